"""Llama in flax.linen, pure functional: one layer, stacked and scanned to train, unrolled to serve.

Axis letters: B batch, T query, S key, D model, K key/value heads, H head width, R rank, V vocabulary, L layers.

    params/embed_tokens/embedding [V, D]              adapter/layers/<block>/<product>/A           [L, d_in, R_f]
    params/layers/<block>_norm/scale [L, D]           adapter/layers/<block>/<product>/<proj>_B    [L, R_b, d_out]
    params/layers/<block>/<product>/<proj>_kernel [L, d_in, d_out]
    params/final_norm/scale [D]   params/lm_head/kernel [D, V] (untied only)

Norms, softmax and logits are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import (
    SAVED,
    AdapterConfig,
    FusedDense,
    check_adapter,
    check_base,
    init_adapter,
    multiply_transposed,
    normal,
    pad_first_layer,
    repeat_and_add,
)
from flora_jax.errors import UserError
from flora_jax.models.attention import Seen, attend, attend_grouped, kernel_runs
from flora_jax.models.config import LlamaConfig
from flora_jax.models.rope import rotary_tables, rotate

Array = jax.Array
Tree = dict[str, Any]

REMAT_POLICIES = {
    "none": None,
    "products": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    k: a tuple of L arrays `[B·K, H, S]`; v: of L arrays `[B·K, S, H]`: as the two products of a decode step want them,
    with no reshaping between, so that a step writes its slot in place and copies nothing. valid `[B, S]` bool, which
    slots hold real tokens; index, scalar int32, the slot that the next token is written to, the same for every row
    (positions differ by row, slots do not).
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    valid: Array
    index: Array

    @classmethod
    def empty(
        cls, config: LlamaConfig, batch: int, length: int, dtype: Any = jnp.float32
    ) -> KVCache:
        """A cache of `length` slots for `batch` rows."""
        BK, H, L = batch * config.num_key_value_heads, config.head_dim, config.num_hidden_layers
        k = tuple(jnp.zeros((BK, H, length), dtype) for _ in range(L))
        v = tuple(jnp.zeros((BK, length, H), dtype) for _ in range(L))
        return cls(k, v, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))


class RMSNorm(nn.Module):
    """`x / rms(x) · scale` in float32, returned in x's dtype. x `[..., D]`, or with further channels behind the D,
    which pass as they are; scale is as wide as x."""

    width: int
    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param(
            "scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype
        ).astype(x.dtype)
        passing = None
        if x.shape[-1] > self.width:
            # Set apart first: what is left is a norm that XLA knows how to make one kernel of.
            own = jnp.arange(x.shape[-1]) < self.width
            passing, x = jnp.where(own, 0, x), jnp.where(own, x, 0)
        y = x.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.square(y).sum(axis=-1, keepdims=True) / self.width + self.eps)
        # Rounded before the scale, as the published models were trained.
        y = (y * factor).astype(x.dtype) * scale
        return y if passing is None else y + passing


class Attention(nn.Module):
    """qkv, rotary embeddings, attention, o. Returns `(output, z written by o, (k, v))`, k and v in the cache's form."""

    config: LlamaConfig
    adapter: AdapterConfig | None
    param_dtype: Any = jnp.float32
    fused: bool = False
    decode_kernel: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        z: Array | None,
        rotary: tuple[Array, Array],
        seen: Seen,
        past: tuple[Array, Array, Array] | None,
        select: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Array | None, tuple[Array, Array] | None]:
        config = self.config

        def dense(product):
            return FusedDense(
                product,
                config.widths,
                self.adapter,
                config.attention_bias,
                self.param_dtype,
                self.fused,
                name=product,
            )

        (q, k, v), z_in = dense("qkv")(x, z, select=select, deterministic=deterministic)
        B, T = x.shape[:2]
        if self.decode_kernel and past is not None and T == 1 and seen.mask is not None:
            # imports what only a GPU needs
            from flora_jax.models.decode_attention import decode_attention

            # With z behind it, this is what the product gave, and no copy of a part of it; z is then read out of it, or
            # XLA would make it a second time.
            qkv = jnp.concatenate([q, k, v] if z_in is None else [q, k, v, z_in], axis=-1)
            qkv = jax.lax.optimization_barrier(qkv)
            z_in = None if z_in is None else qkv[..., -z_in.shape[-1] :]
            out, present = decode_attention(
                qkv[:, 0], rotary, seen.mask[:, 0, 0], past, config.num_attention_heads
            )
            (out,), z_out = dense("o")(
                out[:, None], z_in, select=select, deterministic=deterministic
            )
            return out, z_out, present

        def heads(y):
            return y.reshape(B, T, -1, config.head_dim)

        q, k, v = rotate(heads(q), *rotary), rotate(heads(k), *rotary), heads(v)
        present = None
        if past is not None:
            past_k, past_v, index = past
            K, H = k.shape[2:]
            own_k = k.transpose(0, 2, 3, 1).reshape(B * K, H, T)
            own_v = v.swapaxes(1, 2).reshape(B * K, T, H)
            present = (
                jax.lax.dynamic_update_slice(past_k, own_k.astype(past_k.dtype), (0, 0, index)),
                jax.lax.dynamic_update_slice(past_v, own_v.astype(past_v.dtype), (0, index, 0)),
            )
        if present is None or present[0].shape[-1] == T:  # a cache that holds these tokens alone
            out = attend(q, k, v, seen.mask, seen.segments)
        else:
            out = attend_grouped(q, *(x.astype(q.dtype) for x in present), seen.mask)
        (out,), z_out = dense("o")(
            out.reshape(B, T, -1), z_in, select=select, deterministic=deterministic
        )
        return out, z_out, present


