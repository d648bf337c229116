"""A decode step's products on a GPU: one Pallas kernel each, with what comes before and behind it.

XLA makes products of one row in kernels that read far below the memory's speed, and norms, gates,
concatenations and residuals in launches of their own (docs/results.md, "Time per token on an
H100"). Here a program owns some columns of the array and reads all its rows, in blocks that the
compiler loads ahead; the few rows of x are read again by each program, from the cache. Nothing is
summed across programs, so the result does not depend on their order. Sixteen bytes are loaded at a
time where they divide a row of the array: ranks that 8 divides see to that in half precision.

Axis letters: B rows, at most 16 of them; D_in and D_out of the array, with rows R_b and columns R_f
of adapters behind them; r channels a piece; F of the MLP.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
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
# Tiles that are on their way at once; fewer of several rows with adds, which are loaded ahead, too,
# or an Ada's 99 KB of shared memory would not hold them.
_STAGES = 4
_STAGES_OF_ADDS = 2
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


Read = jax.Array | Columns | Normed | Gated


class Term(NamedTuple):
    """`read · kernel[row : row + width of read]`, in the result's columns from `column` on; with
    `repeat`, a start and a width, those columns of it alone, repeated."""

    read: Read
    kernel: jax.Array
    row: int = 0
    column: int = 0
    repeat: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behind:
    """What follows a product: the bias `[≤ D_out]`, the repeat-and-adds, the factor, the residual
    `[B, D_out]`, in this order."""

    bias: jax.Array | None = None
    adds: tuple[Columns, ...] = ()
    factor: float = 1.0
    residual: jax.Array | None = None


def decode_product(
    terms: Sequence[Term],
    columns: int,
    behind: Behind | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The sum of the terms and what is behind it, `[B, columns]` in the dtype of what is read (of
    the residual, where there is no term).

    Sums, norms and all that is elementwise are in float32 and rounded once. Raises UserError for
    more than DECODE_ROWS rows. Runs on a GPU; `interpret` runs it anywhere, slowly.
    """
    operands = _Operands()
    behind = behind or Behind()
    placed = [_place(term, operands, columns) for term in terms]
    like = placed[0].source.like if placed else behind.residual
    require(
        len(like) <= DECODE_ROWS,
        f"decode_product takes up to {DECODE_ROWS} rows, not {len(like)}",
    )
    width = _block(columns)
    program = functools.partial(
        _program,
        sizes=_Sizes(rows=len(like), columns=columns, width=width),
        terms=placed,
        end=_end(behind, operands),
    )
    return pl.pallas_call(
        program,
        grid=(pl.cdiv(columns, width),),
        out_shape=jax.ShapeDtypeStruct((len(like), columns), like.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_stages(terms, len(like))),
        interpret=interpret,
        name="decode_product",
    )(*operands.arrays)


def _stages(terms: Sequence[Term], rows: int) -> int:
    gates = [term.read for term in terms if isinstance(term.read, Gated)]
    added = any(gate.gate_add is not None or gate.up_add is not None for gate in gates)
    return _STAGES_OF_ADDS if added and rows > 1 else _STAGES


def _block(columns: int) -> int:
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
    """rows and columns of the result; width: columns of a program."""

    rows: int
    columns: int
    width: int


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a term reads.

    like: an array of B rows in its dtype; width: its channels; load(refs, lanes, at, mask): the
    values at some of them, float32; norm: what divides them, `(width, eps)`, which is known only
    behind their squares' sum; scale(refs, at, mask): what multiplies normed values.
    """

    like: jax.Array
    width: int
    load: Callable[..., jax.Array]
    norm: tuple[int, float] | None = None
    scale: Callable[..., jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A term whose arrays are operands. kernel: its array's place; spans: the columns of the result
    that it has a part in; depth: rows of a tile."""

    source: _Source
    kernel: int
    row: int
    column: int
    spans: int
    repeat: tuple[int, int] | None
    depth: int


def _place(term: Term, operands: _Operands, columns: int) -> _Placed:
    source = _source(term.read, operands)
    most = _DEPTH_BYTES // term.kernel.dtype.itemsize
    return _Placed(
        source=source,
        kernel=operands.add(term.kernel),
        row=term.row,
        column=term.column,
        spans=term.kernel.shape[1] if term.repeat is None else columns,
        repeat=term.repeat,
        depth=min(most, max(_ROWS, pl.next_power_of_2(source.width))),
    )


