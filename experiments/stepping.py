"""An optimizer step as a function, the batch it runs on, and the time it takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


def make_batch(
    rows: int, length: int, vocabulary: int, segments: int = 1, answers: float = 1.0
) -> Batch:
    """Random tokens in rows of `segments` examples.

    answers: the share of each row's targets that the loss counts, which are its last ones.
    """
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    weights = np.zeros((rows, length), np.float32)
    weights[:, length - round(answers * length) :] = 1
    place = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    size = -(-length // segments)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights,
        "segment_ids": place // size + 1,
        "positions": place % size,
    }


def start(optimizer: Any, trainable: Any, seed: int) -> Any:
    """The TrainState before the first step."""
    import jax
    import jax.numpy as jnp

    from flora_jax.training.step import TrainState

    moments = jax.jit(optimizer.init)(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, moments, jax.random.key(seed))


def stepper(
    model: Any, optimizer: Any, trainable: Any, frozen: Any, seed: int, **settings: Any
) -> Callable[[Batch], float]:
    """A function that does one step and returns the loss. settings: of `make_train_step`."""
    import jax

    from flora_jax.training.step import make_train_step

    state = start(optimizer, trainable, seed)
    step = jax.jit(make_train_step(model, optimizer, **settings), donate_argnums=0)

    def one(batch: Batch) -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    return one


def time_steps(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, by name and round. Each runs twice before, to compile and to warm
    up."""
    from tqdm import tqdm

    from flora_jax.analysis.timing import interleave

    for step in steps.values():
        for _ in range(2):
            step()
    contestants = {name: functools.partial(_seconds, step) for name, step in steps.items()}
    times = interleave(contestants, rounds)
    times = list(tqdm(times, total=rounds, unit="round", disable=None))
    return {name: [one[name] for one in times] for name in steps}


def _seconds(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
