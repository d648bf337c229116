"""Llama in flax.linen, pure functional: one layer, stacked and scanned to train, unrolled to serve.

Axis letters: B batch, T query, S key, D model, K key/value heads, H head width, R rank, N adapters
side by side, V vocabulary, L layers.

    params/embed_tokens/embedding [V, D]
    params/layers/<block>_norm/scale [L, D]
    params/layers/{q,k}_norm/scale [L, H]                          where q and k have norms
    params/layers/<block>/<product>/<projection>_kernel [L, d_in, d_out]
    params/final_norm/scale [D]
    params/lm_head/kernel [D, V]                                   untied only
    adapter/layers/<block>/<product>/A [L, d_in, R_f]
    adapter/layers/<block>/<product>/<projection>_B [L, R_b, d_out]

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

from flora_jax.adapters import (
    SAVED,
    SPLIT,
    AdapterConfig,
    FusedDense,
    Layout,
    Tree,
    base_leaves,
    check_quantization,
    has_adapter,
    init_adapter,
    multiply_transposed,
    pad_layers,
    quantize_base,
)
from flora_jax.models import checks
from flora_jax.models.attention import (
    Seen,
    attend,
    attend_grouped,
    kernel_runs,
    rotary_of_layer,
    rotary_tables,
    rotate,
)
from flora_jax.models.config import DECODE_ROWS, LlamaConfig

# Keys and values of a layer, and the next slot.
Past = tuple[jax.Array, jax.Array, jax.Array]
# Scales `[H]` of the norms of q and k.
HeadNorms = tuple[jax.Array, jax.Array]

REMAT_POLICIES = {
    "none": None,
    "products": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    k: a tuple of L arrays `[B·K, H, S]`; v: of L arrays `[B·K, S, H]`. The two products of a decode
    step read them like this, without reshaping, so that a step writes its slot in place and copies
    nothing. valid `[B, S]` bool: which slots hold real tokens. index, scalar int32: the next slot,
    the same for every row (positions differ by row, slots do not).
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    valid: jax.Array
    index: jax.Array

    @classmethod
    def empty(
        cls, config: LlamaConfig, batch: int, length: int, dtype: Any = jnp.float32
    ) -> KVCache:
        """A cache of `length` slots for `batch` rows."""
        BK = batch * config.num_key_value_heads
        H = config.head_dim
        layers = range(config.num_hidden_layers)
        k = tuple(jnp.zeros((BK, H, length), dtype) for _ in layers)
        v = tuple(jnp.zeros((BK, length, H), dtype) for _ in layers)
        return cls(k, v, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))


class RMSNorm(nn.Module):
    """`x / rms(x) · scale` in float32, returned in x's dtype. x `[..., D]`, or zflora's fused
    stream with its channels behind the D: they are divided by the same rms, but too small to count
    in it (adapters/fusing.py). scale is as wide as x."""

    width: int
    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype)
        return _over_rms(x, x, self.width, self.eps) * scale.astype(x.dtype)

    def beside(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """z `[..., R]` over the rms of x, for the split layout, where the two are apart."""
        return _over_rms(z, x, self.width, self.eps)


def _over_rms(values: jax.Array, x: jax.Array, width: int, eps: float) -> jax.Array:
    """`values / rms(x)`, the rms over `width` channels, in float32; rounded to the values' dtype
    before a scale is applied, as the published models were trained."""
    y = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.square(y).sum(axis=-1, keepdims=True) / width + eps)
    return (values.astype(jnp.float32) * factor).astype(values.dtype)


class HeadNorm(nn.Module):
    """The scale `[H]` of a norm over each head's channels."""

    width: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("scale", nn.initializers.ones_init(), (self.width,), self.param_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What the modules of a layer are made of. Its methods declare modules in the one that calls.

    adapter: None for the bare base; layout: of the leaves; dense: the class of the products;
    attention_kernel: whether a decode step computes attention in one kernel of ours.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None
    param_dtype: Any = jnp.float32
    layout: Layout = SPLIT
    dense: type[nn.Module] = FusedDense
    attention_kernel: bool = False

    def product(self, name: str) -> nn.Module:
        """One of PRODUCTS."""
        return self.dense(
            name,
            self.config.widths,
            self.adapter,
            name in self.config.biases,
            self.param_dtype,
            self.layout,
            name=name,
        )

    def norm(self, name: str) -> RMSNorm:
        """A norm over D."""
        config = self.config
        return RMSNorm(config.hidden_size, config.rms_norm_eps, self.param_dtype, name=name)

    def head_norms(self) -> HeadNorms | None:
        """The scales of the norms of q and k; None without them."""
        if not self.config.qk_norm:
            return None
        q, k = (
            HeadNorm(self.config.head_dim, self.param_dtype, name=name)()
            for name in ("q_norm", "k_norm")
        )
        return q, k

    def scaled(self, delta: jax.Array) -> jax.Array:
        """What a block adds to the stream."""
        factor = self.config.residual_multiplier
        return delta if factor == 1 else delta * factor


class Attention(nn.Module):
    """qkv, norms of q and k, rotary embeddings, attention, o. Returns `(output, z written by o,
    (k, v))`, k and v in the cache's form. q and k are normed after the adapter's adds (our
    choice)."""

    parts: Parts

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        z: jax.Array | None,
        rotary: tuple[jax.Array, jax.Array],
        seen: Seen,
        past: Past | None,
        select: jax.Array | None,
        deterministic: bool,
        norms: HeadNorms | None,
    ) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array] | None]:
        how = {"select": select, "deterministic": deterministic}
        (q, k, v), z = self.parts.product("qkv")(x, z, **how)
        one_token = past is not None and x.shape[1] == 1 and seen.mask is not None
        if self.parts.attention_kernel and one_token:
            out, z, present = self._in_one_kernel(q, k, v, z, rotary, seen.mask, past, norms)
        else:
            out, present = self._attend(q, k, v, rotary, seen, past, norms)
        (out,), z = self.parts.product("o")(out, z, **how)
        return out, z, present

    def _in_one_kernel(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        z: jax.Array | None,
        rotary: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        past: Past,
        norms: HeadNorms | None,
    ) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array]]:
        """One token's attention; norms, rotary embeddings and writing into the cache included."""
        # It imports what only a GPU needs.
        from flora_jax.models.decode_attention import decode_attention

        # With z behind it this is the product's whole output, and nothing is copied. z is read out
        # of it again, or XLA would compute it twice.
        qkv = jnp.concatenate([q, k, v] if z is None else [q, k, v, z], axis=-1)
        qkv = jax.lax.optimization_barrier(qkv)
        if z is not None:
            z = qkv[..., -z.shape[-1] :]
        config = self.parts.config
        how = {"norms": norms, "eps": config.rms_norm_eps, "scale": config.attention_scale}
        heads = config.num_attention_heads
        parts, present = decode_attention(qkv[:, 0], rotary, mask[:, 0, 0], past, heads, **how)
        return parts.summed()[:, None], z, present

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        seen: Seen,
        past: Past | None,
        norms: HeadNorms | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        B, T = q.shape[:2]
        config = self.parts.config
        H = config.head_dim
        q, k, v = (x.reshape(B, T, -1, H) for x in (q, k, v))
        if norms is not None:
            q, k = (
                _over_rms(x, x, H, config.rms_norm_eps) * scale.astype(x.dtype)
                for x, scale in zip((q, k), norms, strict=True)
            )
        q = rotate(q, *rotary)
        k = rotate(k, *rotary)
        scale = config.attention_scale
        present = None if past is None else _remember(past, k, v)
        if present is None or present[0].shape[-1] == T:  # a cache that holds these tokens alone
            out = attend(q, k, v, seen.mask, seen.segments, scale)
        else:
            out = attend_grouped(q, *(x.astype(q.dtype) for x in present), seen.mask, scale)
        return out.reshape(B, T, -1), present