class MLP(nn.Module):
    """gate and up, silu(gate) · up, down. Returns `(output, z written by down)`."""

    config: LlamaConfig
    adapter: AdapterConfig | None
    param_dtype: Any = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(
        self, x: Array, z: Array | None, select: Array | None, deterministic: bool
    ) -> tuple[Array, Array | None]:
        config = self.config

        def dense(product):
            return FusedDense(
                product,
                config.widths,
                self.adapter,
                config.mlp_bias,
                self.param_dtype,
                self.fused,
                name=product,
            )

        (gate, up), z_in = dense("gate_up")(x, z, select=select, deterministic=deterministic)
        (out,), z_out = dense("down")(
            nn.silu(gate) * up, z_in, select=select, deterministic=deterministic
        )
        return out, z_out


class Layer(nn.Module):
    """One decoder layer over the stream x `[B, T, D]` and, for zflora, its extra channels z `[B, T, R]`; fused, those
    are the last channels of x."""

    config: LlamaConfig
    adapter: AdapterConfig | None
    param_dtype: Any = jnp.float32
    fused: bool = False
    decode_kernel: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        z: Array | None,
        rotary: tuple[Array, Array],
        seen: Seen,
        past: tuple[Array, Array, Array] | None = None,
        select: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Array | None, tuple[Array, Array] | None]:
        config, parts = self.config, (self.config, self.adapter, self.param_dtype, self.fused)

        def norm(name):
            return RMSNorm(config.hidden_size, config.rms_norm_eps, self.param_dtype, name=name)

        with jax.named_scope("attention"):
            attention = Attention(*parts, self.decode_kernel, name="attention")
            delta, z_delta, present = attention(
                norm("attention_norm")(x), z, rotary, seen, past, select, deterministic
            )
            x, z = x + delta, None if z is None else z + z_delta
        with jax.named_scope("mlp"):
            mlp = MLP(*parts, name="mlp")
            delta, z_delta = mlp(norm("mlp_norm")(x), z, select, deterministic)
            x, z = x + delta, None if z is None else z + z_delta
        return x, z, present


