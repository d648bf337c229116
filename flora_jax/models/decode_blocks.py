"""How a decode step's products are cut up for a GPU.

Defaults are right everywhere. A table, `decode_blocks.json`, holds what was measured to be faster,
by the device's name; `experiments.tune_decode` makes its entries. One serves all products of about
its shape, as an adapter's rank changes it little.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Of a column of a tile: in half precision as many rows as give each thread two of x, the fewest
# that are loaded ahead.
_DEPTH_BYTES = 512
_WIDE = 8192  # columns of an array
_ALIKE = 1 / 8  # so far a shape's widths may be from an entry's, as a share of them


class Blocks(NamedTuple):
    """columns of a program, rows of a tile, tiles on their way at once (`stages`), and warps of a
    program."""

    columns: int
    rows: int
    stages: int
    warps: int


class Shape(NamedTuple):
    """What a product's blocks depend on: rows of x (`batch`); what its array has of rows and
    columns, as they are multiplied, its dtype and whether it lies transposed; whether values are
    added to what is read (`added`)."""

    batch: int
    d_in: int
    d_out: int
    dtype: str
    transposed: bool
    added: bool = False


def blocks_for(shape: Shape) -> Blocks:
    """The blocks measured to be fastest on the device that a program is made for, else
    `default_blocks`."""
    device = _device()
    for entry in table():
        if entry["device"] == device and _serves(entry, shape):
            return Blocks(*(entry[field] for field in Blocks._fields))
    return default_blocks(shape)


def default_blocks(shape: Shape) -> Blocks:
    """Blocks that are right on every GPU from Ampere on, if not the fastest.

    A program owns 16 columns, so that every multiprocessor has a program; of wide arrays, which
    have enough, twice as many. Four tiles of 8 KB are on their way at once, but fewer where several
    rows of x are loaded ahead, too, and adds or what codes become: an Ada has 99 KB of shared
    memory. Each warp makes floats of codes for itself, so two make them, not four.
    """
    itemsize = jax.numpy.dtype(shape.dtype).itemsize
    coded = itemsize == 1
    several = shape.batch > 1
    return Blocks(
        columns=32 if shape.d_out >= _WIDE else 16,
        rows=_DEPTH_BYTES // itemsize,
        stages=max(2, 4 - (several and coded) - 2 * (several and shape.added)),
        warps=2 if coded else 4,
    )


@functools.cache
def table() -> Sequence[Mapping[str, Any]]:
    """The entries: a device's name, the fields of a Shape but `added`, and those of its Blocks."""
    return read_table(Path(__file__).with_suffix(".json"))


def read_table(file: Path) -> list[dict[str, Any]]:
    """The entries of a file; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The entries of both; a new one takes the place of an old one of its device and shape."""

    def key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(value for name, value in entry.items() if name not in Blocks._fields)

    return list({key(entry): entry for entry in (*old, *new)}.values())


def _device() -> str:
    """The name of the device that a program is made for: that of the mesh around it, as for a plan,
    or of this process."""
    made_for = jax.sharding.get_abstract_mesh().abstract_device
    return (made_for or jax.devices()[0]).device_kind


def _serves(entry: Mapping[str, Any], shape: Shape) -> bool:
    """Whether an entry is of an array like this one, and of about as many rows of x."""
    near = (
        abs(getattr(shape, name) - entry[name]) <= _ALIKE * entry[name]
        for name in ("d_in", "d_out")
    )
    alike = all(getattr(shape, name) == entry[name] for name in ("dtype", "transposed"))
    return alike and all(near) and _several(shape.batch) == _several(entry["batch"])


def _several(batch: int) -> int:
    """One row, up to eight, or more."""
    return (batch > 1) + (batch > 8)
