"""Trained adapters as directories of safetensors and JSON: written atomically, read with every
shape checked.

Two layouts. `lora` and `pf_lora` without trained base leaves are PEFT LoRA directories, which PEFT,
vLLM and the like load as they are; what PEFT has no field for stands beside them in
`flora_config.json`. Everything else is ours:

    adapter_config.json         {"peft_type": "FLORA", "format_version": 2, "method": "ffba", …}
    adapter_model.safetensors   adapter/layers/attention/qkv/A, … and base leaves that trained,
                                params/final_norm/scale, …; float32

A run of `flora_jax.train` adds `trained_on.json`: the tasks and prompts that the adapter has seen.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flora_jax.adapters import (
    NOT_QUANTIZED,
    QUANTIZATIONS,
    AdapterConfig,
    Quantized,
    Tree,
    abstract_adapter,
    check_tree,
    paths,
    quantization_of,
    quantize_layers,
    shapes_of,
    tree,
)
from flora_jax.device import check_jax
from flora_jax.errors import UserError, require, told_of
from flora_jax.files import check_file, new_directory, read_json, write_json
from flora_jax.interop.peft_lora import (
    CONFIG,
    EXTRAS,
    WEIGHTS,
    from_peft,
    make_config,
    peft_config,
    to_peft,
)
from flora_jax.interop.vllm_adapter import KIND
from flora_jax.models.adapted import Adapted, base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import abstract_base
from flora_jax.models.loading import FLOATS, load_pretrained
from flora_jax.models.tokenizer import check_tokenizer, load_tokenizer

# 1 differs in zflora alone, whose channels passed the norms as they were and ended in x.
FORMAT_VERSION = 2
TRAINED_ON = "trained_on.json"
# By peft_type: the file that states our format_version.
_VERSIONED = {"FLORA": CONFIG, "LORA": EXTRAS}
_HAS = f"; an adapter directory has {CONFIG} and {WEIGHTS}"


def save_adapter(
    directory: str | os.PathLike,
    trained: Mapping[str, Tree],
    config: LlamaConfig,
    adapter_config: AdapterConfig,
    base_model: str,
    fingerprint: str,
    trained_on: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter, and the base leaves that trained with it, to `directory` in float32.

    Args:
      directory: appears complete or not at all; replaces only one that this function wrote.
      trained: {"adapter": tree, "params": base leaves that trained, {} if none}.
      base_model: the source that the base was loaded from.
      fingerprint: the base's `base_fingerprint`.
      trained_on: `tasks`, and `prompts` as digests, for `read_trained_on`.
      quantization: the base's `quantization_of`.

    Raises UserError if `directory` is anything else, and for leaves that do not fit the
    configurations.
    """
    directory = Path(directory)
    require(
        not directory.exists() or _is_ours(directory),
        f"{directory} exists and is no adapter directory of ours; name a new one",
    )
    _check_leaves(trained, config, adapter_config, str(directory))
    with new_directory(directory) as new:
        about = (base_model, fingerprint, np.float32, quantization)
        write_adapter_files(new, trained, config, adapter_config, *about)
        if trained_on is not None:
            write_json(new / TRAINED_ON, trained_on)


def read_trained_on(directory: str | os.PathLike) -> tuple[list[str], set[str]] | None:
    """The tasks that an adapter was trained on, and the digests of its training prompts.

    None without a record of them. Raises UserError for a damaged one.
    """
    path = Path(directory) / TRAINED_ON
    if not path.is_file():
        return None
    stored = read_json(path)
    for field in ("tasks", "prompts"):
        items = stored.get(field)
        require(
            isinstance(items, list) and all(isinstance(item, str) for item in items),
            f"{path}: field {field!r} must be a list of texts; delete the file to score all "
            "the same",
        )
    return stored["tasks"], set(stored["prompts"])


