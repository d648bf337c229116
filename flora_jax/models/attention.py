"""Attention of training and of prompts, and the rotary embeddings of its positions; a decode
step's own kernel is in decode_attention.py.

Axis letters: B batch, T query, S key, N heads, K key/value heads, R rows of a group's product (its
heads' queries), H head width. Softmax in float32 whatever the compute dtype.

What computes it, by which of the keys up to its own a query sees:

    all of them             cuDNN where it runs, else XLA
    those of its segment    Pallas's flash attention where it runs, else XLA, block by block
    those of a mask         XLA, block by block

Packed rows are told apart by segment ids `[B, T]`, and no array of `[T, T]` is made: cuDNN would
take the mask as a bias of that size, and compute the bias's gradient too. Of the kernels that take
segments, `jax.experimental.pallas.ops.gpu.attention.mha` comes with every jax that this
package runs on, needs Ampere or later, and has a backward pass. cuDNN's packed form is private to
jax and needs Hopper. tokamax, which jax 0.11 names as mha's successor, takes segments only as a
dense mask (0.0.12); it is the one to move to once it does.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import rounded_on_cpu
from flora_jax.device import AMPERE, capability
from flora_jax.models.config import LlamaConfig

# jax warns at each import and each lowering. What replaces them is said above and in
# decode_attention.py.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
warnings.filterwarnings("ignore", ".*ops.gpu.attention is deprecated", DeprecationWarning)

_LONG = 128  # from so many tokens a row on, attention is worth cutting into blocks
_BLOCK = 128  # the most queries of a block
_TILE = 128  # of queries and of keys in Pallas's forward pass; a row is filled up to a multiple
_BACKWARD_TILE = 32
_HALF = (jnp.bfloat16, jnp.float16)


class Seen(NamedTuple):
    """What a query sees of the keys up to its own: all, those of its segment, those of a mask.

    segments: `[B, T]` int32, of queries and keys alike. mask: `[B, 1, T, S]` bool, which shows no
    query a later key. At most one of them is given."""

    segments: jax.Array | None = None
    mask: jax.Array | None = None


def _half_on_ampere(q: jax.Array) -> bool:
    return q.dtype in _HALF and (capability() or (0, 0)) >= AMPERE


def cudnn_runs(q: jax.Array) -> bool:
    """Whether cuDNN's fused attention runs. It needs an NVIDIA GPU from Ampere on, half precision,
    and heads of at most 128 channels, a multiple of 8."""
    return _half_on_ampere(q) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def pallas_runs(q: jax.Array) -> bool:
    """Whether Pallas's flash attention runs. It needs an NVIDIA GPU from Ampere on, half precision,
    heads of 64 or 128 channels, and one device, since XLA cannot split a Pallas call over a
    mesh."""
    alone = jax.device_count() == 1
    return _half_on_ampere(q) and q.shape[-1] in (64, 128) and alone and _has_triton()


def kernel_runs(config: LlamaConfig) -> bool:
    """Whether a decode step's attention can be the kernel of decode_attention.py. It needs heads of
    32, 64, 128 or 256 channels and a device that jax compiles Triton for: an NVIDIA GPU from Ampere
    on."""
    wide = config.head_dim in (32, 64, 128, 256)
    return wide and (capability() or (0, 0)) >= AMPERE and _has_triton()


def _has_triton() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of q `[B, T, N, H]` over k, v `[B, T, K, H]`, with mask or segments as in `Seen`;
    plain causal without. scale: of the scores, None for 1/sqrt(H). No array of `[T, T]` outlives
    its block, in the backward pass either."""
    if mask is None and segments is None and cudnn_runs(q):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn", scale=scale
        )
    if mask is None and segments is not None and pallas_runs(q):
        return attend_segments(q, k, v, segments, scale)
    return attend_blocks(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), Seen(segments, mask), scale)


def attend_segments(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments `[B, T]` by Pallas's kernel; shapes as in `attend`.
    interpret: runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.gpu import attention as pallas  # what only a GPU needs

    T, heads = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, heads, axis=2) for x in (k, v))  # the kernel knows no groups
    fill = -T % _TILE
    q, k, v = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (q, k, v))
    # The filling lies behind every query, where causality hides it.
    segments = jnp.pad(segments, ((0, 0), (0, fill)))
    sizes = pallas.BlockSizes(
        block_q=_TILE,
        block_k=_TILE if q.shape[-1] <= 64 else _TILE // 2,
        block_q_dkv=_BACKWARD_TILE,
        block_kv_dkv=_BACKWARD_TILE,
        block_q_dq=_BACKWARD_TILE,
        block_kv_dq=_BACKWARD_TILE,
    )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out = pallas.mha(
        q, k, v, segments, sm_scale=scale, causal=True, block_sizes=sizes, interpret=interpret
    )
    return out[:, :T]


