"""Safetensors files written and read one tensor at a time.

The library's own writer wants all of a file's tensors in memory at once, and its reader copies what
it reads. Without them a model that nearly fills the memory can be exported. The format is a length,
a JSON header and the bytes of the tensors:
https://github.com/safetensors/safetensors#format.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from flora_jax.errors import UserError, require
from flora_jax.files import read_json, write_json

SHARD_BYTES = 4_900_000_000  # a file with its header stays under 5 GB
INDEX = "model.safetensors.index.json"
_BLOCK = 2**22  # values
_KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_shards(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
    tensors: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards with their index, to `directory`.

    shapes: name -> shape of every tensor, in any order; tensors: `(name, array)`, taken one after
    another and cast to `dtype`, so that only one is held at a time; shard_bytes: the most that a
    file holds. Raises UserError for a tensor that is missing, unknown, of another shape or not
    finite.
    """
    dtype = jnp.dtype(dtype)
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in shapes.items()}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    with contextlib.ExitStack() as stack:
        files = {}
        places = {}
        for file, names in plan.filename_to_tensors.items():
            files[file] = stack.enter_context((directory / file).open("wb"))
            places |= _begin(
                files[file], {name: shapes[name] for name in names}, sizes, _KINDS[dtype.name]
            )
        for name, value in _with_progress(tensors, sizes):
            value = np.asarray(value, dtype)
            require(
                name in places and value.shape == tuple(shapes[name]),
                f"tensor {name!r} has shape {value.shape}, expected {shapes.get(name, 'none')}",
            )
            require(
                all(np.isfinite(block).all() for block in row_blocks(value)),
                f"tensor {name!r} holds values that are not finite in {dtype.name}",
            )
            file = files[plan.tensor_to_filename[name]]
            file.seek(places.pop(name))
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    if places:
        raise UserError(f"tensor {next(iter(places))!r} was never given")
    if plan.is_sharded:
        write_json(
            directory / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        )


def row_blocks(value: np.ndarray) -> Iterator[np.ndarray]:
    """A tensor cut along its first axis, so that intermediate results stay small."""
    if not value.ndim:
        yield value
        return
    rows = max(1, _BLOCK * len(value) // max(value.size, 1))
    for i in range(0, len(value), rows):
        yield value[i : i + rows]


def _begin(
    file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], kind: str
) -> dict[str, int]:
    """Writes a file's header and returns the byte at which each tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [end, end + sizes[name]],
        }
        end += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}


def _with_progress(
    tensors: Iterable[tuple[str, np.ndarray]], sizes: Mapping[str, int]
) -> Iterable[Any]:
    """The tensors, with a progress bar on a terminal and a line every ten seconds elsewhere."""
    total = sum(sizes.values())
    start = said = time.monotonic()
    done = 0
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=quiet) as bar:
        for name, value in tensors:
            yield name, value
            done += sizes.get(name, 0)
            bar.update(sizes.get(name, 0))
            if bar.disable and time.monotonic() - said > 10:
                said = time.monotonic()
                left = tqdm.format_interval((said - start) / done * (total - done))
                tqdm.write(
                    f"export: {done / 1e9:.2f} of {total / 1e9:.2f} GB, "
                    f"{done / 1e6 / (said - start):.0f} MB/s, {left} left",
                    file=sys.stderr,
                )


def map_shards(directory: Path) -> dict[str, np.ndarray]:
    """The tensors that `write_shards` wrote, by name, as views of mapped files: nothing is read
    before it is used, and nothing is held afterwards."""
    index = directory / INDEX
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(read_json(index)["weight_map"].values()))
    dtypes = {kind: jnp.dtype(name) for name, kind in _KINDS.items()}
    tensors = {}
    for file in files:
        memory = np.memmap(directory / file, np.uint8, mode="r")
        start = 8 + int.from_bytes(memory[:8].tobytes(), "little")
        for name, entry in json.loads(memory[8:start].tobytes()).items():
            if name != "__metadata__":
                a, b = entry["data_offsets"]
                stored = memory[start + a : start + b].view(dtypes[entry["dtype"]])
                tensors[name] = stored.reshape(entry["shape"])
    return tensors