def _remember(past: Past, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a layer with those of T more tokens, `[B, T, K, H]` each, in the cache's
    form."""
    past_k, past_v, index = past
    B, T, K, H = k.shape
    k = k.transpose(0, 2, 3, 1).reshape(B * K, H, T).astype(past_k.dtype)
    v = v.swapaxes(1, 2).reshape(B * K, T, H).astype(past_v.dtype)
    return (
        jax.lax.dynamic_update_slice(past_k, k, (0, 0, index)),
        jax.lax.dynamic_update_slice(past_v, v, (0, index, 0)),
    )


class MLP(nn.Module):
    """gate and up, silu(gate) · up, down. Returns `(output, z written by down)`."""

    parts: Parts

    @nn.compact
    def __call__(
        self, x: jax.Array, z: jax.Array | None, select: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        how = {"select": select, "deterministic": deterministic}
        (gate, up), z = self.parts.product("gate_up")(x, z, **how)
        (out,), z = self.parts.product("down")(nn.silu(gate) * up, z, **how)
        return out, z


class Layer(nn.Module):
    """One decoder layer over the stream x `[B, T, D]` and, for zflora, its extra channels z
    `[B, T, R]`; fused, those are the last channels of x. A block reads z over the rms of x:
    otherwise tokens of massive activation would drown all others."""

    parts: Parts

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        z: jax.Array | None,
        rotary: tuple[jax.Array, jax.Array],
        seen: Seen,
        past: Past | None = None,
        select: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array] | None]:
        with jax.named_scope("attention"):
            read, z_read = self._read("attention_norm", x, z)
            attention = Attention(self.parts, name="attention")
            norms = self.parts.head_norms()
            delta, z_delta, present = attention(
                read, z_read, rotary, seen, past, select, deterministic, norms
            )
            x = x + self.parts.scaled(delta)
            z = None if z is None else z + self.parts.scaled(z_delta)
        with jax.named_scope("mlp"):
            read, z_read = self._read("mlp_norm", x, z)
            delta, z_delta = MLP(self.parts, name="mlp")(read, z_read, select, deterministic)
            x = x + self.parts.scaled(delta)
            z = None if z is None else z + self.parts.scaled(z_delta)
        return x, z, present

    def _read(
        self, name: str, x: jax.Array, z: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What a block reads of x and z."""
        norm = self.parts.norm(name)
        return norm(x), None if z is None else norm.beside(x, z)


class Llama(nn.Module):
    """A Llama with or without an adapter.

    `Llama(config, adapter_config).apply({"params": base, "adapter": adapter}, tokens)` gives logits
    `[B, T, V]`, float32; `Llama(config, None).apply({"params": base}, tokens)` is the bare base.
    `Llama(config, adapter_config).apply({"params": fused}, tokens)` serves what `fuse` made; the
    tree records its layout.

    dtype: compute dtype, None for the embedding's. remat: what a layer keeps for the backward pass
    ("none" keeps all, "products" the outputs of its four products, "full" nothing). decode_kernels:
    what of a fused model's decode step kernels of ours compute, which only a GPU runs: "none", a
    layer's "attention", or all of a "layer" and the logits (up to 16 rows, without gradients; not
    measured yet); None: attention, where it can. dense: the class of its products, for layouts
    unknown to FusedDense.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    remat: str = "none"
    decode_kernels: str | None = None
    dense: type[nn.Module] = FusedDense

    def setup(self):
        config = self.config
        checks.check_model(config, self.adapter, self.remat, REMAT_POLICIES, self.decode_kernels)
        self.layout = Layout.of(self.variables.get("params", {}))
        served = self.adapter
        if self.layout.fold_adds:
            served = dataclasses.replace(served, add_to=())
        kernels = self.decode_kernels
        if kernels is None:
            kernels = "attention" if kernel_runs(config) else "none"
        parts = Parts(
            config=config,
            adapter=served,
            param_dtype=self.param_dtype,
            layout=self.layout,
            dense=self.dense,
            attention_kernel=self._unrolled and kernels != "none",
        )
        self.served = served
        self.layer = Layer(parts, parent=None)
        self.embed_tokens = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            param_dtype=self.param_dtype,
            embedding_init=base_leaves(config)["embed_tokens/embedding"].init,
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, self.param_dtype)
        if self.is_initializing():
            self.param("layers", self._init_layers)
            if has_adapter(self.adapter):
                self.variable("adapter", "layers", self._init_adapter)
        else:
            checks.check_variables(self.variables, config, self.adapter)
            checks.check_dense(self.layout, self.dense is FusedDense)
            checks.check_decode_kernels(self.decode_kernels, self.variables["params"])
        if not config.tie_word_embeddings:
            self.lm_head = LMHead(config, self.param_dtype)

    @property
    def _unrolled(self) -> bool:
        """Whether each layer has leaves of its own; else they are stacked."""
        return self.layout.kind != "split"

    @property
    def _stream(self) -> bool:
        """Whether the adapter has channels in the residual stream."""
        return has_adapter(self.adapter) and self.adapter.row.writes == "stream"

    def _init_layers(self, rng: jax.Array) -> Tree:
        """Stacked leaves, each layer from a key of its own; one layer after another, so that no
        more than one layer's random bits are in memory."""
        parts = Parts(config=self.config, adapter=None, param_dtype=self.param_dtype)
        bare = Layer(parts, parent=None)
        x = jnp.zeros((1, 1, self.config.hidden_size))
        rotary = rotary_tables(self.config, jnp.zeros((1, 1), jnp.int32))
        keys = jax.random.split(rng, self.config.num_hidden_layers)
        return jax.lax.map(lambda key: bare.init(key, x, None, rotary, Seen())["params"], keys)

    def _init_adapter(self) -> Tree:
        return init_adapter(self.make_rng("params"), self.config, self.adapter)["layers"]

    def __call__(
        self, tokens: jax.Array, **arguments: Any
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Logits `[B, T, V]`, float32; with a cache, `(logits, cache)`. Arguments as in
        `hidden`."""
        hidden, cache = self.hidden(tokens, **arguments)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits `[…, V]`, float32, of final normed states `[…, D]`."""
        with jax.named_scope("logits"):
            if self.decode_kernels == "layer" and hidden.size <= DECODE_ROWS * hidden.shape[-1]:
                return self._logits_in_kernels(hidden)
            unembedding = self.unembedding().astype(hidden.dtype)
            if self.layout.transposed:
                return multiply_transposed(hidden, unembedding, jnp.float32)
            product = functools.partial(
                jnp.einsum, "...D,VD->...V", preferred_element_type=jnp.float32
            )
            if hidden.size == hidden.shape[-1] and hidden.dtype != jnp.float32:
                # For one row cuBLAS has no float32 output, so XLA would cast the whole matrix at
                # every token.
                return product(jnp.stack([hidden, hidden]), unembedding)[0]
            return product(hidden, unembedding)

    def _logits_in_kernels(self, hidden: jax.Array) -> jax.Array:
        # It imports what only a GPU needs.
        from flora_jax.models.decode_layer import decode_logits

        tied = self.config.tie_word_embeddings
        matrix = self.embed_tokens.embedding if tied else self.lm_head()
        logits = decode_logits(hidden.reshape(-1, hidden.shape[-1]), matrix, transposed=tied)
        return logits.reshape(*hidden.shape[:-1], -1)

    def unembedding(self) -> jax.Array:
        """The matrix `[V, D]` that makes logits of hidden states."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.embedding if tied else self.lm_head().T

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        select: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KVCache | None]:
        """Final normed states `[B, T, D]` of tokens `[B, T]` int32, over the configuration's
        logits_divisor, and the cache with them in it.

        positions: `[B, T]` int32 for the rotary embeddings; by default the token's place in its row
            (with a cache: the number of real tokens before it).
        segment_ids: `[B, T]` int32; tokens attend within their segment alone. Padding is a segment
            like any other.
        mask: `[B, T]` bool, which tokens are real, so that padding on either side is never attended
            to, or `[B, T, S]` bool, which keys each query may see. Causality holds on top of
            either.
        cache: T new tokens follow those of the cache, which must have room for them (under jit
            nothing can check its index); row by row they need not be at the same position.
        select: `[B, N]` bool, which one of a fused bank's N adapters each row uses; a row of False
            is the bare base.
        deterministic: no dropout; otherwise apply needs `rngs={"dropout": key}`.
        """
        checks.check_tokens(tokens, self.config.vocab_size)
        checks.check_select(select, self.layout)
        checks.check_dropout(deterministic, self.layout, self.adapter)
        if cache is not None:
            checks.check_room(tokens, cache.index, cache.valid.shape[1], segment_ids)
        real = jnp.ones(tokens.shape, bool)
        if mask is not None and mask.ndim == 2:
            real = mask
        if positions is None:
            positions = _positions(real, cache, counted=mask is not None)
        seen, valid = _visible(real, segment_ids, mask, cache)
        rotary = rotary_tables(self.config, positions)

        embedding = self.embed_tokens.embedding
        dtype = embedding.dtype if self.dtype is None else self.dtype
        x = jnp.take(embedding, tokens, axis=0).astype(dtype)
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        x, z = self._enter(x)
        x, present = self._layers(x, z, rotary, seen, cache, select, deterministic)
        # nothing reads zflora's channels from here on
        x = x[..., : self.config.hidden_size]
        if cache is not None:
            cache = KVCache(*present, valid, cache.index + tokens.shape[1])
        x = self.final_norm(x)
        if self.config.logits_divisor != 1:
            # here, so that states times the unembedding are the model's logits everywhere
            x = x / self.config.logits_divisor
        return x, cache

    def _enter(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The stream that layers read, from embeddings `[B, T, D]`: for zflora, with its channels
        at zero."""
        if not self._stream:
            return x, None
        if self.layout.kind == "split":
            return x, jnp.zeros((*x.shape[:-1], self.adapter.rank), x.dtype)
        width = self.layout.stream(self.config.hidden_size, self.adapter)
        return jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1]))), None

    def _layers(
        self,
        x: jax.Array,
        z: jax.Array | None,
        rotary: tuple[jax.Array, jax.Array],
        seen: Seen,
        cache: KVCache | None,
        select: jax.Array | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]:
        """The stream behind all layers, and their keys and values. Stacked leaves are scanned;
        with a cache, or with leaves a layer, the loop is unrolled."""
        variables = {"params": self.get_variable("params", "layers")}
        if has_adapter(self.adapter) and not self._unrolled:
            layers = self.get_variable("adapter", "layers")
            variables["adapter"] = pad_layers(layers, self.adapter)
        drops = self.adapter is not None and self.adapter.dropout > 0 and not deterministic
        key = self.make_rng("dropout") if drops else None

        def layer(x, z, variables, i, past):
            rngs = {"dropout": jax.random.fold_in(key, i)} if drops else None
            turning = rotary_of_layer(self.config, rotary, i)
            return self.layer.apply(
                variables, x, z, turning, seen, past, select, not drops, rngs=rngs
            )

        def body(carry, xs):
            x, z, _ = layer(*carry, *xs, None)
            return (x, z), None

        layers = range(self.config.num_hidden_layers)
        if self.decode_kernels == "layer" and cache is not None and _is_one_token(x, seen):
            return self._layers_in_kernels(variables["params"], x, rotary, seen, cache, select)
        if not self._unrolled and cache is None:
            if self.remat != "none":
                body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
            (x, z), _ = jax.lax.scan(body, (x, z), (variables, jnp.arange(len(layers))))
            return x, ((), ())
        present = []
        for i in layers:
            past = None if cache is None else (cache.k[i], cache.v[i], cache.index)
            x, z, kv = layer(x, z, self._of_layer(variables, i), i, past)
            present.append(kv)
        return x, ((), ()) if cache is None else tuple(zip(*present, strict=True))

    def _layers_in_kernels(
        self,
        layers: Tree,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        seen: Seen,
        cache: KVCache,
        select: jax.Array | None,
    ) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]:
        """`_layers` of one token a row, all of it in our kernels."""
        # It imports what only a GPU needs.
        from flora_jax.models.decode_layer import DecodeLayer

        step = DecodeLayer(
            config=self.config, adapter=self.served, layout=self.layout, select=select
        )
        x = x[:, 0]
        present = []
        for i in range(self.config.num_hidden_layers):
            turning = rotary_of_layer(self.config, rotary, i)
            past = (cache.k[i], cache.v[i], cache.index)
            x, kv = step(layers[str(i)], x, turning, seen.mask[:, 0, 0], past)
            present.append(kv)
        return x[:, None], tuple(zip(*present, strict=True))

    def _of_layer(self, variables: Tree, i: int) -> Tree:
        if self._unrolled:
            return {collection: tree[str(i)] for collection, tree in variables.items()}
        return jax.tree.map(lambda leaf: leaf[i], variables)


