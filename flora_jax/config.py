"""The base configuration: every field with its meaning, what belongs to presets, and the checks.

A file in `configs/` calls `get_config` and states only what differs. A field whose value is unset
(a placeholder) takes the default named beside it. All checks run before any weight is read and
before anything is compiled.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flora_jax.adapters import METHODS, AdapterConfig
from flora_jax.data import Task, expand, get_task
from flora_jax.data.encode import STYLES
from flora_jax.errors import UserError, near_misses, require, require_known, split_names
from flora_jax.models.config import DTYPES, PRESETS, QUANTIZATIONS, LlamaConfig
from flora_jax.models.llama import REMAT_POLICIES

# What a model preset changes in the base configuration: the larger ones are for GPUs, where
# bfloat16 is native.
_GPU = {"model.param_dtype": "bfloat16", "model.dtype": "bfloat16"}
PRESET_SETTINGS: dict[str, dict[str, Any]] = {
    "llama3.2-1b": _GPU,
    "llama3.2-3b": _GPU,
    "llama3.1-8b": _GPU,
    "qwen2.5-1.5b": _GPU,
    "qwen2.5-7b": _GPU,
    "qwen3-1.7b": _GPU,
    "qwen3-4b": _GPU,
    "qwen3-8b": _GPU,
    "mistral-7b": _GPU,
    "smollm3-3b": _GPU,
    "granite-3-2b": _GPU,
}
CHOICES: dict[str, Collection[str]] = {
    "model.dtype": (*DTYPES, "auto"),
    "model.param_dtype": (*DTYPES, "auto"),
    "model.quantization": QUANTIZATIONS,
    "model.remat": tuple(REMAT_POLICIES),
    "data.prompt_style": STYLES,
    "data.loss_on": ("answer", "all"),
    "train.logger": ("tensorboard", "wandb", "none"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "eval.protocol": ("lm_eval", "llm_adapters"),
    "model.preset": PRESETS,
    "adapter.method": METHODS,
}


class Range(NamedTuple):
    """The numbers that a field may be, if it is set, and the words for all others."""

    words: str
    least: float
    most: float = math.inf
    or_else: int | None = None  # one more that it may be


_POSITIVE = Range("must be at least 1", 1)
_NOT_NEGATIVE = Range("must not be negative", 0)
_DEVICES = Range("must be at least 1, or -1 for the rest of the devices", 1, or_else=-1)
_BELOW_ONE = Range("must be in [0, 1)", 0, math.nextafter(1, 0))
_FLOAT32 = np.finfo(np.float32)
RANGES: tuple[tuple[str, Range], ...] = (
    ("data.max_length", _POSITIVE),
    ("data.validation_size", _POSITIVE),
    ("train.steps", _POSITIVE),
    ("train.batch_size", _POSITIVE),
    ("train.accumulation", _POSITIVE),
    ("train.log_every", _POSITIVE),
    ("train.save_every", _POSITIVE),
    ("train.keep", _POSITIVE),
    ("train.chunk_tokens", _POSITIVE),
    ("eval.limit", _POSITIVE),
    ("eval.batch_size", _POSITIVE),
    ("distributed.processes", _POSITIVE),
    ("train.seed", _NOT_NEGATIVE),
    ("train.eval_every", _NOT_NEGATIVE),
    ("optim.weight_decay", _NOT_NEGATIVE),
    ("optim.clip_norm", _NOT_NEGATIVE),
    ("mesh.data", _DEVICES),
    ("mesh.fsdp", _DEVICES),
    ("mesh.tensor", _DEVICES),
    ("eval.max_length", Range("must be at least 2: a prompt and an answer", 2)),
    ("data.limit", _POSITIVE),
    ("eval.max_new_tokens", _POSITIVE),
    ("optim.learning_rate", Range("must be a positive number", math.ulp(0), sys.float_info.max)),
    ("optim.final_fraction", Range("must be in [0, 1]", 0, 1)),
    ("optim.b1", _BELOW_ONE),
    ("optim.b2", _BELOW_ONE),
    ("optim.eps", Range("must be positive and finite in float32", _FLOAT32.tiny, _FLOAT32.max)),
    ("train.seed", Range("must be below 2**32", 0, 2**32 - 1)),
)


def get_config(preset: str = "llama3.2-1b", method: str = "ffba") -> ConfigDict:
    """The base configuration for a model preset and a method."""
    config = ConfigDict(
        {
            "model": _model(preset),
            "adapter": _adapter(method),
            "data": _data(),
            "train": _train(),
            "optim": _optim(),
            "eval": _eval(),
            "mesh": {
                "data": -1,  # devices along each axis; -1: what the others leave
                "fsdp": 1,
                "tensor": 1,
            },
            "distributed": {
                "auto": False,  # JAX detects the three below: Slurm, Open MPI, Kubernetes
                "coordinator": placeholder(str),  # host:port of process 0; unset: one process
                "processes": 1,
                "process_id": 0,
            },
        }
    )
    for field, value in PRESET_SETTINGS.get(preset, {}).items():
        section, name = field.split(".")
        config[section][name] = value
    return config


def _model(preset: str) -> dict[str, Any]:
    return {
        # where `weights` is unset: its published weights; where it is "random": its shape
        "preset": preset,
        # HF directory, hub id, .gguf file, preset name, or "random"
        "weights": placeholder(str),
        # dtype the frozen base is stored in; what trains is always float32
        "param_dtype": "float32",
        # dtype of compute; norms, softmax, logits and loss stay float32
        "dtype": "float32",  # both: float32, bfloat16, or auto, the one this device is faster in
        # what the kernels of the frozen base are kept in: none (floats), int8, fp8 or nf4
        "quantization": "none",
        # What a layer keeps for the backward pass: products (what its four products give; to
        # compute the rest again is faster than to store it, on a CPU), full (nothing), none (all).
        "remat": "products",
    }


def _adapter(method: str) -> dict[str, Any]:
    return {
        "method": method,  # a row of flora_jax.adapters.METHODS
        "rank": 32,  # channels a piece
        "alpha": placeholder(float),  # scale s = alpha / rank; unset: alpha = rank
        "rslora": False,  # s = alpha / sqrt(rank)
        "targets": placeholder(str),  # comma-separated projections; unset: all seven
        # comma-separated, where repeat-and-add adds; unset: the method's row
        "add_to": placeholder(str),
        "activation": "identity",  # on the parallel path of fpa and parallel
        "dropout": 0.0,  # on the adapter's input
        # the side that starts at zero, A or B; unset: the method's row
        "zero_init": placeholder(str),
    }


def _data() -> dict[str, Any]:
    return {
        # Comma-separated tasks, paths ending in .jsonl or .parquet, data sets of the Hub
        # (hub:ORG/NAME, hub:ORG/NAME:CONFIG), or mixtures ("commonsense", "math": what
        # LLM-Adapters trains on).
        "tasks": "ARC-Easy,ARC-Challenge,openbookqa,boolq",
        # shares drawn of the tasks, such as 3,1,1; unset: each example an epoch
        "weights": placeholder(str),
        # folder with one folder a task, or tfds or tfds:DIR; generated and Hub tasks need none
        "dir": placeholder(str),
        # prepared data; unset: $FLORA_CACHE or ~/.cache/flora_jax
        "cache_dir": placeholder(str),
        "max_length": 512,  # positions of a row
        # plain: prompt, a space, answer; chat: the tokenizer's chat template; llm_adapters: that
        # project's frame.
        "prompt_style": "plain",
        # NAME=VALUE,… that the chat template is given, such as enable_thinking=false (Qwen3)
        "template_arguments": "",
        "loss_on": "answer",  # answer: only what the model should say; all: every token
        "packing": True,  # several examples a row, segments kept apart
        "limit": placeholder(int),  # use only N training examples, always the same
        # train on data that holds over 1 % of a test of eval.tasks, and record it
        "allow_contaminated": False,
        # examples: of the validation split, or held out of train where there is none
        "validation_size": 200,
        # of reasoning-gym tasks; unset: the task's own
        "generator": {
            "train": placeholder(int),  # sizes of the splits
            "validation": placeholder(int),
            "test": placeholder(int),
            "seed": placeholder(int),  # of the draw
            "min_terms": placeholder(int),  # problem sizes
            "max_terms": placeholder(int),
            "min_digits": placeholder(int),
            "max_digits": placeholder(int),
        },
    }


def _train() -> dict[str, Any]:
    return {
        "steps": 1000,  # optimizer steps
        "batch_size": 16,  # rows a step, over all devices and micro-batches
        "accumulation": 1,  # micro-batches a step
        "seed": 0,  # of initialisation, data order and dropout
        "log_every": 10,  # steps
        # where log lines go beside metrics.jsonl: tensorboard, wandb (Weights & Biases) or none
        "logger": "tensorboard",
        "eval_every": 100,  # steps between validation losses; 0: never
        "save_every": 100,  # steps between checkpoints
        "keep": 2,  # latest checkpoints kept, beside the best on validation
        # comma-separated path rules of base leaves that train too, e.g. params/.*norm/scale
        "trainable": "",
        # positions whose logits exist at once, or one a row if that is more
        "chunk_tokens": 256,
    }


def _optim() -> dict[str, Any]:
    return {
        "learning_rate": placeholder(float),  # peak; unset: the method's own
        "schedule": "cosine",  # cosine, linear or constant, after the warm-up
        "warmup_steps": placeholder(int),  # unset: 3 % of the steps
        "final_fraction": 0.1,  # of the peak, at the end of cosine and linear
        "weight_decay": 0.0,  # AdamW's, not on norms and biases
        "clip_norm": 1.0,  # of the global gradient norm; 0: none
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        # comma-separated PATH_RULE=FACTOR on the rate, e.g. adapter/.*_B=16 (LoRA+)
        "rate_rules": "",
    }


def _eval() -> dict[str, Any]:
    return {
        "tasks": "",  # comma-separated tasks scored when training ends; empty: none
        # llm_adapters: generate and extract; lm_eval: choices by likelihood, plain
        "protocol": "llm_adapters",
        # llm_adapters with the faults of its scripts (evaluation/published.py)
        "published_faults": False,
        "limit": 200,  # items a task
        "batch_size": 16,
        # tokens of prompt and answer; longer prompts are counted, and wrong
        "max_length": 1024,
        # Of a generated answer; unset: the task's own number, and for a file of your own at least
        # its longest answer's.
        "max_new_tokens": placeholder(int),
    }


def fields(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by name, such as `train.steps`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat.update(fields(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def adapter_config(config: ConfigDict) -> AdapterConfig:
    """The AdapterConfig that `config.adapter` describes. Raises UserError."""
    return AdapterConfig(**config.adapter.to_dict())


def trained_tasks(config: ConfigDict) -> list[Task]:
    """The tasks of `config.data.tasks`, mixtures spelt out. Raises UserError."""
    return [
        get_task(name, generator_settings(config))
        for name in expand(split_names(config.data.tasks))
    ]


def scored_tasks(config: ConfigDict) -> list[Task]:
    """The tasks of `config.eval.tasks`. Raises UserError."""
    return [get_task(name, generator_settings(config)) for name in split_names(config.eval.tasks)]


def task_weights(config: ConfigDict) -> list[float] | None:
    """The share of each of `config.data.tasks`, mixtures spelt out; None where none is asked for.

    Raises UserError.
    """
    if config.data.weights is None:
        return None
    tasks = expand(split_names(config.data.tasks))
    value = config.data.weights.replace(" ", "")
    try:
        weights = [float(weight) for weight in split_names(value)]
    except ValueError:
        weights = []
    require(
        len(weights) == len(tasks)
        and all(math.isfinite(weight) and weight > 0 for weight in weights)
        and min(weights) >= 1e-6 * max(weights)
        and ",," not in value,
        f"config.data.weights={config.data.weights!r} must be {len(tasks)} positive numbers "
        f"with commas between, none below a millionth of another, for {', '.join(tasks)}",
    )
    return weights


def weights_source(config: ConfigDict) -> str:
    """Where the base comes from: `config.model.weights`, or the preset's own weights."""
    return config.model.weights or config.model.preset


