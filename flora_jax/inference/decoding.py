"""The compiled functions of generation, and the state between two tokens.

B batch, P prompt bucket, S slots of the key/value cache, V vocabulary, N adapters in the arrays.
Weights are in the fused layout and are arguments. Prompts are padded on the right to a bucket P.
Generated tokens go to the slots from P on, whatever a row's own length; positions count real tokens
alone.

    prompts of 5, 9, 14 tokens, 40 new ones:
        prefill [B, 16] -> cache of 16 slots -> grown to 64 -> begin -> decode

`prefill` compiles once per P, the decode loop once per S. The number of new tokens, the stop tokens
and the seed are data.
"""

from __future__ import annotations

import functools
import operator

import flax.struct
import jax
import jax.numpy as jnp

from flora_jax.adapters import Tree
from flora_jax.inference.sampling import Sampling, sample
from flora_jax.models.llama import KVCache, Llama

_SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
    """The smallest power of two that holds `length`, at least 16."""
    return max(_SMALLEST_BUCKET, 1 << (operator.index(length) - 1).bit_length())


def last_logits(
    model: Llama, tokens: jax.Array, mask: jax.Array, cache: KVCache, select: jax.Array | None
) -> tuple[jax.Array, KVCache]:
    """Logits `[B, V]`, float32, after the last real token of each row alone, and the cache.

    tokens `[B, T]` int32; mask `[B, T]` bool, the real ones; select `[B, N]` bool, in a bank.
    """
    hidden, cache = model.hidden(tokens, mask=mask, cache=cache, select=select)
    last = jnp.maximum(mask.sum(-1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return model.logits(hidden), cache


@functools.partial(jax.jit, static_argnames="model")
def prefill(
    model: Llama,
    params: Tree,
    tokens: jax.Array,
    lengths: jax.Array,
    select: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Logits `[B, V]`, float32, after the prompts, and the cache of P slots that holds them.

    params: a fused tree; tokens `[B, P]` int32; lengths `[B]` int32; select `[B, N]` bool, in a
    bank.
    """
    B, P = tokens.shape
    cache = KVCache.empty(model.config, B, P, params["embed_tokens"]["embedding"].dtype)
    mask = jnp.arange(P) < lengths[:, None]
    return model.apply({"params": params}, tokens, mask, cache, select, method=last_logits)


@functools.partial(jax.jit, static_argnames="slots")
def grow(cache: KVCache, slots: int) -> KVCache:
    """The cache with room for `slots` tokens a row."""

    def pad(leaf: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, slots - leaf.shape[axis])
        return jnp.pad(leaf, widths)

    k = tuple(pad(leaf, 2) for leaf in cache.k)
    return KVCache(k, tuple(pad(leaf, 1) for leaf in cache.v), pad(cache.valid, 1), cache.index)


@flax.struct.dataclass
class State:
    """The state between two tokens.

    step: tokens chosen so far, scalar int32; token `[B]` int32: the last one of each row; out
    `[B, S]` int32: all of them; count `[B]` int32: how many of them a row keeps; done `[B]` bool:
    whether a row has ended; failed `[B]` bool: whether it ended at logits that are not finite;
    cache: without the last token.
    """

    step: jax.Array
    token: jax.Array
    out: jax.Array
    count: jax.Array
    done: jax.Array
    failed: jax.Array
    cache: KVCache


def _choose(
    state: State, logits: jax.Array, stop: jax.Array, keys: jax.Array, sampling: Sampling
) -> State:
    """The state with the next token, chosen from the logits `[B, V]`."""
    token = sample(jax.vmap(jax.random.fold_in, (0, None))(keys, state.step), logits, sampling)
    # argmax finds a NaN if there is one, and max returns it. Reading the logit of the best token
    # costs a GPU no further launch, and sampling computes the maximum anyway.
    if sampling.temperature == 0:
        best = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    else:
        best = logits.max(axis=-1)
    # The host reads it when all rows have ended.
    failed = state.failed | (~state.done & ~jnp.isfinite(best))
    done = state.done | failed | (token[:, None] == stop).any(-1)
    return state.replace(
        step=state.step + 1,
        token=token,
        out=jax.lax.dynamic_update_slice(state.out, token[:, None], (0, state.step)),
        count=jnp.where(done, state.count, state.step + 1),
        done=done,
        failed=failed,
    )


def _advance(
    model: Llama,
    params: Tree,
    state: State,
    stop: jax.Array,
    keys: jax.Array,
    select: jax.Array | None,
    sampling: Sampling,
) -> State:
    """One step: the model reads the last token, and the next one is chosen."""
    real = jnp.ones((len(state.token), 1), bool)
    logits, cache = model.apply(
        {"params": params}, state.token[:, None], real, state.cache, select, method=last_logits
    )
    return _choose(state.replace(cache=cache), logits, stop, keys, sampling)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def begin(
    logits: jax.Array,
    cache: KVCache,
    done: jax.Array,
    stop: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
) -> State:
    """The state after the first token, chosen from the prompts' logits `[B, V]`.

    cache: of S slots, donated; done `[B]` bool: dummy rows; stop: ids `[n]` int32, -1 for none;
    keys `[B]`: a random key a row.
    """
    B, S = cache.valid.shape
    zero = jnp.zeros((), jnp.int32)
    tokens = jnp.zeros(B, jnp.int32)
    out = jnp.zeros((B, S), jnp.int32)
    failed = ~done & ~jnp.isfinite(logits).all(axis=-1)
    state = State(zero, tokens, out, jnp.zeros(B, jnp.int32), done, failed, cache)
    return _choose(state, logits, stop, keys, sampling)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def decode(
    model: Llama,
    params: Tree,
    state: State,
    max_new_tokens: jax.Array,
    stop: jax.Array,
    keys: jax.Array,
    select: jax.Array | None = None,
    sampling: Sampling = Sampling(),
) -> State:
    """Continues every row, in one loop on the device, until it emits one of `stop` or has
    `max_new_tokens` (scalar int32) in all.

    state: donated; stop and keys as in `begin`, params and select as in `prefill`.
    """

    def go_on(state: State) -> jax.Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def body(state: State) -> State:
        return _advance(model, params, state, stop, keys, select, sampling)

    return jax.lax.while_loop(go_on, body, state)
