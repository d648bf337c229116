"""The result of a run, read back from its directory and exported with its base."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from flora_jax.adapters import AdapterConfig, Tree, abstract_adapter
from flora_jax.config import adapter_config as make_adapter_config
from flora_jax.config import check_choices, fields, get_config, weights_source
from flora_jax.errors import UserError, near_misses, require, require_known, told_of
from flora_jax.files import read_json
from flora_jax.interop.adapter_files import check_fingerprint, load_adapter
from flora_jax.interop.exports import check_format, hand_over, trained_over
from flora_jax.interop.formats import Trained
from flora_jax.interop.model_card import describe_run
from flora_jax.models.config import DTYPES, LlamaConfig
from flora_jax.models.llama import abstract_base
from flora_jax.models.tokenizer import load_tokenizer
from flora_jax.training.checkpoints import Checkpoints, check_meta, readable
from flora_jax.training.optimizer import trains
from flora_jax.training.rules import partition
from flora_jax.training.run import load_base, model_config


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
    with told_of(str(path)):
        check_choices(config)
        for name in ("dtype", "param_dtype"):
            value = config.model[name]
            require_known(value, DTYPES, f"config.model.{name}={value!r}")  # what auto stood for
    return config


def load_trained(
    workdir: Path, config: ml_collections.ConfigDict, adapter: AdapterConfig, step: int
) -> tuple[dict[str, Tree], str]:
    """`(trained, fingerprint)`: the trained leaves at `step`, and the fingerprint of their base.

    trained: `{"adapter": tree, "params": base leaves that trained}`, float32. Raises UserError if
    the checkpoint was not kept, is damaged, or is of another adapter.
    """
    directory = workdir / "checkpoints"
    # Checked first: opening it would make it.
    require(
        directory.is_dir(), f"--step {step}: there is no such checkpoint; none is in {directory}"
    )
    with contextlib.closing(Checkpoints(directory, config.train.keep)) as checkpoints:
        remedy = _other_steps(directory, checkpoints.steps, step)
        architecture = model_config(config)
        shapes = {
            "params": abstract_base(architecture, quantization=config.model.quantization),
            "adapter": abstract_adapter(architecture, adapter),
        }
        wanted, _ = partition(shapes, trains(config, shapes))
        where = f"checkpoint {step} of --workdir={workdir}"
        with readable(where, remedy):
            meta = checkpoints.meta(step)
            check_meta(meta, adapter, meta["base_fingerprint"], {}, where)
            trained = checkpoints.trained(step, wanted)
    return {"adapter": {}, "params": {}, **trained}, meta["base_fingerprint"]


def _other_steps(directory: Path, steps: Sequence[int], step: int) -> str:
    """The remedy if the checkpoint of `step` is damaged. Raises UserError if there is none."""
    if step not in steps:
        there = "none is"
        if steps:
            there = f"those of steps {', '.join(map(str, steps))} are"
        raise UserError(f"--step {step}: there is no such checkpoint in {directory}; {there} there")
    others = " or ".join(str(other) for other in steps if other != step)
    if not others:
        return "leave --step out, or train anew"
    return f"take another with --step {others}"


def load_run(
    workdir: Path, step: int | None, form: str, dtype: str | None
) -> tuple[Trained, dict[str, Any]]:
    """The model that a run trained, at its best step or at a kept one, and the part of its
    `eval.json` about that step.

    step: None for the best; form, dtype: of the export. Raises UserError if the run cannot be read,
    and before any weights are loaded if the format cannot hold it.
    """
    config = read_run(workdir)
    adapter_config = make_adapter_config(config)
    architecture = model_config(config)
    source = weights_source(config)
    require(
        step is not None or (workdir / "adapter").is_dir(),
        f"--workdir={workdir}: the run has not ended (no adapter/); let it end, or name a kept "
        "--step",
    )
    summary: dict[str, Any] = {}
    if (workdir / "eval.json").exists():
        summary = read_json(workdir / "eval.json")
    describe_run(summary)  # raises, before weights are loaded, for a summary that no run wrote
    if step is None:
        trained = _read_best(workdir / "adapter", architecture, adapter_config)
    else:
        trained, fingerprint = load_trained(workdir, config, adapter_config, step)
        summary = _about_step(summary, step)
    check_format(form, dtype or config.model.param_dtype, adapter_config, trained["params"])
    tokenizer = load_tokenizer(source, config.data.template_arguments)
    parts = {"config": architecture, "adapter_config": adapter_config, "tokenizer": tokenizer}
    floats = functools.partial(_load_floats, config)
    made = trained_over(source, load_base(config), trained, **parts, floats=floats)
    if step is None:
        check_fingerprint(workdir / "adapter", made.fingerprint)
    else:
        require(
            made.fingerprint == fingerprint,
            f"checkpoint {step} of --workdir={workdir} was trained on a base with fingerprint "
            f"{fingerprint}, but {source!r} now has {made.fingerprint}",
        )
    return made, summary


def _load_floats(config: ml_collections.ConfigDict) -> Tree:
    """The run's base in floats."""
    config = config.copy_and_resolve_references()
    config.model.quantization = "none"
    return load_base(config)


def _read_best(directory: Path, config: LlamaConfig, adapter_config: AdapterConfig) -> Tree:
    """The adapter that a run left. Raises UserError if its configuration is not the run's."""
    found, trained = load_adapter(directory, config)
    require(
        dataclasses.replace(found, zero_init=adapter_config.zero_init) == adapter_config,
        f"{directory} is of {found}, but config.json beside it is of {adapter_config}",
    )
    return trained


def _about_step(summary: dict[str, Any], step: int) -> dict[str, Any]:
    """The summary, without its scores if they are of another step."""
    if summary.get("step") == step:
        return summary
    kept = {name: summary[name] for name in ("data", "validation_losses") if name in summary}
    return {**kept, "step": step}


def export_run(
    workdir: Path,
    form: str,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Exports the model that a run of `flora_jax.train` trained, and returns the report of
    `export`.

    step: a kept one, None for the best; command: the command line, for the model card; other
    arguments: as in `hand_over`. Raises UserError as `load_run` and `hand_over` do.
    """
    trained, summary = load_run(Path(workdir), step, form, dtype)
    how = {"dtype": dtype, "overwrite": overwrite, "command": command}
    return hand_over(trained, form, out, summary=summary, **how)