def learning_rate(config: ConfigDict) -> float:
    """The peak rate: the given one, or the method's own. Raises UserError where there is none."""
    if config.optim.learning_rate is not None:
        return config.optim.learning_rate
    method = config.adapter.method
    own = METHODS[method].learning_rate
    require(
        own is not None,
        f"config.optim.learning_rate is unset, and {method} has none of its own in its row's "
        "Method.learning_rate",
    )
    return own


def warmup_steps(config: ConfigDict) -> int:
    """The given number of warm-up steps, or 3 % of all."""
    given = config.optim.warmup_steps
    return max(1, round(0.03 * config.train.steps)) if given is None else given


def generator_settings(config: ConfigDict) -> dict[str, Any]:
    """The fields of `config.data.generator` that are set."""
    return {k: v for k, v in config.data.generator.to_dict().items() if v is not None}


# ------------------------------------------------------------------------------------------ checks


def check_config(config: ConfigDict) -> None:
    """Raises UserError for the first field whose value cannot work. Reads no weights, no data."""
    _check_names(config)
    _check_types(config)
    check_choices(config)
    _check_adapter(config)
    _check_tasks(config)
    for field, allowed in RANGES:
        value = _value(config, field)
        inside = value is None or allowed.least <= value <= allowed.most
        _check(config, field, inside or value == allowed.or_else, allowed.words)
    _check_steps(config)
    _check_processes(config)
    _check_coordinator(config)
    _check_scoring(config)
    _check_folder(config)


