"""Generator: prompts in, text out, with the base and any of its adapters.

B batch, P prompt bucket. Prompts are computed in batches, longest first, by the compiled functions
of decoding.py. bank.py holds the fused arrays.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flora_jax.adapters import (
    AdapterConfig,
    Tree,
    device_layout,
    has_adapter,
    quantization_format,
    served_bytes,
)
from flora_jax.device import ADA, capability, check_jax
from flora_jax.errors import NOT_FINITE, UserError, check_text, require, require_known
from flora_jax.inference.bank import Bank
from flora_jax.inference.decoding import State, begin, bucket, decode, grow, prefill
from flora_jax.inference.sampling import Sampling
from flora_jax.models.adapted import Adapted
from flora_jax.models.attention import kernel_runs
from flora_jax.models.config import DECODE_KERNELS, LlamaConfig
from flora_jax.models.llama import Llama
from flora_jax.tokens import Tokenizer, encode_open, ends

Prompt = str | Sequence[int]

_PROMPTS = "prompts must be a list of prompts, each a text or a list of token ids"
# Stop tokens are padded to a multiple of this, so that one more compiles nothing.
_STOP_SLOTS = 8


@dataclasses.dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    text: of the new tokens, empty without a tokenizer; tokens: the new ones, without the stop
    token; finished: whether it ended at a stop token rather than at max_new_tokens.
    """

    text: str
    tokens: list[int]
    finished: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    """One prompt: its index in the call (its random draws depend on it), its ids, and its adapter's
    name."""

    index: int
    tokens: list[int]
    adapter: str | None


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of one call, the same for all of its prompts. stop: ids that end a row."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A batch after its first token, and the further arguments of `decode`."""

    state: State
    stop: np.ndarray
    keys: jax.Array
    select: jax.Array | None


def _is_integer(value: Any) -> bool:
    """Whether a value is an integer of any library; True and False are none."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _new_tokens(value: Any) -> int:
    require(
        _is_integer(value) and value >= 1, f"max_new_tokens={value!r} must be a positive integer"
    )
    return operator.index(value)


def check_fits(config: LlamaConfig, batch_size: int, length: int, weights: int, dtype: Any) -> None:
    """Raises UserError if weights and key/value cache are more than the device's memory.

    weights: in bytes; the cache has `batch_size` rows with slots for `length` tokens, rounded up to
    a power of two, in `dtype`.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    slot = 2 * config.num_hidden_layers * config.kv_width * jnp.dtype(dtype).itemsize
    cache = batch_size * bucket(length) * slot
    require(
        weights + cache <= memory,
        f"batch_size={batch_size} with {length} tokens a row needs a cache of {cache / 1e9:.1f} GB "
        f"beside {weights / 1e9:.1f} GB of weights, more than the device's {memory / 1e9:.1f} GB; "
        "lower one of them",
    )


def check_sizes(config: LlamaConfig, base: Tree, max_length: int, batch_size: int) -> None:
    """Raises UserError for sizes that no Generator of this base can have."""
    limit = config.max_position_embeddings
    require(
        _is_integer(max_length) and 2 <= max_length <= limit,
        f"max_length={max_length!r} must be from 2 to the model's max_position_embeddings={limit}",
    )
    require(
        _is_integer(batch_size) and batch_size >= 1,
        f"batch_size={batch_size!r} must be a positive integer",
    )
    weights = served_bytes(base)
    check_fits(config, batch_size, max_length, weights, base["embed_tokens"]["embedding"].dtype)


def check_kernels(decode_kernels: str | None, config: LlamaConfig, quantization: str) -> None:
    """Raises UserError for kernels that this device, or a base so quantised, cannot have."""
    if decode_kernels is not None:
        require_known(decode_kernels, DECODE_KERNELS, f"decode_kernels={decode_kernels!r}")
    if decode_kernels in (None, "none"):
        return
    require(
        kernel_runs(config),
        f"decode_kernels={decode_kernels!r} needs an NVIDIA GPU from Ampere on and heads of 32, "
        f"64, 128 or 256 channels; this is a {jax.devices()[0].device_kind} and "
        f"head_dim={config.head_dim}; leave it None",
    )
    float8 = decode_kernels == "layer" and quantization == "fp8"
    require(
        not float8 or (capability() or ADA) >= ADA,
        "decode_kernels='layer' reads a base in fp8 on a GPU from Ada on, and this is a "
        f"{jax.devices()[0].device_kind}; take 'attention', or int8",
    )


