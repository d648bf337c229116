"""From `config.data` to tokens: what is trained on, what is validated on, and an account of both."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
import numpy as np

from flora_jax.config import generator_settings, names, task_weights
from flora_jax.data import (
    CONTAMINATED,
    Encoded,
    Example,
    Task,
    data_hash,
    dedupe,
    encode_all,
    expand,
    get_task,
    has_split,
    load_examples,
    prompt_digests,
)
from flora_jax.data.kept import code_digest, keep, read_kept
from flora_jax.data.sources import SPLITS
from flora_jax.errors import UserError
from flora_jax.files import cache_root
from flora_jax.tokens import tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Encoded examples, and what a result file says of them.

    prompts: digests of those of all training records, whether they were dropped or not.
    parts: where tasks have weights, the number of training examples of each, in order, and its weight."""

    train: list[Encoded]
    validation: list[Encoded]
    account: dict[str, Any]
    prompts: set[str]
    parts: list[tuple[int, float]] | None = None


def load_inputs(config: ml_collections.ConfigDict, tokenizer: PreTrainedTokenizerFast) -> Inputs:
    """The tasks of `config.data`, read, de-duplicated and encoded; what was once is kept under the cache folder and
    found there by the next start with the same data, tokenizer and settings. Raises UserError.
    """
    path = _kept_path(config, tokenizer)
    inputs = path and _read_inputs(path)
    if inputs is None:
        inputs = _prepare(config, tokenizer)
        if path:
            _keep_inputs(path, inputs)
    return inputs