def check_choices(config: ConfigDict) -> None:
    """Raises UserError for the first field that is none of its choices."""
    for field, known in CHOICES.items():
        value = _value(config, field)
        require_known(value, known, f"config.{field}={value!r}")


def _value(config: ConfigDict, field: str) -> Any:
    """The value of a field by its name, such as `train.steps`."""
    for part in field.split("."):
        config = config[part]
    return config


def _check(config: ConfigDict, field: str, ok: bool, what: str) -> None:
    """Raises UserError, with the field, its value and `what` of it, unless it is well."""
    require(ok, f"config.{field}={_value(config, field)!r} {what}")


def _check_names(config: ConfigDict) -> None:
    expected = fields(get_config()).keys()
    there = fields(config).keys()
    for field in sorted(expected ^ there):
        if field in there:
            raise UserError(f"config.{field} is no field; {near_misses(field, expected)}")
        raise UserError(f"config.{field} is missing; start from flora_jax.config.get_config()")


def _check_types(config: ConfigDict) -> None:
    """Each value is of its default's type; a placeholder keeps to its own."""
    for field, default in fields(get_config()).items():
        value = _value(config, field)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if default is None:
            continue
        if isinstance(default, bool | str):
            right = isinstance(value, type(default))
            _check(config, field, right, f"must be a {type(default).__name__}")
        elif isinstance(default, int):
            whole = number and isinstance(value, int) and abs(value) < 2**63
            _check(config, field, whole, "must be an integer of 64 bits")
        else:
            _check(config, field, number and math.isfinite(value), "must be a finite number")


