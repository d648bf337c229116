"""A decode step's products on a GPU: one Pallas kernel each, with what comes before and behind it.

XLA makes products of one row in kernels that read far below the memory's speed, and norms, gates,
concatenations and residuals in launches of their own (docs/results.md, "Time per token on an
H100"). Here a program owns some columns of the array and reads all its rows, in blocks that the
compiler loads ahead; the few rows of x are read again by each program, from the cache. Nothing is
summed across programs, so the result does not depend on their order.

Axis letters: B rows, at most 16 of them; D_in and D_out of the array, with rows R_b and columns R_f
of adapters behind them; r channels a piece; F of the MLP.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from flora_jax.errors import require
from flora_jax.models.config import DECODE_ROWS

_ROWS = DECODE_ROWS  # of a product on a tensor core; fewer are filled up
# Of a column of a tile: in half precision as many rows as give each thread two of x, the fewest
# that are loaded ahead.
_DEPTH_BYTES = 512
_STAGES = 4  # tiles that are on their way at once
_WIDE = 8192  # columns of an array


class Columns(NamedTuple):
    """`array[:, start : start + width]`, read in place: XLA would copy the slice."""

    array: jax.Array
    start: int
    width: int


class Normed(NamedTuple):
    """`x / rms(x) · scale`, the squares' sum over all of x `[B, D_in]` divided by `width`."""

    x: jax.Array
    scale: jax.Array
    width: int
    eps: float


class Gated(NamedTuple):
    """`silu(gate) · up` of y `[B, ≥ 2F]`, gate and up side by side; gate_add and up_add `[B, r]`
    are repeated along F and added to them first."""

    y: jax.Array
    width: int
    gate_add: Columns | None = None
    up_add: Columns | None = None


Read = jax.Array | Normed | Gated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behind:
    """What follows a product: the bias `[≤ D_out]`, the repeat-and-adds, the factor, the residual
    `[B, D_out]`, in this order."""

    bias: jax.Array | None = None
    adds: tuple[Columns, ...] = ()
    factor: float = 1.0
    residual: jax.Array | None = None


