"""Tasks whose answers are generated: their prompts, the answers and the scores."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flora_jax.data.encode import calls_tools, encode_prompt, refuse_tools
from flora_jax.errors import require, told_of
from flora_jax.evaluation import published
from flora_jax.evaluation.answers import is_right
from flora_jax.evaluation.rouge import POLICY, rouge
from flora_jax.evaluation.rounds import FIRST_ROUND, generate_in_rounds
from flora_jax.evaluation.task_data import SHOT_BREAK, Settings, TaskData, few_shot_messages
from flora_jax.inference.generator import Generator
from flora_jax.tokens import Tokenizer

# Further tokens beside the longest answer and its end: a model may need more of them for the same
# text.
_MARGIN = 16

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task's prompts as token ids.

    fits: whether each prompt leaves room for its answer; new_tokens: that room, in tokens.
    """

    prompts: list[list[int]]
    fits: list[bool]
    new_tokens: int

    @property
    def fitting(self) -> list[list[int]]:
        """The prompts that leave room."""
        return [prompt for prompt, fit in zip(self.prompts, self.fits, strict=True) if fit]


def ask(data: TaskData, tokenizer: Tokenizer, settings: Settings, max_length: int) -> Asked:
    """The prompts of a task; max_length: tokens of prompt and answer together.

    Logs how many prompts leave no room, and whether answers are cut. Raises UserError if no prompt
    leaves room, and for examples that cannot be asked or compared as text.
    """
    prompts = _encode(data, tokenizer, settings)
    new_tokens = settings.max_new_tokens or data.task.new_tokens
    asked = Asked(prompts, _fitting(data, prompts, new_tokens, max_length), new_tokens)
    if settings.max_new_tokens is None and data.task.source == "jsonl":
        asked = dataclasses.replace(asked, new_tokens=_room(data, tokenizer, asked, max_length))
    return asked


def _encode(data: TaskData, tokenizer: Tokenizer, settings: Settings) -> list[list[int]]:
    for i, example in enumerate(data.examples):
        require(
            not calls_tools(example.messages[-1]),
            f"{data.task.name}: question {i} is to be answered by a call of a tool, but "
            "answers are compared as texts; leave it out of the test set",
        )
    style = settings.prompt_style
    asked = [few_shot_messages(example, data.shots, style) for example in data.examples]
    with told_of(data.task.name):
        for shot in data.shots:
            refuse_tools(shot.messages, style, shot.tools)
        if settings.published_faults:
            return [published.encode_prompt(messages, tokenizer) for messages in asked]
        return [
            encode_prompt(messages, tokenizer, style, example.tools)
            for messages, example in zip(asked, data.examples, strict=True)
        ]


def _fitting(
    data: TaskData, prompts: Sequence[list[int]], new_tokens: int, max_length: int
) -> list[bool]:
    """Whether each prompt leaves room for `new_tokens`."""
    lengths = [len(prompt) for prompt in prompts]
    fits = [length <= max_length - new_tokens for length in lengths]
    require(
        any(fits),
        f"max_length={max_length} leaves no room for {new_tokens} new tokens after any prompt "
        f"of {data.task.name}; the shortest has {min(lengths)} tokens",
    )
    if not all(fits):
        _log.warning(
            "%s: %d of %d prompts leave no room for %d new tokens in max_length=%d and count as "
            "wrong",
            data.task.name,
            len(fits) - sum(fits),
            len(fits),
            new_tokens,
            max_length,
        )
    return fits


def _room(data: TaskData, tokenizer: Tokenizer, asked: Asked, max_length: int) -> int:
    """New tokens for the longest answer of the data, as far as the longest prompt leaves them."""
    texts = [example.answer for example in data.examples]
    answers = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(map(len, answers))
    left = max_length - max(map(len, asked.fitting))
    new_tokens = max(asked.new_tokens, min(longest + 1 + _MARGIN, left))
    if new_tokens <= longest:  # an answer's end is a token, too
        _log.warning(
            "%s: the longest answer has %d tokens, but max_length=%d leaves %d after the longest "
            "prompt; such answers are cut and count as wrong",
            data.task.name,
            longest,
            max_length,
            left,
        )
    return new_tokens


def score_answers(
    data: TaskData, asked: Asked, generator: Generator, settings: Settings
) -> dict[str, Any]:
    """Generates a task's answers and scores them; the result is JSON-ready.

    Logs how many answers did not end. Raises FloatingPointError, with the task, for logits that are
    not finite.
    """
    stop_text = None
    if data.shots and settings.prompt_style != "chat":
        stop_text = SHOT_BREAK

    def ended(i: int, text: str) -> bool:
        return stop_text is not None and stop_text in text.lstrip()

    prompts = asked.fitting
    if settings.published_faults:
        prompts = published.pad(prompts, data.task.metric, settings.batch_size)
    try:
        generations = generate_in_rounds(generator, prompts, asked.new_tokens, ended)
    except FloatingPointError as error:
        raise FloatingPointError(f"{data.task.name}: {error}") from None
    count = len(generations)
    cut = [not one.finished and not ended(i, one.text) for i, one in enumerate(generations)]
    unfinished = sum(cut) / count
    if unfinished:
        _log.warning(
            "%s: %.1f %% of the answers did not end within %d new tokens; max_new_tokens gives "
            "them more",
            data.task.name,
            100 * unfinished,
            asked.new_tokens,
        )
    texts: list[str | None] = [None] * len(asked.fits)
    for i, one in zip(np.flatnonzero(asked.fits), generations, strict=True):
        texts[i] = _before(one.text, stop_text)
    return {
        **_scores(data, texts, settings.published_faults),
        "texts": texts,
        "decode": {
            "temperature": 0.0,
            "max_new_tokens": asked.new_tokens,
            "first_round": FIRST_ROUND,
            "stop_text": stop_text,
        },
        "finished": sum(one.finished for one in generations) / count,
        "unfinished": unfinished,
        "too_long": len(asked.prompts) - len(prompts),
        "prompt": generator.tokenizer.decode(asked.prompts[0]),
    }


def _before(text: str, stop_text: str | None) -> str:
    """The part of a text before its first stop text; the whole text without one."""
    if stop_text is None:
        return text
    return text.lstrip().split(stop_text)[0]


def _scores(data: TaskData, texts: Sequence[str | None], published_faults: bool) -> dict[str, Any]:
    """Scores of generated texts; None, where a prompt left no room, counts as an empty answer."""
    metric = data.task.metric
    if metric == "rouge":
        references = [example.references for example in data.examples]
        return {**rouge([text or "" for text in texts], references), "scoring": f"ROUGE: {POLICY}"}
    judge = is_right
    scoring = f"generated text, final answer by metric {metric!r}"
    if published_faults:
        judge = published.is_right
        scoring += " of the published scripts"
    right = [
        text is not None and judge(metric, text, example.answer, example.labels)
        for text, example in zip(texts, data.examples, strict=True)
    ]
    return {
        **accuracy("accuracy", "stderr", right),
        "items": [int(one) for one in right],
        "scoring": scoring,
    }


def accuracy(name: str, error_name: str, right: Sequence[bool]) -> dict[str, float]:
    """The share p that is right and its standard error sqrt(p (1 − p) / n), under these names."""
    p = sum(right) / len(right)
    return {name: p, error_name: math.sqrt(p * (1 - p) / len(right))}
