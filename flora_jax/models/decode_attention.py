"""A decode step's attention on a GPU, in one Pallas kernel.

The kernel norms q and k where they have norms, turns them by their rotary embeddings, fills the
cache's new slot and attends. Written out for XLA this is five to eight launches a layer. The kernel
is one. The sum over its parts is a second, which takes in what o reads beside attention; or o, in a
kernel of ours, sums them as it reads. Axis letters as in llama.py; P parts that the slots are cut
into, each read by a program of its own (flash decoding: one query has too few heads to keep a GPU
busy); G heads of a group, filled up to R rows of a product.

The kernel is written for Pallas's Triton backend, which jax deprecates since 0.11.0 and will
remove. jax names two replacements: Pallas's Mosaic GPU backend
(`jax.experimental.pallas.mosaic_gpu`), or a kernel in Triton's own language, called through the
package jax_triton. Without the backend XLA's attention serves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from flora_jax.errors import require
from flora_jax.models.decode_product import Columns, Parts, in_piece

Halves = tuple[jax.Array, jax.Array]  # the channels of a head that rotary embeddings turn together

_SLOTS = 64  # that a program looks at in one go
_PART = 256  # slots a program has to read …
_MOST_PARTS = 32  # … until there are so many programs to a head
_ROWS = 16  # the fewest of a product on a tensor core; a group has fewer heads
_LOWEST = float(jnp.finfo(jnp.float32).min)


# N heads, K key/value heads, H channels of each, S slots, and how many slots a part has.
_Sizes = namedtuple("_Sizes", "N, K, H, S, part")
# Of the scores; what the norms of q and k add to a mean square, None without norms; where the
# pieces that are repeat-and-added to q, k and v lie, None without.
_Numbers = namedtuple("_Numbers", "scale, eps, adds")


def decode_attention(
    qkv: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    seen: jax.Array,
    past: tuple[jax.Array, jax.Array, jax.Array],
    heads: int,
    norms: tuple[jax.Array, jax.Array] | None = None,
    eps: float = 0.0,
    scale: float | None = None,
    adds: Sequence[Columns | None] = (None, None, None),
    interpret: bool = False,
) -> tuple[Parts, tuple[jax.Array, jax.Array]]:
    """Attention of one new token a row, `[B, N·H]` in parts that are still to be summed, and the
    cache's `(k, v)` with it in its slot.

    qkv `[B, ≥ (N+2K)·H]`: q, k and v as their product gives them, heads side by side, and any
    columns behind them.
    rotary: cos and sin `[B, 1, 1, H/2]`. seen `[B, S]` bool: the slots up to `index` that a row
    sees, that one too.
    past: k `[B·K, H, S]`, v `[B·K, S, H]` and the scalar `index` of the token's slot; k and v are
    consumed. heads: N. norms: the scales `[H]` of RMS norms of q's and k's heads, before they are
    turned; eps: theirs. scale: of the scores, None for 1/sqrt(H). adds: what is repeat-and-added to
    q, k and v before that, all in one array; None where nothing is. Products in qkv's dtype with
    float32 sums, norms and softmax in float32. H is a power of two, at least 32 on a GPU, which is
    where it runs; `interpret` runs it anywhere, slowly.
    """
    k, v, index = past
    B = len(qkv)
    BK, H, S = k.shape
    P = min(pl.cdiv(S, _PART), _MOST_PARTS)
    part = pl.cdiv(pl.cdiv(S, P), _SLOTS) * _SLOTS
    sizes = _Sizes(N=heads, K=BK // B, H=H, S=S, part=part)
    cos, sin = (table.reshape(B, H // 2) for table in rotary)
    scaling = H**-0.5 if scale is None else scale
    array, own, pieces = _placed(adds)
    q_norm, k_norm = norms or (None, None)
    optional = {"adds": array, "own": own, "q_norm": q_norm, "k_norm": k_norm}
    optional = {name: one for name, one in optional.items() if one is not None}
    numbers = _Numbers(scale=scaling, eps=None if norms is None else eps, adds=pieces)
    names = (*_READ, *optional, *_WRITTEN)
    sums, peaks, totals, k, v = pl.pallas_call(
        functools.partial(_kernel, names=names, sizes=sizes, numbers=numbers),
        grid=(B, sizes.K, P),
        out_shape=[
            jax.ShapeDtypeStruct((P, B, heads, H), jnp.float32),
            jax.ShapeDtypeStruct((P, B, heads), jnp.float32),
            jax.ShapeDtypeStruct((P, B, heads), jnp.float32),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        input_output_aliases={5: 3, 6: 4},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(index.reshape(1), qkv, cos, sin, seen, k, v, *optional.values())
    return Parts(sums, peaks, totals, qkv.dtype), (k, v)


def _placed(adds: Sequence[Columns | None]) -> tuple[jax.Array | None, jax.Array | None, Any]:
    """The array of the adds, each row's own block of it, and the adds without these; None for what
    there is not."""
    given = [add for add in adds if add is not None]
    if not given:
        return None, None, None
    first = given[0]
    require(
        all(add.array is first.array and add.own is first.own for add in given),
        "decode_attention takes adds that lie in one array",
    )
    return first.array, first.own, [add and add._replace(array=None, own=None) for add in adds]


# The arrays that a program reads, those that it may be given, and those that it writes.
_READ = ("index", "qkv", "cos", "sin", "seen", "k", "v")
_OPTIONAL = ("adds", "own", "q_norm", "k_norm")
_WRITTEN = ("sums", "peaks", "totals", "new_k", "new_v")
_Refs = namedtuple("_Refs", (*_READ, *_OPTIONAL, *_WRITTEN))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Program:
    """One program: a row's group of heads over a part of the slots."""

    refs: _Refs
    sizes: _Sizes
    numbers: _Numbers
    row: jax.Array
    group: jax.Array
    part: jax.Array
    cached: jax.Array  # the row of the cache: rows and groups are one axis there
    index: jax.Array  # the new token's slot
    lower: jax.Array  # the channels of a head's first half
    lanes: jax.Array  # all its channels
    heads: jax.Array  # [R], filled up behind the group's
    real: jax.Array  # [R] bool: whether the group has the head

    @property
    def dtype(self) -> Any:
        """Of all products."""
        return self.refs.qkv.dtype


