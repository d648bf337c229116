"""The base configuration: every field with its meaning, the presets that belong to methods, and the checks.

A file in `configs/` calls `get_config` and states only what differs. A field whose value is unset (a placeholder)
takes the default named beside it. All checks run before any weight is read and before anything is compiled.
"""

from __future__ import annotations

import inspect
import math
import os
import runpy
import traceback
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from flora_jax.adapters import METHODS, AdapterConfig
from flora_jax.data.encode import STYLES
from flora_jax.data.tasks import expand
from flora_jax.errors import UserError, near_misses
from flora_jax.models.config import DTYPES, PRESETS, LlamaConfig
from flora_jax.models.llama import REMAT_POLICIES

# A zero A with a full B moves the output 18 to 64 times as far in one Adam step as LoRA's zero B does, so the rate
# belongs to the method (README, "The family"). For scale s = 1; ffba_qd_add's is a guess, and fft's a third of what was
# best on SmolLM2-135M, for larger models want less.
LEARNING_RATES: dict[str, float] = {
    "fft": 5e-5,
    "lora": 1e-3,
    "pf_lora": 1e-3,
    "ffa": 1e-4,
    "fpa": 1e-3,
    "parallel": 1e-3,
    "ffba": 3e-4,
    "ffba_qg_add": 3e-4,
    "ffba_qd_add": 3e-4,
    "zflora": 1e-4,
}
# What a model preset changes in the base configuration: the Llamas are for GPUs, where bfloat16 is native.
_GPU = {"model.param_dtype": "bfloat16", "model.dtype": "bfloat16"}
PRESET_SETTINGS: dict[str, dict[str, Any]] = {
    "llama3.2-1b": _GPU,
    "llama3.2-3b": _GPU,
    "llama3.1-8b": _GPU,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": DTYPES,
    "model.param_dtype": DTYPES,
    "model.remat": tuple(REMAT_POLICIES),
    "data.prompt_style": STYLES,
    "data.loss_on": ("answer", "all"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "eval.protocol": ("lm_eval", "llm_adapters"),
}


def get_config(preset: str = "llama3.2-1b", method: str = "ffba") -> ml_collections.ConfigDict:
    """The base configuration for a model preset and a method."""
    config = ml_collections.ConfigDict()

    config.model = ml_collections.ConfigDict()
    # where `weights` is unset: its published weights; where it is "random": its shape
    config.model.preset = preset
    # HF directory, hub id, .gguf file, preset name, or "random"
    config.model.weights = placeholder(str)
    # dtype the frozen base is stored in; what trains is always float32
    config.model.param_dtype = "float32"
    config.model.dtype = "float32"  # dtype of compute; norms, softmax, logits and loss stay float32
    # What a layer keeps for the backward pass: products (what its four products give; to compute the rest again is
    # faster than to store it, on a CPU), full (nothing), none (all).
    config.model.remat = "products"

    config.adapter = ml_collections.ConfigDict()
    config.adapter.method = method  # a row of flora_jax.adapters.METHODS
    config.adapter.rank = 32  # channels a piece
    config.adapter.alpha = placeholder(float)  # scale s = alpha / rank; unset: alpha = rank
    config.adapter.rslora = False  # s = alpha / sqrt(rank)
    config.adapter.targets = placeholder(str)  # comma-separated projections; unset: all seven
    # comma-separated, where repeat-and-add adds; unset: the method's row
    config.adapter.add_to = placeholder(str)
    config.adapter.activation = "identity"  # on the parallel path of fpa and parallel
    config.adapter.dropout = 0.0  # on the adapter's input
    # the side that starts at zero, A or B; unset: the method's row
    config.adapter.zero_init = placeholder(str)

    config.data = ml_collections.ConfigDict()
    # Comma-separated tasks, paths ending in .jsonl, or mixtures ("commonsense", "math": what LLM-Adapters trains on).
    config.data.tasks = "ARC-Easy,ARC-Challenge,openbookqa,boolq"
    # shares drawn of the tasks, such as 3,1,1; unset: each example an epoch
    config.data.weights = placeholder(str)
    # folder with one folder a task, or tfds or tfds:DIR; generated tasks need none
    config.data.dir = placeholder(str)
    # prepared data; unset: $FLORA_CACHE or ~/.cache/flora_jax
    config.data.cache_dir = placeholder(str)
    config.data.max_length = 512  # positions of a row
    # plain: prompt, a space, answer; chat: the tokenizer's chat template; llm_adapters: that project's frame.
    config.data.prompt_style = "plain"
    config.data.loss_on = "answer"  # answer: only what the model should say; all: every token
    config.data.packing = True  # several examples a row, segments kept apart
    config.data.limit = placeholder(int)  # use only N training examples, always the same
    # train on data that holds over 1 % of a test of eval.tasks, and record it
    config.data.allow_contaminated = False
    # examples: of the validation split, or held out of train where there is none
    config.data.validation_size = 200
    # reasoning-gym tasks; unset: the task's own
    config.data.generator = ml_collections.ConfigDict()
    for field in (
        "train",
        "validation",
        "test",
        "seed",
        "min_terms",
        "max_terms",
        "min_digits",
        "max_digits",
    ):
        # sizes of the splits, seed of the draw, problem sizes
        config.data.generator[field] = placeholder(int)

    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000  # optimizer steps
    config.train.batch_size = 16  # rows a step, over all devices and micro-batches
    config.train.accumulation = 1  # micro-batches a step
    config.train.seed = 0  # of initialisation, data order and dropout
    config.train.log_every = 10  # steps
    config.train.eval_every = 100  # steps between validation losses; 0: never
    config.train.save_every = 100  # steps between checkpoints
    config.train.keep = 2  # latest checkpoints kept, beside the best on validation
    # comma-separated path rules of base leaves that train too, e.g. params/.*norm/scale
    config.train.trainable = ""
    # positions whose logits exist at once, or one a row if that is more
    config.train.chunk_tokens = 256

    config.optim = ml_collections.ConfigDict()
    config.optim.learning_rate = placeholder(float)  # peak; unset: the method's own
    config.optim.schedule = "cosine"  # cosine, linear or constant, after the warm-up
    config.optim.warmup_steps = placeholder(int)  # unset: 3 % of the steps
    config.optim.final_fraction = 0.1  # of the peak, at the end of cosine and linear
    config.optim.weight_decay = 0.0  # AdamW's, not on norms and biases
    config.optim.clip_norm = 1.0  # of the global gradient norm; 0: none
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    # comma-separated PATH_RULE=FACTOR on the rate, e.g. adapter/.*_B=16 (LoRA+)
    config.optim.rate_rules = ""

    config.eval = ml_collections.ConfigDict()
    config.eval.tasks = ""  # comma-separated tasks scored when training ends; empty: none
    # llm_adapters: generate and extract; lm_eval: choices by likelihood, plain
    config.eval.protocol = "llm_adapters"
    # llm_adapters with the faults of its scripts (evaluation/published.py)
    config.eval.published_faults = False
    config.eval.limit = 200  # items a task
    config.eval.batch_size = 16
    # tokens of prompt and answer; longer prompts are counted, and wrong
    config.eval.max_length = 1024
    # Of a generated answer; unset: the task's own number, and for a JSONL file at least its longest answer's.
    config.eval.max_new_tokens = placeholder(int)

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices along each axis; -1: what the others leave
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.distributed = ml_collections.ConfigDict()
    config.distributed.auto = False  # JAX detects the three below: Slurm, Open MPI, Kubernetes
    config.distributed.coordinator = placeholder(str)  # host:port of process 0; unset: one process
    config.distributed.processes = 1
    config.distributed.process_id = 0

    for field, value in PRESET_SETTINGS.get(preset, {}).items():
        section, name = field.split(".")
        config[section][name] = value
    return config


def read_config(path: str | Path) -> ml_collections.ConfigDict:
    """What `get_config()` of a configuration file returns, or of `FILE:NAME` its `get_config(NAME)`. Raises UserError
    for a file that cannot be read or run."""
    where = f"--config={path}"
    path = os.path.expanduser(path)
    file, colon, name = str(path).rpartition(":")
    path, given = (file, [name]) if colon and not Path(path).is_file() else (str(path), [])
    if not Path(path).is_file():
        raise UserError(
            f"{where}: there is no such file; configs/ has one for each method and model"
        )
    try:
        make = runpy.run_path(path).get("get_config")
        if make and given and not inspect.signature(make).parameters:
            raise UserError(
                f"{path} is one configuration and takes no name; leave {':' + given[0]!r} out"
            )
        made = make(*given) if make else None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # whatever the file raises is the file's own
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path
        ]
        place = f", line {lines[-1]}" if lines else ""
        reason = str(error).strip() or "no message"
        raise UserError(f"{where}{place}: {type(error).__name__}: {reason}") from None
    if not isinstance(made, ml_collections.ConfigDict):
        raise UserError(
            f"{where}: get_config() must return the configuration of flora_jax.config.get_config, changed"
        )
    return made.lock()


