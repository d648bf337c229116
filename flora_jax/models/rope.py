"""Rotary position embeddings, in HF's half-split order, with Llama 3's frequency scaling."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.models.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """`[H/2]` float32 angular frequencies theta^(−2i/H), under llama3 scaling slowed by `factor`.

    Wavelengths above original/low_freq_factor are slowed in full, those below
    original/high_freq_factor not at all, and those between by linear interpolation.
    """
    H = config.head_dim
    frequencies = 1.0 / (config.rope_theta ** (np.arange(0, H, 2, dtype=np.float32) / H))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequencies / scaling.factor + smooth * frequencies).astype(np.float32)


def rotary_tables(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin `[B, T, 1, H/2]`, float32, for positions `[B, T]`."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x `[B, T, heads, H]`: channel i of the first half pairs with channel i of the
    second."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
