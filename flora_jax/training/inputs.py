"""From `config.data` to tokens: what is trained and validated on, and an account of both."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    dedupe,
    encode_all,
    has_split,
    load_examples,
    prompt_digests,
)
from flora_jax.data.sources import SPLITS
from flora_jax.errors import UserError, require, split_names, told_of
from flora_jax.files import cache_root
from flora_jax.tokens import Tokenizer, tokenizer_digest


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Encoded examples, and what a result file says of them.

    prompts: digests of those of all training records, whether they were dropped or not.
    parts: where tasks have weights, the number of training examples of each, in order, and its
    weight.
    """

    train: list[Encoded]
    validation: list[Encoded]
    account: dict[str, Any]
    prompts: set[str]
    parts: list[tuple[int, float]] | None = None


def load_inputs(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Inputs:
    """The tasks of `config.data`, read, de-duplicated and encoded.

    What was once is kept under the cache folder, and found there by the next start with the same
    data, tokenizer and settings. Raises UserError.
    """
    path = _kept_path(config, tokenizer)
    inputs = path and _read_inputs(path)
    if inputs is None:
        inputs = _prepare(config, tokenizer)
        if path:
            _keep_inputs(path, inputs)
    return inputs


# ----------------------------------------------------------------------------------------- prepare


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """One task's examples, in the order of its records.

    records: all of its training split; of them train lacks what is held out.
    hashes: sha256 of the data of each split that was read, by `task/split`.
    """

    task: Task
    records: list[Example]
    train: list[Example]
    validation: list[Example]
    hashes: dict[str, str]


_Tests = dict[str, list[Example]]  # the test sets by their tasks' names
_Encode = Callable[[Sequence[Example]], tuple[list[Encoded], EncodeReport]]


def _prepare(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Inputs:
    """Reads, de-duplicates and encodes the tasks. Raises UserError."""
    data = config.data
    weights = task_weights(config)
    tasks = trained_tasks(config)
    # Of what validates, each task gives an equal share.
    share = max(1, data.validation_size // len(tasks))
    read = [_read_part(task, share, data) for task in tasks]
    tests = _read_tests(config, tasks)
    overlaps = _refuse_contaminated(config, tests, read)
    clean = _drop_overlaps(config, tests, read)
    encode = functools.partial(
        encode_all,
        tokenizer=tokenizer,
        style=data.prompt_style,
        loss_on=data.loss_on,
        max_length=data.max_length,
        silent=jax.process_index() != 0,
    )
    encoded, reports = _encode_train(_take(clean, data.limit), bool(weights), encode)
    train = list(itertools.chain(*encoded))
    validation, validation_report = encode(_all(clean, "validation"))
    account = {
        "tasks": [part.task.name for part in read],
        "sha256": {
            **dict(itertools.chain(*(part.hashes.items() for part in read))),
            "tokens": _tokens_hash(train),
            "validation tokens": _tokens_hash(validation),
        },
        "weights": weights,
        "train": _together([dataclasses.asdict(report) for report in reports]),
        "validation": dataclasses.asdict(validation_report),
        "dropped_as_in_test": len(_all(read, "train")) - len(_all(clean, "train")),
        "share_of_test_in_train": overlaps,  # before those records were dropped
        "dropped_from_validation": len(_all(read, "validation")) - len(_all(clean, "validation")),
    }
    sizes = weights and list(zip(map(len, encoded), weights, strict=True))
    return Inputs(train, validation, account, prompt_digests(_all(read, "records")), sizes)


def _all(parts: Iterable[_Part], which: Literal["records", "train", "validation"]) -> list[Example]:
    return list(itertools.chain(*(getattr(part, which) for part in parts)))


def _read_part(task: Task, share: int, data: ml_collections.ConfigDict) -> _Part:
    """One task; without a validation split, a fixed sample of its training records validates."""
    records = load_examples(task, "train", data.dir, data.cache_dir)
    hashes = {f"{task.name}/train": data_hash(task, "train", data.dir)}
    if has_split(task, "validation", data.dir):
        train = records
        validation = load_examples(task, "validation", data.dir, data.cache_dir)[:share]
        hashes[f"{task.name}/validation"] = data_hash(task, "validation", data.dir)
    else:
        chosen = _held_out(task, len(records), share)
        train = [example for i, example in enumerate(records) if i not in chosen]
        validation = [records[i] for i in sorted(chosen)]
    return _Part(task=task, records=records, train=train, validation=validation, hashes=hashes)


def _held_out(task: Task, records: int, share: int) -> set[int]:
    """Which of a task's training records validate: at most a tenth of them."""
    require(
        records >= 2,
        f"task {task.name!r}: one record is too few, since it has no validation split and some "
        "records are held out; give more, or a folder with a validation file",
    )
    order = np.random.default_rng(0).permutation(records)
    return set(order[: min(share, max(1, records // 10))].tolist())


def _read_tests(config: ml_collections.ConfigDict, trained: Sequence[Task]) -> _Tests:
    """The test sets of the tasks that are trained on and of those that are scored.

    One file given by its path is a test set only where it is to be scored.
    """
    data = config.data
    beside = [task for task in trained if not task.is_file and has_split(task, "test", data.dir)]
    tasks = {task.name: task for task in beside}
    tasks |= zip(split_names(config.eval.tasks), scored_tasks(config), strict=True)
    return {
        name: load_examples(task, "test", data.dir, data.cache_dir) for name, task in tasks.items()
    }


def _refuse_contaminated(
    config: ml_collections.ConfigDict, tests: _Tests, parts: Sequence[_Part]
) -> dict[str, float]:
    """The share of each scored test whose prompts are among the training records.

    Where it is more than 1 %, the test's near doubles will be in the data as well: a UserError
    unless `config.data.allow_contaminated`.
    """
    records = _all(parts, "records")
    scored = split_names(config.eval.tasks)
    overlaps = {}
    for name in [name for name in tests if name in scored]:
        share = overlaps[name] = dedupe(tests[name], records)[1] / len(tests[name])
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
    tested = list(itertools.chain(*tests.values()))
    kept = [
        dataclasses.replace(part, validation=dedupe(part.validation, tested)[0]) for part in parts
    ]
    require(
        _all(kept, "validation"),
        f"config.data.tasks={config.data.tasks}: each validation record is also in a test set",
    )
    asked = tested + _all([part for part in kept if part.task.source != "jsonl"], "validation")
    answered = _all([part for part in parts if part.task.source == "jsonl"], "validation")
    for i, part in enumerate(kept):
        others, _ = dedupe(part.train, asked)
        others, _ = dedupe(others, answered, answers=True)
        kept[i] = dataclasses.replace(part, train=others)
    if not _all(kept, "train"):
        raise UserError(
            f"config.data.tasks={config.data.tasks}: each of {len(_all(parts, 'train'))} training "
            "records is also in a test or the validation set; give more data, or a folder whose "
            "validation and test files hold other prompts"
        )
    return kept


def _take(parts: Sequence[_Part], limit: int | None) -> Sequence[_Part]:
    """The parts with `limit` training examples in all, always the same ones, in their order."""
    total = len(_all(parts, "train"))
    if limit is None or limit >= total:
        return parts
    chosen = set(np.random.default_rng(1).permutation(total)[:limit].tolist())
    places = itertools.count()
    return [
        dataclasses.replace(
            part, train=[example for example in part.train if next(places) in chosen]
        )
        for part in parts
    ]


def _encode_train(
    parts: Sequence[_Part], weighted: bool, encode: _Encode
) -> tuple[list[list[Encoded]], list[EncodeReport]]:
    """What is trained on, part by part where each has a weight, else in one; and the reports."""
    if not weighted:
        encoded, report = encode(_all(parts, "train"))
        return [encoded], [report]
    found = []
    for part in parts:
        with told_of(f"task {part.task.name!r}, which has a weight"):
            found.append(encode(part.train))
    return [encoded for encoded, _ in found], [report for _, report in found]


def _together(reports: list[dict[str, int]]) -> dict[str, int]:
    """One account of several parts' examples."""
    total = {field: sum(report[field] for report in reports) for field in reports[0]}
    return {**total, "longest": max(report["longest"] for report in reports)}


def _tokens_hash(encoded: list[Encoded]) -> str:
    """sha256 of tokens and loss masks: another tokenizer or chat template is other data."""
    digest = hashlib.sha256()
    for example in encoded:
        digest.update(example.tokens.tobytes() + example.loss.tobytes() + b"|")
    return digest.hexdigest()


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


def _keep_inputs(path: Path, inputs: Inputs) -> None:
    encoded = [*inputs.train, *inputs.validation]
    about = json.dumps(
        {"train": len(inputs.train), "account": inputs.account, "parts": inputs.parts}
    )
    keep(
        path,
        {
            "lengths": np.array([len(example.tokens) for example in encoded]),
            "tokens": np.concatenate([example.tokens for example in encoded]),
            "loss": np.concatenate([example.loss for example in encoded]),
            "prompts": np.array(sorted(inputs.prompts), "S16"),
            "about": np.frombuffer(about.encode(), np.uint8),
        },
    )


def _read_inputs(path: Path) -> Inputs | None:
    stored = read_kept(path)
    if stored is None:
        return None
    about = json.loads(stored["about"].tobytes())
    ends = np.cumsum(stored["lengths"])[:-1]
    arrays = zip(np.split(stored["tokens"], ends), np.split(stored["loss"], ends), strict=True)
    encoded = [Encoded(tokens, loss) for tokens, loss in arrays]
    return Inputs(
        train=encoded[: about["train"]],
        validation=encoded[about["train"] :],
        account=about["account"],
        prompts={digest.decode() for digest in stored["prompts"].tolist()},
        parts=about["parts"] and [(size, weight) for size, weight in about["parts"]],
    )


_SUM = 32  # bytes of the check sum that a file begins with


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


def read_kept(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays by name; None where they are not kept, or the file is damaged."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(stored[_SUM:]).digest() != stored[:_SUM]:
        return None
    with np.load(io.BytesIO(stored[_SUM:]), allow_pickle=False) as arrays:
        return dict(arrays)


def keep(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps the arrays if the folder can be written; else the next start prepares them again."""
    stored = io.BytesIO()
    np.savez(stored, **arrays)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="preparing-") as scratch:
            new = Path(scratch) / path.name
            new.write_bytes(hashlib.sha256(stored.getbuffer()).digest() + stored.getbuffer())
            os.replace(new, path)
