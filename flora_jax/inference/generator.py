"""Generator: prompts in, text out, with the base and any of its adapters.

B batch, P prompt bucket, S slots of the key/value cache, V vocabulary. Prompts are padded on the right to a bucket P (a
power of two); generated tokens follow from slot P on, whatever each row's own length, and positions are counted over
real tokens alone. Weights are arguments of the compiled functions, one set of leaves a layer.

    prompts of 5, 9, 14 tokens, 40 new ones:  prefill [B, 16] -> cache of 16 slots -> grown to 64 -> decode loop

`prefill` compiles once per P, the decode loop once per S; the number of new tokens, stop tokens and seed are data.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flora_jax.adapters import AdapterConfig, check_adapter
from flora_jax.errors import UserError, near_misses
from flora_jax.inference.sampling import Sampling, sample
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import KVCache, Llama, unstack_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Array = jax.Array
Tree = dict[str, Any]

_SMALLEST_BUCKET = 16
_STOP_SLOTS = 8  # stop tokens are padded to a multiple of it, so that one more of them compiles nothing


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one prompt was continued with: the new tokens, without prompt and stop token; their text (empty without a
    tokenizer); and whether it ended at a stop token rather than at max_new_tokens."""

    text: str
    tokens: list[int]
    finished: bool


def bucket(length: int) -> int:
    """The smallest power of two that holds `length`, at least 16."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _last_logits(model: Llama, tokens: Array, mask: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """float32 logits `[B, V]` after the last real token of each row, and no other's."""
    hidden, cache = model.hidden(tokens, mask=mask, cache=cache)
    last = jnp.maximum(mask.sum(-1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    unembedding = model.unembedding().astype(hidden.dtype)
    return jnp.einsum("BD,VD->BV", hidden, unembedding, preferred_element_type=jnp.float32), cache


@functools.partial(jax.jit, static_argnames="model")
def prefill(model: Llama, variables: Tree, tokens: Array, lengths: Array) -> tuple[Array, KVCache]:
    """Logits `[B, V]` after prompts `tokens` `[B, P]` of `lengths` `[B]`, and the cache of P slots that holds them."""
    B, P = tokens.shape
    dtype = variables["params"]["embed_tokens"]["embedding"].dtype
    cache = KVCache.empty(model.config, B, P, dtype)
    mask = jnp.arange(P) < lengths[:, None]
    return model.apply(variables, tokens, mask, cache, method=_last_logits)


@functools.partial(jax.jit, static_argnames="slots")
def grow(cache: KVCache, slots: int) -> KVCache:
    """The cache with room for `slots` tokens a row."""
    room = slots - cache.valid.shape[1]

    def pad(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, room) if axis == 1 else (0, 0) for axis in range(leaf.ndim)])

    return KVCache(*jax.tree.map(pad, (cache.k, cache.v, cache.valid)), cache.index)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="cache")
def decode(
    model: Llama, variables: Tree, logits: Array, cache: KVCache, done: Array, max_new_tokens: Array, stop: Array,
    keys: Array, sampling: Sampling,
) -> tuple[Array, Array, Array, KVCache]:  # fmt: skip
    """Continues every row until it emits one of `stop` or has `max_new_tokens`, in one loop on the device.

    logits `[B, V]` and cache (S slots, consumed) are those of the prompts; done `[B]` marks rows that are not asked
    for; keys `[B]`, one a row. Returns tokens `[B, S]` int32 and their counts `[B]` without the stop token, finished
    `[B]`, and the cache, which is only there for its memory to be used in place.
    """

    def choose(step: Array, logits: Array, out: Array, count: Array, done: Array) -> tuple[Array, ...]:
        token = sample(jax.vmap(jax.random.fold_in, (0, None))(keys, step), logits, sampling)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
        done = done | (token[:, None] == stop).any(-1)
        return step + 1, token, out, jnp.where(done, count, step + 1), done

    def go_on(state: tuple) -> Array:
        step, _, _, _, done, _ = state
        return (step < max_new_tokens) & ~done.all()

    def body(state: tuple) -> tuple:
        step, token, out, count, done, cache = state
        real = jnp.ones((len(token), 1), bool)
        logits, cache = model.apply(variables, token[:, None], real, cache, method=_last_logits)
        return *choose(step, logits, out, count, done), cache

    out = jnp.zeros(cache.valid.shape, jnp.int32)
    first = choose(jnp.zeros((), jnp.int32), logits, out, jnp.zeros(len(done), jnp.int32), done)
    _, _, out, count, done, cache = jax.lax.while_loop(go_on, body, (*first, cache))
    return out, count, done, cache


