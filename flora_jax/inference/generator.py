"""Generator: prompts in, text out, with the base and any of its adapters.

B batch, P prompt bucket, S slots of the key/value cache, V vocabulary, N adapters in the arrays. Weights are served in
the fused layout and are arguments of the compiled functions. Prompts are padded on the right to a bucket P (a power of
two, or all that the new tokens leave of max_length); generated tokens follow from slot P on, whatever each row's own
length, and positions are counted over real tokens alone.

    prompts of 5, 9, 14 tokens, 40 new ones:  prefill [B, 16] -> cache of 16 slots -> grown to 64 -> begin -> decode

`prefill` compiles once per P, the decode loop once per S; the number of new tokens, stop tokens and seed are data.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from flora_jax.adapters import (
    AdapterConfig,
    adapter_riders,
    check_adapter,
    device_layout,
    fuse,
    make_room,
    widen,
    write_adapter,
)
from flora_jax.device import check_jax
from flora_jax.errors import NOT_FINITE, UserError, check_text, near_misses
from flora_jax.inference.sampling import Sampling, sample
from flora_jax.models.adapted import Adapted
from flora_jax.models.attention import kernel_runs
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import KVCache, Llama
from flora_jax.tokens import encode_open, ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Array = jax.Array
Tree = dict[str, Any]

_SMALLEST_BUCKET = 16
_PROMPTS = "prompts must be a list of prompts, each a text or a list of token ids"
# stop tokens are padded to a multiple of it, so that one more of them compiles nothing
_STOP_SLOTS = 8


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one prompt was continued with: the new tokens, without prompt and stop token; their text (empty without a
    tokenizer); and whether it ended at a stop token rather than at max_new_tokens."""

    text: str
    tokens: list[int]
    finished: bool


def _is_integer(value: Any) -> bool:
    """Whether it is one, of whatever library; True and False are none."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _new_tokens(value: Any) -> int:
    if not _is_integer(value) or value < 1:
        raise UserError(f"max_new_tokens={value!r} must be a positive integer")
    return operator.index(value)


def bucket(length: int) -> int:
    """The smallest power of two that holds `length`, at least 16."""
    return max(_SMALLEST_BUCKET, 1 << (operator.index(length) - 1).bit_length())


def check_fits(config: LlamaConfig, batch_size: int, length: int, weights: int, dtype: Any) -> None:
    """Raises UserError where `weights` bytes and a key/value cache of `batch_size` rows of `length` tokens, whose slots
    are a power of two, are more than the device has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    slot = 2 * config.num_hidden_layers * config.kv_width * jnp.dtype(dtype).itemsize
    cache = batch_size * bucket(length) * slot
    if weights + cache > memory:
        raise UserError(
            f"batch_size={batch_size} with {length} tokens a row needs a cache of {cache / 1e9:.1f} GB beside "
            f"{weights / 1e9:.1f} GB of weights, more than the device's {memory / 1e9:.1f} GB; lower one of them"
        )


def check_sizes(config: LlamaConfig, base: Tree, max_length: int, batch_size: int) -> None:
    """Raises UserError for sizes that no Generator of this base can have."""
    if not _is_integer(max_length) or not 2 <= max_length <= config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise UserError(
            f"max_length={max_length!r} must be from 2 to the model's max_position_embeddings={limit}"
        )
    if not _is_integer(batch_size) or batch_size < 1:
        raise UserError(f"batch_size={batch_size!r} must be a positive integer")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    check_fits(config, batch_size, max_length, weights, base["embed_tokens"]["embedding"].dtype)


