"""A run's directory read back: its configuration, its base, and what had trained at any step that was kept."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections

from flora_jax.adapters import AdapterConfig, abstract_adapter
from flora_jax.config import fields, get_config, weights_source
from flora_jax.device import check_jax
from flora_jax.errors import UserError, near_misses
from flora_jax.files import read_json
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import abstract_base, init_base
from flora_jax.models.loading import check_weights, load_config, load_pretrained
from flora_jax.models.tokenizer import check_tokenizer, load_tokenizer
from flora_jax.training.checkpoints import Checkpoints, check_meta, readable
from flora_jax.training.optimizer import trains
from flora_jax.training.rules import partition, paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tree = dict[str, Any]


def read_run(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `workdir`. Raises UserError if it holds none."""
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: there is no such directory")
    path = workdir / "config.json"
    stored = read_json(path, "; a run of flora_jax.train has one").get("config")
    config = get_config()  # a field that is newer than the run has its default
    known = fields(config)
    if not isinstance(stored, dict):
        raise UserError(f"{path}: field 'config' is missing; a run's configuration has it")
    for name, value in fields(stored).items():
        if name not in known:
            raise UserError(
                f"{path}: config.{name} is no field of a run; {near_misses(name, known)}"
            )
        *sections, field = name.split(".")
        part = functools.reduce(lambda part, section: part[section], sections, config)
        try:
            part[field] = value
        except (TypeError, ValueError):
            raise UserError(f"{path}: config.{name}={value!r} is of the wrong type") from None
    return config


def model_config(config: ml_collections.ConfigDict) -> LlamaConfig:
    """The architecture that a run trains."""
    source = weights_source(config)
    return LlamaConfig.preset(config.model.preset) if source == "random" else load_config(source)


def check_base(config: ml_collections.ConfigDict) -> tuple[LlamaConfig, PreTrainedTokenizerFast]:
    """A run's architecture and tokenizer. Raises UserError if they do not fit each other, or weights that are at hand
    are not whole."""
    source = weights_source(config)
    architecture, tokenizer = model_config(config), load_tokenizer(source)
    check_tokenizer(tokenizer, architecture)
    if source != "random":
        check_weights(source)
    return architecture, tokenizer


def load_base(config: ml_collections.ConfigDict, shardings: Tree | None = None) -> Tree:
    """The base's parameters as a run starts from them: loaded, or drawn from its seed."""
    check_jax()
    dtype, source = jnp.dtype(config.model.param_dtype), weights_source(config)
    if source == "random":
        return init_base(run_keys(config)[0], model_config(config), dtype, shardings)
    return load_pretrained(
        source, dtype, shardings=None if shardings is None else paths(shardings).__getitem__
    )[1]


def run_keys(config: ml_collections.ConfigDict) -> jax.Array:
    """The run's three keys: of a random base, of the adapter's start, of dropout."""
    return jax.random.split(jax.random.key(config.train.seed), 3)


def load_trained(
    workdir: Path, config: ml_collections.ConfigDict, adapter: AdapterConfig, step: int
) -> tuple[dict[str, Tree], str]:
    """`{"adapter": tree, "params": base leaves that trained}`, float32, of the checkpoint at `step`, and its base's
    fingerprint. Raises UserError if it was not kept, is damaged, or is of another adapter."""
    directory = workdir / "checkpoints"
    if not directory.is_dir():  # opening makes one
        raise UserError(f"--step {step}: there is no such checkpoint; none is in {directory}")
    with contextlib.closing(Checkpoints(directory, config.train.keep)) as checkpoints:
        steps = checkpoints.steps
        if step not in steps:
            there = f"those of steps {', '.join(map(str, steps))} are" if steps else "none is"
            raise UserError(
                f"--step {step}: there is no such checkpoint in {directory}; {there} there"
            )
        architecture, where = model_config(config), f"checkpoint {step} of --workdir={workdir}"
        shapes = {
            "params": abstract_base(architecture),
            "adapter": abstract_adapter(architecture, adapter),
        }
        wanted = partition(shapes, trains(config, shapes))[0]
        others = " or ".join(str(other) for other in steps if other != step)
        remedy = (
            f"take another with --step {others}" if others else "leave --step out, or train anew"
        )
        with readable(where, remedy):
            meta = checkpoints.meta(step)
            check_meta(meta, adapter, meta["base_fingerprint"], {}, where)
            trained = checkpoints.trained(step, wanted)
    return {"adapter": {}, "params": {}, **trained}, meta["base_fingerprint"]
