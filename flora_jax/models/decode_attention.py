"""A decode step's attention on a GPU: rotary embeddings, the cache's new slot and attention in one
Pallas kernel.

Written out for XLA this is five to eight launches a layer. The kernel is one, and the sum over its
parts a second, which takes in what o reads beside attention. Axis letters as in llama.py; P parts
that the slots are cut into, each read by a program of its own (flash decoding: one query has too
few heads to keep a GPU busy).

The kernel is written for Pallas's Triton backend, which jax deprecates since 0.11.0 and will
remove. jax names two replacements: Pallas's Mosaic GPU backend
(`jax.experimental.pallas.mosaic_gpu`), or a kernel in Triton's own language, called through the
package jax_triton. Without the backend XLA's attention serves.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Array = jax.Array

_SLOTS = 64  # that a program looks at in one go
# slots a program has to read, until there are so many programs to a head
_PART, _MOST_PARTS = 256, 32
_ROWS = 16  # the fewest of a product on a tensor core; a group has fewer heads
_LOWEST = float(jnp.finfo(jnp.float32).min)


def decode_attention(
    qkv: Array,
    rotary: tuple[Array, Array],
    seen: Array,
    past: tuple[Array, Array, Array],
    heads: int,
    interpret: bool = False,
) -> tuple[Array, tuple[Array, Array]]:
    """Attention of one new token a row, `[B, N·H]`, and the cache's `(k, v)` with that token in its
    slot.

    qkv `[B, ≥ (N+2K)·H]`: q, k and v as their product gives them, heads side by side, and any
    columns behind them.
    rotary: cos and sin `[B, 1, 1, H/2]`. seen `[B, S]` bool: the slots up to `index` that a row
    sees, that one too.
    past: k `[B·K, H, S]`, v `[B·K, S, H]` and the scalar `index` of the token's slot; k and v are
    consumed. heads: N. Products in qkv's dtype with float32 sums, softmax in float32. H is a power
    of two, at least 32 on a GPU, which is where it runs; `interpret` runs it anywhere, slowly.
    """
    k, v, index = past
    B, (BK, H, S) = len(qkv), k.shape
    K, N = BK // B, heads
    P = min(pl.cdiv(S, _PART), _MOST_PARTS)
    part = pl.cdiv(pl.cdiv(S, P), _SLOTS) * _SLOTS
    cos, sin = (table.reshape(B, H // 2) for table in rotary)
    sums, peaks, totals, k, v = pl.pallas_call(
        functools.partial(_kernel, N=N, K=K, H=H, S=S, part=part),
        grid=(B, K, P),
        out_shape=[
            jax.ShapeDtypeStruct((P, B, N, H), jnp.float32),
            jax.ShapeDtypeStruct((P, B, N), jnp.float32),
            jax.ShapeDtypeStruct((P, B, N), jnp.float32),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        input_output_aliases={5: 3, 6: 4},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(index.reshape(1), qkv, cos, sin, seen, k, v)
    # Part by part rather than as reductions over P, so that XLA makes one kernel of it.
    peak = functools.reduce(jnp.maximum, peaks)
    shares = [jnp.exp(peaks[i] - peak)[..., None] for i in range(P)]
    out = sum(share * sums[i] for i, share in enumerate(shares))
    out = out / sum(share * totals[i][..., None] for i, share in enumerate(shares))
    return out.astype(qkv.dtype).reshape(B, N * H), (k, v)


def _kernel(
    index_ref: Any,
    qkv_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    seen_ref: Any,
    k_ref: Any,
    v_ref: Any,
    sums_ref: Any,
    peaks_ref: Any,
    totals_ref: Any,
    new_k_ref: Any,
    new_v_ref: Any,
    *,
    N: int,
    K: int,
    H: int,
    S: int,
    part: int,
) -> None:
    """The heads of one group of one row over one part of the slots. The first part writes the new
    token's slot and counts the token itself, which no program reads back from the cache: nothing
    waits for that write."""
    b, group, p = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dtype, half, G = qkv_ref.dtype, H // 2, N // K
    # A cache that is full is written to its last slot, as XLA's updates do, and never behind it.
    index, row = jnp.minimum(index_ref[0], S - 1), b * K + group
    lower, lanes = jnp.arange(half), jnp.arange(H)
    own = jnp.arange(max(_ROWS, pl.next_power_of_2(G)))
    heads, real = group * G + own, own < G
    product = functools.partial(
        triton.dot, precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    )

    def wide(x):
        return x.astype(jnp.float32)

    cos, sin = cos_ref[b, lower], sin_ref[b, lower]

    def rotated(load: Any) -> tuple[Array, Array]:
        first, second = wide(load(lower)), wide(load(half + lower))
        return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(
            dtype
        )

    def load_q(channels: Array) -> Array:
        columns = heads[:, None] * H + channels[None, :]
        mask = jnp.broadcast_to(real[:, None], columns.shape)
        return triton.load(qkv_ref.at[b, columns], mask=mask, other=0.0)

    at = (N + group) * H
    q = rotated(load_q)
    k = [x.astype(k_ref.dtype) for x in rotated(lambda channels: qkv_ref[b, at + channels])]
    v = qkv_ref[b, at + K * H + lanes].astype(v_ref.dtype)

    @pl.when(p == 0)
    def _() -> None:
        new_k_ref[row, lower, index] = k[0]
        new_k_ref[row, half + lower, index] = k[1]
        new_v_ref[row, index, lanes] = v

    first = p == 0
    scores = (
        sum(
            (wide(a) * wide(x.astype(dtype))[None, :]).sum(axis=1)
            for a, x in zip(q, k, strict=True)
        )
        * H**-0.5
    )
    peaks = jnp.where(first, scores, _LOWEST)
    totals = jnp.where(first, jnp.ones_like(scores), 0.0)
    sums = jnp.where(first, jnp.broadcast_to(wide(v.astype(dtype))[None, :], (len(own), H)), 0.0)

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peaks, totals, sums = carry
        slots = p * part + i * _SLOTS + jnp.arange(_SLOTS)
        inside = slots < S

        def load(ref: Any, at: Any, mask: Array) -> Array:
            return triton.load(ref.at[at], mask=mask, other=0.0).astype(dtype)

        seen = triton.load(seen_ref.at[b, slots], mask=inside, other=False) & (slots != index)
        across = jnp.broadcast_to(inside[None, :], (half, _SLOTS))
        keys = [
            load(k_ref, (row, (start + lower)[:, None], slots[None, :]), across)
            for start in (0, half)
        ]
        scores = sum(product(a, x) for a, x in zip(q, keys, strict=True)) * H**-0.5
        scores = jnp.where(seen[None, :], scores, _LOWEST)
        higher = jnp.maximum(peaks, scores.max(axis=1))
        weights = jnp.where(seen[None, :], jnp.exp(scores - higher[:, None]), 0.0)
        shrunk = jnp.exp(peaks - higher)
        down = jnp.broadcast_to(inside[:, None], (_SLOTS, H))
        values = load(v_ref, (row, slots[:, None], lanes[None, :]), down)
        sums = sums * shrunk[:, None] + product(weights.astype(dtype), values)
        return higher, totals * shrunk + weights.sum(axis=1), sums

    # Slots that nothing has been written to yet are not read.
    steps = pl.cdiv(jnp.clip(index - p * part, 0, part), _SLOTS)
    peaks, totals, sums = jax.lax.fori_loop(0, steps, body, (peaks, totals, sums))
    triton.store(peaks_ref.at[p, b, heads], peaks, mask=real)
    triton.store(totals_ref.at[p, b, heads], totals, mask=real)
    every = jnp.broadcast_to(real[:, None], sums.shape)
    triton.store(sums_ref.at[p, b, heads[:, None], lanes[None, :]], sums, mask=every)
