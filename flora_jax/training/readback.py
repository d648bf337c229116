"""A run's directory read back: its configuration, and what had trained at a step that was kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from flora_jax.adapters import AdapterConfig, Tree, abstract_adapter
from flora_jax.config import fields, get_config
from flora_jax.errors import UserError, near_misses, require
from flora_jax.files import read_json
from flora_jax.models.llama import abstract_base
from flora_jax.training.checkpoints import Checkpoints, check_meta, readable
from flora_jax.training.optimizer import trains
from flora_jax.training.rules import partition
from flora_jax.training.run import model_config


def read_run(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `workdir`. Raises UserError if it holds none."""
    require(workdir.is_dir(), f"--workdir={workdir}: there is no such directory")
    path = workdir / "config.json"
    stored = read_json(path, "; a run of flora_jax.train has one").get("config")
    config = get_config()  # a field that is newer than the run has its default
    known = fields(config)
    require(
        isinstance(stored, dict), f"{path}: field 'config' is missing; a run's configuration has it"
    )
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


def load_trained(
    workdir: Path, config: ml_collections.ConfigDict, adapter: AdapterConfig, step: int
) -> tuple[dict[str, Tree], str]:
    """What had trained at the checkpoint of `step`, and the fingerprint of its base.

    That is `{"adapter": tree, "params": base leaves that trained}`, float32. Raises UserError if it
    was not kept, is damaged, or is of another adapter.
    """
    directory = workdir / "checkpoints"
    if not directory.is_dir():  # opening makes one
        raise UserError(f"--step {step}: there is no such checkpoint; none is in {directory}")
    with contextlib.closing(Checkpoints(directory, config.train.keep)) as checkpoints:
        remedy = _other_steps(directory, checkpoints.steps, step)
        wanted = _trained_shapes(config, adapter)
        where = f"checkpoint {step} of --workdir={workdir}"
        with readable(where, remedy):
            meta = checkpoints.meta(step)
            check_meta(meta, adapter, meta["base_fingerprint"], {}, where)
            trained = checkpoints.trained(step, wanted)
    return {"adapter": {}, "params": {}, **trained}, meta["base_fingerprint"]


def _other_steps(directory: Path, steps: Sequence[int], step: int) -> str:
    """What would do where a damaged checkpoint is that of `step`. Raises UserError for no step."""
    if step not in steps:
        there = f"those of steps {', '.join(map(str, steps))} are" if steps else "none is"
        raise UserError(f"--step {step}: there is no such checkpoint in {directory}; {there} there")
    others = " or ".join(str(other) for other in steps if other != step)
    if not others:
        return "leave --step out, or train anew"
    return f"take another with --step {others}"


def _trained_shapes(config: ml_collections.ConfigDict, adapter: AdapterConfig) -> Tree:
    """The shapes of all that trains, as a checkpoint holds them."""
    architecture = model_config(config)
    shapes = {
        "params": abstract_base(architecture),
        "adapter": abstract_adapter(architecture, adapter),
    }
    trainable, _ = partition(shapes, trains(config, shapes))
    return trainable
