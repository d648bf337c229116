"""Cross-entropy over a large vocabulary without ever holding all logits.

Positions that the loss does not count are never scored: each row's counted positions are moved to its front, and
chunks that hold none are skipped. A chunk's logits live once, block of the vocabulary by block: the forward pass takes
from them the loss and, as an online softmax (Milakov and Gimelshein 2018), its gradient with respect to the hidden
states, so nothing is computed a second time for the backward pass.

B rows, T positions, C positions of a chunk, D model width, V vocabulary, W entries of a block of it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

_BLOCK = 2048  # logits of 256 positions and as many entries stay in a core's cache


def vocabulary_block(vocabulary: int, split: bool = False) -> int:
    """How many entries of a vocabulary to score at once: on a CPU the largest divisor from 1,024 to 2,048, if there is
    one. All where a GPU runs, which wants large products, or a mesh has `split` the unembedding, since it would gather
    every block."""
    if split or jax.default_backend() != "cpu":
        return vocabulary
    return next((n for n in range(_BLOCK, _BLOCK // 2 - 1, -1) if vocabulary % n == 0), vocabulary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_cross_entropy(
    hidden: Array, unembedding: Array, targets: Array, weights: Array, chunk: int, block: int
) -> Array:
    """Sum over positions of `weights · (logsumexp(h Uᵀ) − (h Uᵀ)[target])`, float32 scalar.

    hidden `[B, T, D]`, unembedding U `[V, D]`, targets `[B, T]` int32, weights `[B, T]` float32 (0: not counted);
    chunk: positions of a row scored at once, and block, a divisor of V: entries of the vocabulary scored at once, so
    that at most `[B, chunk, block]` logits exist. Differentiable in hidden and unembedding; the latter's gradient is
    computed only if something asks for it.
    """
    return _forward(hidden, unembedding, targets, weights, chunk, block)[0]


def _chunks(x: Array, order: Array, chunk: int) -> Array:
    """`[B, T, …]` in the order of `order [B, T]`, cut along T into `[T / chunk, B, chunk, …]`, zeros at the end."""
    x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
    B, T = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)


def _cut(order: Array, chunk: int, *arrays: Array) -> tuple[Array, ...]:
    return tuple(_chunks(x, order, chunk) for x in arrays)


def _uncut(chunks: Array, order: Array) -> Array:
    """What `_chunks` has cut, in its old place: `[T / chunk, B, chunk, …]` to `[B, T, …]`."""
    x = jnp.moveaxis(chunks, 0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return jnp.take_along_axis(x, jnp.argsort(order, axis=1).reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def _logits(h: Array, entries: Array) -> Array:
    """`[B, C, D]` and `[W, D]` to `[B, C, W]`, float32."""
    return jnp.einsum("BCD,WD->BCW", h, entries, preferred_element_type=jnp.float32)


def _expected_entry(h: Array, blocks: Array) -> tuple[Array, Array]:
    """logsumexp of the logits `[B, C]` and `softmax(h Uᵀ) U` `[B, C, D]`, float32; U in blocks `[V / W, W, D]`."""

    def add(carry: tuple[Array, Array, Array], entries: Array) -> tuple[tuple[Array, Array, Array], None]:
        highest, total, weighted = carry
        logits = _logits(h, entries)
        risen = jnp.maximum(highest, logits.max(-1))
        exponentials, shrink = jnp.exp(logits - risen[..., None]), jnp.exp(highest - risen)
        own = jnp.einsum("BCW,WD->BCD", exponentials.astype(h.dtype), entries, preferred_element_type=jnp.float32)
        return (risen, shrink * total + exponentials.sum(-1), shrink[..., None] * weighted + own), None

    zeros = jnp.zeros(h.shape[:2], jnp.float32)
    start = (zeros - jnp.inf, zeros, jnp.zeros(h.shape, jnp.float32))
    (highest, total, weighted), _ = jax.lax.scan(add, start, blocks, unroll=len(blocks) == 1)
    return highest + jnp.log(total), weighted / total[..., None]


def _forward(hidden, unembedding, targets, weights, chunk, block):
    U = jnp.asarray(unembedding, hidden.dtype)
    blocks = U.reshape(-1, block, U.shape[1])
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def score(h, y, w):
        with jax.named_scope("logits"):
            logsumexp, expected = _expected_entry(h, blocks)
            # The target's logit by its own short product: a one-hot mask would be as large as the logits.
            at_target = jnp.einsum("BCD,BCD->BC", h, U[y], preferred_element_type=jnp.float32)
            gradient = w[..., None] * (expected - U[y])
            return jnp.sum(w * (logsumexp - at_target)), gradient.astype(h.dtype), logsumexp

    def skip(h, y, w):
        return jnp.zeros((), jnp.float32), jnp.zeros_like(h), jnp.zeros_like(w)

    def body(total, xs):
        loss, *parts = jax.lax.cond(jnp.any(xs[2] != 0), score, skip, *xs)
        return total + loss, parts

    start = jnp.zeros((), jnp.float32)
    loss, (gradient, logsumexp) = jax.lax.scan(body, start, _cut(order, chunk, hidden, targets, weights))
    return loss, (_uncut(gradient, order), logsumexp, order, hidden, unembedding, targets, weights)


def _backward(chunk, block, residuals, cotangent):
    gradient, logsumexp, order, hidden, unembedding, targets, weights = residuals
    U = jnp.asarray(unembedding, hidden.dtype)
    blocks = U.reshape(-1, block, U.shape[1])

    def body(total, xs):
        h, y, w, logsumexp = xs

        def own(_, entries):
            softmax = jnp.exp(_logits(h, entries) - logsumexp[..., None]) * w[..., None]
            return None, jnp.einsum("BCW,BCD->WD", softmax.astype(h.dtype), h, preferred_element_type=jnp.float32)

        _, expected = jax.lax.scan(own, None, blocks, unroll=len(blocks) == 1)
        return total + expected.reshape(total.shape).at[y].add(-w[..., None] * h.astype(jnp.float32)), None

    # Dead code, and removed as such, wherever the unembedding is frozen.
    cut = (*_cut(order, chunk, hidden, targets, weights), logsumexp)
    total, _ = jax.lax.scan(body, jnp.zeros(unembedding.shape, jnp.float32), cut)
    return cotangent.astype(gradient.dtype) * gradient, (cotangent * total).astype(unembedding.dtype), None, None


chunked_cross_entropy.defvjp(_forward, _backward)
