"""A decode step's products on a GPU: one Pallas kernel each, with what comes before and behind it.

XLA makes products of one row in kernels that read far below the memory's speed, and norms, gates,
concatenations and residuals in launches of their own (docs/results.md, "Time per token on an
H100"). Here a program owns some columns of the array and reads all its rows, in blocks that the
compiler loads ahead; the few rows of x are read again by each program, from the cache. Nothing is
summed across programs, so the result does not depend on their order. An array that lies transposed
is read in long runs, sixteen bytes at a time; one that does not, if they divide its rows. Codes of
8 bits become floats on their way to the tensor core.

Axis letters: B rows, at most 16 of them; D_in and D_out of the array, with rows R_b and columns R_f
of adapters behind them; N adapters of a bank; r channels a piece; F of the MLP.
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

from flora_jax.adapters import ACTIVATIONS, Scaled
from flora_jax.errors import require
from flora_jax.models.config import DECODE_ROWS
from flora_jax.models.decode_blocks import Blocks, Shape, blocks_for

_ROWS = DECODE_ROWS  # of a product on a tensor core; fewer are filled up


class Columns(NamedTuple):
    """`width` channels of an array `[B, …]` from `start` on, read in place: XLA would copy them.

    A bank has blocks of `stride` channels, one for each adapter. With `piece` the channels are so
    many of every block; with `own` `[B]` int32 they are those of the block that the row's number
    says.
    """

    array: jax.Array
    start: int
    width: int
    stride: int = 0
    piece: int = 0
    own: jax.Array | None = None

    def at(self, channels: jax.Array) -> jax.Array:
        """Where these channels lie, in the first block with `own`."""
        if self.piece:
            block = _quotient(channels, self.piece)
            channels = block * self.stride + in_piece(channels, self.piece)
        return self.start + channels


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


class Parts(NamedTuple):
    """Attention of one query a row, `[B, N·H]` in `dtype`, whose slots were cut into P parts: each
    part's weighted sums `[P, B, N, H]`, highest scores and sums of weights `[P, B, N]`, float32.
    Read as such, every program of a product sums what it reads."""

    sums: jax.Array
    peaks: jax.Array
    totals: jax.Array
    dtype: Any

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """Its shape and dtype."""
        _, B, N, H = self.sums.shape
        return jax.ShapeDtypeStruct((B, N * H), self.dtype)

    def summed(self) -> jax.Array:
        """By XLA."""
        peaks, totals = ([*array[..., None]] for array in (self.peaks, self.totals))
        out = _sum_of_parts([*self.sums], peaks, totals)
        return out.astype(self.dtype).reshape(self.like.shape)


Read = jax.Array | Columns | Normed | Gated | Parts
# What loads values, float32: (refs, lanes, at, mask) to [lanes, at], zeros where masked.
Load = Callable[..., jax.Array]


class Term(NamedTuple):
    """`read · kernel[row : row + width of read]`, in the result's columns from `column` on; with
    `repeat`, a start and a width, those columns of it alone, repeated. transposed: the kernel is
    stored `[D_out, D_in]`."""

    read: Read
    kernel: jax.Array | Scaled
    row: int = 0
    column: int = 0
    repeat: tuple[int, int] | None = None
    transposed: bool = False


class Pieces(NamedTuple):
    """What adapters read, in the columns from `start` on, `width` for each: their activation, and
    zeros but for those that `select` `[B, N]` bool chooses for a row."""

    start: int
    width: int
    activation: str = "identity"
    select: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behind:
    """What follows a product: the bias `[≤ D_out]`, the repeat-and-adds, what the pieces of
    adapters go through, the factor, the residual `[B, D_out]`, in this order."""

    bias: jax.Array | None = None
    adds: tuple[Columns, ...] = ()
    pieces: Pieces | None = None
    factor: float = 1.0
    residual: jax.Array | None = None


def decode_product(
    terms: Sequence[Term],
    columns: int,
    behind: Behind | None = None,
    interpret: bool = False,
    dtype: Any = None,
    blocks: Blocks | None = None,
) -> jax.Array:
    """The sum of the terms and what is behind it, `[B, columns]` in `dtype`, by default that of
    what is read (of the adds, where there is no term).

    Sums, norms and all that is elementwise are in float32 and rounded once. blocks: None for those
    of decode_blocks.py. Raises UserError for more than DECODE_ROWS rows. Runs on a GPU; `interpret`
    runs it anywhere, slowly.
    """
    operands = _Operands()
    behind = behind or Behind()
    blocks = blocks or _blocks(terms, columns)
    placed = [_place(term, operands, columns, blocks) for term in terms]
    like = placed[0].source.like if placed else behind.adds[0].array
    require(
        len(like) <= DECODE_ROWS,
        f"decode_product takes up to {DECODE_ROWS} rows, not {len(like)}",
    )
    program = functools.partial(
        _program,
        sizes=_Sizes(rows=len(like), columns=columns, width=blocks.columns, dtype=like.dtype),
        terms=placed,
        end=_end(behind, operands),
    )
    return pl.pallas_call(
        program,
        grid=(pl.cdiv(columns, blocks.columns),),
        out_shape=jax.ShapeDtypeStruct((len(like), columns), dtype or like.dtype),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="decode_product",
    )(*operands.arrays)


def _blocks(terms: Sequence[Term], columns: int) -> Blocks:
    """How it is cut up: by its first term, which is by far the largest."""
    if not terms:
        return Blocks(columns=_ROWS, rows=_ROWS, stages=1, warps=4)
    read, kernel, *_ = first = terms[0]
    stored = kernel.codes if isinstance(kernel, Scaled) else kernel
    adds = (read.gate_add, read.up_add) if isinstance(read, Gated) else ()
    like = _array(read)
    shape = Shape(
        batch=len(like),
        reads=like.dtype.name,
        d_in=stored.shape[1 if first.transposed else 0],
        d_out=columns,
        dtype=stored.dtype.name,
        transposed=first.transposed,
        added=isinstance(read, Parts) or any(add is not None for add in adds),
    )
    return blocks_for(shape)


def _array(read: Read) -> jax.Array | jax.ShapeDtypeStruct:
    """An array of B rows in the dtype of what is read, or what has its shape and dtype."""
    if isinstance(read, Normed):
        return _array(read.x)
    if isinstance(read, Gated):
        return read.y
    if isinstance(read, Parts):
        return read.like
    return read.array if isinstance(read, Columns) else read


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
    """rows and columns of the result; width: columns of a program; dtype: of the products."""

    rows: int
    columns: int
    width: int
    dtype: Any


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a term reads.

    like: an array of B rows in its dtype; width: its channels; load(refs, lanes, at, mask): the
    values at some of them, float32; norm: what divides them, `(width, eps)`, which is known only
    behind their squares' sum; scale(refs, at, mask): what multiplies normed values.
    """

    like: jax.Array | jax.ShapeDtypeStruct
    width: int
    load: Load
    norm: tuple[int, float] | None = None
    scale: Callable[..., jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A term whose arrays are operands. kernel, scale, factor: the places of its array, or of its
    codes and what multiplies their columns and rows; spans: the columns of the result that it has a
    part in; depth: rows of a tile."""

    source: _Source
    kernel: int
    scale: int | None
    factor: int | None
    row: int
    column: int
    spans: int
    repeat: tuple[int, int] | None
    depth: int
    transposed: bool


def _place(term: Term, operands: _Operands, columns: int, blocks: Blocks) -> _Placed:
    source = _source(term.read, operands)
    scale = factor = None
    kernel = term.kernel
    if isinstance(kernel, Scaled):
        scale = operands.add(kernel.scale)
        factor = kernel.factor if kernel.factor is None else operands.add(kernel.factor)
        kernel = kernel.codes
    return _Placed(
        source=source,
        kernel=operands.add(kernel),
        scale=scale,
        factor=factor,
        row=term.row,
        column=term.column,
        spans=kernel.shape[0 if term.transposed else 1] if term.repeat is None else columns,
        repeat=term.repeat,
        transposed=term.transposed,
        depth=min(blocks.rows, max(_ROWS, pl.next_power_of_2(source.width))),
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
    if isinstance(read, Parts):
        return _parts(read, operands)
    columns = read if isinstance(read, Columns) else Columns(read, 0, read.shape[1])
    return _Source(columns.array, columns.width, _loaded(columns, operands))


def _loaded(columns: Columns, operands: _Operands) -> Load:
    """What loads these channels."""
    array = operands.add(columns.array)
    own = None if columns.own is None else operands.add(columns.own)

    def load(refs: Any, lanes: jax.Array, at: jax.Array, mask: jax.Array) -> jax.Array:
        places = columns.at(at)[None, :]
        if own is not None:
            # Lanes behind the last row are masked; they, too, must not read behind the array.
            rows = jnp.minimum(lanes, len(columns.own) - 1)
            places = triton.load(refs[own].at[rows])[:, None] * columns.stride + places
        return _load(refs[array], lanes, places, mask)

    return load


def _added(add: Columns | None, operands: _Operands) -> Load:
    """What loads these channels repeated, or zeros."""
    if add is None:
        return lambda refs, lanes, at, mask: jnp.zeros(mask.shape, jnp.float32)
    loaded = _loaded(add, operands)
    return lambda refs, lanes, at, mask: loaded(refs, lanes, in_piece(at, add.width), mask)


def _gated(read: Gated, operands: _Operands) -> _Source:
    halves = [
        (_loaded(Columns(read.y, start, read.width), operands), _added(add, operands))
        for start, add in ((0, read.gate_add), (read.width, read.up_add))
    ]

    def load(refs: Any, *where: jax.Array) -> jax.Array:
        gate, up = (half(refs, *where) + add(refs, *where) for half, add in halves)
        return gate * jax.nn.sigmoid(gate) * up

    return _Source(read.y, read.width, load)


def _parts(read: Parts, operands: _Operands) -> _Source:
    sums, *others = (operands.add(array) for array in (read.sums, read.peaks, read.totals))
    P, _, _, H = read.sums.shape

    def load(refs: Any, lanes: jax.Array, at: jax.Array, mask: jax.Array) -> jax.Array:
        head = (lanes[:, None], _quotient(at, H)[None, :])
        channel = (*head, in_piece(at, H)[None, :])

        def of_parts(place: int, where: tuple[jax.Array, ...]) -> list[jax.Array]:
            loads = (triton.load(refs[place].at[p, *where], mask=mask, other=0.0) for p in range(P))
            return list(loads)

        peaks, totals = (of_parts(place, head) for place in others)
        # What is masked is 0 / 0.
        return jnp.where(mask, _sum_of_parts(of_parts(sums, channel), peaks, totals), 0.0)

    return _Source(read.like, read.like.shape[1], load)


def _sum_of_parts(
    sums: Sequence[jax.Array], peaks: Sequence[jax.Array], totals: Sequence[jax.Array]
) -> jax.Array:
    """Part by part rather than as reductions, so that XLA makes one kernel of it."""
    peak = functools.reduce(jnp.maximum, peaks)
    shares = [jnp.exp(one - peak) for one in peaks]
    weighted, weights = (
        sum(share * part for share, part in zip(shares, parts, strict=True))
        for parts in (sums, totals)
    )
    return weighted / weights


def _end(behind: Behind, operands: _Operands) -> Callable[..., jax.Array]:
    """What turns the sums `[16, width]` of the columns `at` into the result."""
    bias = None if behind.bias is None else operands.add(behind.bias)
    adds = [_added(add, operands) for add in behind.adds]
    pieces = None if behind.pieces is None else _pieces(behind.pieces, operands)
    residual = None if behind.residual is None else operands.add(behind.residual)

    def end(refs: Any, lanes: jax.Array, at: jax.Array, mask: jax.Array, y: jax.Array) -> jax.Array:
        if bias is not None:
            has = at < len(behind.bias)
            y = y + _wide(triton.load(refs[bias].at[at], mask=has, other=0.0))[None, :]
        for add in adds:
            y = y + add(refs, lanes, at, mask)
        if pieces is not None:
            y = pieces(refs, lanes, at, mask, y)
        y = y * behind.factor
        return y if residual is None else y + _load(refs[residual], lanes, at[None, :], mask)

    return end


def _pieces(pieces: Pieces, operands: _Operands) -> Callable[..., jax.Array]:
    """What makes of the columns `at` of y what the pieces of adapters there become."""
    select = None if pieces.select is None else operands.add(pieces.select)

    def become(
        refs: Any, lanes: jax.Array, at: jax.Array, mask: jax.Array, y: jax.Array
    ) -> jax.Array:
        z = ACTIVATIONS[pieces.activation](y)
        theirs = at >= pieces.start
        if select is not None:
            adapter = _quotient(at - pieces.start, pieces.width)
            has = theirs & (adapter < pieces.select.shape[1])
            where = (lanes[:, None], adapter[None, :])
            chosen = triton.load(refs[select].at[where], mask=mask & has[None, :], other=False)
            z = jnp.where(chosen, z, 0.0)
        return jnp.where(theirs[None, :], z, y)

    return become


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
    dtype = sizes.dtype
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
        if term.factor is not None:
            x = x * triton.load(refs[term.factor].at[term.row + own], mask=within, other=0.0)[None]
        where = ((term.row + own)[:, None], columns[None, :])
        kernel = refs[term.kernel]
        tile = triton.load(
            kernel.at[where[::-1] if term.transposed else where],
            mask=within[:, None] & across,
            other=jnp.zeros((), kernel.dtype),
        )
        # Not repeated: Triton for Ampere takes no dot of what is but a broadcast.
        x = jnp.where(first, x, 0.0).astype(dtype)
        return sums + triton.dot(x, tile.astype(dtype), precision=precision), squares

    sums = jnp.zeros((_ROWS, sizes.width), jnp.float32)
    squares = jnp.zeros((len(lanes), term.depth if source.norm else 1), jnp.float32)
    steps = pl.cdiv(source.width, term.depth)
    sums, squares = jax.lax.fori_loop(0, steps, step, (sums, squares))
    if term.scale is not None:
        sums = sums * triton.load(refs[term.scale].at[columns[None, :]], mask=across, other=0.0)
    if source.norm is None:
        return sums
    width, eps = source.norm
    return sums * jax.lax.rsqrt(squares.sum(axis=1) / width + eps)[:, None]


def _load(ref: Any, lanes: jax.Array, places: jax.Array, mask: jax.Array) -> jax.Array:
    """The values of each lane at its places `[1 or lanes, channels]`, float32, zero where
    masked."""
    return _wide(triton.load(ref.at[lanes[:, None], places], mask=mask, other=0.0))


def in_piece(at: jax.Array, width: int) -> jax.Array:
    """`at % width`, the channels of a piece that is repeated, as an operation that keeps neighbours
    together for the compiler."""
    return jax.lax.rem(at, jnp.full_like(at, width))


def _quotient(at: jax.Array, width: int) -> jax.Array:
    """`at // width` of what is not negative; rounded towards zero of the rest."""
    return jax.lax.div(at, jnp.full_like(at, width))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