class Generator:
    """Text from a base and its adapters.

    base, adapters: trees in the `split` layout, leaves stacked (`load_pretrained`, `init_adapter`). Adapters go by name
    and share one `adapter_config`; the first is in use, without any it is the bare base. tokenizer: needed for prompts
    given as text and for the text of the result. max_length: tokens of prompt and continuation together. batch_size:
    prompts computed side by side; fewer are filled up with dummies. Arithmetic is in the dtype of the base. Raises
    UserError where trees and configurations disagree.
    """

    def __init__(
        self,
        config: LlamaConfig,
        base: Tree,
        adapters: Mapping[str, Tree] | None = None,
        adapter_config: AdapterConfig | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
    ):
        if not 2 <= max_length <= config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise UserError(f"max_length={max_length} must be from 2 to the model's max_position_embeddings={limit}")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be a positive integer")
        if adapters and adapter_config is None:
            raise UserError(f"adapters {', '.join(adapters)} need their adapter_config")
        self._bare = {"params": unstack_layers({"params": base}, None)["params"]}
        self._adapters: dict[str, Tree] = {}
        for name, adapter in (adapters or {}).items():
            check_adapter(adapter, config, adapter_config)
            self._adapters[name] = unstack_layers({"adapter": adapter}, adapter_config)
        self.config, self.adapter_config, self.tokenizer = config, adapter_config, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.use(next(iter(self._adapters), None))

    def use(self, name: str | None) -> None:
        """Switches to the adapter `name`, or with None to the bare base. Adapters share what is compiled."""
        if name is not None and name not in self._adapters:
            known = near_misses(name, self._adapters) if self._adapters else "none is"
            raise UserError(f"adapter {name!r} is not loaded; {known}")
        self._model = Llama(self.config, None if name is None else self.adapter_config)
        self._variables = {**self._bare, **({} if name is None else self._adapters[name])}

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 - immutable
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> list[Generation]:
        """Continues each prompt (text, or token ids as they are) by at most `max_new_tokens`, in the order given.

        A row ends at the model's or the tokenizer's end-of-text token or one of `stop` (ids). What prompt i draws
        depends on `seed` and i alone. Raises UserError for a prompt that is empty, has ids outside the vocabulary, or
        is longer than max_length − max_new_tokens.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be a positive integer")
        rows = [self._encode(i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
        stop_ids = sorted({*self.config.eos_token_id, *stop} | self._tokenizer_eos())
        stop_ids = np.array(stop_ids + [-1] * (_STOP_SLOTS - len(stop_ids) % _STOP_SLOTS), np.int32)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        batches = [by_length[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        out: list[Generation | None] = [None] * len(rows)
        for batch in tqdm(batches, desc="generate", disable=len(batches) < 2 or not sys.stderr.isatty()):
            generations = self._batch(rows, batch, max_new_tokens, sampling, seed, stop_ids)
            for i, generation in zip(batch, generations, strict=True):
                out[i] = generation
        return out

    def _encode(self, i: int, prompt: str | Sequence[int], max_new_tokens: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"prompt {i} is text, but there is no tokenizer; give token ids")
            tokens = self.tokenizer(prompt)["input_ids"]
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise UserError(f"prompt {i} is empty; it needs at least one token")
        outside = [token for token in tokens if not 0 <= token < self.config.vocab_size]
        if outside:
            size = self.config.vocab_size
            raise UserError(f"prompt {i} has token id {outside[0]}, outside the model's vocab_size={size}")
        if len(tokens) > self.max_length - max_new_tokens:
            raise UserError(
                f"prompt {i} has {len(tokens)} tokens, more than max_length={self.max_length} leaves beside "
                f"max_new_tokens={max_new_tokens}; raise one, lower the other, or shorten the prompt"
            )
        return tokens

    def _tokenizer_eos(self) -> set[int]:
        eos = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return set() if eos is None else {eos}

    def _batch(
        self, rows: list[list[int]], batch: list[int], max_new_tokens: int, sampling: Sampling, seed: int,
        stop: np.ndarray,
    ) -> list[Generation]:  # fmt: skip
        """The generations of the prompts `batch` (indices into rows)."""
        P = bucket(max(len(rows[i]) for i in batch))
        tokens, lengths = np.zeros((self.batch_size, P), np.int32), np.zeros(self.batch_size, np.int32)
        for b, i in enumerate(batch):
            tokens[b, : len(rows[i])], lengths[b] = rows[i], len(rows[i])
        indices = np.array(batch + [0] * (self.batch_size - len(batch)))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
        logits, cache = prefill(self._model, self._variables, tokens, lengths)
        out, counts, finished, _ = decode(
            self._model, self._variables, logits, grow(cache, bucket(P + max_new_tokens)), jnp.asarray(lengths == 0),
            jnp.int32(max_new_tokens), stop, keys, sampling,
        )  # fmt: skip
        out, counts, finished = jax.device_get((out, counts, finished))
        return [self._generation(out[b, : counts[b]].tolist(), bool(finished[b])) for b in range(len(batch))]

    def _generation(self, tokens: list[int], finished: bool) -> Generation:
        text = "" if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Generation(text, tokens, finished)