def _check_adapters(adapters: Any, adapter_config: Any) -> None:
    """Raises UserError unless these are trees by name and their configurations."""
    if adapters is not None and not isinstance(adapters, Mapping):
        kind = type(adapters).__name__
        raise UserError(f"adapters must be trees by name, {{'mine': adapter}}, not a {kind}")
    configs = [adapter_config]
    if isinstance(adapter_config, Mapping):
        configs = list(adapter_config.values())
    for one in configs:
        if not isinstance(one, AdapterConfig | None):
            kind = type(one).__name__
            raise UserError(
                f"adapter_config must be an AdapterConfig, or one by name, not a {kind}"
            )
    # fft's configuration comes without adapters: it trained the base.
    require(
        adapters or not any(map(has_adapter, configs)),
        "adapter_config is given without adapters; pass them as {'mine': adapter}",
    )


class Generator:
    """Text from a base and its adapters.

    Args:
      config: the base's.
      base: its tree in the `split` layout (`load_pretrained`); it is copied into fused arrays.
      adapters: split trees by name (`init_adapter`). The first is in use; without any, the bare
        base.
      adapter_config: one for all adapters, or one for each by name. They are of one method; ranks
        and alpha may differ, and smaller ranks are widened.
      tokenizer: for prompts given as text, and for the text of the result.
      max_length: tokens of prompt and continuation together.
      batch_size: prompts computed side by side; dummies fill up a smaller batch.
      decode_kernels: as in `Llama`.

    Arithmetic is in the dtype of the base. Raises UserError where trees and configurations
    disagree, and where the cache does not fit into memory.

    One adapter is in the arrays at a time, and `use` writes another one over it in place.
    `generate(adapter_names=…)` with several lays all of them side by side once, as a bank.
    """

    def __init__(
        self,
        config: LlamaConfig,
        base: Tree,
        adapters: Mapping[str, Tree] | None = None,
        adapter_config: AdapterConfig | Mapping[str, AdapterConfig] | None = None,
        tokenizer: Tokenizer | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        decode_kernels: str | None = None,
    ):
        check_jax()
        check_sizes(config, base, max_length, batch_size)
        _check_adapters(adapters, adapter_config)
        quantization = quantization_format(base)
        check_kernels(decode_kernels, config, quantization)
        self.config = config
        self.tokenizer = tokenizer
        self.max_length = operator.index(max_length)
        self.batch_size = operator.index(batch_size)
        self._ends = set(config.eos_token_id)
        if tokenizer is not None:
            self._ends |= set(ends(tokenizer))
        layout = device_layout(quantization != "none", decode_kernels == "layer")
        self._bank = Bank(config, base, adapters or {}, adapter_config, layout)
        self._model = Llama(config, self.adapter_config, decode_kernels=decode_kernels)
        self._name: str | None = None
        if self.adapter_config is not None:
            self.use(self._bank.names[0])

    @classmethod
    def of(cls, adapted: Adapted, max_length: int, batch_size: int) -> Generator:
        """A Generator of `adapted`; its adapter, if it has one, is named `adapter`."""
        adapters = {}
        if adapted.adapter is not None:
            adapters["adapter"] = adapted.adapter
        return cls(
            adapted.config,
            adapted.base,
            adapters,
            adapted.adapter_config,
            adapted.tokenizer,
            max_length,
            batch_size,
        )

    @property
    def adapter_config(self) -> AdapterConfig | None:
        """The configuration of all adapters, smaller ranks widened; None with the bare base
        alone."""
        return self._bank.adapter_config

    @property
    def params(self) -> Tree:
        """The fused tree that is served."""
        return self._bank.params

    def use(self, name: str | None) -> None:
        """Switches to the adapter `name`, or with None to the bare base.

        It writes the adapter's columns and rows, or zeros, into the arrays; nothing compiles anew.
        In a bank nothing is written. Raises UserError for an unknown name.
        """
        self._bank.check(name)
        self._bank.arrange({name})
        self._name = name

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        stop: Sequence[int] = (),
        adapter_names: Sequence[str | None] | None = None,
    ) -> list[Generation]:
        """Continues each prompt (text, or token ids as they are) by at most `max_new_tokens`.

        adapter_names: the adapter of each prompt, None for the bare base; by default all take the
        one in `use`. A row ends at the model's or the tokenizer's end-of-text token, at the one
        that ends a turn of the chat template, or at one of `stop` (ids). The draws of prompt i
        depend on `seed` (0 to 2**32 - 1) and i alone. Returns the continuations in the order of the
        prompts. Raises UserError for a prompt that is empty, has ids outside the vocabulary, or is
        longer than max_length − max_new_tokens, and for an adapter that is not loaded; raises
        FloatingPointError, with the prompt, for logits that are not finite.
        """
        require(not isinstance(prompts, str), f"{_PROMPTS}, not one text")
        if not isinstance(prompts, Iterable):
            raise UserError(f"{_PROMPTS}, not {prompts!r}")
        prompts = list(prompts)
        max_new_tokens = _new_tokens(max_new_tokens)
        ids = [self._encode(i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
        rows = self._rows(ids, adapter_names)
        settings = self._settings(max_new_tokens, sampling, seed, stop)
        self._bank.arrange({row.adapter for row in rows})
        # The longest first, so that the shortest share the last batch with dummies.
        rows = sorted(rows, key=lambda row: -len(row.tokens))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        out: dict[int, Generation] = {}
        quiet = len(batches) < 2 or not sys.stderr.isatty()
        for batch in tqdm(batches, desc="generate", disable=quiet):
            out |= self._generate(batch, settings)
        return [out[i] for i in range(len(rows))]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> Iterator[str]:
        """The text of `generate([prompt], …)` with the adapter in use, in pieces as tokens come.

        A piece ends where characters are whole. The loop returns to Python after every token.
        Raises UserError if the adapter is switched meanwhile, and else as `generate` does.
        """
        require(self.tokenizer is not None, "stream gives text, but there is no tokenizer")
        max_new_tokens = _new_tokens(max_new_tokens)
        row = _Row(0, self._encode(0, prompt, max_new_tokens), self._name)
        settings = self._settings(max_new_tokens, sampling, seed, stop)
        self._bank.arrange({row.adapter})
        places = list(self._bank.places)
        begun = self._begin([row], settings, batch_size=1)
        state = begun.state
        shown = ""
        while True:
            tokens = np.asarray(state.out)[0, : int(state.count[0])].tolist()
            if state.failed[0]:
                raise self._not_finite(row, len(tokens))
            last = bool(state.done[0]) or int(state.step) >= max_new_tokens
            text = self._text(tokens)
            if last or not text.endswith("\ufffd"):
                if len(text) > len(shown):
                    yield text[len(shown) :]
                shown = text
            if last:
                return
            require(
                self._bank.places == places,
                "the adapter was switched while a stream was going on; end one before the other",
            )
            state = self._decode(begun, state, state.step + 1, sampling)

    def generation(self, tokens: list[int], finished: bool) -> Generation:
        """The Generation of these new tokens, with their text."""
        return Generation(self._text(tokens), tokens, finished)

    # -------------------------------------------------------------------------------- what is asked

    def _rows(self, ids: list[list[int]], adapter_names: Sequence[str | None] | None) -> list[_Row]:
        if adapter_names is None:
            adapter_names = [self._name] * len(ids)
        names = list(adapter_names)
        require(
            len(names) == len(ids),
            f"adapter_names has {len(names)} names for {len(ids)} prompts; give one each",
        )
        for name in names:
            self._bank.check(name)
        return [_Row(i, own, name) for i, (own, name) in enumerate(zip(ids, names, strict=True))]

    def _settings(
        self, max_new_tokens: int, sampling: Sampling, seed: int, stop: Sequence[int]
    ) -> _Settings:
        """Raises UserError for a wrong sampling, seed or stop."""
        require(
            isinstance(sampling, Sampling),
            f"sampling={sampling!r} must be a Sampling(temperature, top_k, top_p)",
        )
        if not isinstance(stop, Iterable):
            stop = (stop,)
        stop = tuple(stop)
        vocabulary = range(self.config.vocab_size)
        require(
            all(_is_integer(token) and operator.index(token) in vocabulary for token in stop),
            f"stop={stop!r} must be token ids below the model's vocab_size={len(vocabulary)}",
        )
        require(
            _is_integer(seed) and 0 <= operator.index(seed) < 2**32,
            f"seed={seed!r} must be an integer from 0 to 2**32 - 1",
        )
        ids = sorted({*self._ends, *stop})
        ids += [-1] * (_STOP_SLOTS - len(ids) % _STOP_SLOTS)
        return _Settings(max_new_tokens, sampling, operator.index(seed), np.array(ids, np.int32))

    def _encode(self, i: int, prompt: Prompt, max_new_tokens: int) -> list[int]:
        """The ids of prompt i. Raises UserError for one that cannot be continued."""
        if isinstance(prompt, str):
            require(
                self.tokenizer is not None,
                f"prompt {i} is text, but there is no tokenizer; give token ids",
            )
            check_text(prompt, f"prompt {i}")
            tokens = encode_open(self.tokenizer, prompt)
        else:
            tokens = _given_ids(i, prompt)
        require(tokens, f"prompt {i} is empty; it needs at least one token")
        size = self.config.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise UserError(
                    f"prompt {i} has token id {token}, outside the model's vocab_size={size}"
                )
        require(
            len(tokens) <= self.max_length - max_new_tokens,
            f"prompt {i} has {len(tokens)} tokens, more than max_length={self.max_length} leaves "
            f"beside max_new_tokens={max_new_tokens}; raise one, lower the other, or shorten the "
            "prompt",
        )
        return tokens

    # ----------------------------------------------------------------------------- what is computed

    def _begin(self, rows: list[_Row], settings: _Settings, batch_size: int) -> _Begun:
        """The rows after their first token, dummies behind them."""
        # The slots of new tokens come after P: a larger P would need more of them than max_length.
        longest = max(len(row.tokens) for row in rows)
        P = min(bucket(longest), self.max_length - settings.max_new_tokens)
        tokens = np.zeros((batch_size, P), np.int32)
        lengths = np.zeros(batch_size, np.int32)
        indices = np.zeros(batch_size, np.int64)
        for b, row in enumerate(rows):
            tokens[b, : len(row.tokens)] = row.tokens
            lengths[b] = len(row.tokens)
            indices[b] = row.index
        select = self._bank.select([row.adapter for row in rows], batch_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(settings.seed), indices)
        logits, cache = prefill(self._model, self.params, tokens, lengths, select)
        cache = grow(cache, bucket(P + settings.max_new_tokens))
        dummies = jnp.asarray(lengths == 0)
        state = begin(logits, cache, dummies, settings.stop, keys, settings.sampling)
        return _Begun(state, settings.stop, keys, select)

    def _decode(self, begun: _Begun, state: State, limit: jax.Array, sampling: Sampling) -> State:
        """The state after `limit` tokens in all; `state` is donated."""
        settings = (begun.stop, begun.keys, begun.select)
        return decode(self._model, self.params, state, limit, *settings, sampling=sampling)

    def _generate(self, rows: list[_Row], settings: _Settings) -> dict[int, Generation]:
        """The generations of a batch, by the prompts' indices."""
        begun = self._begin(rows, settings, self.batch_size)
        limit = jnp.int32(settings.max_new_tokens)
        state = self._decode(begun, begun.state, limit, settings.sampling)
        found = jax.device_get((state.out, state.count, state.done, state.failed))
        generations = {}
        for row, out, count, done, failed in zip(rows, *found, strict=False):
            if failed:
                raise self._not_finite(row, int(count))
            generations[row.index] = self.generation(out[:count].tolist(), bool(done))
        return generations

    def _not_finite(self, row: _Row, count: int) -> FloatingPointError:
        """The error for logits that are NaN or infinite after `count` new tokens."""
        prompt = f"prompt {row.index}"
        if self.tokenizer is not None:
            prompt += f" ({self._text(row.tokens)[:60]!r})"
        if row.adapter is not None:
            prompt += f" with adapter {row.adapter!r}"
        return FloatingPointError(
            f"{prompt}: the logits after {count} new tokens are not finite; {NOT_FINITE}"
        )

    def _text(self, tokens: list[int]) -> str:
        """The text of tokens, "" without a tokenizer."""
        if self.tokenizer is None:
            return ""
        # Cleaning up would take out spaces that the text has ("it 's" becomes "it's").
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _given_ids(i: int, prompt: Any) -> list[int]:
    """Prompt i, given as token ids of any library, as Python's integers."""
    if isinstance(prompt, np.ndarray | jax.Array):
        prompt = np.asarray(prompt).tolist()
    if not isinstance(prompt, Sequence):
        raise UserError(f"{_PROMPTS}; prompt {i} is {prompt!r:.40}")
    for token in prompt:
        if not _is_integer(token):
            raise UserError(f"prompt {i} has {token!r:.40} where a token id belongs")
    return [operator.index(token) for token in prompt]