def _source(read: Read, operands: _Operands) -> _Source:
    if isinstance(read, Normed):
        scale = operands.add(read.scale)

        def scales(refs: Any, at: jax.Array, mask: jax.Array) -> jax.Array:
            return _wide(triton.load(refs[scale].at[at], mask=mask, other=0.0))

        plain = _source(read.x, operands)
        return dataclasses.replace(plain, norm=(read.width, read.eps), scale=scales)
    if isinstance(read, Gated):
        return _gated(read, operands)
    columns = read if isinstance(read, Columns) else Columns(read, 0, read.shape[1])
    place = operands.add(columns.array)

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
    return values + _load(refs[place], lanes, columns.start + in_piece(at, columns.width), mask)


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
    *refs: Any, sizes: _Sizes, terms: Sequence[_Placed], end: Callable[..., jax.Array]
) -> None:
    """The columns of one program."""
    # One row alone is read and gated as one, and filled up for the tensor core.
    lanes = jnp.arange(1 if sizes.rows == 1 else _ROWS)
    at = pl.program_id(0) * sizes.width + jnp.arange(sizes.width)
    inside = (lanes < sizes.rows)[:, None] & (at < sizes.columns)[None, :]
    sums = jnp.zeros((_ROWS, sizes.width), jnp.float32)
    for term in terms:
        sums = sums + _times(refs, sizes, term, lanes, at)
    y = end(refs, lanes, at, inside, sums)
    out = refs[-1]
    every = jnp.arange(_ROWS)
    inside = (every < sizes.rows)[:, None] & (at < sizes.columns)[None, :]
    triton.store(out.at[every[:, None], at[None, :]], y.astype(out.dtype), mask=inside)


def _times(refs: Any, sizes: _Sizes, term: _Placed, lanes: jax.Array, at: jax.Array) -> jax.Array:
    """A term's part in the columns `at`, `[16, width]`."""
    source = term.source
    dtype = refs[-1].dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    real = (lanes < sizes.rows)[:, None]
    first = (jnp.arange(_ROWS) < sizes.rows)[:, None]
    columns = at - term.column
    across = ((columns >= 0) & (columns < term.spans))[None, :]
    if term.repeat is not None:
        start, period = term.repeat
        columns = start + in_piece(columns, period)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums, squares = carry
        own = i * term.depth + jnp.arange(term.depth)
        within = own < source.width
        x = source.load(refs, lanes, own, real & within[None, :])
        if source.norm is not None:
            squares = squares + x * x
            x = x * source.scale(refs, own, within)[None, :]
        tile = triton.load(
            refs[term.kernel].at[(term.row + own)[:, None], columns[None, :]],
            mask=within[:, None] & across,
            other=0.0,
        )
        # Not repeated: Triton for Ampere takes no dot of what is but a broadcast.
        x = jnp.where(first, x, 0.0).astype(dtype)
        return sums + triton.dot(x, tile.astype(dtype), precision=precision), squares

    sums = jnp.zeros((_ROWS, sizes.width), jnp.float32)
    squares = jnp.zeros((len(lanes), term.depth if source.norm else 1), jnp.float32)
    steps = pl.cdiv(source.width, term.depth)
    sums, squares = jax.lax.fori_loop(0, steps, step, (sums, squares))
    if source.norm is None:
        return sums
    width, eps = source.norm
    return sums * jax.lax.rsqrt(squares.sum(axis=1) / width + eps)[:, None]


def _load(ref: Any, lanes: jax.Array, at: jax.Array, mask: jax.Array) -> jax.Array:
    """`ref[lanes, at]`, `[len(lanes), len(at)]` float32, zero where masked."""
    return _wide(triton.load(ref.at[lanes[:, None], at[None, :]], mask=mask, other=0.0))


def in_piece(at: jax.Array, width: int) -> jax.Array:
    """`at % width`, the channels of a piece that is repeated, as an operation that keeps neighbours
    together for the compiler."""
    return jax.lax.rem(at, jnp.full_like(at, width))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