def _is_one_token(x: jax.Array, seen: Seen) -> bool:
    """Whether x `[B, T, D]` is a decode step of as few rows as our products take."""
    return x.shape[1] == 1 and len(x) <= DECODE_ROWS and seen.mask is not None


def _positions(real: jax.Array, cache: KVCache | None, counted: bool) -> jax.Array:
    """Places `[B, T]` int32 of tokens in their rows; `counted`: only real tokens count."""
    if cache is None and not counted:
        return jnp.broadcast_to(jnp.arange(real.shape[1], dtype=jnp.int32), real.shape)
    before = 0 if cache is None else cache.valid.sum(-1, keepdims=True)
    return jnp.maximum(before + jnp.cumsum(real, -1, dtype=jnp.int32) - 1, 0)


def _visible(
    real: jax.Array, segment_ids: jax.Array | None, mask: jax.Array | None, cache: KVCache | None
) -> tuple[Seen, jax.Array | None]:
    """What attention sees, and the cache's new `valid`."""
    T = real.shape[1]
    by_query = mask is not None and mask.ndim == 3
    valid = None
    if cache is not None:
        valid = jax.lax.dynamic_update_slice(cache.valid, real, (0, cache.index))
    alone = cache is None or cache.valid.shape[1] == T
    if alone and not by_query:
        return Seen(segments=_segments(segment_ids, mask)), valid
    if cache is None:
        return Seen(mask=_mask_by_query(T, segment_ids, mask)), None
    slots = jnp.arange(cache.valid.shape[1])
    queries = cache.index + jnp.arange(T)
    seen = (slots[None, :] <= queries[:, None])[None] & valid[:, None, :]
    if by_query:
        seen = seen & mask
    # A query sees itself, whatever its mask.
    return Seen(mask=(seen | (slots[None, :] == queries[:, None])[None])[:, None]), valid