def write_adapter_files(
    directory: Path,
    trained: Mapping[str, Tree],
    config: LlamaConfig,
    adapter_config: AdapterConfig,
    base_model: str,
    fingerprint: str,
    dtype: Any = np.float32,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes the files of `save_adapter` to an existing directory; dtype: the tensors'."""
    adapter = trained.get("adapter", {})
    params = trained.get("params", {})
    about = {
        "format_version": FORMAT_VERSION,
        "method": adapter_config.method,
        "fingerprint": fingerprint,
    }
    if quantization and quantization["format"] != "none":
        about["quantization"] = dict(quantization)
    if adapter_config.method in ("lora", "pf_lora") and not params:
        files = {CONFIG: peft_config(adapter_config, base_model), EXTRAS: about}
        tensors = to_peft(adapter, config, adapter_config)
    else:
        fields = dataclasses.asdict(adapter_config)
        files = {
            CONFIG: {"peft_type": "FLORA", **about, "base_model_name_or_path": base_model, **fields}
        }
        tensors = paths({"adapter": adapter, "params": params})
    for name, content in files.items():
        write_json(directory / name, content)
    write_tensors(directory, tensors, dtype)


def write_tensors(directory: Path, tensors: Mapping[str, Any], dtype: Any) -> None:
    """Writes the tensors to the file WEIGHTS in `dtype`, marked as PyTorch's."""
    tensors = {
        name: np.ascontiguousarray(np.asarray(value), dtype) for name, value in tensors.items()
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def load_adapter(
    directory: str | os.PathLike, config: LlamaConfig, fingerprint: str | None = None
) -> tuple[AdapterConfig, dict[str, Tree]]:
    """Reads a directory of `save_adapter`, or anybody's PEFT LoRA of a Llama.

    Returns `(adapter_config, trained)`, trained = {"adapter": tree, "params": tree} in numpy
    float32. `fingerprint`, where given, is compared with the stored one; PEFT's own directories
    have none. Raises UserError for a directory that is missing, damaged, of another format or base,
    or that does not fit `config`, and for PEFT features that we lack.
    """
    directory = Path(directory)
    require(directory.is_dir(), f"{directory}: there is no such adapter directory")
    stored, extras = _read_about(directory)
    if fingerprint is not None:
        check_fingerprint(directory, fingerprint)
    tensors = read_tensors(directory)
    for path, value in tensors.items():
        require(
            np.isfinite(value).all(),
            f"{directory / WEIGHTS}: {path!r} holds a value that is not finite; train the "
            "adapter anew",
        )
    if stored["peft_type"] == "LORA":
        return from_peft(directory, stored, extras.get("method", "lora"), tensors, config)
    adapter_config = _adapter_config(directory, stored)
    leaves = {"adapter": {}, "params": {}}
    for path, value in tensors.items():
        collection, _, rest = path.partition("/")
        require(
            collection in leaves,
            f"{directory / WEIGHTS}: leaf {path!r} belongs neither to adapter/ nor to params/",
        )
        leaves[collection][rest] = value
    trained = {name: tree(own) for name, own in leaves.items()}
    _check_leaves(trained, config, adapter_config, str(directory / WEIGHTS))
    return adapter_config, trained


def _read_about(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of CONFIG and of EXTRAS, `{}` if there is none.

    Raises UserError for a kind or version that is not read.
    """
    stored = read_json(directory / CONFIG, _HAS)
    extras = _read_extras(directory)
    kind = stored.get("peft_type")
    require(
        kind != KIND,
        f"{directory / CONFIG}: peft_type={kind!r} is an export for vLLM; what is read here is "
        "the adapter of the run that it was made from",
    )
    require(
        kind in ("FLORA", "LORA"),
        f"{directory / CONFIG}: peft_type={kind!r} is not supported; FLORA and LORA are",
    )
    name = _VERSIONED[kind]
    about = {CONFIG: stored, EXTRAS: extras}[name]
    version = about.get("format_version")
    require(
        not about or version in (1, FORMAT_VERSION),
        f"{directory / name}: format_version={version!r} is unknown; 1 and {FORMAT_VERSION} are "
        "what is read",
    )
    require(
        version != 1 or about.get("method") != "zflora",
        f"{directory / name}: format_version=1 of zflora is no longer computed: its channels "
        "passed the norms as they were; train it anew",
    )
    return stored, extras


def _read_extras(directory: Path) -> dict[str, Any]:
    path = directory / EXTRAS
    if not path.exists():
        return {}
    return read_json(path)


def check_fingerprint(directory: Path, fingerprint: str) -> None:
    """Raises UserError if the adapter states another base's fingerprint."""
    stored = read_json(directory / CONFIG, _HAS)
    found = {**_read_extras(directory), **stored}.get("fingerprint", fingerprint)
    require(
        found == fingerprint,
        f"{directory}: the adapter was trained on another base, "
        f"{stored.get('base_model_name_or_path')!r} with fingerprint {found}; this base has "
        f"{fingerprint}",
    )


def quantization_under(directory: Path) -> dict[str, Any]:
    """The `quantization_of` the base that an adapter was trained over.

    Raises UserError for a damaged field.
    """
    stored = read_json(directory / CONFIG, _HAS)
    found = {**_read_extras(directory), **stored}.get("quantization", NOT_QUANTIZED)
    require(
        isinstance(found, dict)
        and found.get("format") in QUANTIZATIONS
        and isinstance(found.get("error"), float),
        f"{directory / CONFIG}: quantization={found!r} must have a format, one of "
        f"{', '.join(QUANTIZATIONS)}, and the error of it",
    )
    return found


def _warn_of_quantization(directory: Path, base: Tree) -> None:
    """Prints a warning if the base is quantised otherwise than while the adapter trained."""
    theirs = quantization_under(directory)
    ours = quantization_of(base)
    if theirs["format"] != ours["format"]:
        before, now = map(_base_in_words, (theirs, ours))
        print(f"warning: {directory} was trained over {before}, this is {now}", file=sys.stderr)


def _base_in_words(quantization: Mapping[str, Any]) -> str:
    if quantization["format"] == "none":
        return "the float base"
    return f"{quantization['format']} ({quantization['error']:.2%} from the floats)"


def load_adapted(
    source: str,
    directory: str | os.PathLike | None,
    dtype: Any = np.float32,
    quantization: str = "none",
    template_arguments: str = "",
) -> Adapted:
    """A base with its tokenizer, and the adapter of `directory` (None: no adapter).

    source, dtype, quantization: as `load_pretrained` takes them; template_arguments: as
    `load_tokenizer` does. Base leaves that trained with the adapter replace the base's own. If the
    adapter was trained over another quantisation, a warning goes to stderr. Raises UserError for
    what those two functions refuse, and for an adapter of another base.
    """
    check_jax()
    if directory is not None:
        _check_there(Path(directory))  # before a model is loaded
    tokenizer = load_tokenizer(source, template_arguments)
    config, base = load_pretrained(source, dtype, quantization=quantization)
    check_tokenizer(tokenizer, config)
    fingerprint = base_fingerprint(base)
    bare = Adapted(config=config, base=base, tokenizer=tokenizer, fingerprint=fingerprint)
    if directory is None:
        return bare
    adapter_config, trained = load_adapter(directory, config, fingerprint)
    _warn_of_quantization(Path(directory), base)
    leaves = paths(base)
    for path, value in paths(trained["params"]).items():
        if isinstance(leaves[path], Quantized):
            leaves[path] = quantize_layers(jnp.asarray(value), quantization)
        else:
            leaves[path] = jnp.asarray(value, leaves[path].dtype)
    return dataclasses.replace(
        bare,
        base=tree(leaves),
        adapter_config=adapter_config,
        adapter=jax.tree.map(jnp.asarray, trained["adapter"]),
    )


def _check_there(directory: Path) -> None:
    if (directory / CONFIG).is_file():
        return
    below = directory / "adapter"
    at = f"an adapter directory has {CONFIG} and {WEIGHTS}"
    if (below / CONFIG).is_file():
        at = f"it is in {below}"
    raise UserError(f"{directory}: there is no adapter here; {at}")


def _check_leaves(
    trained: Mapping[str, Tree], config: LlamaConfig, adapter_config: AdapterConfig, where: str
) -> None:
    """Raises UserError unless the adapter has exactly the method's leaves, and `params` none but
    the base's."""
    with told_of(where):
        adapter_config.check(config.widths)

    def say(path: str, there: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> str:
        return (
            f"{where}: leaf {path}: expected {wanted or 'no such leaf'} for this model, found "
            f"{there or 'nothing'}"
        )

    def shapes(name: str, tree: Tree) -> dict[str, tuple[int, ...]]:
        return {f"{name}/{path}": shape for path, shape in shapes_of(tree).items()}

    adapter = shapes("adapter", trained.get("adapter", {}))
    check_tree(adapter, shapes("adapter", abstract_adapter(config, adapter_config)), say)
    params = shapes("params", trained.get("params", {}))
    check_tree(params, shapes("params", abstract_base(config)), say, partly=True)


def _adapter_config(directory: Path, stored: Mapping[str, Any]) -> AdapterConfig:
    where = directory / CONFIG
    names = [field.name for field in dataclasses.fields(AdapterConfig)]
    # The first directories of this format lack the field. It changes how training begins, not what
    # is computed.
    stored = {"zero_init": None, **stored}
    missing = [name for name in names if name not in stored]
    if missing:
        raise UserError(f"{where}: field {missing[0]!r} is missing")
    fields = {name: stored[name] for name in names}
    for name in ("targets", "add_to"):
        require(
            isinstance(fields[name], list),
            f"{where}: {name}={fields[name]!r} must be a list of projections",
        )
    return make_config(where, **fields)


def _is_ours(directory: Path) -> bool:
    """Whether `save_adapter` wrote the directory: a user's own files are never replaced."""
    if not (directory / CONFIG).is_file():
        return False
    if (directory / EXTRAS).is_file():
        return True
    return read_json(directory / CONFIG, _HAS).get("peft_type") == "FLORA"


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of WEIGHTS as float32.

    Raises UserError for a file that is absent or damaged, or holds anything but floats.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        hint = ""
        if (directory / "adapter_model.bin").is_file():
            hint = (
                "; adapter_model.bin is a pickle and is not opened: convert it to safetensors first"
            )
        raise UserError(f"{path} is missing{hint}")
    check_file(path)
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            for name in names:
                if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise UserError(
                        f"{path}: tensor {name!r} is stored as {kind}; {', '.join(FLOATS)} are read"
                    )
            with np.errstate(over="ignore"):  # load_adapter refuses infinities by name
                return {name: file.get_tensor(name).astype(np.float32) for name in names}
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from None
