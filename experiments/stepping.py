"""One optimizer step of ours as a function, and the batch it is timed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


def make_batch(
    rows: int, length: int, vocabulary: int, segments: int = 1, answers: float = 1.0
) -> Batch:
    """Random tokens in rows of `segments` examples; the last `answers` of each row's targets count
    in the loss."""
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


def stepper(
    model: Any, optimizer: Any, trainable: Any, frozen: Any, seed: int, **settings: Any
) -> Callable[[Batch], float]:
    """A function that does one step and returns the loss; settings: of `make_train_step`."""
    import jax
    import jax.numpy as jnp

    from flora_jax.training.step import TrainState, make_train_step

    state = TrainState(
        jnp.zeros((), jnp.int32),
        trainable,
        jax.jit(optimizer.init)(trainable),
        jax.random.key(seed),
    )
    step = jax.jit(make_train_step(model, optimizer, **settings), donate_argnums=0)

    def one(batch: Batch) -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    return one
