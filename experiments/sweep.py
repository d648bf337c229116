"""A sweep: arms that are trained, scored and recorded one after another, each once.

An experiment defines what an arm's run is called, how an earlier result is recognised, and how a
new one is made; what all sweeps share is here. The same command resumes a sweep that was stopped:
recorded results are read, a run that was begun resumes from its checkpoint, and one that its
workdir holds finished is only scored.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from flora_jax.analysis.results import about_run
from flora_jax.errors import UserError, near_misses, split_names
from flora_jax.evaluation.loglik import choice_loglik, encode_pair
from flora_jax.evaluation.task_data import TaskData
from flora_jax.files import read_json, write_json
from flora_jax.train import run
from flora_jax.training.replicas import train_replicas

SCHEMA_VERSION = 1

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(abc.ABC):
    """One run of a sweep. name: of its folder below --workdir; path: of its result, None if the
    experiment writes that itself."""

    name: str
    path: Path | None
    args: Namespace

    @abc.abstractmethod
    def find(self) -> Result | None:
        """The result of an earlier call, or None. Raises UserError if its settings were others."""

    @abc.abstractmethod
    def make(self, workdir: Path) -> Result:
        """Trains (or resumes) and scores. Returns the result without minutes and provenance."""


def outcomes(arms: Iterable[Arm]) -> Iterator[tuple[Arm, Result]]:
    """Yields each arm with its result, found or made. The next arm is taken only when this one is
    recorded; an error ends the sweep."""
    for arm in arms:
        result = arm.find()
        yield arm, _made(arm) if result is None else result


def _made(arm: Arm) -> Result:
    start = time.perf_counter()
    result = arm.make(arm.args.workdir / arm.name)
    minutes = (time.perf_counter() - start) / 60
    result |= {"minutes": minutes, "provenance": about_run(arm.args)}
    if arm.path is not None:
        write_json(arm.path, result)
    jax.clear_caches()
    return result


def say_found(path: Path) -> None:
    """Says that a stored result is used."""
    print(f"{path} is there and is not run again; another --out runs it anew", file=sys.stderr)


def read_result(path: Path) -> Result:
    """A run's stored result. Raises UserError for another file."""
    result = read_json(path)
    if not isinstance(result.get("asked"), dict):
        raise UserError(f"{path} is not the result of a run; move it away, or name another --out")
    return result


# -------------------------------------------------------------------------- training, scoring


def train(setup: Any, workdir: Path) -> tuple[Result, Result | None]:
    """Trains a configuration (or resumes it). Returns what a result says of the training, and the
    scores that the configuration asks for."""
    summary = run(setup, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": setup.train.seed,
        "step": summary["step"],
        "validation_losses": summary["validation_losses"],
        "data": summary["data"],
        "loss_curve": {str(line["step"]): line["loss"] for line in lines if "loss" in line},
        "config": placeless(setup),
    }, summary.get("evaluation")


def train_together(
    runs: Sequence[tuple[Any, Path]], replicas: int
) -> dict[int, FloatingPointError]:
    """Trains configurations in their workdirs, up to `replicas` together over one base.

    Returns the errors of those whose loss was not finite, by place. One that would be alone
    is left to `run`, which has nothing to train for the others.
    """
    diverged = {}
    for start in range(0, len(runs), replicas):
        group = runs[start : start + replicas]
        if len(group) > 1:
            found = train_replicas(*zip(*group, strict=True))
            diverged |= {start + place: error for place, error in found.items()}
            jax.clear_caches()
    return diverged


def placeless(setup: Any) -> dict[str, Any]:
    """A configuration as results record it: the data's place is DIR."""
    return {**setup.to_dict(), "data": {**setup.data.to_dict(), "dir": "DIR"}}


def last_loss(setup: Any, workdir: Path) -> float:
    """Trains a configuration. Returns its validation loss after the last step, infinity if a loss
    was not finite."""
    try:
        return run(setup, workdir)["validation_losses"][str(setup.train.steps)]
    except FloatingPointError:
        return math.inf
    finally:
        jax.clear_caches()


def best_loss(result: Result) -> float:
    """The smallest validation loss of a run, but for that before the first step."""
    return min(loss for step, loss in result["validation_losses"].items() if step != "0")


def item_losses(model: Any, tasks: Sequence[TaskData]) -> dict[str, list[tuple[float, int]]]:
    """By task and item: the loss of the reference answer after its prompt, in nats, and its number
    of tokens."""
    losses = {}
    for task in tasks:
        pairs = [(e.messages[0].content, " " + e.messages[-1].content) for e in task.examples]
        sizes = [len(encode_pair(model.tokenizer, *pair)[1]) for pair in pairs]
        found = choice_loglik(model, [[pair] for pair in pairs])
        losses[task.task.name] = [
            (-float(one), size) for [one], size in zip(found, sizes, strict=True)
        ]
    return losses


# --------------------------------------------------------------------------------- the flags


def check_names(
    flag: str, text: str, known: Collection[str], unknown: str = "unknown"
) -> list[str]:
    """The names of a comma-separated flag. Raises UserError if there are none, or one is not
    known."""
    asked = split_names(text)
    for name in asked:
        if name not in known:
            raise UserError(f"{flag}: {name!r} is {unknown}; {near_misses(name, known)}")
    if not asked:
        raise UserError(f"{flag} {text!r} names none; known: {', '.join(known)}")
    return asked


def read_seeds(value: str) -> list[int]:
    """`"0,1"` as `[0, 1]`. Raises UserError unless all are integers from 0, each once."""
    seeds = [int(seed) if seed.isdecimal() else -1 for seed in split_names(value)]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(
            f"--seeds {value!r} must be integers, 0 or more, each once, with commas between"
        )
    return seeds


def workdir_of(out: Path, usual: Path) -> Path:
    """The workdir of runs whose results go to `out`: runs/NAME for the usual place, below it OUT's
    full path for another, so that no other OUT finds them finished."""
    name = Path("runs", usual.name)
    place = out.resolve()
    return name if place == usual.resolve() else name.joinpath(*place.parts[1:])