def _prepare(config: ml_collections.ConfigDict, tokenizer: PreTrainedTokenizerFast) -> Inputs:
    """Reads, de-duplicates and encodes the tasks.

    A task without a validation split gives a fixed sample of its training records. Records whose prompt is also in a
    test set, of `config.eval.tasks` or of a trained task itself, are dropped from both and counted; so are training
    records whose prompt is in the validation set (of a JSONL file, where one prompt may have many answers: prompt and
    answer). Where they are more than 1 % of a test of `config.eval.tasks`, its near
    doubles will be in the data as well: that is refused unless `config.data.allow_contaminated`. Raises UserError.
    """
    data = config.data
    tasks = [get_task(name, generator_settings(config)) for name in expand(names(data.tasks))]
    weights = task_weights(config)
    by_task: list[list[Example]] = []
    loaded: list[Example] = []
    own: list[Example] = []  # what is held out of files whose prompts may repeat
    validation: list[Example] = []
    hashes = {}
    share = max(1, data.validation_size // len(tasks))
    for task in tasks:
        examples = load_examples(task, "train", data.dir, data.cache_dir)
        hashes[f"{task.name}/train"] = data_hash(task, "train", data.dir)
        loaded += examples
        if has_split(task, "validation", data.dir):
            held_out = load_examples(task, "validation", data.dir, data.cache_dir)[:share]
            hashes[f"{task.name}/validation"] = data_hash(task, "validation", data.dir)
        else:
            if len(examples) < 2:
                raise UserError(
                    f"task {task.name!r}: one record is too few, since it has no validation split and some "
                    "records are held out; give more, or a folder with a validation file"
                )
            order = np.random.default_rng(0).permutation(len(examples))
            chosen = set(order[: min(share, max(1, len(examples) // 10))].tolist())
            held_out = [examples[i] for i in sorted(chosen)]
            examples = [example for i, example in enumerate(examples) if i not in chosen]
        by_task.append(examples)
        validation += held_out
        own += held_out if task.source == "jsonl" else []
    tests: list[Example] = []
    scored = {name: get_task(name, generator_settings(config)) for name in names(config.eval.tasks)}
    # One file given by its path is a test set only where it is to be scored.
    beside = [task for task in tasks if not _is_file(task) and has_split(task, "test", data.dir)]
    overlaps = {}
    for name, task in {**{task.name: task for task in beside}, **scored}.items():
        asked = load_examples(task, "test", data.dir, data.cache_dir)
        tests += asked
        if name in scored:
            overlaps[name] = dedupe(asked, loaded)[1] / len(asked)
            if overlaps[name] > CONTAMINATED and not data.allow_contaminated:
                raise UserError(
                    f"config.data.tasks={data.tasks}: {100 * overlaps[name]:.1f} % of the test questions of {name!r} "
                    "are in the training data; leave that test or that data out, or set config.data.allow_contaminated"
                )
    before = sum(map(len, by_task))
    validation, dropped_validation = dedupe(validation, tests)
    if not validation:
        raise UserError(
            f"config.data.tasks={data.tasks}: each validation record is also in a test set"
        )
    of_own = set(map(id, own))
    kept, _ = dedupe(
        list(itertools.chain(*by_task)), [*(e for e in validation if id(e) not in of_own), *tests]
    )
    kept, _ = dedupe(kept, own, answers=True)
    dropped = before - len(kept)
    if not kept:
        raise UserError(
            f"config.data.tasks={data.tasks}: each of {before} training records is also in a test or the validation "
            "set; give more data, or a folder whose validation and test files hold other prompts"
        )
    if data.limit is not None and data.limit < len(kept):
        chosen = np.random.default_rng(1).permutation(len(kept))[: data.limit]
        kept = [kept[i] for i in chosen]
    trained = set(map(id, kept))
    by_task = [[example for example in examples if id(example) in trained] for examples in by_task]
    settings = {
        "style": data.prompt_style,
        "loss_on": data.loss_on,
        "max_length": data.max_length,
        "silent": jax.process_index() != 0,
    }
    parts = by_task if weights else [list(itertools.chain(*by_task))]
    encoded_parts, reports = [], []
    for task, part in zip(tasks, parts, strict=False):
        try:
            found, report = encode_all(part, tokenizer, **settings)
        except UserError as error:
            raise UserError(
                f"task {task.name!r}, which has a weight: {error}" if weights else str(error)
            ) from None
        encoded_parts.append(found)
        reports.append(report)
    encoded = list(itertools.chain(*encoded_parts))
    validation_encoded, validation_report = encode_all(validation, tokenizer, **settings)
    account = {
        "tasks": [task.name for task in tasks],
        "sha256": {
            **hashes,
            "tokens": _tokens_hash(encoded),
            "validation tokens": _tokens_hash(validation_encoded),
        },
        "weights": weights,
        "train": _together([dataclasses.asdict(report) for report in reports]),
        "validation": dataclasses.asdict(validation_report),
        "dropped_as_in_test": dropped,
        "share_of_test_in_train": overlaps,  # before those records were dropped
        "dropped_from_validation": dropped_validation,
    }
    sizes = weights and list(zip(map(len, encoded_parts), weights, strict=True))
    return Inputs(encoded, validation_encoded, account, prompt_digests(loaded), sizes)


def _together(reports: list[dict[str, int]]) -> dict[str, int]:
    """One account of several parts' examples."""
    return {
        field: (max if field == "longest" else sum)(r[field] for r in reports)
        for field in reports[0]
    }


def _tokens_hash(encoded: list[Encoded]) -> str:
    """sha256 of tokens and loss masks: another tokenizer or chat template is other data."""
    digest = hashlib.sha256()
    for example in encoded:
        digest.update(example.tokens.tobytes() + example.loss.tobytes() + b"|")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- kept


def _kept_path(
    config: ml_collections.ConfigDict, tokenizer: PreTrainedTokenizerFast
) -> Path | None:
    """The file whose name says all that the inputs depend on: data, tokenizer, settings and the code that makes them.
    None where the tokenizer's contents cannot be told."""
    known = tokenizer_digest(tokenizer)
    if known is None:
        return None
    data = config.data.to_dict()
    folder, cache = data.pop("dir"), data.pop("cache_dir")
    trained = [
        (name, get_task(name, generator_settings(config)))
        for name in expand(names(config.data.tasks))
    ]
    scored = [
        (name, get_task(name, generator_settings(config))) for name in names(config.eval.tasks)
    ]
    asked = [
        (task, split)
        for _, task in trained
        for split in SPLITS
        if split == "train" or not _is_file(task)
    ]
    asked += [(task, "test") for _, task in scored]
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
    return (
        cache_root(cache) / "encoded" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.arrays"
    )


def _is_file(task: Task) -> bool:
    return task.name.endswith(".jsonl")


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
