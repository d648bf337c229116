"""Evaluates a model on tasks and writes the result: scores, and everything needed to get them again.

Two protocols. `lm_eval`: choice tasks by the log-likelihood of the choices, as the lm-eval harness; the others by
generating and matching the final answer. `llm_adapters`: the instruction prompt that adapters are trained on, a
generated answer, and the label word, number or letter in it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import math
import os
import platform
import random
import time
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flora_jax.adapters import AdapterConfig
from flora_jax.data.encode import STYLES, calls_tools, encode_prompt, refuse_tools
from flora_jax.data.sources import data_hash, load_examples
from flora_jax.data.tasks import (
    CONTAMINATED,
    Example,
    Message,
    Task,
    dedupe,
    get_task,
    lm_eval_request,
    prompt_digests,
)
from flora_jax.device import check_jax
from flora_jax.errors import UserError, near_misses
from flora_jax.evaluation import published
from flora_jax.evaluation.answers import is_right
from flora_jax.evaluation.loglik import Pairs, encode_pairs, token_loglik
from flora_jax.evaluation.rouge import KINDS, POLICY, rouge
from flora_jax.evaluation.rounds import FIRST_ROUND, generate_in_rounds
from flora_jax.inference.generator import Generator, check_sizes
from flora_jax.models.config import LlamaConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tree = dict[str, Any]

SCHEMA_VERSION = 1
PROTOCOLS = ("lm_eval", "llm_adapters")

# tokens beside the longest answer and its end: it may be said in more of them than it is written in
_MARGIN = 16
# between the examples of a plain few-shot prompt; a generated answer ends at it
_SHOT_BREAK = "\n\n"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """One task, ready to be asked: its test examples, and examples of its training split shown before each."""

    task: Task
    examples: Sequence[Example]
    shots: Sequence[Example]
    data_hash: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task's prompts as token ids, whether each leaves room for its answer, and that room in tokens."""

    prompts: list[list[int]]
    fits: list[bool]
    new_tokens: int


def is_generated(task: Task, protocol: str) -> bool:
    """Whether the protocol has the answers of `task` generated; it scores given choices by likelihood otherwise."""
    return protocol != "lm_eval" or task.metric != "choice"


