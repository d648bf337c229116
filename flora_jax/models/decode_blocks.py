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
import jax.numpy as jnp

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
    """What a product's blocks depend on: rows of x (`batch`) and its dtype (`reads`); rows and
    columns of its array, as they are multiplied, its dtype and whether it lies transposed; whether
    what is read is a sum (`added`)."""

    batch: int
    d_in: int
    d_out: int
    dtype: str
    transposed: bool
    reads: str = "bfloat16"
    added: bool = False


def blocks_for(shape: Shape) -> Blocks:
    """The blocks measured to be fastest on the device that a program is made for, of the nearest
    widths; else `default_blocks`."""
    device = _device()
    found = [one for one in table() if one["device"] == device and _serves(one, shape)]
    if not found:
        return default_blocks(shape)
    nearest = min(found, key=lambda entry: max(_distances(entry, shape)))
    return Blocks(*(nearest[field] for field in Blocks._fields))


def default_blocks(shape: Shape) -> Blocks:
    """Blocks that are right on every GPU from Ampere on, if not the fastest.

    A program owns 16 columns, so that every multiprocessor has a program; of wide arrays, which
    have enough, twice as many. Four tiles of 8 KB are on their way at once, but fewer where much is
    loaded ahead beside them, several rows of x or what is added to it: an Ada has 99 KB of shared
    memory. Each warp makes floats of codes for itself, so two make them, not four.
    """
    itemsize, x_itemsize = (jnp.dtype(one).itemsize for one in (shape.dtype, shape.reads))
    coded = itemsize == 1
    several = shape.batch > 1
    return Blocks(
        columns=32 if shape.d_out >= _WIDE else 16,
        rows=_DEPTH_BYTES // (itemsize if x_itemsize == 2 else x_itemsize),
        stages=max(2, 4 - (coded and (several or shape.added)) - 2 * (several and shape.added)),
        warps=2 if coded else 4,
    )


@functools.cache
def table() -> Sequence[Mapping[str, Any]]:
    """The entries: a device's name, the fields of a Shape, and those of its Blocks."""
    return read_table(Path(__file__).with_suffix(".json"))


def read_table(file: Path) -> list[dict[str, Any]]:
    """The entries of a file; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def replaced(
    old: Sequence[Mapping[str, Any]],
    measured: Sequence[Mapping[str, Any]],
    new: Sequence[Mapping[str, Any]],
) -> list[Any]:
    """The old entries but those of a device and shape that were measured, and the new ones."""

    def key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[field] for field in ("device", *Shape._fields))

    again = set(map(key, measured))
    return [*(entry for entry in old if key(entry) not in again), *new]


def _device() -> str:
    """The name of the device that a program is made for: that of the mesh around it, as for a plan,
    or of this process."""
    made_for = jax.sharding.get_abstract_mesh().abstract_device
    return (made_for or jax.devices()[0]).device_kind


def _serves(entry: Mapping[str, Any], shape: Shape) -> bool:
    """Whether an entry is of an array like this one, about as many rows of x, and no less to be
    loaded."""
    alike = all(getattr(shape, name) == entry[name] for name in ("dtype", "transposed", "reads"))
    fits = entry["added"] >= shape.added and _several(shape.batch) == _several(entry["batch"])
    return alike and fits and max(_distances(entry, shape)) <= _ALIKE


def _distances(entry: Mapping[str, Any], shape: Shape) -> list[float]:
    """How far a shape's widths are from an entry's, as a share of these."""
    return [abs(getattr(shape, name) / entry[name] - 1) for name in ("d_in", "d_out")]


def _several(batch: int) -> int:
    """One row, up to eight, or more."""
    return (batch > 1) + (batch > 8)
