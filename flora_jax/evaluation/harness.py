"""EleutherAI's lm-evaluation-harness on our models: `evaluate_harness` runs it on a `HarnessLM`.

Needs the extra `lm-eval`. Tokenisation follows the harness. `encode_pair` differs from it for two
inputs; here

    1. after an empty context, a continuation that starts with the prefix token gets no second one,
       and that token is not scored (`encode_pair` puts it in front and scores both)
    2. a context of spaces alone, with a tokenizer that adds no bos, has no tokens: the prefix token
       replaces it, as in `encode_pair` (the harness's own Hugging Face model fails)

Unlike the harness's own Hugging Face model, this one leaves out the eos that some tokenizers put
behind every text, and with an adapter it keeps embeddings beyond the tokenizer's ids among the
candidates. A pair that is too long is cut from the left with a warning, as in the harness;
`choice_loglik` refuses it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
    make_table,
)

from flora_jax.device import versions
from flora_jax.errors import UserError, in_a_line, near_misses, require
from flora_jax.evaluation.loglik import token_loglik
from flora_jax.evaluation.rounds import generate_in_rounds
from flora_jax.evaluation.task_data import check_names
from flora_jax.inference.decoding import bucket
from flora_jax.inference.generator import Generator
from flora_jax.inference.sampling import Sampling
from flora_jax.models.adapted import Adapted
from flora_jax.tokens import encode_open, render

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

SCHEMA_VERSION = 1
_PACKAGES = (
    "flora_jax",
    "lm_eval",
    "datasets",
    "jax",
    "flax",
    "transformers",
    "tokenizers",
    "numpy",
)

# Arguments of transformers' `generate` that some tasks set to the only value known here.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
# Fields of the harness's results about torch and the working directory, which have no part in the
# scores.
_LEFT_OUT = ("pretty_env_info", "upper_git_hash", "git_hash")

_log = logging.getLogger(__name__)


class HarnessLM(TemplateLM):
    """A model as the harness's language model: one process, right-padded batches.

    max_length: tokens that the model reads at once, by default max_position_embeddings; longer
    input is cut from the left with a warning. seed: of sampled generations. chat: whether prompts
    are conversations, from the first that is rendered on. Arithmetic is in the base's dtype. Raises
    UserError for sizes out of range and a tokenizer without a bos or eos token.
    """

    def __init__(
        self,
        adapted: Adapted,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        limit = adapted.config.max_position_embeddings
        require(batch_size >= 1, f"batch_size={batch_size} must be a positive integer")
        require(
            max_length is None or 2 <= max_length <= limit,
            f"max_length={max_length} must be from 2 to the model's "
            f"max_position_embeddings={limit}",
        )
        self.adapted = adapted
        self.tokenizer = adapted.tokenizer
        require(
            self.tokenizer.bos_token_id is not None or self.tokenizer.eos_token_id is not None,
            "the harness needs a tokenizer with a bos or eos token to start an empty context from",
        )
        self.batch_size = batch_size
        self.seed = seed
        self.max_length = max_length or limit
        self.max_gen_toks = 256  # the harness's default, for tasks that set none
        self._generator: Generator | None = None
        self.chat = False

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context: bos, or eos where there is no bos."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return self.eot_token_id
        return bos

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name or a digest, by which the harness tells cached chat prompts
        apart."""
        if self.tokenizer.name_or_path:
            return self.tokenizer.name_or_path.replace("/", "__")
        core = self.tokenizer.backend_tokenizer.to_str() + str(self.tokenizer.chat_template)
        return "sha256-" + hashlib.sha256(core.encode()).hexdigest()[:16]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as a prompt.

        Raises UserError without a template, or if the template refuses the conversation.
        """
        require(
            self.tokenizer.chat_template is not None,
            "apply_chat_template: the tokenizer has no chat template",
        )
        self.chat = True  # the harness uses the template for all prompts or for none
        return render(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer adds.

        A text that begins with bos gets no second one. A chat has the special tokens of its
        template alone, as in training.
        """
        special = add_special_tokens is not False and not self.chat
        return encode_open(self.tokenizer, string, special)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """`(summed log-likelihood, is_greedy)` of each request's continuation after its context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each request's whole text after the prefix token, in the harness's
        windows of max_length tokens."""
        owners = []
        windows = []
        prefix = self.prefix_token_id
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, prefix, self.max_length, context_len=1):
                owners.append(i)
                windows.append([make_disjoint_window(pair)])
        out = [0.0] * len(requests)
        for i, [(score, _)] in zip(owners, self._score(windows), strict=True):
            out[i] += score
        return out

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each request's context, up to its first stop string.

        Generation arguments: `until`, `max_gen_toks` (and the harness's other names for it),
        `do_sample`, `temperature`, `top_k` and `top_p`. Without `do_sample` or a temperature
        the best token is taken. Unlike in transformers, sampling without a top_k considers all
        tokens. A context that is too long is cut from the left. Raises UserError for any other
        argument, and where max_gen_toks leaves no room for a context.
        """
        settings = [self._settings(request.args[1]) for request in requests]
        prompts = [
            self._prompt(request.args[0], new_tokens)
            for request, (_, new_tokens, _) in zip(requests, settings, strict=True)
        ]
        out = [""] * len(requests)
        alike: dict[tuple[int, Sampling], list[int]] = {}
        for i, (_, *setting) in enumerate(settings):
            alike.setdefault(tuple(setting), []).append(i)
        for (new_tokens, sampling), group in alike.items():
            asked = [(prompts[i], settings[i][0]) for i in group]
            for i, text in zip(group, self._continue(asked, new_tokens, sampling), strict=True):
                out[i] = text
        return out

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        """The last tokens of a context, as many as leave room for `new_tokens`."""
        room = self.max_length - new_tokens
        require(
            room >= 1,
            f"max_gen_toks={new_tokens} leaves max_length={self.max_length} no room for a prompt",
        )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        if len(prompt) > room:
            _log.warning("a prompt of %d tokens is cut to its last %d", len(prompt), room)
        return prompt[-room:]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        return before or [self.prefix_token_id], after

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        questions: list[list[tuple[list[int], list[int]]]] = []
        read = 0  # tokens of the last question's row
        for (_, text), context, continuation in requests:
            require(
                1 <= len(continuation) <= self.max_length,
                f"continuation {text[:60]!r} has {len(continuation)} tokens; 1 to "
                f"max_length={self.max_length} can be scored",
            )
            # The last token is not read, so one more than max_length fits.
            room = self.max_length + 1 - len(continuation)
            if len(context) > room:
                _log.warning("a context of %d tokens is cut to its last %d", len(context), room)
            context = context[-room:]
            # The choices of a question come one after another, and in one row their context is
            # computed once. For a context of one token the rows would only become longer.
            same = bool(questions) and len(context) > 1 and questions[-1][0][0] == context
            if same and read + len(continuation) - 1 <= self.max_length:
                questions[-1].append((context, continuation))
                read += len(continuation) - 1
            else:
                questions.append([(context, continuation)])
                read = len(context) + len(continuation) - 1
        return [score for question in self._score(questions) for score in question]

    def _score(
        self, questions: list[list[tuple[list[int], list[int]]]]
    ) -> list[list[tuple[float, bool]]]:
        def describe(i: int) -> str:
            context, continuation = questions[i][0]
            return f"harness request {self.tokenizer.decode([*context, *continuation])[-60:]!r}"

        return token_loglik(self.adapted, questions, self.batch_size, describe)

    def _settings(self, arguments: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
        """Stop strings, number of new tokens and decode settings, from a request's generation
        arguments."""
        given = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        eos = None
        if self.eot_token_id is not None:
            eos = self.tokenizer.decode(self.eot_token_id)
        until = [stop for stop in handle_stop_sequences(given.pop("until"), eos) if stop]
        new_tokens = given.pop("max_gen_toks")
        do_sample = given.pop("do_sample")
        temperature = given.pop("temperature", 0.0)
        top_k = given.pop("top_k", 0)
        top_p = given.pop("top_p", 1.0)
        for name, value in given.items():
            require(
                name in _NEUTRAL and value == _NEUTRAL[name],
                f"generation argument {name}={value!r} is not supported; until, max_gen_toks, "
                "do_sample, temperature, top_k and top_p are",
            )
        require(new_tokens >= 1, f"max_gen_toks={new_tokens} must be a positive integer")
        if not do_sample:
            return until, new_tokens, Sampling()
        require(temperature, "do_sample=True needs a temperature above 0")
        return until, new_tokens, Sampling(float(temperature), top_k, top_p)

    def _continue(
        self, asked: Sequence[tuple[list[int], list[str]]], new_tokens: int, sampling: Sampling
    ) -> list[str]:
        """The text after each prompt of `asked`, pairs of token ids and stop strings, up to the
        first stop string."""
        prompts = [prompt for prompt, _ in asked]
        generator = self._generator_for(max(map(len, prompts)) + new_tokens)

        def ended(i: int, text: str) -> bool:
            return any(stop in text for stop in asked[i][1])

        if sampling.temperature == 0:
            generations = generate_in_rounds(generator, prompts, new_tokens, ended)
        else:
            # A draw depends on a row's place and step, so rounds would change it.
            generations = generator.generate(prompts, new_tokens, sampling, self.seed)
        return [
            _before(generation.text, stops)
            for generation, (_, stops) in zip(generations, asked, strict=True)
        ]

    def _generator_for(self, length: int) -> Generator:
        """A generator for rows of `length` tokens; the last one where it is long enough."""
        if self._generator is None or self._generator.max_length < length:
            # Frees the old generator's copy of the weights before the new one is made.
            self._generator = None
            room = min(bucket(length), self.max_length)
            self._generator = Generator.of(self.adapted, room, self.batch_size)
        return self._generator


def _before(text: str, stops: Sequence[str]) -> str:
    """The part of a text before the first of the stop strings."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def load_harness_tasks(
    names: Sequence[str], include_path: str | os.PathLike | None = None
) -> list[Task | Group]:
    """The harness's tasks, groups and tags of these names, with their data.

    include_path: a folder of task files, which override the harness's own. Needs no model. Raises
    UserError for an unknown or repeated name, a group beside one of its tasks, a folder that is
    absent, data that cannot be loaded, and tasks that run generated code or need images.
    """
    check_names(names)
    if include_path is not None:
        include_path = os.fspath(include_path)
        require(
            os.path.isdir(include_path), f"include_path={include_path}: there is no such folder"
        )
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index:
            hint = near_misses(name, manager.all_tasks)
            if len(hint) >= 500:  # nothing is near, and the harness has thousands of names
                hint = "`lm-eval ls tasks` lists all"
            raise UserError(f"harness task {name!r} is unknown; {hint}")
    out: list[Task | Group] = []
    grouped: set[str] = set()
    loaded_by: dict[str, str] = {}  # which of `names` a task came with
    for name in names:
        loaded = _load(manager, name)
        groups = loaded.get("groups", {})
        for one in loaded["tasks"].values():
            other = loaded_by.setdefault(one.task_name, name)
            require(
                other == name or (name not in groups and other not in grouped),
                f"harness task {one.task_name!r} comes with {other!r} and with {name!r}; leave "
                "one out",
            )
        if name in groups:
            grouped.add(name)
            out.append(groups[name])
        else:
            out += loaded["tasks"].values()
    return out


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    """The `tasks` that the harness has by a name, and its `groups` if it has any."""
    from datasets.exceptions import DatasetsError

    try:
        loaded = manager.load(name)
    except (OSError, DatasetsError) as error:
        raise UserError(f"harness task {name!r}: its data cannot be loaded ({error})") from error
    except Exception as error:  # a task file is a program and may fail in any way
        why = f"{type(error).__name__}: {in_a_line(error)}"
        raise UserError(f"harness task {name!r} does not fit its data ({why})") from error
    for task in loaded["tasks"].values():
        for flag, what in (("UNSAFE_CODE", "runs generated code"), ("MULTIMODAL", "shows images")):
            require(
                not getattr(task, flag, False),
                f"harness task {task.task_name!r} {what}, which is not supported here",
            )
    return loaded


