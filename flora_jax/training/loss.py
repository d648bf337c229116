"""Cross-entropy over a large vocabulary without ever holding all logits.

Positions that the loss does not count are never scored: each row's counted positions are moved to its front, and
chunks that hold none are skipped. A chunk's logits live once: the forward pass takes from them the loss and its
gradient with respect to the hidden states, so nothing is computed a second time for the backward pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(hidden: Array, unembedding: Array, targets: Array, weights: Array, chunk: int) -> Array:
    """Sum over positions of `weights · (logsumexp(h Uᵀ) − (h Uᵀ)[target])`, float32 scalar.

    hidden `[B, T, D]`, unembedding U `[V, D]`, targets `[B, T]` int32, weights `[B, T]` float32 (0: not counted);
    chunk: positions of a row scored at once, so that at most `[B, chunk, V]` logits exist. Differentiable in hidden
    and unembedding; the latter's gradient is computed only if something asks for it.
    """
    return _forward(hidden, unembedding, targets, weights, chunk)[0]


def _chunks(x: Array, order: Array, chunk: int) -> Array:
    """`[B, T, …]` in the order of `order [B, T]`, cut along T into `[T / chunk, B, chunk, …]`, zeros at the end."""
    x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
    B, T = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)


def _cut(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, tuple[Array, Array, Array]]:
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    return order, tuple(_chunks(x, order, chunk) for x in (hidden, targets, weights))


def _softmax_parts(h: Array, U: Array, y: Array) -> tuple[Array, Array, Array]:
    """A chunk's exponentials `[B, C, V]`, their sum and the loss `[B, C]` of each position, float32."""
    logits = jnp.einsum("BCD,VD->BCV", h, U, preferred_element_type=jnp.float32)
    highest = jax.lax.stop_gradient(logits.max(-1))
    exponentials = jnp.exp(logits - highest[..., None])
    total = exponentials.sum(-1)
    # The target's logit by its own short product: a one-hot mask would be as large as the logits.
    at_target = jnp.einsum("BCD,BCD->BC", h, U[y], preferred_element_type=jnp.float32)
    return exponentials, total, highest + jnp.log(total) - at_target


def _forward(hidden, unembedding, targets, weights, chunk):
    U = jnp.asarray(unembedding, hidden.dtype)
    order, cut = _cut(hidden, targets, weights, chunk)

    def score(h, y, w):
        with jax.named_scope("logits"):
            exponentials, total, losses = _softmax_parts(h, U, y)
            expected = jnp.einsum("BCV,VD->BCD", exponentials.astype(h.dtype), U, preferred_element_type=jnp.float32)
            gradient = (w / total)[..., None] * expected - w[..., None] * U[y]
            return jnp.sum(w * losses), gradient.astype(h.dtype)

    def skip(h, y, w):
        return jnp.zeros((), jnp.float32), jnp.zeros_like(h)

    def body(total, xs):
        loss, gradient = jax.lax.cond(jnp.any(xs[2] != 0), score, skip, *xs)
        return total + loss, gradient

    loss, gradient = jax.lax.scan(body, jnp.zeros((), jnp.float32), cut)
    gradient = jnp.moveaxis(gradient, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    gradient = jnp.take_along_axis(gradient, jnp.argsort(order, axis=1)[..., None], axis=1)
    return loss, (gradient, hidden, unembedding, targets, weights)


def _backward(chunk, residuals, cotangent):
    gradient, hidden, unembedding, targets, weights = residuals
    U = jnp.asarray(unembedding, hidden.dtype)
    _, cut = _cut(hidden, targets, weights, chunk)

    def body(total, xs):
        h, y, w = xs
        exponentials, sums, _ = _softmax_parts(h, U, y)
        softmax = (exponentials * (w / sums)[..., None]).astype(h.dtype)
        expected = jnp.einsum("BCV,BCD->VD", softmax, h, preferred_element_type=jnp.float32)
        return total + expected.at[y].add(-w[..., None] * h.astype(jnp.float32)), None

    # Dead code, and removed as such, wherever the unembedding is frozen.
    total, _ = jax.lax.scan(body, jnp.zeros(unembedding.shape, jnp.float32), cut)
    return cotangent.astype(gradient.dtype) * gradient, (cotangent * total).astype(unembedding.dtype), None, None


chunked_cross_entropy.defvjp(_forward, _backward)
