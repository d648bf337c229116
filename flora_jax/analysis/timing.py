"""Time to first token (TTFT) and time per output token (TPOT) of models side by side.

B batch, P prompt bucket, S cache slots, N new tokens. The Generator's own compiled functions are
timed:

    TTFT  prefill [B, P], grow the cache to S slots, begin: until the first token is there
    TPOT  decode, one loop on the device with no stop tokens, divided by the N - 1 tokens it adds

A machine slows down for a while and speeds up again, so times are compared within a round. In a
round every contestant has one turn on the same prompts, and the order is reversed from round to
round. Ratios are taken round by round. With turns of a few tokens each, many in a generation, the
machine has less time to change between two turns.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import Tree
from flora_jax.inference.decoding import State, begin, bucket, decode, grow, prefill
from flora_jax.inference.sampling import Sampling
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama

T = TypeVar("T")
# TTFT and TPOT of one run, in seconds; TTFT is None where the prompts were not read again.
Seconds = tuple[float | None, float]

_STOP = np.full(8, -1, np.int32)  # ids that no row ever emits, as many as the Generator passes
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class Setting:
    """The task of a model: `batch_size` prompts of `prompt_length` tokens, and `new_tokens` (>= 2)
    after them."""

    prompt_length: int
    batch_size: int
    new_tokens: int

    def prompts(self, config: LlamaConfig) -> np.ndarray:
        """Random ids `[B, prompt_length]`, int32, the same for all models of one vocabulary."""
        shape = (self.batch_size, self.prompt_length)
        return np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The four functions compiled for one model and setting; the weights are an argument.

    compile_seconds: for the decode loop, tracing and lowering included; cached: whether it came
    from the persistent cache.
    """

    setting: Setting
    prefill: Callable[..., Any]
    grow: Callable[..., Any]
    begin: Callable[..., Any]
    decode: Callable[..., Any]
    compile_seconds: float
    cached: bool

    def run(
        self,
        params: Tree,
        prompts: np.ndarray,
        new_tokens: int | None = None,
        select: jax.Array | None = None,
    ) -> Seconds:
        """Times one greedy generation with a fresh cache: TTFT and TPOT in seconds.

        prompts: ids `[B, prompt_length]` int32; new_tokens: fewer than the setting's, to warm up;
        select `[B, N]` bool, in a bank.
        """
        state, ttft = self.start(params, prompts, select)
        return ttft, self.go_on(params, state, new_tokens, select)[1]

    def start(
        self, params: Tree, prompts: np.ndarray, select: jax.Array | None = None
    ) -> tuple[State, float]:
        """The state after the first token, and TTFT in seconds."""
        rows, length = prompts.shape
        tokens = jnp.zeros((rows, bucket(length)), jnp.int32).at[:, :length].set(prompts)
        lengths = jnp.full(rows, length, jnp.int32)
        done = jnp.zeros(rows, bool)
        keys = _keys(rows)
        jax.block_until_ready((tokens, lengths, done, keys))
        start = time.perf_counter()
        logits, cache = self.prefill(params, tokens, lengths, select)
        state = jax.block_until_ready(self.begin(logits, self.grow(cache), done, _STOP, keys))
        return state, time.perf_counter() - start

    def go_on(
        self,
        params: Tree,
        state: State,
        new_tokens: int | None = None,
        select: jax.Array | None = None,
    ) -> tuple[State, float]:
        """The state after `new_tokens` in all (by default the setting's), and TPOT in seconds of
        those it adds; `state` is donated."""
        before = int(state.step)
        total = new_tokens or self.setting.new_tokens
        keys = _keys(len(state.done))
        limit = jnp.int32(total)
        jax.block_until_ready((keys, limit))
        start = time.perf_counter()
        state = jax.block_until_ready(self.decode(params, state, limit, _STOP, keys, select))
        end = time.perf_counter()
        if int(state.step) != total:
            raise RuntimeError(f"decode made {int(state.step)} tokens where {total} were asked for")
        return state, (end - start) / (total - before)


class Contestant:
    """A model at its programs' setting; a call is its turn: a generation, or the next `turn` tokens
    of one.

    The first `prefills` generations read the prompts. Later ones decode from a copy of the last
    such state, since reading long prompts can take many times as long as the decoding after it.
    """

    def __init__(
        self,
        programs: Programs,
        params: Tree,
        prompts: np.ndarray,
        prefills: int,
        turn: int | None = None,
    ):
        self._programs = programs
        self._params = params
        self._prompts = prompts
        self._prefills = prefills
        self._tokens = programs.setting.new_tokens
        self._turn = turn or self._tokens
        self._begun: State | None = None  # after the first token
        self._now: State | None = None  # in the middle of a generation

    def warm_up(self) -> None:
        """Runs once before the rounds, up to the second token."""
        self._begun, _ = self._programs.start(self._params, self._prompts)
        self._programs.go_on(self._params, self._copy(), 2)

    def __call__(self) -> Seconds:
        ttft = None
        if self._now is None:
            if self._prefills > 0:
                self._prefills -= 1
                self._begun = None  # frees its memory for the next one
                self._begun, ttft = self._programs.start(self._params, self._prompts)
            self._now = self._copy()
        until = min(int(self._now.step) + self._turn, self._tokens)
        state, tpot = self._programs.go_on(self._params, self._now, until)
        self._now = state
        if until == self._tokens:
            self._now = None
        return ttft, tpot

    def _copy(self) -> State:
        return jax.block_until_ready(jax.tree.map(jnp.copy, self._begun))


