"""The name of a base: a digest of its parameters, so that an adapter is never used on another base unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    """Two position-dependent sums of a leaf's bits in bfloat16, uint32 `[2]`: exact, so the same on every mesh."""
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    mixed = (bits ^ (place * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(3266489917)
    return jnp.stack([mixed.sum(dtype=jnp.uint32), (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32)])


def base_fingerprint(params: Mapping[str, Any]) -> str:
    """A hex digest of every base parameter's path, shape and value; the same however the leaves are sharded.

    Values are rounded to bfloat16 first, so that one checkpoint loaded in float32 or in bfloat16 is one base.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{path} {leaf.shape} {_digest(leaf).tolist()}\n".encode())
    return digest.hexdigest()[:32]