def _check_adapter(config: ConfigDict) -> None:
    """The adapter is one, and fits a model whose shape is known without reading any file."""
    adapter = adapter_config(config)
    weights = config.model.weights
    if weights in (None, "random"):
        adapter.check(LlamaConfig.preset(config.model.preset).widths)
    elif weights in tuple(PRESETS):
        adapter.check(LlamaConfig.preset(weights).widths)


def _check_tasks(config: ConfigDict) -> None:
    _check(config, "data.tasks", bool(split_names(config.data.tasks)), "names no task")
    for field in ("data.tasks", "eval.tasks"):
        tasks = expand(split_names(_value(config, field)))
        _check(config, field, len(tasks) == len(set(tasks)), "names a task twice")
    task_weights(config)


def _check_steps(config: ConfigDict) -> None:
    """There is a rate, the warm-up is among the steps, and micro-batches are of one size."""
    learning_rate(config)
    steps = config.train.steps
    inside = 0 <= warmup_steps(config) <= steps
    _check(config, "optim.warmup_steps", inside, f"must be between 0 and train.steps={steps}")
    rows = config.train.batch_size
    whole = rows % config.train.accumulation == 0
    _check(config, "train.accumulation", whole, f"must divide train.batch_size={rows}")


def _check_processes(config: ConfigDict) -> None:
    """What is detected is not set as well, and the processes share out the rows of a batch."""
    distributed = config.distributed
    processes = distributed.processes
    if distributed.auto:
        # Once they have found each other, the number that was detected stands in the configuration.
        detected = jax.process_count() if jax.distributed.is_initialized() else 1
        beside = "is set beside distributed.auto, which detects it; leave one of the two out"
        _check(config, "distributed.coordinator", distributed.coordinator is None, beside)
        _check(config, "distributed.processes", processes in (1, detected), beside)
        _check(config, "distributed.process_id", distributed.process_id == 0, beside)
    whole = config.train.batch_size % processes == 0
    multiple = f"must be a multiple of distributed.processes={processes}"
    _check(config, "train.batch_size", whole, multiple)
    inside = 0 <= distributed.process_id < processes
    _check(config, "distributed.process_id", inside, f"must be in 0 … {processes - 1}")