# The new token: its queries `[R, H/2]` twice, its key `[H/2]` twice, its value `[H]`.
_Token = namedtuple("_Token", "q, k, v")
# A softmax over some of the slots, in float32: each head's highest score and the sum of its
# weights, `[R]`, and the weighted sum of the values, `[R, H]`.
_Running = namedtuple("_Running", "peaks, totals, sums")


def _kernel(*refs: Any, names: Sequence[str], sizes: _Sizes, numbers: _Numbers) -> None:
    """The heads of one group of one row over one part of the slots.

    The first part writes the new token's slot and counts the token itself, which no program reads
    back from the cache: nothing waits for that write.
    """
    given = dict.fromkeys(_OPTIONAL) | dict(zip(names, refs, strict=True))
    program = _locate(_Refs(**given), sizes, numbers)
    token = _load_token(program)

    @pl.when(program.part == 0)
    def _() -> None:
        _write_slot(program, token)

    begun = _begin(program, token)
    # Slots that nothing has been written to yet are not read.
    written = jnp.clip(program.index - program.part * sizes.part, 0, sizes.part)
    look = functools.partial(_look, program, token.q)
    _store(program, jax.lax.fori_loop(0, pl.cdiv(written, _SLOTS), look, begun))


def _locate(refs: _Refs, sizes: _Sizes, numbers: _Numbers) -> _Program:
    """The program of this place in the grid."""
    row, group, part = (pl.program_id(axis) for axis in range(3))
    G = sizes.N // sizes.K
    own = jnp.arange(max(_ROWS, pl.next_power_of_2(G)))
    return _Program(
        refs=refs,
        sizes=sizes,
        numbers=numbers,
        row=row,
        group=group,
        part=part,
        # A full cache is written to its last slot, as XLA's updates do, and never behind it.
        index=jnp.minimum(refs.index[0], sizes.S - 1),
        cached=row * sizes.K + group,
        lower=jnp.arange(sizes.H // 2),
        lanes=jnp.arange(sizes.H),
        heads=group * G + own,
        real=own < G,
    )


def _load_token(program: _Program) -> _Token:
    refs = program.refs
    sizes = program.sizes
    cos = refs.cos[program.row, program.lower]
    sin = refs.sin[program.row, program.lower]

    def rotated(load: Callable[[jax.Array], jax.Array], norm: Any) -> Halves:
        first = _wide(load(program.lower))
        second = _wide(load(sizes.H // 2 + program.lower))
        if program.numbers.eps is not None:
            first, second = _normed(program, (first, second), norm)
        turned = first * cos - second * sin
        return turned.astype(program.dtype), (second * cos + first * sin).astype(program.dtype)

    def load_q(channels: jax.Array) -> jax.Array:
        columns = program.heads[:, None] * sizes.H + channels[None, :]
        mask = jnp.broadcast_to(program.real[:, None], columns.shape)
        q = triton.load(refs.qkv.at[program.row, columns], mask=mask, other=0.0)
        return _with_add(program, 0, q, columns)

    def load_own(which: int, channels: jax.Array) -> jax.Array:
        """Of the group's one head of k (1) or v (2)."""
        start = (sizes.N + (which - 1) * sizes.K) * sizes.H
        columns = program.group * sizes.H + channels
        return _with_add(program, which, refs.qkv[program.row, start + columns], columns)

    q = rotated(load_q, refs.q_norm)
    first, second = rotated(functools.partial(load_own, 1), refs.k_norm)
    k = (first.astype(refs.k.dtype), second.astype(refs.k.dtype))
    v = load_own(2, program.lanes).astype(refs.v.dtype)
    return _Token(q, k, v)


def _with_add(program: _Program, which: int, values: jax.Array, columns: jax.Array) -> jax.Array:
    """Columns of q, k or v (0, 1, 2) with what is repeat-and-added to them."""
    adds = program.numbers.adds
    if adds is None or adds[which] is None:
        return values
    add = adds[which]
    places = add.at(in_piece(columns, add.width))
    if program.refs.own is not None:
        places = program.refs.own[program.row] * add.stride + places
    return values + program.refs.adds[program.row, places]


def _normed(program: _Program, halves: Halves, norm: Any) -> Halves:
    """Heads over the root of their mean square, times the norm's scale, rounded where the models
    are: before the scale and behind it."""
    dtype = program.dtype
    squares = sum(jnp.sum(half * half, axis=-1, keepdims=True) for half in halves)
    factor = jax.lax.rsqrt(squares / program.sizes.H + program.numbers.eps)
    starts = (0, program.sizes.H // 2)
    scales = [norm[start + program.lower].astype(dtype) for start in starts]
    first, second = (
        _wide((half * factor).astype(dtype) * scale)
        for half, scale in zip(halves, scales, strict=True)
    )
    return first, second


def _write_slot(program: _Program, token: _Token) -> None:
    """Writes the token's key and value into its slot of the cache."""
    new_k = program.refs.new_k
    half = program.sizes.H // 2
    new_k[program.cached, program.lower, program.index] = token.k[0]
    new_k[program.cached, half + program.lower, program.index] = token.k[1]
    program.refs.new_v[program.cached, program.index, program.lanes] = token.v


def _begin(program: _Program, token: _Token) -> _Running:
    """The softmax over the token itself in the first part, over nothing in the others."""
    first = program.part == 0
    products = (
        (_wide(q) * _wide(k.astype(program.dtype))[None, :]).sum(axis=1)
        for q, k in zip(token.q, token.k, strict=True)
    )
    scores = sum(products) * program.numbers.scale
    peaks = jnp.where(first, scores, _LOWEST)
    totals = jnp.where(first, jnp.ones_like(scores), 0.0)
    value = _wide(token.v.astype(program.dtype))
    alone = jnp.broadcast_to(value[None, :], (len(program.heads), len(value)))
    return _Running(peaks, totals, jnp.where(first, alone, 0.0))


def _look(program: _Program, q: Halves, i: jax.Array, running: _Running) -> _Running:
    """The softmax with the i-th slots of the part taken in."""
    refs = program.refs
    sizes = program.sizes
    slots = program.part * sizes.part + i * _SLOTS + jnp.arange(_SLOTS)
    inside = slots < sizes.S

    def load(ref: Any, at: Any, mask: jax.Array) -> jax.Array:
        return triton.load(ref.at[at], mask=mask, other=0.0).astype(program.dtype)

    stored = triton.load(refs.seen.at[program.row, slots], mask=inside, other=False)
    seen = stored & (slots != program.index)
    across = jnp.broadcast_to(inside[None, :], (sizes.H // 2, _SLOTS))
    keys = [
        load(refs.k, (program.cached, (start + program.lower)[:, None], slots[None, :]), across)
        for start in (0, sizes.H // 2)
    ]
    scores = sum(_product(a, x) for a, x in zip(q, keys, strict=True))
    scores = scores * program.numbers.scale
    scores = jnp.where(seen[None, :], scores, _LOWEST)
    peaks = jnp.maximum(running.peaks, scores.max(axis=1))
    weights = jnp.where(seen[None, :], jnp.exp(scores - peaks[:, None]), 0.0)
    shrunk = jnp.exp(running.peaks - peaks)
    down = jnp.broadcast_to(inside[:, None], (_SLOTS, sizes.H))
    values = load(refs.v, (program.cached, slots[:, None], program.lanes[None, :]), down)
    sums = running.sums * shrunk[:, None] + _product(weights.astype(program.dtype), values)
    return _Running(peaks, running.totals * shrunk + weights.sum(axis=1), sums)


def _store(program: _Program, running: _Running) -> None:
    """Writes what the part comes to, of the heads that the group has."""
    refs = program.refs
    at = (program.part, program.row, program.heads)
    triton.store(refs.peaks.at[at], running.peaks, mask=program.real)
    triton.store(refs.totals.at[at], running.totals, mask=program.real)
    every = jnp.broadcast_to(program.real[:, None], running.sums.shape)
    at = (program.part, program.row, program.heads[:, None], program.lanes[None, :])
    triton.store(refs.sums.at[at], running.sums, mask=every)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """On a tensor core where the dtype is a half one, in float32 without TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision)