def decode_product(
    read: Read,
    kernel: jax.Array,
    rows: Columns | None = None,
    behind: Behind | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`(read | rows) · kernel` and what is behind it, `[B, D_out]` in the dtype of what is read.

    kernel `[≥ D_in + R_b, D_out]`; what fills up its rows is not read. rows: what the rows R_b
    multiply. Sums, norms and all that is elementwise are in float32 and rounded once. Raises
    UserError for more than DECODE_ROWS rows. Runs on a GPU; `interpret` runs it anywhere, slowly.
    """
    behind = behind or Behind()
    operands = _Operands()
    source = _source(read, operands)
    B = len(source.first)
    dtype = source.first.dtype
    require(B <= _ROWS, f"decode_product takes up to {_ROWS} rows, not {B}")
    tail = None if rows is None else _plain(operands.add(rows.array), rows)
    end = _end(behind, operands)
    weights = operands.add(kernel)
    width = block(kernel.shape[1])
    program = functools.partial(
        _program,
        sizes=_Sizes(
            rows=B,
            columns=kernel.shape[1],
            width=width,
            depth=_DEPTH_BYTES // kernel.dtype.itemsize,
        ),
        weights=weights,
        source=source,
        tail=tail,
        end=end,
    )
    return pl.pallas_call(
        program,
        grid=(pl.cdiv(kernel.shape[1], width),),
        out_shape=jax.ShapeDtypeStruct((B, kernel.shape[1]), dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_STAGES),
        interpret=interpret,
        name="decode_product",
    )(*operands.arrays)


def block(columns: int) -> int:
    """How many columns a program owns: 16, a sector of the memory in half precision, so that every
    multiprocessor has a program; of wide arrays, which have enough, twice as many."""
    return 32 if columns >= _WIDE else 16


class _Operands:
    """The arrays that the kernel is given, each once."""

    def __init__(self) -> None:
        self.arrays: list[jax.Array] = []

    def add(self, array: jax.Array) -> int:
        """Its place."""
        for place, known in enumerate(self.arrays):
            if known is array:
                return place
        self.arrays.append(array)
        return len(self.arrays) - 1


class _Sizes(NamedTuple):
    """rows and columns of the result; width and depth: columns and rows of a tile."""

    rows: int
    columns: int
    width: int
    depth: int


@dataclasses.dataclass(frozen=True)
class _Source:
    """Rows of the array, and what they multiply.

    first: an array of B rows; width: how many rows; load(refs, lanes, at, mask): the values `[16,
    depth]`, float32; norm: what divides them, `(width, eps)`, for the squares' sum is only known
    behind them; scale(refs, at, mask): what multiplies a normed value.
    """

    first: jax.Array
    width: int
    load: Callable[..., jax.Array]
    norm: tuple[int, float] | None = None
    scale: Callable[..., jax.Array] | None = None


def _source(read: Read, operands: _Operands) -> _Source:
    if isinstance(read, Normed):
        x = operands.add(read.x)
        scale = operands.add(read.scale)

        def scales(refs: Any, at: jax.Array, mask: jax.Array) -> jax.Array:
            return _wide(triton.load(refs[scale].at[at], mask=mask, other=0.0))

        whole = Columns(read.x, 0, read.x.shape[1])
        load = _plain(x, whole).load
        return _Source(read.x, whole.width, load, (read.width, read.eps), scales)
    if isinstance(read, Gated):
        return _gated(read, operands)
    return _plain(operands.add(read), Columns(read, 0, read.shape[1]))


def _plain(place: int, columns: Columns) -> _Source:
    def load(refs: Any, lanes: jax.Array, at: jax.Array, mask: jax.Array) -> jax.Array:
        return _load(refs[place], lanes, columns.start + at, mask)

    return _Source(columns.array, columns.width, load)


def _gated(read: Gated, operands: _Operands) -> _Source:
    y = operands.add(read.y)
    adds = [
        None if add is None else (operands.add(add.array), add)
        for add in (read.gate_add, read.up_add)
    ]

    def load(refs: Any, lanes: jax.Array, at: jax.Array, mask: jax.Array) -> jax.Array:
        gate, up = (
            _with_add(refs, lanes, at, mask, _load(refs[y], lanes, start + at, mask), add)
            for start, add in zip((0, read.width), adds, strict=True)
        )
        return gate * jax.nn.sigmoid(gate) * up

    return _Source(read.y, read.width, load)


def _with_add(
    refs: Any,
    lanes: jax.Array,
    at: jax.Array,
    mask: jax.Array,
    values: jax.Array,
    add: tuple[int, Columns] | None,
) -> jax.Array:
    """`values + rep(z)` at the channels `at`."""
    if add is None:
        return values
    place, columns = add
    return values + _load(refs[place], lanes, columns.start + at % columns.width, mask)


def _end(behind: Behind, operands: _Operands) -> Callable[..., jax.Array]:
    """What turns the sums `[16, width]` of the columns `at` into the result."""
    bias = None if behind.bias is None else operands.add(behind.bias)
    adds = [(operands.add(add.array), add) for add in behind.adds]
    residual = None if behind.residual is None else operands.add(behind.residual)

    def end(refs: Any, lanes: jax.Array, at: jax.Array, mask: jax.Array, y: jax.Array) -> jax.Array:
        if bias is not None:
            has = at < len(behind.bias)
            y = y + _wide(triton.load(refs[bias].at[at], mask=has, other=0.0))[None, :]
        for add in adds:
            y = _with_add(refs, lanes, at, mask, y, add)
        y = y * behind.factor
        return y if residual is None else y + _load(refs[residual], lanes, at, mask)

    return end


def _program(
    *refs: Any,
    sizes: _Sizes,
    weights: int,
    source: _Source,
    tail: _Source | None,
    end: Callable[..., jax.Array],
) -> None:
    """The columns of one program."""
    # One row alone is read and gated as one, and filled up for the tensor core.
    lanes = jnp.arange(1 if sizes.rows == 1 else _ROWS)
    at = pl.program_id(0) * sizes.width + jnp.arange(sizes.width)
    inside = (lanes < sizes.rows)[:, None] & (at < sizes.columns)[None, :]
    sums = jnp.zeros((_ROWS, sizes.width), jnp.float32)
    sums = _times(refs, sizes, weights, source, 0, lanes, at, sums)
    if tail is not None:
        sums = _times(refs, sizes, weights, tail, source.width, lanes, at, sums)
    y = end(refs, lanes, at, inside, sums)
    out = refs[-1]
    every = jnp.arange(_ROWS)
    inside = (every < sizes.rows)[:, None] & (at < sizes.columns)[None, :]
    triton.store(out.at[every[:, None], at[None, :]], y.astype(out.dtype), mask=inside)


def _times(
    refs: Any,
    sizes: _Sizes,
    weights: int,
    source: _Source,
    start: int,
    lanes: jax.Array,
    at: jax.Array,
    sums: jax.Array,
) -> jax.Array:
    """`sums` and the product of `source` with the array's rows from `start` on."""
    kernel = refs[weights]
    real = (lanes < sizes.rows)[:, None]
    across = (at < sizes.columns)[None, :]
    first = (jnp.arange(_ROWS) < sizes.rows)[:, None]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums, squares = carry
        own = i * sizes.depth + jnp.arange(sizes.depth)
        within = own < source.width
        x = source.load(refs, lanes, own, real & within[None, :])
        if source.norm is not None:
            squares = squares + x * x
            x = x * source.scale(refs, own, within)[None, :]
        tile = triton.load(
            kernel.at[(start + own)[:, None], at[None, :]],
            mask=within[:, None] & across,
            other=0.0,
        )
        dtype = refs[-1].dtype
        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        # Not repeated: Triton for Ampere takes no dot of what is but a broadcast.
        x = jnp.where(first, x, 0.0).astype(dtype)
        return sums + triton.dot(x, tile.astype(dtype), precision=precision), squares

    none = jnp.zeros((len(lanes), sizes.depth if source.norm else 1), jnp.float32)
    steps = pl.cdiv(source.width, sizes.depth)
    begun = (jnp.zeros_like(sums), none)
    product, squares = jax.lax.fori_loop(0, steps, step, begun)
    if source.norm is not None:
        width, eps = source.norm
        mean = squares.sum(axis=1) / width
        product = product * jax.lax.rsqrt(mean + eps)[:, None]
    return sums + product


def _load(ref: Any, lanes: jax.Array, at: jax.Array, mask: jax.Array) -> jax.Array:
    """`ref[:, at]`, `[16, len(at)]` float32, zero where masked."""
    return _wide(triton.load(ref.at[lanes[:, None], at[None, :]], mask=mask, other=0.0))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