def evaluate_harness(
    lm: HarnessLM,
    tasks: Sequence[Task | Group],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs the harness and returns the result as a JSON-ready dict.

    `about` goes in as it is, with the settings and versions; `lm_eval` has the harness's own
    results. num_fewshot: None leaves each task its own number, and the harness keeps a 0 that a
    task sets; limit: the first N documents of each task. Raises UserError for either out of range.
    """
    require(
        num_fewshot is None or num_fewshot >= 0,
        f"num_fewshot={num_fewshot} must be 0 or a positive integer",
    )
    require(
        limit is None or limit >= 1,
        f"limit={limit} must be a positive integer (leave it out for all documents)",
    )
    packages = versions(*_PACKAGES)
    lm.chat = False  # as an evaluation before this one may have left it
    asked = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "batch_size": lm.batch_size,
    }
    results = simple_evaluate(lm, tasks=list(tasks), log_samples=False, **asked)
    results = {name: value for name, value in results.items() if name not in _LEFT_OUT}
    adapter_config = lm.adapted.adapter_config
    return {
        "schema_version": SCHEMA_VERSION,
        **(about or {}),
        "adapter_config": adapter_config and dataclasses.asdict(adapter_config),
        **asked,
        "max_length": lm.max_length,
        "dtype": lm.adapted.dtype,
        "device": jax.devices()[0].device_kind,
        "versions": packages,
        "lm_eval": json.loads(json.dumps(results, default=handle_non_serializable)),
    }


def table(result: Mapping[str, Any]) -> str:
    """The harness's table of a result of `evaluate_harness`, and its table of groups if it has
    any."""
    results = result["lm_eval"]
    return "\n".join(
        make_table(results, column) for column in ("results", "groups") if results.get(column)
    )
