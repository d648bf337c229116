"""The training step and the validation loss, as pure functions.

The loss of a batch is the sum of its tokens' losses over the sum of their weights. So k
micro-batches give the gradient of one big batch. Gradients are taken with respect to the trainable
tree alone; the frozen tree is an argument of the step, never closed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from flora_jax.models.llama import Llama
from flora_jax.training.loss import chunked_cross_entropy, vocabulary_block
from flora_jax.training.rules import Tree, combine


@flax.struct.dataclass
class TrainState:
    """The state that a step changes.

    step: scalar int32; trainable: the leaves that train; optimizer: its state; key: the run's, into
    which each step and micro-batch folds its number.
    """

    step: jax.Array
    trainable: Tree
    optimizer: optax.OptState
    key: jax.Array


def token_losses(
    model: Llama,
    variables: Tree,
    batch: dict[str, jax.Array],
    chunk_tokens: int,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`(sum of weighted losses, sum of weights)` of a batch, float32 scalars.

    batch: arrays `[B, T]` tokens, targets, loss_weights, segment_ids, positions; chunk_tokens: the
    most positions scored at once, or one of each row if there are more rows; key: for dropout, None
    for none.
    """
    hidden = _hidden(model, variables, batch, key)
    unembedding = model.apply(variables, method="unembedding")
    losses = _row_losses(hidden, unembedding, batch, chunk_tokens)
    return losses.sum(), batch["loss_weights"].sum()


def _hidden(
    model: Llama, variables: Tree, batch: dict[str, jax.Array], key: jax.Array | None
) -> jax.Array:
    """The final states `[B, T, D]` of a batch."""
    rngs = {}
    if key is not None:
        rngs["dropout"] = key
    hidden, _ = model.apply(
        variables,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        deterministic=key is None,
        rngs=rngs,
        method="hidden",
    )
    return hidden


def _row_losses(
    hidden: jax.Array, unembedding: jax.Array, batch: dict[str, jax.Array], chunk_tokens: int
) -> jax.Array:
    """The sum of each row's weighted losses, `[B]`."""
    chunk = max(1, min(chunk_tokens // hidden.shape[0], hidden.shape[1]))
    block = vocabulary_block(len(unembedding))
    return chunked_cross_entropy(
        hidden, unembedding, batch["targets"], batch["loss_weights"], chunk, block
    )


def make_train_step(
    model: Llama,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    chunk_tokens: int = 256,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, frozen, batch, factor=None) -> (state, metrics)`.

    batch: leaves `[B, T]`, cut into `accumulation` micro-batches; chunk_tokens: as in
    `token_losses`; factor: multiplies the optimizer's updates; metrics: loss (mean over counted
    tokens), tokens (counted), gradient_norm, all float32 scalars.
    """

    def train_step(
        state: TrainState,
        frozen: Tree,
        batch: dict[str, jax.Array],
        factor: jax.Array | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def micro_loss(
            trainable: Tree, micro: dict[str, jax.Array], key: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return token_losses(model, combine(trainable, frozen), micro, chunk_tokens, key)

        gradient = jax.value_and_grad(micro_loss, has_aux=True)
        key = jax.random.fold_in(state.key, state.step)
        if accumulation == 1:
            (loss, count), grads = gradient(state.trainable, batch, key)
        else:
            # Micro-batch i takes every k-th row, so that rows stay on the devices that hold them.
            micros = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch
            )

            def body(total, xs):
                (loss, count), grads = gradient(
                    state.trainable, xs[0], jax.random.fold_in(key, xs[1])
                )
                return jax.tree.map(jnp.add, total, (loss, count, grads)), None

            zero = jnp.zeros((), jnp.float32)
            start = (zero, zero, jax.tree.map(jnp.zeros_like, state.trainable))
            (loss, count, grads), _ = jax.lax.scan(body, start, (micros, jnp.arange(accumulation)))
        return _update(state, loss, count, grads, optimizer, factor)

    return train_step


def _update(
    state: TrainState,
    loss: jax.Array,
    count: jax.Array,
    grads: Tree,
    optimizer: optax.GradientTransformation,
    factor: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The next state and the step's metrics.

    loss, grads: sums over `count` tokens; factor: multiplies the optimizer's updates.
    """
    # A batch without a counted token has zero gradients; dividing by one keeps them so.
    divisor = jnp.where(count > 0, count, 1.0)
    grads = jax.tree.map(lambda g: g / divisor, grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.optimizer, state.trainable)
        if factor is not None:
            updates = jax.tree.map(lambda update: factor * update, updates)
        trainable = optax.apply_updates(state.trainable, updates)
    metrics = {"loss": loss / divisor, "tokens": count, "gradient_norm": optax.tree.norm(grads)}
    return state.replace(step=state.step + 1, trainable=trainable, optimizer=opt_state), metrics


def make_replica_step(
    model: Llama, optimizer: optax.GradientTransformation, chunk_tokens: int = 256
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`step(states, frozen, batches, factors) -> (states, metrics)`: the step of `make_train_step`
    for k runs over one frozen base.

    The leaves of states, batches and metrics have an axis of k replicas in front. factors `[k]`
    multiply the optimizer's updates: with a peak rate of 1 in the optimizer, they are the replicas'
    rates. Only an adapter trains. All replicas share one product with each of the base's weights,
    and one loss, which skips a chunk if no replica counts it.
    """

    def step(
        states: TrainState, frozen: Tree, batches: dict[str, jax.Array], factors: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        keys = jax.vmap(jax.random.fold_in)(states.key, states.step)

        def losses(trainable: Tree) -> tuple[jax.Array, jax.Array]:
            def one(own: Tree, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
                return _hidden(model, combine(own, frozen), batch, key)

            hidden = jax.vmap(one)(trainable, batches, keys)
            first = jax.tree.map(lambda leaf: leaf[0], trainable)
            unembedding = model.apply(combine(first, frozen), method="unembedding")
            rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (hidden, batches))
            found = _row_losses(rows[0], unembedding, rows[1], chunk_tokens * len(hidden))
            found = found.reshape(len(hidden), -1).sum(1)
            # No replica's loss depends on another's leaves.
            return found.sum(), found

        (_, loss), grads = jax.value_and_grad(losses, has_aux=True)(states.trainable)
        count = batches["loss_weights"].sum((1, 2))
        update = functools.partial(_update, optimizer=optimizer)
        return jax.vmap(lambda *own: update(*own[:-1], factor=own[-1]))(
            states, loss, count, grads, factors
        )

    return step


def make_eval_step(
    model: Llama, chunk_tokens: int = 256
) -> Callable[[Tree, Tree, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
    """`step(trainable, frozen, batch) -> (sum of losses, sum of weights)`, without dropout."""

    def eval_step(
        trainable: Tree, frozen: Tree, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return token_losses(model, combine(trainable, frozen), batch, chunk_tokens)

    return eval_step
