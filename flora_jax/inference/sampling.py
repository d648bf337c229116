"""The choice of the next token: greedy, or sampled with temperature, top-k and top-p.

B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from flora_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Decode settings; hashable, so that a compiled decode loop holds only what its setting needs.

    temperature: 0 takes the best token, and top_k and top_p are not read; top_k: keep the k best, 0
    keeps all; top_p: keep the smallest set of best tokens whose probability reaches p, 1 keeps all.
    Raises UserError for values outside these ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for field, kind, plain, what in (
            ("temperature", numbers.Real, float, "a number"),
            ("top_k", numbers.Integral, int, "an integer"),
            ("top_p", numbers.Real, float, "a number"),
        ):
            value = getattr(self, field)
            require(
                isinstance(value, kind) and not isinstance(value, bool),
                f"{field}={value!r} must be {what}",
            )
            # Python's own numbers hash and compare alike, whatever library the value came from.
            object.__setattr__(self, field, plain(value))
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature={self.temperature!r} must be 0 (greedy) or a positive number",
        )
        require(self.top_k >= 0, f"top_k={self.top_k!r} must be 0 (all) or a positive integer")
        require(0 < self.top_p <= 1, f"top_p={self.top_p!r} must be in (0, 1]")


def keep_top(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """`logits` `[B, V]` with −inf outside the top k tokens, then outside the nucleus p of those
    left."""
    if 0 < top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        best_first = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, best_first, axis=-1), axis=-1)
        # A token stays while those before it have not reached p, so the best one always stays.
        stays = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = jnp.where(
            jnp.zeros(logits.shape, bool).at[rows, best_first].set(stays), logits, -jnp.inf
        )
    return logits


def sample(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """One token a row, `[B]` int32, from logits `[B, V]`.

    keys `[B]`: a random key a row, so that a row's draw does not depend on the rows beside it.
    Greedy reads no key.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    # With the best logit at 0 nothing overflows, however small the temperature. It must not be 0 in
    # float32 itself.
    temperature = max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    logits = keep_top(logits, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