def attend_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, scale: float | None = None
) -> jax.Array:
    """Attention of q `[B, T, N, H]` over k `[B, K, H, T]` and v `[B, K, T, H]` that shows no query
    a later key. Queries go in four parts, each over the keys up to its end, which spares three
    eighths of the work, all of it masked. Parts of long rows are cut further, one block after
    another, and each block's scores are computed again in the backward pass."""
    T = q.shape[1]
    size = T if T < _LONG else -(-T // 4)
    parts = [(start, min(start + size, T)) for start in range(0, T, size)]
    return jnp.concatenate([_part(q, k, v, seen, scale, *part) for part in parts], axis=1)


def _part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    scale: float | None,
    start: int,
    end: int,
) -> jax.Array:
    """Attention of the queries from `start` to `end` over the keys up to `end`."""

    def block(rows: _Rows) -> jax.Array:
        mask = rows.places[:, None] >= jnp.arange(end)
        if rows.mask is not None:
            mask = rows.mask
        elif rows.segments is not None:
            mask = mask & (rows.segments[:, :, None] == seen.segments[:, None, :end])
        mask = jnp.broadcast_to(mask, (len(q), *mask.shape[-2:]))
        return attend_grouped(rows.q, k[..., :end], v[..., :end, :], mask[:, None], scale)

    block = jax.checkpoint(block, prevent_cse=False)
    rows = _Rows(
        q[:, start:end],
        jnp.arange(start, end),
        None if seen.segments is None else seen.segments[:, start:end],
        None if seen.mask is None else seen.mask[:, 0, start:end, :end],
    )
    if end - start <= _BLOCK:
        return block(rows)
    out = jax.lax.map(block, _Rows(*(None if x is None else _cut(x) for x in rows)))
    return jnp.moveaxis(out, 0, 1).reshape(len(q), -1, *q.shape[2:])[:, : end - start]


class _Rows(NamedTuple):
    """Queries of a part or a block, `[B, T, …]`, their places `[T]`, and what they see."""

    q: jax.Array
    places: jax.Array
    segments: jax.Array | None
    mask: jax.Array | None


def _cut(x: jax.Array) -> jax.Array:
    """`[B, T, …]` or `[T]` in blocks, `[blocks, B, 128, …]`, the last one filled up with zeros."""
    axis = min(1, x.ndim - 1)
    x = jnp.pad(x, [(0, -n % _BLOCK if i == axis else 0) for i, n in enumerate(x.shape)])
    x = x.reshape(*x.shape[:axis], -1, _BLOCK, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def attend_grouped(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float | None = None
) -> jax.Array:
    """Attention of q `[B, T, N, H]` over k `[B, K, H, S]` and v `[B, K, S, H]`.

    k and v may have B and K in one axis, as in the cache. mask: `[B, 1, T, S]` bool. The heads of a
    group are rows of one product, which reads its k and v once (XLA's
    `jax.nn.dot_product_attention` makes each head a product of its own, and is slower). Softmax in
    float32.
    """
    B, T, N, H = q.shape
    # B and K apart, a mesh can split both; in one axis, a decode loop copies no cache.
    *leading, _, S = k.shape
    K = math.prod(leading) // B
    rows = q.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4).reshape(*leading, -1, H)
    if scale is None:
        scale = H**-0.5
    scores = _matmul(rows, k, jnp.float32) * scale
    seen = jnp.broadcast_to(mask[:, :, None], (B, K, 1, T, S)).reshape(*leading, 1, T, S)
    scores = jnp.where(seen, scores.reshape(*leading, -1, T, S), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(*leading, -1, S)
    return _matmul(weights, v, v.dtype).reshape(B, N, T, H).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """`a b` in `dtype`, a `[…, M, K]` and b `[…, K, N]` of one dtype, which their gradients are
    computed in, too: the automatic ones of float32 scores would be products in float32."""
    return rounded_on_cpu(jnp.matmul, a, b, dtype)


def _matmul_forward(
    a: jax.Array, b: jax.Array, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(a, b, dtype), (a, b)


def _matmul_backward(
    dtype: Any, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a, b = saved
    cotangent = cotangent.astype(a.dtype)
    return (
        _matmul(cotangent, b.swapaxes(-1, -2), a.dtype),
        _matmul(a.swapaxes(-1, -2), cotangent, b.dtype),
    )


_matmul.defvjp(_matmul_forward, _matmul_backward)


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


def rotary_of_layer(
    config: LlamaConfig, rotary: tuple[jax.Array, jax.Array], i: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of layer i. A layer without rotary embeddings has 1 and 0, which turn nothing, so
    that all layers are one program."""
    if not config.no_rope_layers:
        return rotary
    cos, sin = rotary
    turned = np.ones(config.num_hidden_layers, bool)
    turned[list(config.no_rope_layers)] = False
    turned = jnp.asarray(turned)[i]
    return jnp.where(turned, cos, 1), jnp.where(turned, sin, 0)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x `[B, T, heads, H]`: channel i of the first half pairs with channel i of the
    second."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
