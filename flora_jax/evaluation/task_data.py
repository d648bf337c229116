"""Tasks ready to be asked: test examples, the solved examples shown before them, and the settings
of a result."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Mapping, Sequence, Set
from typing import Any

from flora_jax.data.encode import STYLES
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
from flora_jax.errors import require, require_known
from flora_jax.evaluation import published

PROTOCOLS = ("lm_eval", "llm_adapters")
# Between the examples of a plain few-shot prompt; a generated answer ends at it.
SHOT_BREAK = "\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a result, the same for all of its tasks.

    protocol: of PROTOCOLS; prompt_style: of STYLES; published_faults: score generated answers as
    the published scripts of LLM-Adapters do (`published`); batch_size: rows computed side by side;
    max_length: tokens of prompt and answer together, where a prompt that leaves no room counts as
    wrong and in `too_long`; max_new_tokens: of a generated answer, None for its task's own number,
    and for people's own file as many as its longest answer needs.
    """

    protocol: str = "lm_eval"
    prompt_style: str = "plain"
    published_faults: bool = False
    batch_size: int = 16
    max_length: int = 1024
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class TaskData:
    """One task: its test examples, and the training examples (`shots`) shown before each."""

    task: Task
    examples: Sequence[Example]
    shots: Sequence[Example]
    data_hash: str


def is_generated(task: Task, protocol: str) -> bool:
    """Whether the protocol generates the answers of `task`, rather than score its choices by
    likelihood."""
    return protocol != "lm_eval" or task.metric != "choice"


def load_task_data(
    names: Sequence[str],
    data_dir: str | os.PathLike | None,
    settings: Settings = Settings(),
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    seed: int = 0,
    generator: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> list[TaskData]:
    """The test split of each task (its first `limit` examples) and `num_fewshot` training examples
    drawn by `seed`.

    generator: fields of generated tasks (see `get_task`). Needs no model. Raises UserError for an
    unknown task, protocol or style, missing or malformed data, and counts out of range.
    """
    for field, known in (("protocol", PROTOCOLS), ("prompt_style", STYLES)):
        value = getattr(settings, field)
        require_known(value, known, f"{field}={value!r}")
    require(
        limit is None or limit >= 1,
        f"limit={limit} must be a positive integer (leave it out for all examples)",
    )
    require(num_fewshot >= 0, f"num_fewshot={num_fewshot} must be 0 or a positive integer")
    check_names(names)
    tasks = [get_task(name, generator) for name in names]
    _check_tasks(settings, tasks)
    loaded = []
    for task in tasks:
        whole = load_examples(task, "test", data_dir, cache_dir)
        shots = []
        if num_fewshot:
            # No test example may be shown: a single file serves as both splits, and some published
            # sets overlap.
            pool, _ = dedupe(load_examples(task, "train", data_dir, cache_dir), whole)
            shots = _draw(task, pool, num_fewshot, seed)
        loaded.append(TaskData(task, whole[:limit], shots, data_hash(task, "test", data_dir)))
    return loaded


def _check_tasks(settings: Settings, tasks: list[Task]) -> None:
    """Raises UserError for a task that these settings cannot ask or score."""
    protocol = settings.protocol
    style = settings.prompt_style
    faults = settings.published_faults
    require(
        not faults or (protocol, style) == ("llm_adapters", "llm_adapters"),
        "published_faults are those of protocol and prompt_style 'llm_adapters', "
        f"not of protocol {protocol!r} with prompt_style {style!r}",
    )
    for task in tasks:
        require(
            not faults or task.metric in published.METRICS,
            f"published_faults: LLM-Adapters has no script for {task.name} "
            f"(metric {task.metric!r})",
        )
        require(
            style == "plain" or is_generated(task, protocol),
            f"prompt_style={style!r}: protocol lm_eval scores the choices of {task.name} as "
            "plain text; use prompt_style 'plain' or protocol 'llm_adapters'",
        )


def check_names(names: Sequence[str]) -> None:
    """Raises UserError without any task, and for one that is named twice."""
    require(names, "tasks is empty; name at least one")
    require(len(set(names)) == len(names), f"tasks={','.join(names)} names a task twice")


def _draw(task: Task, pool: Sequence[Example], count: int, seed: int) -> list[Example]:
    require(
        count <= len(pool),
        f"num_fewshot={count}: the train split of {task.name} has {len(pool)} examples "
        "that are not in its test split too",
    )
    return random.Random(seed).sample(pool, count)


def check_seen(
    tasks: Sequence[TaskData],
    trained_on: tuple[Sequence[str], Set[str]] | None,
    allowed: bool = False,
) -> dict[str, float] | None:
    """By task, the share (0 to 1) of its questions that an adapter was trained on.

    trained_on: the names of its training tasks and the digests of their prompts; None without a
    record, and then the result is None. Raises UserError above 1 % unless `allowed`.
    """
    if trained_on is None:
        return None
    names, prompts = trained_on
    shares = {}
    for data in tasks:
        seen = [bool(prompt_digests([example]) & prompts) for example in data.examples]
        share = sum(seen) / len(seen)
        shares[data.task.name] = share
        require(
            share <= CONTAMINATED or allowed,
            f"--tasks {data.task.name}: {100 * share:.1f} % of the questions asked are in what "
            f"the adapter was trained on ({', '.join(names)}); leave it out, or "
            "--allow_contaminated, which records the share",
        )
    return shares


def few_shot_requests(example: Example, shots: Sequence[Example]) -> list[tuple[str, str]]:
    """`lm_eval_request` with solved examples, a blank line apart, before each context."""
    before = ""
    for shot in shots:
        context, continuation = lm_eval_request(shot)[shot.gold]
        before += context + continuation + SHOT_BREAK
    return [(before + context, continuation) for context, continuation in lm_eval_request(example)]


def few_shot_messages(example: Example, shots: Sequence[Example], style: str) -> list[Message]:
    """The conversation to answer, with solved examples before it.

    They are earlier turns in style 'chat', and text before the question in the others. Those have
    room for one answer each: raises UserError for a conversation with several.
    """
    asked = list(example.messages[:-1])
    if style == "chat" or not shots:
        return _as_turns(asked, shots)
    require(
        not (_is_answered(asked) or any(_is_answered(shot.messages[:-1]) for shot in shots)),
        f"prompt_style={style!r} holds one answer, but a conversation has several; use 'chat'",
    )
    parts = [[message.content for message in shot.messages] for shot in shots]
    solved = ["\n\n".join(before) + f" {answer}" for *before, answer in parts]
    question = [message.content for message in asked]
    return [Message("user", SHOT_BREAK.join([*solved, *question]))]


def _as_turns(asked: list[Message], shots: Sequence[Example]) -> list[Message]:
    """The turns of the shots, then those asked. The only system message is the question's own, in
    front."""
    system = [message for message in asked if message.role == "system"]
    turns = [message for shot in shots for message in shot.messages] + asked
    return system + [message for message in turns if message.role != "system"]


def _is_answered(messages: Sequence[Message]) -> bool:
    return any(message.role == "assistant" for message in messages)