def load_task_data(
    names: Sequence[str],
    data_dir: str | os.PathLike | None,
    *,
    protocol: str = "lm_eval",
    prompt_style: str = "plain",
    published_faults: bool = False,
    limit: int | None = None,
    num_fewshot: int = 0,
    seed: int = 0,
    generator: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> list[TaskData]:
    """The test split of each task (its first `limit` examples) and `num_fewshot` training examples drawn by `seed`.

    `generator` overrides fields of generated tasks (see `get_task`). Needs no model, so bad input is a UserError
    before one is loaded: unknown task, protocol or style, missing or malformed data, counts out of range.
    """
    for field, value, known in (
        ("protocol", protocol, PROTOCOLS),
        ("prompt_style", prompt_style, STYLES),
    ):
        if value not in known:
            raise UserError(f"{field}={value!r} is unknown; {near_misses(value, known)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be a positive integer (leave it out for all examples)")
    if num_fewshot < 0:
        raise UserError(f"num_fewshot={num_fewshot} must be 0 or a positive integer")
    if not names:
        raise UserError("tasks is empty; name at least one")
    if len(set(names)) < len(names):
        raise UserError(f"tasks={','.join(names)} names a task twice")
    tasks = [get_task(name, generator) for name in names]
    if published_faults and (protocol, prompt_style) != ("llm_adapters", "llm_adapters"):
        raise UserError(
            f"published_faults are those of protocol and prompt_style 'llm_adapters', "
            f"not of protocol {protocol!r} with prompt_style {prompt_style!r}"
        )
    for task in tasks:
        if published_faults and task.metric not in published.METRICS:
            raise UserError(
                f"published_faults: LLM-Adapters has no script for {task.name} (metric {task.metric!r})"
            )
        if prompt_style != "plain" and not is_generated(task, protocol):
            raise UserError(
                f"prompt_style={prompt_style!r}: protocol lm_eval scores the choices of {task.name} as plain text; "
                "use prompt_style 'plain' or protocol 'llm_adapters'"
            )
    out = []
    for task in tasks:
        examples = load_examples(task, "test", data_dir, cache_dir)[:limit]
        shots: list[Example] = []
        if num_fewshot:
            # Nothing that is asked may be shown: a single file is both splits, and some published sets overlap.
            whole = load_examples(task, "test", data_dir, cache_dir)
            pool, _ = dedupe(load_examples(task, "train", data_dir, cache_dir), whole)
            if num_fewshot > len(pool):
                raise UserError(
                    f"num_fewshot={num_fewshot}: the train split of {task.name} has {len(pool)} examples "
                    "that are not in its test split too"
                )
            shots = random.Random(seed).sample(pool, num_fewshot)
        out.append(TaskData(task, examples, shots, data_hash(task, "test", data_dir)))
    return out


def check_seen(
    tasks: Sequence[TaskData],
    trained_on: tuple[Sequence[str], Set[str]] | None,
    allowed: bool = False,
) -> dict[str, float] | None:
    """By task, the share of its questions that an adapter was trained on: `trained_on`, the names of its tasks and its
    prompts' digests, or None where nothing is on record. Raises UserError above 1 % unless `allowed`."""
    if trained_on is None:
        return None
    names, prompts = trained_on
    shares = {}
    for data in tasks:
        seen = [bool(prompt_digests([example]) & prompts) for example in data.examples]
        shares[data.task.name] = share = sum(seen) / len(seen)
        if share > CONTAMINATED and not allowed:
            raise UserError(
                f"--tasks {data.task.name}: {100 * share:.1f} % of the questions asked are in what the "
                f"adapter was trained on ({', '.join(names)}); leave it out, or --allow_contaminated, "
                "which records the share"
            )
    return shares


def evaluate_tasks(
    tasks: Sequence[TaskData],
    config: LlamaConfig,
    base: Tree,
    tokenizer: PreTrainedTokenizerFast,
    *,
    adapter: Tree | None = None,
    adapter_config: AdapterConfig | None = None,
    protocol: str = "lm_eval",
    prompt_style: str = "plain",
    published_faults: bool = False,
    batch_size: int = 16,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result as a JSON-ready dict: what ran (`about`, e.g. model and adapter, goes in as it is), versions, and by
    task `accuracy` and `stderr` (sqrt(p (1 − p) / n)), `accuracy_norm` and `stderr_norm` where choices are scored, or
    `rouge1`, `rouge2`, `rougeL`, `rougeLsum` (rouge.py says which mean) where texts are, `items` (1 or 0 by
    question, in order; the rougeL of texts), `texts` (what was generated for each, None where the prompt was too long),
    `finished` (the share that ended at a token) and `unfinished` (that ended neither there nor at a stop text), `n`,
    `scoring`, `decode` settings, `data_hash`, one whole `prompt` as an example, and `seconds`.

    published_faults: score generated answers as the published scripts of LLM-Adapters do (`published`).
    base, adapter: trees as `Llama` takes them; arithmetic in the base's dtype. max_length: prompt and new tokens of
    generated answers; a prompt that leaves no room counts as wrong and in `too_long`. max_new_tokens: of a generated
    answer, in place of its task's own number; a JSONL file has room for its longest answer, as far as max_length leaves
    it. Raises UserError if none fits, for choices beyond max_position_embeddings, and for sizes that no Generator of
    this base can have; FloatingPointError for scores and tokens of values that are not finite.
    """
    check_jax()
    # A task whose prompts leave no room, or whose choices are too long, is refused before another one is scored.
    asked = check_prompts(
        tasks,
        config,
        tokenizer,
        protocol,
        prompt_style,
        published_faults,
        max_length,
        max_new_tokens,
    )
    if any(is_generated(data.task, protocol) for data in tasks):
        check_sizes(config, base, max_length, batch_size)
    results: dict[str, Any] = {}
    versions, generator = _versions(), None
    for data in tasks:
        start = time.perf_counter()
        if is_generated(data.task, protocol):
            if generator is None:
                adapters = {"adapter": adapter} if adapter is not None else None
                generator = Generator(
                    config, base, adapters, adapter_config, tokenizer, max_length, batch_size
                )
            result = _generate_answers(
                data, asked[data.task.name], generator, prompt_style, published_faults, batch_size
            )
        else:
            result = _score_choices(
                data, asked[data.task.name], config, base, adapter, adapter_config, batch_size
            )
        results[data.task.name] = {
            **result,
            "n": len(data.examples),
            "num_fewshot": len(data.shots),
            "data_hash": data.data_hash,
            "seconds": round(time.perf_counter() - start, 3),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        **(about or {}),
        "adapter_config": None if adapter_config is None else dataclasses.asdict(adapter_config),
        "protocol": protocol,
        "prompt_style": prompt_style,
        "published_faults": published_faults,
        "split": "test",
        "batch_size": batch_size,
        "max_length": max_length,
        "dtype": str(base["embed_tokens"]["embedding"].dtype),
        "mask": "none over the padding of choice tasks, as published"
        if published_faults
        else "explicit; padding is never attended to and never scored",
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "tasks": results,
    }


def check_prompts(
    tasks: Sequence[TaskData],
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    protocol: str,
    prompt_style: str,
    published_faults: bool,
    max_length: int,
    max_new_tokens: int | None = None,
) -> dict[str, Asked | Pairs]:
    """What is asked, by task: prompts, or the token ids of choices. Raises UserError where `evaluate_tasks` would, for
    prompts that the style cannot express or that leave no room, and choices that are too long: before a model is
    trained to be scored on them. A line says how many prompts leave no room, and where answers may be cut."""
    asked = {}
    for data in tasks:
        if is_generated(data.task, protocol):
            room = min(max_length, config.max_position_embeddings)
            asked[data.task.name] = _prompts(
                data, tokenizer, prompt_style, published_faults, room, max_new_tokens
            )
        else:
            asked[data.task.name] = _choices(data, config, tokenizer)
    return asked


def describe(scores: Mapping[str, Any]) -> str:
    """A task's scores in one line."""
    if "rougeL" in scores:
        return "  ".join(
            f"{kind} {scores[kind]:.4f} ± {scores[f'{kind}_stderr']:.4f}" for kind in KINDS
        )
    norm = f"  norm {scores['accuracy_norm']:.4f}" if "accuracy_norm" in scores else ""
    return f"{scores['accuracy']:.4f} ± {scores['stderr']:.4f}{norm}"


def few_shot_requests(example: Example, shots: Sequence[Example]) -> list[tuple[str, str]]:
    """`lm_eval_request` with solved examples, a blank line apart, before each context."""
    solved = []
    for shot in shots:
        context, continuation = lm_eval_request(shot)[shot.gold]
        solved.append(context + continuation + _SHOT_BREAK)
    return [
        ("".join(solved) + context, continuation)
        for context, continuation in lm_eval_request(example)
    ]


def few_shot_messages(example: Example, shots: Sequence[Example], style: str) -> list[Message]:
    """The conversation to answer: solved examples are earlier turns ('chat') or text before the question (others, which
    have room for one answer each: UserError for a conversation with several)."""
    asked = list(example.messages[:-1])
    if style == "chat" or not shots:
        # the question's own, once and in front
        system = [message for message in asked if message.role == "system"]
        turns = [
            message for shot in (*(shot.messages for shot in shots), asked) for message in shot
        ]
        return system + [message for message in turns if message.role != "system"]
    if any(
        message.role == "assistant"
        for turns in (asked, *(s.messages[:-1] for s in shots))
        for message in turns
    ):
        raise UserError(
            f"prompt_style={style!r} holds one answer, but a conversation has several; use 'chat'"
        )
    solved = [
        "\n\n".join(m.content for m in shot.messages[:-1]) + " " + shot.messages[-1].content
        for shot in shots
    ]
    return [Message("user", _SHOT_BREAK.join([*solved, *(m.content for m in asked)]))]


def _score_choices(
    data: TaskData,
    pairs: Pairs,
    config: LlamaConfig,
    base: Tree,
    adapter: Tree | None,
    adapter_config: AdapterConfig | None,
    batch_size: int,
) -> dict[str, Any]:
    def describe(i):
        return f"{data.task.name}: question {i}"

    scores = token_loglik(config, base, adapter, adapter_config, pairs, batch_size, describe)
    right, right_norm = [], []
    for example, found in zip(data.examples, scores, strict=True):
        loglik = [value for value, _ in found]
        characters = [len(choice) for choice in example.choices]
        right.append(int(np.argmax(loglik)) == example.gold)
        right_norm.append(int(np.argmax(np.divide(loglik, characters))) == example.gold)
    return {
        **_accuracy("accuracy", "stderr", right),
        **_accuracy("accuracy_norm", "stderr_norm", right_norm),
        "items": [int(one) for one in right],
        "scoring": "log-likelihood of each choice; accuracy_norm divides by its characters",
        "decode": None,
        "prompt": "".join(few_shot_requests(data.examples[0], data.shots)[0]),
    }


def _choices(data: TaskData, config: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> Pairs:
    """The token ids of each question's choices, `(context, continuation)`. Raises UserError for one that is too long
    or has none."""
    try:
        return encode_pairs(
            config, tokenizer, [few_shot_requests(example, data.shots) for example in data.examples]
        )
    except UserError as error:
        raise UserError(f"{data.task.name}: {error}") from None


def _prompts(
    data: TaskData,
    tokenizer: PreTrainedTokenizerFast,
    style: str,
    published_faults: bool,
    max_length: int,
    max_new_tokens: int | None,
) -> Asked:
    """Raises UserError where no prompt leaves room for its answer."""
    for i, example in enumerate(data.examples):
        if calls_tools(example.messages[-1]):
            raise UserError(
                f"{data.task.name}: question {i} is to be answered by a call of a tool, but answers are "
                "compared as texts; leave it out of the test set"
            )
    asked = [few_shot_messages(example, data.shots, style) for example in data.examples]
    try:
        for example in data.shots:
            refuse_tools(example.messages, style, example.tools)
        if published_faults:
            prompts = [published.encode_prompt(messages, tokenizer) for messages in asked]
        else:
            prompts = [
                encode_prompt(messages, tokenizer, style, example.tools)
                for messages, example in zip(asked, data.examples, strict=True)
            ]
    except UserError as error:
        raise UserError(f"{data.task.name}: {error}") from None
    name, new_tokens = data.task.name, max_new_tokens or data.task.new_tokens
    lengths = [len(prompt) for prompt in prompts]
    fits = [length <= max_length - new_tokens for length in lengths]
    if not any(fits):
        raise UserError(
            f"max_length={max_length} leaves no room for {new_tokens} new tokens after any prompt of {name}; the "
            f"shortest has {min(lengths)} tokens"
        )
    if not all(fits):
        _log.warning(
            "%s: %d of %d prompts leave no room for %d new tokens in max_length=%d and count as wrong",
            name,
            len(fits) - sum(fits),
            len(fits),
            new_tokens,
            max_length,
        )
    if max_new_tokens is None and data.task.source == "jsonl":
        answers = tokenizer(
            [example.answer for example in data.examples], add_special_tokens=False, verbose=False
        )
        longest = max(map(len, answers["input_ids"]))
        left = max_length - max(length for length, fit in zip(lengths, fits, strict=True) if fit)
        new_tokens = max(new_tokens, min(longest + 1 + _MARGIN, left))
        if new_tokens <= longest:  # its end is a token, too
            _log.warning(
                "%s: the longest answer has %d tokens, but max_length=%d leaves %d after the longest prompt; "
                "such answers are cut and count as wrong",
                name,
                longest,
                max_length,
                left,
            )
    return Asked(prompts, fits, new_tokens)


def _generate_answers(
    data: TaskData,
    asked: Asked,
    generator: Generator,
    style: str,
    published_faults: bool,
    batch_size: int,
) -> dict[str, Any]:
    metric, new_tokens, tokenizer = data.task.metric, asked.new_tokens, generator.tokenizer
    judge = published.is_right if published_faults else is_right
    prompts = [prompt for prompt, fit in zip(asked.prompts, asked.fits, strict=True) if fit]
    if published_faults:
        prompts = published.pad(prompts, metric, batch_size)
    stop_text = _SHOT_BREAK if data.shots and style != "chat" else None

    def ended(i, text):
        return stop_text is not None and stop_text in text.lstrip()

    try:
        generations = generate_in_rounds(generator, prompts, new_tokens, ended)
    except FloatingPointError as error:
        raise FloatingPointError(f"{data.task.name}: {error}") from None
    unfinished = sum(
        not g.finished and not ended(i, g.text) for i, g in enumerate(generations)
    ) / len(generations)
    if unfinished:
        _log.warning(
            "%s: %.1f %% of the answers did not end within %d new tokens; max_new_tokens gives them more",
            data.task.name,
            100 * unfinished,
            new_tokens,
        )
    said = iter([g.text.lstrip().split(stop_text)[0] if stop_text else g.text for g in generations])
    texts = [next(said) if fit else None for fit in asked.fits]
    if metric == "rouge":  # a prompt that leaves no room is answered with nothing
        references = [example.references for example in data.examples]
        scores = {
            **rouge([text or "" for text in texts], references),
            "scoring": f"ROUGE: {POLICY}",
        }
    else:
        right = [
            text is not None and judge(metric, text, example.answer, example.labels)
            for text, example in zip(texts, data.examples, strict=True)
        ]
        scores = {
            **_accuracy("accuracy", "stderr", right),
            "items": [int(one) for one in right],
            "scoring": f"generated text, final answer by metric {metric!r}"
            + " of the published scripts" * published_faults,
        }
    return {
        **scores,
        "texts": texts,
        "decode": {
            "temperature": 0.0,
            "max_new_tokens": new_tokens,
            "first_round": FIRST_ROUND,
            "stop_text": stop_text,
        },
        "finished": sum(g.finished for g in generations) / len(generations),
        "unfinished": unfinished,
        "too_long": len(asked.prompts) - len(prompts),
        "prompt": tokenizer.decode(asked.prompts[0]),
    }


def _accuracy(name: str, error_name: str, right: Sequence[bool]) -> dict[str, float]:
    p = sum(right) / len(right)
    return {name: p, error_name: math.sqrt(p * (1 - p) / len(right))}


def _versions() -> dict[str, str]:
    packages = ("flora_jax", "jax", "flax", "transformers", "tokenizers", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
