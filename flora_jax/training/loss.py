"""Cross-entropy over a large vocabulary without ever holding all logits.

Positions that the loss does not count are never scored: each row's counted positions are moved to
its front, and chunks without any are skipped. The logits of a chunk are computed once, one block of
the vocabulary at a time. From them the forward pass takes the loss and, with an online softmax
(Milakov and Gimelshein 2018), its gradient with respect to the hidden states, so the backward pass
computes no logits again.

B rows, T positions, C positions of a chunk, D model width, V vocabulary, W entries of its blocks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Entries; the logits of 256 positions and a block are 2 MB, which stay in a core's cache.
_BLOCK = 2048


def vocabulary_block(vocabulary: int) -> int:
    """How many entries of the vocabulary to score at once.

    On a CPU it is the largest divisor from 1,024 to 2,048, or all entries if there is none.
    Elsewhere it is all entries, since a GPU wants large products.
    """
    if jax.default_backend() != "cpu":
        return vocabulary
    return next((n for n in range(_BLOCK, _BLOCK // 2 - 1, -1) if vocabulary % n == 0), vocabulary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_cross_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    block: int,
) -> jax.Array:
    """The sum over each row's positions of `weights · (logsumexp(h Uᵀ) − (h Uᵀ)[target])`, `[B]`
    float32.

    hidden `[B, T, D]`; unembedding U `[V, D]`; targets `[B, T]` int32; weights `[B, T]` float32 (0:
    not counted); chunk: positions of a row scored at once; block: entries of the vocabulary scored
    at once, a divisor of V. At most `[B, chunk, block]` logits exist at a time. Differentiable in
    hidden and unembedding; the gradient of the unembedding is computed only if it is used.
    """
    return _forward(hidden, unembedding, targets, weights, chunk, block)[0]


def _chunks(x: jax.Array, order: jax.Array, chunk: int) -> jax.Array:
    """`[B, T, …]` in the order of `order [B, T]`, cut along T into `[T / chunk, B, chunk, …]`.

    Zeros fill the last chunk.
    """
    x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
    B, T = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)


def _uncut(chunks: jax.Array, order: jax.Array) -> jax.Array:
    """Undoes `_chunks`: `[T / chunk, B, chunk, …]` to `[B, T, …]` in the old order."""
    x = jnp.moveaxis(chunks, 0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return jnp.take_along_axis(
        x, jnp.argsort(order, axis=1).reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1
    )


def _logits(h: jax.Array, entries: jax.Array) -> jax.Array:
    """`[B, C, D]` and `[W, D]` to `[B, C, W]`, float32."""
    return jnp.einsum("BCD,WD->BCW", h, entries, preferred_element_type=jnp.float32)


def _blocks(U: jax.Array, block: int) -> jax.Array:
    """`[V, D]` to `[V / W, W, D]`."""
    return U.reshape(-1, block, U.shape[1])


def _expected_entry(h: jax.Array, U: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """logsumexp of the logits `[B, C]` and `softmax(h Uᵀ) U` `[B, C, D]`, float32."""

    def add(
        carry: tuple[jax.Array, jax.Array, jax.Array], entries: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        highest, total, weighted = carry
        logits = _logits(h, entries)
        risen = jnp.maximum(highest, logits.max(-1))
        exponentials = jnp.exp(logits - risen[..., None])
        shrink = jnp.exp(highest - risen)
        own = jnp.einsum(
            "BCW,WD->BCD", exponentials.astype(h.dtype), entries, preferred_element_type=jnp.float32
        )
        return (
            risen,
            shrink * total + exponentials.sum(-1),
            shrink[..., None] * weighted + own,
        ), None

    zeros = jnp.zeros(h.shape[:2], jnp.float32)
    start = (zeros - jnp.inf, zeros, jnp.zeros(h.shape, jnp.float32))
    (highest, total, weighted), _ = jax.lax.scan(
        add, start, _blocks(U, block), unroll=block == len(U)
    )
    return highest + jnp.log(total), weighted / total[..., None]


def _forward(hidden, unembedding, targets, weights, chunk, block):
    U = jnp.asarray(unembedding, hidden.dtype)
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def score(h, y, w):
        with jax.named_scope("logits"):
            logsumexp, expected = _expected_entry(h, U, block)
            # The target's logit is a short product of its own: a one-hot mask would be as large as
            # the logits.
            at_target = jnp.einsum("BCD,BCD->BC", h, U[y], preferred_element_type=jnp.float32)
            gradient = w[..., None] * (expected - U[y])
            return jnp.sum(w * (logsumexp - at_target), axis=1), (
                gradient.astype(h.dtype),
                logsumexp,
            )

    def skip(h, y, w):
        return jnp.zeros(len(h), jnp.float32), (jnp.zeros_like(h), jnp.zeros_like(w))

    def body(total, xs):
        loss, parts = jax.lax.cond(jnp.any(xs[2] != 0), score, skip, *xs)
        return total + loss, parts

    cut = tuple(_chunks(x, order, chunk) for x in (hidden, targets, weights))
    start = jnp.zeros(len(hidden), jnp.float32)
    loss, (gradient, logsumexp) = jax.lax.scan(body, start, cut)
    return loss, (_uncut(gradient, order), logsumexp, order, hidden, unembedding, targets, weights)


def _backward(chunk, block, residuals, cotangent):
    gradient, logsumexp, order, hidden, unembedding, targets, weights = residuals
    U = jnp.asarray(unembedding, hidden.dtype)

    def add(total, h, y, w, logsumexp):
        def of_block(_, entries):
            softmax = jnp.exp(_logits(h, entries) - logsumexp[..., None]) * w[..., None]
            return None, jnp.einsum(
                "BCW,BCD->WD", softmax.astype(h.dtype), h, preferred_element_type=jnp.float32
            )

        _, expected = jax.lax.scan(of_block, None, _blocks(U, block), unroll=block == len(U))
        return total + expected.reshape(total.shape).at[y].add(
            -w[..., None] * h.astype(jnp.float32)
        )

    def body(total, xs):
        return jax.lax.cond(jnp.any(xs[2] != 0), add, lambda total, *_: total, total, *xs), None

    # With a frozen unembedding the compiler removes this as dead code.
    weights = cotangent[:, None] * weights
    cut = (*(_chunks(x, order, chunk) for x in (hidden, targets, weights)), logsumexp)
    total, _ = jax.lax.scan(body, jnp.zeros(unembedding.shape, jnp.float32), cut)
    return (
        cotangent.astype(gradient.dtype)[:, None, None] * gradient,
        total.astype(unembedding.dtype),
        None,
        None,
    )


chunked_cross_entropy.defvjp(_forward, _backward)