def fields(config: ml_collections.ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by name, such as `train.steps`."""
    flat = {}
    for key, value in config.items():
        section = isinstance(value, ml_collections.ConfigDict | dict)
        flat.update(fields(value, f"{prefix}{key}.") if section else {f"{prefix}{key}": value})
    return flat


def adapter_config(config: ml_collections.ConfigDict) -> AdapterConfig:
    """The AdapterConfig that `config.adapter` describes. Raises UserError."""
    return AdapterConfig(**config.adapter.to_dict())


def names(value: str) -> list[str]:
    """`"a, b"` as `["a", "b"]`."""
    return [name.strip() for name in value.split(",") if name.strip()]


def task_weights(config: ml_collections.ConfigDict) -> list[float] | None:
    """The share of each of `config.data.tasks`, mixtures spelt out; None where none is asked for. Raises UserError."""
    if config.data.weights is None:
        return None
    tasks, value = expand(names(config.data.tasks)), config.data.weights.replace(" ", "")
    try:
        weights = [float(weight) for weight in names(value)]
    except ValueError:
        weights = []
    well = [math.isfinite(weight) and weight > 0 for weight in weights]
    if (
        len(weights) != len(tasks)
        or not all(well)
        or min(weights) < 1e-6 * max(weights)
        or ",," in value
    ):
        raise UserError(
            f"config.data.weights={config.data.weights!r} must be {len(tasks)} positive numbers with commas between, "
            f"none below a millionth of another, for {', '.join(tasks)}"
        )
    return weights


def weights_source(config: ml_collections.ConfigDict) -> str:
    """Where the base comes from: `config.model.weights`, or the preset's own weights."""
    return config.model.weights or config.model.preset


def learning_rate(config: ml_collections.ConfigDict) -> float:
    """The peak rate: the given one, or the method's own."""
    rate, method = config.optim.learning_rate, config.adapter.method
    if rate is None and method not in LEARNING_RATES:
        raise UserError(
            f"config.optim.learning_rate is unset, and {method} has none of its own in LEARNING_RATES"
        )
    return LEARNING_RATES[method] if rate is None else rate


def warmup_steps(config: ml_collections.ConfigDict) -> int:
    """The given number of warm-up steps, or 3 % of all."""
    given = config.optim.warmup_steps
    return max(1, round(0.03 * config.train.steps)) if given is None else given


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field whose value cannot work; reads no weights and no data."""

    def check(field: str, ok: bool, what: str) -> None:
        value = config
        for part in field.split("."):
            value = value[part]
        if not ok:
            raise UserError(f"config.{field}={value!r} {what}")

    there_values = fields(config)
    expected, there = fields(get_config()).keys(), there_values.keys()
    for field in sorted(expected ^ there):
        if field in there:
            raise UserError(f"config.{field} is no field; {near_misses(field, expected)}")
        raise UserError(f"config.{field} is missing; start from flora_jax.config.get_config()")
    for field, default in fields(get_config()).items():
        value = there_values[field]
        if default is None:  # unset, which a placeholder may be
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, bool | str):
            check(field, isinstance(value, type(default)), f"must be a {type(default).__name__}")
        elif isinstance(default, int):
            check(
                field,
                number and isinstance(value, int) and abs(value) < 2**63,
                "must be an integer of 64 bits",
            )
        else:
            check(field, number and math.isfinite(value), "must be a finite number")
    for field, known in CHOICES.items():
        section, name = field.split(".")
        value = config[section][name]
        check(field, value in known, f"is unknown; {near_misses(str(value), known)}")
    preset = config.model.preset
    check("model.preset", preset in PRESETS, f"is unknown; {near_misses(str(preset), PRESETS)}")
    method = config.adapter.method
    check("adapter.method", method in METHODS, f"is unknown; {near_misses(str(method), METHODS)}")
    adapter = adapter_config(config)
    weights = config.model.weights
    if weights in (None, "random", *PRESETS):
        adapter.check(LlamaConfig.preset(weights if weights in PRESETS else preset).widths)
    check("data.tasks", bool(names(config.data.tasks)), "names no task")
    for field in ("data.tasks", "eval.tasks"):
        tasks = expand(names(config[field.split(".")[0]].tasks))
        check(field, len(tasks) == len(set(tasks)), "names a task twice")
    task_weights(config)
    for field in (
        "data.max_length",
        "data.validation_size",
        "train.steps",
        "train.batch_size",
        "train.accumulation",
        "train.log_every",
        "train.save_every",
        "train.keep",
        "train.chunk_tokens",
        "eval.limit",
        "eval.batch_size",
        "eval.max_length",
        "distributed.processes",
    ):
        section, name = field.split(".")
        check(field, config[section][name] >= 1, "must be at least 1")
    for field in ("train.seed", "train.eval_every", "optim.weight_decay", "optim.clip_norm"):
        section, name = field.split(".")
        check(field, config[section][name] >= 0, "must not be negative")
    for field in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        value = config.mesh[field.split(".")[1]]
        check(
            field,
            value >= 1 or value == -1,
            "must be at least 1, or -1 for the rest of the devices",
        )
    check(
        "eval.max_length", config.eval.max_length >= 2, "must be at least 2: a prompt and an answer"
    )
    check("data.limit", config.data.limit is None or config.data.limit >= 1, "must be at least 1")
    given = config.eval.max_new_tokens
    check("eval.max_new_tokens", given is None or given >= 1, "must be at least 1")
    rate = learning_rate(config)
    check("optim.learning_rate", math.isfinite(rate) and rate > 0, "must be a positive number")
    check("optim.final_fraction", 0 <= config.optim.final_fraction <= 1, "must be in [0, 1]")
    for field in ("optim.b1", "optim.b2"):
        check(field, 0 <= config.optim[field.split(".")[1]] < 1, "must be in [0, 1)")
    floats = np.finfo(np.float32)
    check(
        "optim.eps",
        floats.tiny <= config.optim.eps <= floats.max,
        "must be positive and finite in float32",
    )
    check("train.seed", config.train.seed < 2**32, "must be below 2**32")
    warmup = warmup_steps(config)
    steps = config.train.steps
    check("optim.warmup_steps", 0 <= warmup <= steps, f"must be between 0 and train.steps={steps}")
    rows, micro = config.train.batch_size, config.train.accumulation
    check("train.accumulation", rows % micro == 0, f"must divide train.batch_size={rows}")
    processes = config.distributed.processes
    auto = config.distributed.auto
    # Once they have found each other, the number that was detected stands in the configuration.
    detected = jax.process_count() if auto and jax.distributed.is_initialized() else 1
    beside = "is set beside distributed.auto, which detects it; leave one of the two out"
    check("distributed.coordinator", not auto or config.distributed.coordinator is None, beside)
    check("distributed.processes", not auto or processes in (1, detected), beside)
    check("distributed.process_id", not auto or config.distributed.process_id == 0, beside)
    check(
        "train.batch_size",
        rows % processes == 0,
        f"must be a multiple of distributed.processes={processes}",
    )
    check(
        "distributed.process_id",
        0 <= config.distributed.process_id < processes,
        f"must be in 0 … {processes - 1}",
    )
    check(
        "distributed.coordinator",
        auto or bool(config.distributed.coordinator) == (processes > 1),
        f"must be host:port of process 0 for several processes and unset for one; there are {processes}",
    )
    host, _, port = (config.distributed.coordinator or "host:1").rpartition(":")
    check(
        "distributed.coordinator",
        bool(host) and port.isdecimal() and 1 <= int(port) < 2**16,
        "must be host:port, the port from 1 to 65535",
    )
    check(
        "eval.tasks",
        processes == 1 or not config.eval.tasks,
        f"needs one process, not {processes}; score the adapter with flora_jax.evaluate instead",
    )
    theirs = (config.eval.protocol, config.data.prompt_style) == ("llm_adapters", "llm_adapters")
    check(
        "eval.published_faults",
        theirs or not config.eval.published_faults,
        "are those of eval.protocol and data.prompt_style 'llm_adapters'",
    )
    data_dir = config.data.dir
    check(
        "data.dir",
        data_dir in (None, "tfds")
        or os.path.isdir(os.path.expanduser(data_dir.removeprefix("tfds:"))),
        "is not a directory (nor tfds, nor tfds:DIR)",
    )


def generator_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of `config.data.generator` that are set."""
    return {k: v for k, v in config.data.generator.to_dict().items() if v is not None}