def _segments(segment_ids: jax.Array | None, mask: jax.Array | None) -> jax.Array | None:
    """Segments `[B, T]`, padding one of its own, so that no row of the softmax is empty."""
    if mask is None:
        return segment_ids
    segments = jnp.zeros(mask.shape, jnp.int32) if segment_ids is None else segment_ids
    return jnp.where(mask, segments, jnp.iinfo(jnp.int32).min)


def _mask_by_query(T: int, segment_ids: jax.Array | None, mask: jax.Array) -> jax.Array:
    """`[B, 1, T, T]` from `mask` `[B, T, T]`, causality and segments on top of it."""
    seen = jnp.tril(jnp.ones((T, T), bool))[None] & mask
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    # A query sees itself, whatever its mask.
    return (seen | jnp.eye(T, dtype=bool))[:, None]


class LMHead(nn.Module):
    """The unembedding `[D, V]` of an untied model."""

    config: LlamaConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> jax.Array:
        leaf = base_leaves(self.config)["lm_head/kernel"]
        return self.param("kernel", leaf.init, leaf.shape, self.param_dtype)


def abstract_base(
    config: LlamaConfig, dtype: Any = jnp.float32, quantization: str = "none"
) -> Tree:
    """Shapes and dtypes of the base's parameters, as `jax.ShapeDtypeStruct`s; nothing is
    allocated. Raises UserError for a quantization that does not fit."""
    check_quantization(quantization, config)
    model = Llama(config, None, param_dtype=dtype)

    def make(key: jax.Array) -> Tree:
        base = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return quantize_base(base, quantization)

    return jax.eval_shape(make, jax.random.key(0))


def init_base(
    rng: jax.Array, config: LlamaConfig, dtype: Any = jnp.float32, shardings: Any = None
) -> Tree:
    """Random base parameters (HF's initialisation, std 0.02), made straight in their shards where
    given."""
    model = Llama(config, None, param_dtype=dtype)

    @functools.partial(jax.jit, out_shardings=shardings)
    def init(key: jax.Array) -> Tree:
        return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    return init(rng)
