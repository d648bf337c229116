"""From `config.data` to tokens: what is trained on, what is validated on, and an account of both."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections
import numpy as np
from transformers import PreTrainedTokenizerFast

from flora_jax.config import generator_settings, names
from flora_jax.data import (
    Encoded,
    EncodeReport,
    Example,
    data_hash,
    dedupe,
    encode_all,
    get_task,
    has_split,
    load_examples,
)
from flora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Encoded examples, and what a result file says of them."""

    train: list[Encoded]
    validation: list[Encoded]
    report: EncodeReport
    account: dict[str, Any]


def load_inputs(config: ml_collections.ConfigDict, tokenizer: PreTrainedTokenizerFast) -> Inputs:
    """Reads, de-duplicates and encodes the tasks of `config.data`.

    A task without a validation split gives a fixed sample of its training records. Training records whose prompt is
    also one of the validation set's or of a test set in `config.eval.tasks` are dropped and counted. Raises UserError.
    """
    data = config.data
    tasks = [get_task(name, generator_settings(config)) for name in names(data.tasks)]
    train: list[Example] = []
    validation: list[Example] = []
    hashes = {}
    share = max(1, data.validation_size // len(tasks))
    for task in tasks:
        examples = load_examples(task, "train", data.dir, data.cache_dir)
        hashes[f"{task.name}/train"] = data_hash(task, "train", data.dir)
        if has_split(task, "validation", data.dir):
            held_out = load_examples(task, "validation", data.dir, data.cache_dir)[:share]
            hashes[f"{task.name}/validation"] = data_hash(task, "validation", data.dir)
        else:
            if len(examples) < 2:
                raise UserError(f"task {task.name!r}: one record is too few, since it has no validation split and some "
                                "records are held out; give more, or a folder with a validation file")  # fmt: skip
            order = np.random.default_rng(0).permutation(len(examples))
            chosen = set(order[: min(share, max(1, len(examples) // 10))].tolist())
            held_out = [examples[i] for i in sorted(chosen)]
            examples = [example for i, example in enumerate(examples) if i not in chosen]
        train += examples
        validation += held_out
    tests: list[Example] = []
    for name in names(config.eval.tasks):
        tests += load_examples(get_task(name, generator_settings(config)), "test", data.dir, data.cache_dir)
    before = len(train)
    train, dropped = dedupe(train, [*validation, *tests])
    if not train:
        raise UserError(f"config.data.tasks={data.tasks}: each of {before} training records is also in a test set")
    if data.limit is not None and data.limit < len(train):
        chosen = np.sort(np.random.default_rng(1).permutation(len(train))[: data.limit])
        train = [train[i] for i in chosen]
    settings = {"style": data.prompt_style, "loss_on": data.loss_on, "max_length": data.max_length}
    encoded, report = encode_all(train, tokenizer, **settings)
    validation_encoded, validation_report = encode_all(validation, tokenizer, **settings)
    account = {
        "tasks": [task.name for task in tasks],
        "sha256": hashes,
        "train": dataclasses.asdict(report),
        "validation": dataclasses.asdict(validation_report),
        "dropped_as_in_test": dropped,
    }
    return Inputs(encoded, validation_encoded, report, account)