class Llama(nn.Module):
    """A Llama with or without an adapter.

    `Llama(config, adapter_config).apply({"params": base, "adapter": adapter}, tokens)` gives logits `[B, T, V]`,
    float32; `Llama(config, None).apply({"params": base}, tokens)` is the bare base. What `fuse` gives is
    served by `Llama(config, adapter_config).apply({"params": fused}, tokens)`: the tree tells its layout.

    dtype: compute dtype, None for the embedding's. remat: what a layer keeps for the backward pass ("none" keeps all,
    "products" what its four products give, "full" nothing). decode_kernel: whether a fused model's decode step does
    attention in one kernel of ours, which only a GPU runs; None: where it can.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    remat: str = "none"
    decode_kernel: bool | None = None

    def setup(self):
        config = self.config
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat={self.remat!r} is unknown; known: {', '.join(REMAT_POLICIES)}")
        if self.decode_kernel and config.head_dim & (config.head_dim - 1):
            raise UserError(
                f"decode_kernel=True needs a head_dim that is a power of two, not {config.head_dim}"
            )
        if self.adapter is not None:
            self.adapter.check(config.widths)
        served = self.adapter
        if self._fused and "folded" in self.variables["params"]:
            served = dataclasses.replace(served, add_to=())
        kernel = kernel_runs(config) if self.decode_kernel is None else self.decode_kernel
        self.layer = Layer(
            config, served, self.param_dtype, self._fused, self._fused and kernel, parent=None
        )
        self.embed_tokens = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            param_dtype=self.param_dtype,
            embedding_init=normal(0.02),
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, self.param_dtype)
        if self.is_initializing():
            self.param("layers", self._init_layers)
            if self._has_adapter:
                self.variable("adapter", "layers", self._init_adapter)
        elif not self._has_adapter and self.variables.get("adapter"):
            raise UserError(
                "variables hold an adapter, but the model was built without one; pass its AdapterConfig"
            )
        if not self.is_initializing():
            self._check_trees()
        if not config.tie_word_embeddings:
            self.lm_head = LMHead(config, self.param_dtype)

    def _check_trees(self) -> None:
        """Raises UserError for variables of another configuration, which flax would ignore or jax would clamp."""
        params = self.variables["params"]
        if self.config.tie_word_embeddings and "lm_head" in params:
            raise UserError(
                "params hold an lm_head, but the configuration has tie_word_embeddings=True"
            )
        if not self._fused:
            check_base(params, self.config)
            if self._has_adapter:
                check_adapter(self.variables.get("adapter", {}), self.config, self.adapter)
        elif (riders := params.get("riders")) is not None:
            served = self.adapter.rank if self._has_adapter else "none"
            if riders.shape[-1] != served:
                raise UserError(
                    f"the fused tree holds an adapter of rank {riders.shape[-1]}, the model's is {served}"
                )

    def _check_call(
        self, tokens: Array, cache: KVCache | None, select: Array | None, deterministic: bool
    ) -> None:
        """Raises UserError for arguments that would be ignored, clamped, or read as NaN."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(
                f"tokens must be integers [B, T], not {tokens.dtype} {list(tokens.shape)}"
            )
        # under jit nothing can be checked
        if not isinstance(tokens, jax.core.Tracer) and tokens.size:
            ids, V = np.asarray(tokens), self.config.vocab_size
            least, most = ids.min(), ids.max()
            if least < 0 or most >= V:
                raise UserError(
                    f"tokens from {least} to {most} are not all of the model's vocabulary: vocab_size={V}"
                )
        riders = self.variables["params"].get("riders")
        places = 1 if riders is None else riders.shape[-2]
        if select is not None and not self._fused:
            raise UserError("select is for a bank of fused adapters; these variables are split")
        found = None if select is None else select.shape[-1]
        if riders is not None and found != places and (found is not None or places > 1):
            raise UserError(
                f"the fused tree is a bank of {places} adapters and needs select [B, {places}]; {found=}"
            )
        if self._fused and not deterministic and self.adapter is not None and self.adapter.dropout:
            raise UserError(
                "a fused tree is served without dropout; pass deterministic=True, or train the split one"
            )
        if cache is None:
            return
        T, S = tokens.shape[1], cache.valid.shape[1]
        index = 0 if isinstance(cache.index, jax.core.Tracer) else int(cache.index)
        if index + T > S:
            raise UserError(
                f"{T} tokens from slot {index} on do not fit into a cache of {S} slots; make a longer one"
            )

    @property
    def _has_adapter(self) -> bool:
        return self.adapter is not None and self.adapter.row.reads is not None

    @property
    def _fused(self) -> bool:
        """Whether the leaves are those of layouts.py, one set a layer, rather than stacked and split ones."""
        return "0" in self.variables.get("params", {}).get("layers", {})

    @property
    def _transposed(self) -> bool:
        """Whether the fused arrays are stored for a CPU."""
        products = self.variables["params"]["layers"].get("0", {}).get("attention", {})
        return any(name.endswith("weight") for name in products.get("qkv", {}))

    def _init_layers(self, rng: Array) -> Tree:
        """Stacked leaves, each layer from a key of its own; one layer after another, so that no more than one layer's
        random bits are in memory."""
        bare = Layer(self.config, None, self.param_dtype, parent=None)
        x = jnp.zeros((1, 1, self.config.hidden_size))
        rotary = rotary_tables(self.config, jnp.zeros((1, 1), jnp.int32))
        keys = jax.random.split(rng, self.config.num_hidden_layers)
        return jax.lax.map(lambda key: bare.init(key, x, None, rotary, Seen())["params"], keys)

    def _init_adapter(self) -> Tree:
        return init_adapter(self.make_rng("params"), self.config, self.adapter)["layers"]

    def __call__(self, tokens: Array, **arguments: Any) -> Array | tuple[Array, KVCache]:
        """Logits `[B, T, V]`, float32; with a cache, `(logits, cache)`. Arguments as in `hidden`."""
        hidden, cache = self.hidden(tokens, **arguments)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, cache)

    def logits(self, hidden: Array) -> Array:
        """Logits `[…, V]`, float32, of final normed states `[…, D]`."""
        unembedding = self.unembedding().astype(hidden.dtype)
        with jax.named_scope("logits"):
            if self._transposed:
                return multiply_transposed(hidden, unembedding, jnp.float32)
            product = functools.partial(
                jnp.einsum, "...D,VD->...V", preferred_element_type=jnp.float32
            )
            if hidden.size == hidden.shape[-1] and hidden.dtype != jnp.float32:
                # Of one row cuBLAS gives no float32 results, and XLA would cast the whole matrix at every token.
                return product(jnp.stack([hidden, hidden]), unembedding)[0]
            return product(hidden, unembedding)

    def unembedding(self) -> Array:
        """The matrix `[V, D]` that hidden states are scored with."""
        return self.embed_tokens.embedding if self.config.tie_word_embeddings else self.lm_head().T

    def hidden(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Array | None = None,
        cache: KVCache | None = None,
        select: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, KVCache | None]:
        """Final normed states `[B, T, D]` of tokens `[B, T]` int32, and the cache with them in it.

        positions: `[B, T]` int32 for the rotary embeddings; by default the token's place in its row (with a cache: the
            number of real tokens before it).
        segment_ids: `[B, T]` int32; tokens attend within their segment alone. Padding is a segment like any other.
        mask: `[B, T]` bool, which tokens are real, so that padding on either side is never attended to, or `[B, T, S]`
            bool, which keys each query may see. Causality holds on top of either.
        cache: T new tokens follow those of the cache, which must have room for them (under jit nothing can check its
            index); row by row they need not be at the same position.
        select: `[B, N]` bool, which of a fused bank's N adapters each row uses; a row of False is the bare base.
        deterministic: no dropout; otherwise apply needs `rngs={"dropout": key}`.
        """
        self._check_call(tokens, cache, select, deterministic)
        B, T = tokens.shape
        if cache is not None and segment_ids is not None:
            raise UserError(
                "segment_ids are for packed training rows and cannot be combined with a cache"
            )
        real = mask if mask is not None and mask.ndim == 2 else jnp.ones((B, T), bool)
        if positions is None:
            before = 0 if cache is None else cache.valid.sum(-1, keepdims=True)
            if mask is None and cache is None:
                positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
            else:
                positions = jnp.maximum(before + jnp.cumsum(real, -1, dtype=jnp.int32) - 1, 0)
        seen, cache_valid = self._visible(T, real, segment_ids, mask, cache)
        rotary = rotary_tables(self.config, positions)

        embedding = self.embed_tokens.embedding
        x = jnp.take(embedding, tokens, axis=0).astype(
            embedding.dtype if self.dtype is None else self.dtype
        )
        stream = self._has_adapter and self.adapter.row.writes == "stream"
        z = None
        if stream and self._fused:
            qkv = self.variables["params"]["layers"]["0"]["attention"]["qkv"]
            width = qkv["weight"].shape[1] if self._transposed else qkv["kernel"].shape[0]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])))
        elif stream:
            z = jnp.zeros((B, T, self.adapter.rank), x.dtype)
        x, z, present = self._layers(x, z, rotary, seen, cache, select, deterministic)
        if stream and self._fused:
            D, R, N = (
                self.config.hidden_size,
                self.adapter.rank,
                1 if select is None else select.shape[-1],
            )
            x, z = x[..., :D], x[..., D : D + N * R].reshape(B, T, N, R).sum(-2)
        if stream:
            x = repeat_and_add(x, z)
        if cache is not None:
            cache = KVCache(*present, cache_valid, cache.index + T)
        return self.final_norm(x), cache

    def _visible(
        self,
        T: int,
        real: Array,
        segment_ids: Array | None,
        mask: Array | None,
        cache: KVCache | None,
    ) -> tuple[Seen, Array | None]:
        """What attention sees, and the cache's new `valid`."""
        by_query = mask is not None and mask.ndim == 3
        S = T if cache is None else cache.valid.shape[1]
        valid = None
        if cache is not None:
            valid = jax.lax.dynamic_update_slice(cache.valid, real, (0, cache.index))
        if S == T and not by_query:
            segments = segment_ids
            if mask is not None:
                # Padding is a segment of its own, so that no row of the softmax is empty.
                segments = jnp.zeros(mask.shape, jnp.int32) if segments is None else segments
                segments = jnp.where(mask, segments, jnp.iinfo(jnp.int32).min)
            return Seen(segments=segments), valid
        if cache is None:
            seen = jnp.tril(jnp.ones((T, T), bool))[None] & mask
            if segment_ids is not None:
                seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
            # A query sees itself, whatever its mask.
            return Seen(mask=(seen | jnp.eye(T, dtype=bool))[:, None]), None
        slots, queries = jnp.arange(S), cache.index + jnp.arange(T)
        seen = (slots[None, :] <= queries[:, None])[None] & valid[:, None, :]
        if by_query:
            seen = seen & mask
        return Seen(mask=(seen | (slots[None, :] == queries[:, None])[None])[:, None]), valid

    def _layers(
        self,
        x: Array,
        z: Array | None,
        rotary: tuple[Array, Array],
        seen: Seen,
        cache: KVCache | None,
        select: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Array | None, tuple[tuple[Array, ...], tuple[Array, ...]]]:
        """All layers: a scan over stacked leaves, or, over fused ones or with a cache, unrolled."""
        variables = {"params": self.get_variable("params", "layers")}
        if self._has_adapter and not self._fused:
            variables["adapter"] = pad_first_layer(
                self.get_variable("adapter", "layers"), self.adapter
            )
        L = self.config.num_hidden_layers
        dropout = self.adapter is not None and self.adapter.dropout > 0 and not deterministic
        key = self.make_rng("dropout") if dropout else None

        def layer(x, z, variables, index, past):
            rngs = {"dropout": jax.random.fold_in(key, index)} if dropout else None
            return self.layer.apply(
                variables, x, z, rotary, seen, past, select, not dropout, rngs=rngs
            )

        if not self._fused and cache is None:

            def body(carry, xs):
                x, z, _ = layer(*carry, *xs, None)
                return (x, z), None

            if self.remat != "none":
                body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
            (x, z), _ = jax.lax.scan(body, (x, z), (variables, jnp.arange(L)))
            return x, z, ((), ())
        present = []
        for i in range(L):
            leaves = {
                collection: tree[str(i)]
                if self._fused
                else jax.tree.map(lambda leaf, i=i: leaf[i], tree)
                for collection, tree in variables.items()
            }
            x, z, kv = layer(
                x, z, leaves, i, None if cache is None else (cache.k[i], cache.v[i], cache.index)
            )
            present.append(kv)
        return x, z, tuple(zip(*present, strict=True)) if cache is not None else ((), ())


class LMHead(nn.Module):
    """The unembedding `[D, V]` of an untied model."""

    config: LlamaConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.config.hidden_size, self.config.vocab_size)
        return self.param("kernel", normal(0.02), shape, self.param_dtype)


def abstract_base(config: LlamaConfig, dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of the base's parameters, as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    model = Llama(config, None, param_dtype=dtype)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def init_base(
    rng: Array, config: LlamaConfig, dtype: Any = jnp.float32, shardings: Any = None
) -> Tree:
    """Random base parameters (HF's initialisation, std 0.02), made straight in their shards where given."""
    model = Llama(config, None, param_dtype=dtype)
    init = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], out_shardings=shardings
    )
    return init(rng)