def last_logits(
    model: Llama, tokens: Array, mask: Array, cache: KVCache, select: Array | None
) -> tuple[Array, KVCache]:
    """float32 logits `[B, V]` after the last real token of each row, and no other's."""
    hidden, cache = model.hidden(tokens, mask=mask, cache=cache, select=select)
    last = jnp.maximum(mask.sum(-1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return model.logits(hidden), cache


@functools.partial(jax.jit, static_argnames="model")
def prefill(
    model: Llama, params: Tree, tokens: Array, lengths: Array, select: Array | None = None
) -> tuple[Array, KVCache]:
    """Logits `[B, V]` after prompts `tokens` `[B, P]` of `lengths` `[B]`, and the cache of P slots that holds them.
    params: a fused tree; select `[B, N]` bool, of a bank."""
    B, P = tokens.shape
    cache = KVCache.empty(model.config, B, P, params["embed_tokens"]["embedding"].dtype)
    mask = jnp.arange(P) < lengths[:, None]
    return model.apply({"params": params}, tokens, mask, cache, select, method=last_logits)


@functools.partial(jax.jit, static_argnames="slots")
def grow(cache: KVCache, slots: int) -> KVCache:
    """The cache with room for `slots` tokens a row."""

    def pad(leaf: Array, axis: int) -> Array:
        return jnp.pad(leaf, [(0, slots - n if i == axis else 0) for i, n in enumerate(leaf.shape)])

    k, v = tuple(pad(leaf, 2) for leaf in cache.k), tuple(pad(leaf, 1) for leaf in cache.v)
    return KVCache(k, v, pad(cache.valid, 1), cache.index)


@flax.struct.dataclass
class State:
    """Between two tokens: step, scalar int32; token `[B]`, the last one chosen; out `[B, S]`, those chosen so far;
    count `[B]`, how many of them a row keeps; done `[B]` bool; failed `[B]` bool, whether it ended because its logits
    were not finite; cache, without the last token."""

    step: Array
    token: Array
    out: Array
    count: Array
    done: Array
    failed: Array
    cache: KVCache


def _choose(state: State, logits: Array, stop: Array, keys: Array, sampling: Sampling) -> State:
    """The state with the next token, from its logits `[B, V]`."""
    token = sample(jax.vmap(jax.random.fold_in, (0, None))(keys, state.step), logits, sampling)
    # NaN is the largest of all that it stands among. Where a GPU takes the best token, to look at the logit of that one
    # alone is no launch more; a sample has computed their maximum anyway.
    greedy = sampling.temperature == 0
    best = (
        jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        if greedy
        else logits.max(axis=-1)
    )
    # the host looks at it once all rows are through
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
    stop: Array,
    keys: Array,
    select: Array | None,
    sampling: Sampling,
) -> State:
    """One token further: the model reads the last one and the next is chosen."""
    real = jnp.ones((len(state.token), 1), bool)
    logits, cache = model.apply(
        {"params": params}, state.token[:, None], real, state.cache, select, method=last_logits
    )
    return _choose(state.replace(cache=cache), logits, stop, keys, sampling)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def begin(
    logits: Array, cache: KVCache, done: Array, stop: Array, keys: Array, sampling: Sampling
) -> State:
    """The state after the first token, chosen from the prompts' logits `[B, V]`; `done` `[B]` marks rows that are not
    asked for. The cache (S slots) is consumed."""
    B, S = cache.valid.shape
    zero = jnp.zeros((), jnp.int32)
    tokens, out = jnp.zeros(B, jnp.int32), jnp.zeros((B, S), jnp.int32)
    failed = ~done & ~jnp.isfinite(logits).all(axis=-1)
    state = State(zero, tokens, out, jnp.zeros(B, jnp.int32), done, failed, cache)
    return _choose(state, logits, stop, keys, sampling)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def decode(
    model: Llama,
    params: Tree,
    state: State,
    max_new_tokens: Array,
    stop: Array,
    keys: Array,
    select: Array | None = None,
    sampling: Sampling = Sampling(),
) -> State:
    """Continues every row until it emits one of `stop` or has `max_new_tokens` in all, in one loop on the device. The
    state is consumed; keys `[B]`, one a row; select as in `prefill`."""

    def go_on(state: State) -> Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def body(state: State) -> State:
        return _advance(model, params, state, stop, keys, select, sampling)

    return jax.lax.while_loop(go_on, body, state)


@functools.partial(jax.jit, static_argnames=("config", "adapter_config"), donate_argnums=0)
def _write(
    layers: Tree, riders: Tree, place: Array, config: LlamaConfig, adapter_config: AdapterConfig
) -> Tree:
    return write_adapter(layers, riders, config, adapter_config, place)


def _share(
    config: LlamaConfig,
    adapters: Mapping[str, Tree],
    configs: AdapterConfig | Mapping[str, AdapterConfig] | None,
) -> tuple[AdapterConfig | None, dict[str, Tree]]:
    """The configuration of all adapters once the smaller ranks are widened, and what each writes, on the host; None
    where the method has no adapter, the base being what was trained."""
    if not adapters:
        return None, {}
    if not isinstance(configs, Mapping):
        configs = dict.fromkeys(adapters, configs)
    for name in adapters:
        if configs.get(name) is None:
            raise UserError(f"adapter {name!r} needs its adapter_config")
    first = configs[next(iter(adapters))]

    # What is laid out the same, whatever the names, the scale and what only training reads.
    def shape(one):
        return (one.row, one.targets, one.add_to, one.activation)

    for name in adapters:
        own = configs[name]
        if shape(own) != shape(first):
            raise UserError(
                f"adapter {name!r} ({own.method}, targets={','.join(own.targets)}, add_to={','.join(own.add_to)}, "
                f"activation={own.activation}) is not laid out as the first is ({first.method}, "
                f"targets={','.join(first.targets)}, add_to={','.join(first.add_to)}, activation={first.activation}); "
                "adapters of one Generator are alike but for rank and alpha"
            )
    if first.row.reads is None:
        return None, {name: {} for name in adapters}
    shared, riders = max((configs[name] for name in adapters), key=lambda one: one.rank), {}
    for name, adapter in adapters.items():
        own = configs[name]
        check_adapter(adapter, config, own)
        for path, leaf in flatten_dict(adapter, sep="/").items():
            if not np.isfinite(leaf).all():
                raise UserError(
                    f"adapter {name!r}: leaf {path!r} holds a value that is not finite; train it anew"
                )
        if own.rank < shared.rank:
            adapter, own = widen(adapter, own, shared.rank)
        riders[name] = jax.device_get(adapter_riders(adapter, config, own))
    return shared, riders


class Generator:
    """Text from a base and its adapters.

    base, adapters: trees in the `split` layout, leaves stacked (`load_pretrained`, `init_adapter`); they are copied
    into fused arrays. Adapters go by name; adapter_config is theirs, or one for each by name: of one method, ranks and
    alpha may differ (smaller ranks are widened). The first is in use, without any it is the bare base. tokenizer:
    needed for prompts given as text and for the text of the result. max_length: tokens of prompt and continuation
    together. batch_size: prompts computed side by side; fewer are filled up with dummies. decode_kernel: as in `Llama`.
    Arithmetic is in the dtype of the base. Raises UserError where trees and configurations disagree, and where the
    cache would not fit.

    One adapter is in the arrays at a time and `use` writes another one over it, in place. `generate(adapter_names=…)`
    with several lays them all side by side once, as a bank; from then on a switch costs nothing and every token N
    adapters' bytes.
    """

    def __init__(
        self,
        config: LlamaConfig,
        base: Tree,
        adapters: Mapping[str, Tree] | None = None,
        adapter_config: AdapterConfig | Mapping[str, AdapterConfig] | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        decode_kernel: bool | None = None,
    ):
        check_jax()
        check_sizes(config, base, max_length, batch_size)
        if adapters is not None and not isinstance(adapters, Mapping):
            raise UserError(
                f"adapters must be trees by name, {{'mine': adapter}}, not a {type(adapters).__name__}"
            )
        configs = (
            adapter_config.values() if isinstance(adapter_config, Mapping) else [adapter_config]
        )
        wrong = [one for one in configs if not isinstance(one, AdapterConfig | None)]
        if wrong:
            raise UserError(
                f"adapter_config must be an AdapterConfig, or one by name, not a {type(wrong[0]).__name__}"
            )
        # fft's configuration goes without: its base is what was trained.
        if not adapters and any(one is not None and one.row.reads is not None for one in configs):
            raise UserError(
                "adapter_config is given without adapters; pass them as {'mine': adapter}"
            )
        if decode_kernel and not kernel_runs(config):
            raise UserError(
                "decode_kernel=True needs an NVIDIA GPU from Ampere on and heads of 32, 64, 128 or 256 channels; this "
                f"is a {jax.devices()[0].device_kind} and head_dim={config.head_dim}; leave it None"
            )
        self.config, self.tokenizer = config, tokenizer
        self.max_length, self.batch_size = operator.index(max_length), operator.index(batch_size)
        self._ends = {*config.eos_token_id, *(() if tokenizer is None else ends(tokenizer))}
        self.adapter_config, self._riders = _share(config, adapters or {}, adapter_config)
        layout = device_layout()
        self._row_multiple = layout["row_multiple"]
        self.params = fuse(base, None, config, None, **layout)
        self._model = Llama(config, self.adapter_config, decode_kernel=decode_kernel)
        # whose columns and rows the arrays hold, place by place
        self._places: list[str | None] = [None]
        self._bank = False
        self._name: str | None = None
        if self.adapter_config is not None:
            self.params = make_room(self.params, config, self.adapter_config, 1, self._row_multiple)
            self.use(next(iter(self._riders)))

    @classmethod
    def of(cls, adapted: Adapted, max_length: int, batch_size: int) -> Generator:
        """Serves a model whose parts travel together; its adapter, where it has one, by the name
        `adapter`."""
        return cls(
            adapted.config,
            adapted.base,
            None if adapted.adapter is None else {"adapter": adapted.adapter},
            adapted.adapter_config,
            adapted.tokenizer,
            max_length,
            batch_size,
        )

    def use(self, name: str | None) -> None:
        """Switches to the adapter `name`, or with None to the bare base: writes its columns and rows into the arrays
        (for None zeros), which everything compiled goes on using. In a bank nothing is written."""
        self._check_name(name)
        self._arrange({name})
        self._name = name

    def _check_name(self, name: str | None) -> None:
        if name is not None and (not isinstance(name, str) or name not in self._riders):
            known = near_misses(str(name), self._riders) if self._riders else "none is"
            raise UserError(f"adapter {name!r} is not loaded; {known}")

    def _arrange(self, names: set[str | None]) -> None:
        """Sees to it that the arrays hold the adapters of `names`: one by writing it, several by becoming a bank."""
        if (
            self._bank
            or self.adapter_config is None
            or (len(names) == 1 and set(self._places) == names)
        ):
            return
        if len(names) > 1:
            places = len(self._riders)
            self.params = make_room(
                self.params, self.config, self.adapter_config, places, self._row_multiple
            )
            self._bank, self._places = True, [None] * places
            names = self._riders
        for place, name in enumerate(names):
            riders = (
                jax.tree.map(np.zeros_like, next(iter(self._riders.values())))
                if name is None
                else self._riders[name]
            )
            layers = _write(
                self.params["layers"], riders, jnp.int32(place), self.config, self.adapter_config
            )
            self.params["layers"], self._places[place] = layers, name

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        stop: Sequence[int] = (),
        adapter_names: Sequence[str | None] | None = None,
    ) -> list[Generation]:
        """Continues each prompt (text, or token ids as they are) by at most `max_new_tokens`, in the order given.

        adapter_names: the adapter of each prompt, None for the bare base; by default all take the one in `use`. A row
        ends at the model's or the tokenizer's end-of-text token, that of the chat template's turns, or one of `stop`
        (ids). What prompt i draws depends on `seed` (0 to 2**32 - 1) and i alone. Raises UserError for a prompt that is
        empty, has ids outside the vocabulary, or is longer than max_length − max_new_tokens, and for an adapter that is
        not loaded; FloatingPointError, with the prompt, where a token was to be chosen from logits that are not finite.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise UserError(
                f"{_PROMPTS}, not {'one text' if isinstance(prompts, str) else repr(prompts)}"
            )
        prompts, max_new_tokens = list(prompts), _new_tokens(max_new_tokens)
        rows = [self._encode(i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
        names = [self._name] * len(rows) if adapter_names is None else list(adapter_names)
        if len(names) != len(rows):
            raise UserError(
                f"adapter_names has {len(names)} names for {len(rows)} prompts; give one each"
            )
        for name in names:
            self._check_name(name)
        stop_ids = self._stop(stop, seed, sampling)
        self._arrange(set(names))
        # The longest first: what is left for the last batch, which dummies fill up, are the shortest.
        by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        batches = [by_length[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        out: list[Generation | None] = [None] * len(rows)
        for batch in tqdm(
            batches, desc="generate", disable=len(batches) < 2 or not sys.stderr.isatty()
        ):
            generations = self._batch(rows, names, batch, max_new_tokens, sampling, seed, stop_ids)
            for i, generation in zip(batch, generations, strict=True):
                out[i] = generation
        return out

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> Iterator[str]:
        """The text of `generate([prompt], …)` with the adapter in use, piece by piece as tokens come; a piece ends
        where characters are whole. Returns to Python after every token; raises UserError if the generator's arrays
        have been given another adapter meanwhile, FloatingPointError as `generate` does."""
        if self.tokenizer is None:
            raise UserError("stream gives text, but there is no tokenizer")
        max_new_tokens = _new_tokens(max_new_tokens)
        row, stop_ids, shown = (
            self._encode(0, prompt, max_new_tokens),
            self._stop(stop, seed, sampling),
            "",
        )
        self._arrange({self._name})
        places = list(self._places)
        state, *settings = self._start(
            [row], [self._name], [0], max_new_tokens, sampling, seed, stop_ids, batch_size=1
        )
        while True:
            tokens = np.asarray(state.out)[0, : int(state.count[0])].tolist()
            if state.failed[0]:
                raise self._not_finite(0, row, self._name, len(tokens))
            last = bool(state.done[0]) or int(state.step) >= max_new_tokens
            text = self._text(tokens)
            if last or not text.endswith("\ufffd"):
                if len(text) > len(shown):
                    yield text[len(shown) :]
                shown = text
            if last:
                return
            if self._places != places:
                raise UserError(
                    "the adapter was switched while a stream was going on; end one before the other"
                )
            state = decode(
                self._model, self.params, state, state.step + 1, *settings, sampling=sampling
            )

    def _stop(self, stop: Sequence[int], seed: int, sampling: Sampling) -> np.ndarray:
        """Ids that end a row, filled up so that one more of them compiles nothing; refuses what is no id, seed or
        sampling."""
        if not isinstance(sampling, Sampling):
            raise UserError(f"sampling={sampling!r} must be a Sampling(temperature, top_k, top_p)")
        stop = tuple(stop) if isinstance(stop, Iterable) else (stop,)
        vocabulary = range(self.config.vocab_size)
        if not all(_is_integer(token) and operator.index(token) in vocabulary for token in stop):
            raise UserError(
                f"stop={stop!r} must be token ids below the model's vocab_size={len(vocabulary)}"
            )
        if not _is_integer(seed) or not 0 <= operator.index(seed) < 2**32:
            raise UserError(f"seed={seed!r} must be an integer from 0 to 2**32 - 1")
        ids = sorted({*self._ends, *stop})
        return np.array(ids + [-1] * (_STOP_SLOTS - len(ids) % _STOP_SLOTS), np.int32)

    def _encode(self, i: int, prompt: str | Sequence[int], max_new_tokens: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"prompt {i} is text, but there is no tokenizer; give token ids")
            check_text(prompt, f"prompt {i}")
            tokens = encode_open(self.tokenizer, prompt)
        else:
            given = (
                np.asarray(prompt).tolist()
                if isinstance(prompt, np.ndarray | jax.Array)
                else prompt
            )
            if not isinstance(given, Sequence):
                raise UserError(f"{_PROMPTS}; prompt {i} is {given!r:.40}")
            wrong = [token for token in given if not _is_integer(token)]
            if wrong:
                raise UserError(f"prompt {i} has {wrong[0]!r:.40} where a token id belongs")
            tokens = [operator.index(token) for token in given]
        if not tokens:
            raise UserError(f"prompt {i} is empty; it needs at least one token")
        outside = [token for token in tokens if not 0 <= token < self.config.vocab_size]
        if outside:
            size = self.config.vocab_size
            raise UserError(
                f"prompt {i} has token id {outside[0]}, outside the model's vocab_size={size}"
            )
        if len(tokens) > self.max_length - max_new_tokens:
            raise UserError(
                f"prompt {i} has {len(tokens)} tokens, more than max_length={self.max_length} leaves beside "
                f"max_new_tokens={max_new_tokens}; raise one, lower the other, or shorten the prompt"
            )
        return tokens

    def _start(
        self,
        rows: list[list[int]],
        names: list[str | None],
        batch: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop: np.ndarray,
        batch_size: int,
    ) -> tuple[State, np.ndarray, Array, Array | None]:
        """The state after the first token of the prompts `batch` (indices into rows and names), and the stop ids, keys
        and select that `decode` goes on with."""
        # Not beyond what leaves the cache, whose slots follow on P, as long as max_length needs.
        P = min(bucket(max(len(rows[i]) for i in batch)), self.max_length - max_new_tokens)
        tokens, lengths = np.zeros((batch_size, P), np.int32), np.zeros(batch_size, np.int32)
        select = np.zeros((batch_size, len(self._places)), bool)
        for b, i in enumerate(batch):
            tokens[b, : len(rows[i])], lengths[b] = rows[i], len(rows[i])
            select[b] = [names[i] is not None and names[i] == place for place in self._places]
        select = jnp.asarray(select) if self._bank else None
        indices = np.array(batch + [0] * (batch_size - len(batch)))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(operator.index(seed)), indices
        )
        logits, cache = prefill(self._model, self.params, tokens, lengths, select)
        state = begin(
            logits,
            grow(cache, bucket(P + max_new_tokens)),
            jnp.asarray(lengths == 0),
            stop,
            keys,
            sampling,
        )
        return state, stop, keys, select

    def _batch(
        self,
        rows: list[list[int]],
        names: list[str | None],
        batch: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop: np.ndarray,
    ) -> list[Generation]:
        """The generations of the prompts `batch`."""
        state, *settings = self._start(
            rows, names, batch, max_new_tokens, sampling, seed, stop, self.batch_size
        )
        state = decode(
            self._model, self.params, state, jnp.int32(max_new_tokens), *settings, sampling=sampling
        )
        out, counts, finished, failed = jax.device_get(
            (state.out, state.count, state.done, state.failed)
        )
        for b, i in enumerate(batch):
            if failed[b]:
                raise self._not_finite(i, rows[i], names[i], int(counts[b]))
        return [
            self.generation(out[b, : counts[b]].tolist(), bool(finished[b]))
            for b in range(len(batch))
        ]

    def _not_finite(
        self, i: int, prompt: list[int], name: str | None, count: int
    ) -> FloatingPointError:
        """What stops a generation whose logits are NaN or infinite after `count` new tokens."""
        text = "" if self.tokenizer is None else f" ({self._text(prompt)[:60]!r})"
        adapter = "" if name is None else f" with adapter {name!r}"
        return FloatingPointError(
            f"prompt {i}{text}{adapter}: the logits after {count} new tokens are not finite; {NOT_FINITE}"
        )

    def _text(self, tokens: list[int]) -> str:
        # To clean up is to take spaces out ("it 's" is "it's"), which the text was never given.
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def generation(self, tokens: list[int], finished: bool) -> Generation:
        """The continuation that these new tokens are, with their text."""
        text = "" if self.tokenizer is None else self._text(tokens)
        return Generation(text, tokens, finished)