def _keys(rows: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), rows)


def compile_programs(
    model: Llama,
    params: Tree,
    setting: Setting,
    select: jax.Array | None = None,
    options: Mapping[str, Any] | None = None,
) -> Programs:
    """Compiles the Programs of a model at a setting.

    params: only its shapes are read; select `[B, N]` bool, in a bank; options: XLA's, by name, on
    top of its defaults.
    """
    B = setting.batch_size
    P = bucket(setting.prompt_length)
    S = bucket(P + setting.new_tokens)
    options = dict(options or {})
    shape = jax.ShapeDtypeStruct
    keys = _keys(B)
    tokens = shape((B, P), jnp.int32)
    lengths = shape((B,), jnp.int32)
    done = shape((B,), jnp.bool_)
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == _CACHE_HIT:
            hits.append(event)

    first = prefill.lower(model, params, tokens, lengths, select)
    logits, cache = first.out_info
    grown = grow.lower(cache, S)
    begun = begin.lower(logits, grown.out_info, done, _STOP, keys, sampling=Sampling())
    three = [lowered.compile(compiler_options=options) for lowered in (first, grown, begun)]
    jax.monitoring.register_event_listener(listen)
    start = time.perf_counter()
    loop = decode.lower(
        model, params, begun.out_info, jnp.int32(2), _STOP, keys, select, sampling=Sampling()
    )
    loop = loop.compile(compiler_options=options)
    seconds = time.perf_counter() - start
    jax.monitoring.unregister_event_listener(listen)
    return Programs(setting, *three, loop, seconds, bool(hits))


def interleave(contestants: Mapping[str, Callable[[], T]], rounds: int) -> Iterator[dict[str, T]]:
    """Yields each round's times by name: all contestants once, in the order given and the reverse
    order by turns."""
    names = list(contestants)
    for _ in range(rounds):
        yield {name: contestants[name]() for name in names}
        names.reverse()


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles (linear between the values) of at least one value."""
    low, middle, high = (float(np.quantile(values, q)) for q in (0.25, 0.5, 0.75))
    return {"median": middle, "quartiles": [low, high]}


def paired_ratio(own: Sequence[float | None], other: Sequence[float | None]) -> dict[str, Any]:
    """Summary of `own / other`, round by round, where both were timed."""
    return summary(
        [a / b for a, b in zip(own, other, strict=True) if a is not None and b is not None]
    )


def claims(ratio: float, lora: float) -> dict[str, float | None]:
    """Both readings of the paper's claim.

    ratio, lora: the times of a method and of LoRA over the merged base's. less_than_lora:
    `1 - T_m / T_lora`. overhead_removed: `(T_lora - T_m) / (T_lora - T_base)`, None where LoRA has
    no overhead.
    """
    removed = None
    if lora > 1:
        removed = (lora - ratio) / (lora - 1)
    return {"less_than_lora": 1 - ratio / lora, "overhead_removed": removed}


def read_bandwidth(size: int | None = None) -> dict[str, Any]:
    """How fast the device reads memory, in GB/s: the best of three reads of `size` bytes, by
    default 1 GiB; 4 GiB on a GPU, where starting the read would count otherwise.

    A CPU reads with one thread a core. Each computes the dot product of its part with itself, which
    is numpy's fastest plain read.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = size or (2**30 if on_cpu else 2**32)
    threads = 0
    if on_cpu:
        threads = os.cpu_count() or 1
        parts = np.array_split(np.ones(size // 4, np.float32), threads)
        pool = concurrent.futures.ThreadPoolExecutor(threads)

        def read():
            return list(pool.map(lambda part: np.dot(part, part), parts))
    else:
        array = jnp.ones(size // 4, jnp.float32)
        total = jax.jit(jnp.sum)

        def read():
            return total(array).block_until_ready()

    read()  # starts the threads, or compiles
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    if on_cpu:
        pool.shutdown()
    speeds = [size / s / 1e9 for s in seconds]
    return {"gb_per_s": max(speeds), "runs_gb_per_s": speeds, "bytes": size, "threads": threads}
