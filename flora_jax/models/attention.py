"""Attention as XLA or cuDNN computes it; a decode step's own kernel is in decode_attention.py.

Axis letters: B batch, T query, S key, N heads, K key/value heads, R rows of a group's product (its heads' queries),
H head width. Softmax in float32 whatever the compute dtype.
"""

from __future__ import annotations

import importlib.util
import math
import re

import jax
import jax.numpy as jnp

from flora_jax.models.config import LlamaConfig

Array = jax.Array

_LONG = 128  # tokens of a row from which on attention is worth cutting into blocks


def cudnn_runs(q: Array) -> bool:
    """Whether cuDNN's fused attention can: on a GPU, in half precision."""
    return jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)


def kernel_runs(config: LlamaConfig) -> bool:
    """Whether a decode step's attention can be the kernel of decode_attention.py: heads are 32, 64, 128 or 256 wide and
    jax compiles Triton for the device, an NVIDIA GPU of compute capability 8.0 (Ampere) or more."""
    found = importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(jax.devices()[0], "compute_capability", "")))
    return found and capability is not None and int(capability[1]) >= 8 and config.head_dim in (32, 64, 128, 256)


def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention of q `[B, T, N, H]` over k, v `[B, S, K, H]`; mask `[B, 1, T, S]` bool, which shows no query a later
    key, None for plain causal. T = S where cuDNN cannot run. Softmax in float32."""
    if cudnn_runs(q):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, implementation="cudnn")

    def attention(q: Array, k: Array, v: Array) -> Array:
        k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
        S = k.shape[-1]
        return attend_blocks(q, k, v, jnp.tril(jnp.ones((S, S), bool))[None, None] if mask is None else mask)

    # As cuDNN does, the softmax is computed again in the backward pass: no `[B, N, T, S]` array outlives its layer.
    return jax.checkpoint(attention, prevent_cse=False)(q, k, v)


def attend_blocks(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """`attend_grouped` where T = S and the mask shows no query a later key: queries block by block, each over the keys
    up to its end, so that three eighths of the work, all masked, is not done."""
    S = k.shape[-1]
    size = S if S < _LONG else -(-S // 4)
    blocks = [
        attend_grouped(q[:, end - size : end], k[..., :end], v[..., :end, :], mask[..., end - size : end, :end])
        for end in range(size, S + size, size)
    ]
    return jnp.concatenate(blocks, axis=1)


def attend_grouped(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attention of q `[B, T, N, H]` over k `[B, K, H, S]` and v `[B, K, S, H]`, or B and K in one axis as in the cache;
    mask `[B, 1, T, S]` bool. The heads of a group are rows of one product, which reads its k and v once (XLA's
    `jax.nn.dot_product_attention` makes each head a product of its own, and is slower). Softmax in float32."""
    B, T, N, H = q.shape
    *leading, _, S = k.shape  # apart, a mesh can split both; in one, a decode step's loop copies no cache
    K = math.prod(leading) // B
    rows = q.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4).reshape(*leading, -1, H)
    scores = jnp.einsum("...RH,...HS->...RS", rows, k, preferred_element_type=jnp.float32) * H**-0.5
    seen = jnp.broadcast_to(mask[:, :, None], (B, K, 1, T, S)).reshape(*leading, 1, T, S)
    scores = jnp.where(seen, scores.reshape(*leading, -1, T, S), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(*leading, -1, S)
    return jnp.einsum("...RS,...SH->...RH", weights, v).reshape(B, N, T, H).swapaxes(1, 2)
