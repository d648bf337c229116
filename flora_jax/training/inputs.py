"""From `config.data` to tokens: what is trained and validated on, and an account of both.

Examples stay on disk and are read twice: for two numbers by which each is known again, which are in
memory with its place, and to be encoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import ml_collections
import numpy as np

import flora_jax
from flora_jax.config import scored_tasks, task_weights, trained_tasks
from flora_jax.data import (
    CONTAMINATED,
    Encoded,
    EncodeReport,
    Example,
    Task,
    data_hash,
    encode_each,
    has_split,
    open_examples,
)
from flora_jax.data.sources import SPLITS
from flora_jax.data.store import new_store, open_store
from flora_jax.errors import UserError, require, split_names, told_of
from flora_jax.files import cache_root, filling_cache
from flora_jax.progress import progress
from flora_jax.tokens import Tokenizer, tokenizer_digest


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Encoded examples, and what a result file says of them.

    prompts: uint64, 64 bits of the digest of each prompt in all training records, whether they were
    dropped or not. parts: where tasks have weights, the number of training examples of each, in
    order, and its weight.
    """

    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    account: dict[str, Any]
    prompts: np.ndarray
    parts: list[tuple[int, float]] | None = None


def load_inputs(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Inputs:
    """The tasks of `config.data`, read, de-duplicated and encoded.

    What was once is kept under the cache folder, and found there by the next start with the same
    data, tokenizer and settings. Raises UserError.
    """
    path = _kept_path(config, tokenizer)
    inputs = path and _read_inputs(path)
    if inputs:
        return inputs
    with _scratch(cache_root(config.data.cache_dir) / "encoded") as folder:
        new = folder / "new"
        _prepare(config, tokenizer, new)
        inputs = _read_inputs(new)
        # What another process has kept since, it has mapped: a file system that is shared between
        # machines would take it away.
        if path and _read_inputs(path) is None:
            with contextlib.suppress(OSError):
                os.replace(new, path)
    return inputs


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A scratch folder in `folder`, or among the system's where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix="preparing-")
    except OSError:
        scratch = tempfile.TemporaryDirectory()
    with scratch as name:
        yield Path(name)


# ----------------------------------------------------------------------------------------- prepare


@dataclasses.dataclass(frozen=True)
class _Examples:
    """Some examples of a split, in its order, each read when it is asked for.

    places: int64 [n], where they are in the split. prompts, answers: uint64 [n], 64 bits of the
    digests of their prompts, and of prompts with answers.
    """

    split: Sequence[Example]
    places: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Example]:
        return (self.split[int(place)] for place in self.places)

    def where(self, chosen: np.ndarray | slice) -> _Examples:
        """Those of them that a mask or a slice chooses."""
        return _Examples(
            self.split, self.places[chosen], self.prompts[chosen], self.answers[chosen]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """One task's examples, in the order of its records.

    records: all of its training split; of them train lacks what is held out.
    hashes: sha256 of the data of each split that was read, by `task/split`.
    """

    task: Task
    records: _Examples
    train: _Examples
    validation: _Examples
    hashes: dict[str, str]


_Tests = dict[str, _Examples]  # the test sets by their tasks' names
_Encode = Callable[[Iterable[Example], int], EncodeReport]


def _prepare(config: ml_collections.ConfigDict, tokenizer: Tokenizer, path: Path) -> None:
    """Reads, de-duplicates and encodes the tasks to a new file. Raises UserError."""
    data = config.data
    weights = task_weights(config)
    tasks = trained_tasks(config)
    # Of what validates, each task gives an equal share.
    share = max(1, data.validation_size // len(tasks))
    read = [_read_part(task, share, data) for task in tasks]
    tests = _read_tests(config, tasks)
    overlaps = _refuse_contaminated(config, tests, read)
    clean = _drop_overlaps(config, tests, read)
    with filling_cache(path.parent), new_store(path) as store:
        encode = functools.partial(
            encode_each,
            tokenizer=tokenizer,
            keep=store.add,
            style=data.prompt_style,
            loss_on=data.loss_on,
            max_length=data.max_length,
            silent=_is_silent(),
        )
        reports = _encode_train(_take(clean, data.limit), bool(weights), encode)
        tokens = store.take_digest()
        validation = encode(_each(clean, "validation"), _count(clean, "validation"))
        account = {
            "tasks": [part.task.name for part in read],
            "sha256": {
                **dict(itertools.chain(*(part.hashes.items() for part in read))),
                "tokens": tokens,
                "validation tokens": store.take_digest(),
            },
            "weights": weights,
            "train": _together([dataclasses.asdict(report) for report in reports]),
            "validation": dataclasses.asdict(validation),
            "dropped_as_in_test": _count(read, "train") - _count(clean, "train"),
            "share_of_test_in_train": overlaps,  # before those records were dropped
            "dropped_from_validation": _count(read, "validation") - _count(clean, "validation"),
        }
        sizes = weights and list(zip([report.kept for report in reports], weights, strict=True))
        prompts = np.unique(np.concatenate([part.records.prompts for part in read]))
        about = json.dumps({"account": account, "parts": sizes})
        store.finish(prompts=prompts, about=np.frombuffer(about.encode(), np.uint8))


def _is_silent() -> bool:
    return jax.process_index() != 0


_Which = Literal["train", "validation"]


def _each(parts: Iterable[_Part], which: _Which) -> Iterator[Example]:
    return itertools.chain.from_iterable(getattr(part, which) for part in parts)


def _count(parts: Iterable[_Part], which: _Which) -> int:
    return sum(len(getattr(part, which)) for part in parts)


def _read_part(task: Task, share: int, data: ml_collections.ConfigDict) -> _Part:
    """One task; without a validation split, a fixed sample of its training records validates."""
    records = _read_split(task, "train", data)
    hashes = {f"{task.name}/train": data_hash(task, "train", data.dir)}
    if has_split(task, "validation", data.dir):
        train = records
        validation = _read_split(task, "validation", data).where(slice(share))
        hashes[f"{task.name}/validation"] = data_hash(task, "validation", data.dir)
    else:
        held_out = _held_out(task, len(records), share)
        train = records.where(~held_out)
        validation = records.where(held_out)
    return _Part(task=task, records=records, train=train, validation=validation, hashes=hashes)


def _read_split(task: Task, split: str, data: ml_collections.ConfigDict) -> _Examples:
    """All examples of a split."""
    examples = open_examples(task, split, data.dir, data.cache_dir)
    digests = np.empty((2, len(examples)), np.uint64)
    shown = progress(examples, len(examples), "reading", "example", _is_silent())
    for i, example in enumerate(shown):
        digests[:, i] = [int(one[:16], 16) for one in (example.prompt_digest, example.digest)]
    return _Examples(examples, np.arange(len(examples)), *digests)


def _held_out(task: Task, records: int, share: int) -> np.ndarray:
    """Which of a task's training records validate, as a mask: at most a tenth of them."""
    require(
        records >= 2,
        f"task {task.name!r}: one record is too few, since it has no validation split and some "
        "records are held out; give more, or a folder with a validation file",
    )
    return _drawn(0, records, min(share, max(1, records // 10)))


def _drawn(seed: int, total: int, count: int) -> np.ndarray:
    """A mask of `count` of `total`, always the same ones."""
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(seed).permutation(total)[:count]] = True
    return chosen


def _read_tests(config: ml_collections.ConfigDict, trained: Sequence[Task]) -> _Tests:
    """The test sets of the tasks that are trained on and of those that are scored.

    One file given by its path is a test set only where it is to be scored.
    """
    data = config.data
    beside = [task for task in trained if not task.is_file and has_split(task, "test", data.dir)]
    tasks = {task.name: task for task in beside}
    tasks |= zip(split_names(config.eval.tasks), scored_tasks(config), strict=True)
    return {name: _read_split(task, "test", data) for name, task in tasks.items()}


def _refuse_contaminated(
    config: ml_collections.ConfigDict, tests: _Tests, parts: Sequence[_Part]
) -> dict[str, float]:
    """The share of each scored test whose prompts are among the training records.

    Where it is more than 1 %, the test's near doubles will be in the data as well: a UserError
    unless `config.data.allow_contaminated`.
    """
    records = np.concatenate([part.records.prompts for part in parts])
    scored = split_names(config.eval.tasks)
    overlaps = {}
    for name in [name for name in tests if name in scored]:
        seen = int(np.isin(tests[name].prompts, records).sum())
        share = overlaps[name] = seen / len(tests[name])
        require(
            share <= CONTAMINATED or config.data.allow_contaminated,
            f"config.data.tasks={config.data.tasks}: {100 * share:.1f} % of the test questions "
            f"of {name!r} are in the training data; leave that test or that data out, or set "
            "config.data.allow_contaminated",
        )
    return overlaps


def _drop_overlaps(
    config: ml_collections.ConfigDict, tests: _Tests, parts: Sequence[_Part]
) -> list[_Part]:
    """The parts without records that are in a test set, nor training records that validate.

    They are known by their prompt. Of conversations, where one prompt may have many answers, the
    training records that validate are known by prompt and answer.
    """
    tested = _joined(test.prompts for test in tests.values())
    kept = [
        dataclasses.replace(part, validation=_without(part.validation, tested)) for part in parts
    ]
    require(
        _count(kept, "validation"),
        f"config.data.tasks={config.data.tasks}: each validation record is also in a test set",
    )
    own = [part for part in parts if part.task.source == "jsonl"]
    others = [part for part in kept if part.task.source != "jsonl"]
    asked = _joined([tested, *(part.validation.prompts for part in others)])
    answered = _joined(part.validation.answers for part in own)
    for i, part in enumerate(kept):
        kept[i] = dataclasses.replace(part, train=_without(part.train, asked, answered))
    if not _count(kept, "train"):
        raise UserError(
            f"config.data.tasks={config.data.tasks}: each of {_count(parts, 'train')} training "
            "records is also in a test or the validation set; give more data, or a folder whose "
            "validation and test files hold other prompts"
        )
    return kept


def _joined(digests: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint64), *digests])


def _without(
    examples: _Examples, prompts: np.ndarray, answers: np.ndarray | None = None
) -> _Examples:
    """The examples that are not known by these prompts, nor by these prompts with answers."""
    held = np.isin(examples.prompts, prompts)
    if answers is not None:
        held |= np.isin(examples.answers, answers)
    return examples.where(~held)


def _take(parts: Sequence[_Part], limit: int | None) -> Sequence[_Part]:
    """The parts with `limit` training examples in all, always the same ones, in their order."""
    total = _count(parts, "train")
    if limit is None or limit >= total:
        return parts
    ends = np.cumsum([len(part.train) for part in parts])
    chosen = np.split(_drawn(1, total, limit), ends[:-1])
    return [
        dataclasses.replace(part, train=part.train.where(own))
        for part, own in zip(parts, chosen, strict=True)
    ]


def _encode_train(parts: Sequence[_Part], weighted: bool, encode: _Encode) -> list[EncodeReport]:
    """What is trained on, encoded part by part where each has a weight, else in one."""
    if not weighted:
        return [encode(_each(parts, "train"), _count(parts, "train"))]
    reports = []
    for part in parts:
        with told_of(f"task {part.task.name!r}, which has a weight"):
            reports.append(encode(part.train, len(part.train)))
    return reports


def _together(reports: list[dict[str, int]]) -> dict[str, int]:
    """One account of several parts' examples."""
    total = {field: sum(report[field] for report in reports) for field in reports[0]}
    return {**total, "longest": max(report["longest"] for report in reports)}


# -------------------------------------------------------------------------------------------- kept


def _kept_path(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Path | None:
    """The file whose name says all that the inputs depend on.

    That is data, tokenizer, settings and the code that makes them. None where the tokenizer's
    contents cannot be told.
    """
    known = tokenizer_digest(tokenizer)
    if known is None:
        return None
    data = config.data.to_dict()
    folder = data.pop("dir")
    cache = data.pop("cache_dir")
    trained = itertools.product(trained_tasks(config), SPLITS)
    asked = [
        *((task, split) for task, split in trained if split == "train" or not task.is_file),
        *((task, "test") for task in scored_tasks(config)),
    ]
    found = [
        (
            task.name,
            split,
            data_hash(task, split, folder) if has_split(task, split, folder) else None,
        )
        for task, split in asked
    ]
    code = code_digest("data", "tokens.py", "training/inputs.py")
    about = json.dumps([known, code, data, config.eval.tasks, found], sort_keys=True, default=list)
    name = hashlib.sha256(about.encode()).hexdigest()[:32]
    return cache_root(cache) / "encoded" / f"{name}.arrays"


def _read_inputs(path: Path) -> Inputs | None:
    found = open_store(path)
    if found is None:
        return None
    examples, known = found
    about = json.loads(known["about"].tobytes())
    trained = about["account"]["train"]["kept"]
    return Inputs(
        train=examples[:trained],
        validation=examples[trained:],
        account=about["account"],
        prompts=known["prompts"],
        parts=about["parts"] and [(size, weight) for size, weight in about["parts"]],
    )


def code_digest(*names: str) -> str:
    """sha256 of the package's Python files `names` (a folder: all in it).

    What other code makes is made anew.
    """
    digest = hashlib.sha256()
    root = Path(flora_jax.__file__).parent
    for name in names:
        for path in sorted((root / name).glob("*.py")) if (root / name).is_dir() else [root / name]:
            digest.update(path.read_bytes())
    return digest.hexdigest()