def _check_coordinator(config: ConfigDict) -> None:
    """It is there where it is needed, and an address."""
    distributed = config.distributed
    processes = distributed.processes
    several = processes > 1
    _check(
        config,
        "distributed.coordinator",
        distributed.auto or bool(distributed.coordinator) == several,
        "must be host:port of process 0 for several processes and unset for one; "
        f"there are {processes}",
    )
    host, _, port = (distributed.coordinator or "host:1").rpartition(":")
    _check(
        config,
        "distributed.coordinator",
        bool(host) and port.isdecimal() and 1 <= int(port) < 2**16,
        "must be host:port, the port from 1 to 65535",
    )


def _check_scoring(config: ConfigDict) -> None:
    """One process scores, and faults are reproduced only where they were made."""
    processes = config.distributed.processes
    _check(
        config,
        "eval.tasks",
        processes == 1 or not config.eval.tasks,
        f"needs one process, not {processes}; score the adapter with flora_jax.evaluate instead",
    )
    _check(
        config,
        "data.template_arguments",
        config.data.prompt_style == "chat" or not config.data.template_arguments,
        "are of a chat template, and have no effect without data.prompt_style='chat'",
    )
    theirs = (config.eval.protocol, config.data.prompt_style) == ("llm_adapters", "llm_adapters")
    _check(
        config,
        "eval.published_faults",
        theirs or not config.eval.published_faults,
        "are those of eval.protocol and data.prompt_style 'llm_adapters'",
    )


def _check_folder(config: ConfigDict) -> None:
    source = config.data.dir
    if source in (None, "tfds"):
        return
    there = os.path.isdir(os.path.expanduser(source.removeprefix("tfds:")))
    _check(config, "data.dir", there, "is not a directory (nor tfds, nor tfds:DIR)")
