"""What a run trained, read back with its base to be exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flora_jax.adapters import AdapterConfig, Tree
from flora_jax.config import adapter_config as make_adapter_config
from flora_jax.config import weights_source
from flora_jax.errors import UserError, require
from flora_jax.files import read_json
from flora_jax.interop.adapter_files import check_fingerprint, load_adapter
from flora_jax.interop.exports import check_format
from flora_jax.interop.formats import Trained
from flora_jax.interop.handover import hand_over, trained_over
from flora_jax.interop.model_card import describe_run
from flora_jax.models.config import LlamaConfig
from flora_jax.models.tokenizer import load_tokenizer
from flora_jax.training.readback import load_trained, read_run
from flora_jax.training.run import load_base, model_config


def load_run(
    workdir: Path, step: int | None, form: str, dtype: str | None
) -> tuple[Trained, dict[str, Any]]:
    """What a run trained, at its best step or at one that it kept, and its `eval.json`, as far as
    that is about the same step. Raises UserError, before any weights are loaded if the format
    cannot hold it."""
    config = read_run(workdir)
    adapter_config = make_adapter_config(config)
    architecture = model_config(config)
    source = weights_source(config)
    require(
        step is not None or (workdir / "adapter").is_dir(),
        f"--workdir={workdir}: the run has not ended (no adapter/); let it end, or name a kept "
        "--step",
    )
    summary = read_json(workdir / "eval.json") if (workdir / "eval.json").exists() else {}
    describe_run(summary)  # what is wrong with it is said before weights are loaded
    if step is None:
        trained = _read_best(workdir / "adapter", architecture, adapter_config)
    else:
        trained, fingerprint = load_trained(workdir, config, adapter_config, step)
        summary = _about_step(summary, step)
    check_format(form, dtype or config.model.param_dtype, adapter_config, trained["params"])
    tokenizer = load_tokenizer(source)
    parts = {"config": architecture, "adapter_config": adapter_config, "tokenizer": tokenizer}
    made = trained_over(source, load_base(config), trained, **parts)
    if step is None:
        check_fingerprint(workdir / "adapter", made.fingerprint)
    elif made.fingerprint != fingerprint:
        raise UserError(
            f"checkpoint {step} of --workdir={workdir} was trained on a base with fingerprint "
            f"{fingerprint}, but {source!r} now has {made.fingerprint}"
        )
    return made, summary


def _read_best(directory: Path, config: LlamaConfig, adapter_config: AdapterConfig) -> Tree:
    """The adapter that a run left. Raises UserError if it is not of the run's configuration."""
    found, trained = load_adapter(directory, config)
    require(
        dataclasses.replace(found, zero_init=adapter_config.zero_init) == adapter_config,
        f"{directory} is of {found}, but config.json beside it is of {adapter_config}",
    )
    return trained


def _about_step(summary: dict[str, Any], step: int) -> dict[str, Any]:
    """The summary without scores, where they are those of another step."""
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
    """Exports what a run of `flora_jax.train` trained, at its best step or at one that it kept; the
    report, as `export` returns it. command: that asked for it, for the model card."""
    trained, summary = load_run(Path(workdir), step, form, dtype)
    how = {"dtype": dtype, "overwrite": overwrite, "command": command}
    return hand_over(trained, form, out, summary=summary, **how)
