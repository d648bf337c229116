"""Several runs over one base: seeds and rates of a method. Those that are computed at once share
the products with the base.

Each run has its own loop in a thread, with its own directory, data, validation, checkpoints and
log. These are a lone run's, so a lone run can continue a replica and the other way about. Only the
step is common: when all threads have given their state and batch, one of them runs the program for
all, or for one group after another. A group holds what all its replicas keep for their gradients.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from flora_jax.adapters import Tree
from flora_jax.commands import noted_signals
from flora_jax.config import fields, learning_rate, weights_source
from flora_jax.errors import Stopped, expand_path, require
from flora_jax.models.llama import Llama
from flora_jax.training.cluster import settle
from flora_jax.training.loop import run_steps
from flora_jax.training.optimizer import make_optimizer, trains
from flora_jax.training.report import print_start, say
from flora_jax.training.rules import combine
from flora_jax.training.run import Run, prepare
from flora_jax.training.step import TrainState, make_replica_step, make_train_step
from flora_jax.training.workdir import begun

# Fields in which replicas may differ.
OWN_FIELDS = ("train.seed", "optim.learning_rate")

Batch = dict[str, jax.Array]
Program = Callable[..., tuple[tuple[TrainState, ...], tuple[dict[str, jax.Array], ...]]]


def train_replicas(
    configs: Sequence[ml_collections.ConfigDict],
    workdirs: Sequence[str | Path],
    at_once: int | None = None,
) -> dict[int, FloatingPointError]:
    """Trains (or resumes) all runs together, up to their last step.

    at_once: the most replicas that a step computes at once, by default one on a CPU, which is as
    fast with one and holds less, and all on other devices.

    `train` of the same configuration and workdir then only reads the best step. Losses and adapters
    are a lone run's up to rounding. A run whose loss is not finite leaves the others, and its error
    is returned by its place in `configs`. Otherwise raises as `train` does, and UserError for runs
    that differ in other fields than OWN_FIELDS, that train base leaves, or on several devices.
    """
    if at_once is None:
        at_once = default_at_once(len(configs))
    require(at_once >= 1, f"at_once={at_once} must be a positive number of replicas")
    configs = [settle(config) for config in configs]
    _check(configs)
    places = [Path(expand_path(workdir)) for workdir in workdirs]
    first = prepare(configs[0], places[0])
    runs = [first]
    for config, workdir in zip(configs[1:], places[1:], strict=True):
        runs.append(prepare(config, workdir, first.frozen["params"]))
    rates = np.asarray([learning_rate(config) for config in configs], np.float32)
    chunk = configs[0].train.chunk_tokens
    program = replica_program(first.model, _unit_optimizer(first), chunk)
    together = Together(program, rates, at_once)
    for i, run in enumerate(runs):
        run.compiled_step = functools.partial(together.step, i)
        run.compiled_eval = first.compiled_eval
    print_start(first, 0)
    say(f"{len(runs)} replicas of what trains: " + ", ".join(map(_name, configs)))
    with contextlib.ExitStack() as stack:
        for config, workdir in zip(configs, places, strict=True):
            stack.enter_context(begun(workdir, config))
        return _run_all(runs, places, together)


def _check(configs: Sequence[ml_collections.ConfigDict]) -> None:
    """Raises UserError for runs that cannot be trained together."""
    require(
        jax.device_count() == 1,
        f"replicas are for one device, and there are {jax.device_count()}",
    )
    ours = fields(configs[0])
    for config in configs[1:]:
        for field, value in fields(config).items():
            require(
                value == ours[field] or field in OWN_FIELDS,
                f"config.{field} is {ours[field]!r} in one replica and {value!r} in another; they "
                f"may differ in {' and '.join(OWN_FIELDS)}",
            )
    seeds = {config.train.seed for config in configs}
    require(
        weights_source(configs[0]) != "random" or len(seeds) == 1,
        "config.model.weights='random' draws a base of each seed's own, and replicas share one",
    )
    alone = {
        "adapter.method": ours["adapter.method"] == "fft",
        "train.trainable": bool(ours["train.trainable"]),
        "train.accumulation": ours["train.accumulation"] > 1,
    }
    for field, refused in alone.items():
        require(
            not refused,
            f"config.{field}={ours[field]!r}: replicas share all that is no adapter, and take "
            "their batch at once",
        )


def _name(config: ml_collections.ConfigDict) -> str:
    return f"seed {config.train.seed}, rate {learning_rate(config):g}"


def _unit_optimizer(run: Run) -> optax.GradientTransformation:
    """The run's optimizer, with a peak rate of 1."""
    config = run.config.copy_and_resolve_references()
    config.optim.learning_rate = 1.0
    variables = combine(run.state.trainable, run.frozen)
    return make_optimizer(config, variables, trains(config, variables))


def replica_program(
    model: Llama, optimizer: optax.GradientTransformation, chunk_tokens: int = 256
) -> Program:
    """`program(states, frozen, batches, rates) -> (states, metrics)`, compiled for each number of
    replicas.

    states, batches, metrics: tuples with an item for each replica; states are donated. optimizer:
    with a peak rate of 1; rates `[k]`: the replicas' peak rates. One replica takes the step of a
    lone run.
    """
    alone = make_train_step(model, optimizer, chunk_tokens=chunk_tokens)
    step = make_replica_step(model, optimizer, chunk_tokens)

    def program(states: Any, frozen: Tree, batches: Any, rates: Any) -> Any:
        if len(states) == 1:
            state, metrics = alone(states[0], frozen, batches[0], rates[0])
            return (state,), (metrics,)
        out = step(_stacked(states), frozen, _stacked(batches), rates)
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(len(rates))]
        return tuple(zip(*each, strict=True))

    return jax.jit(program, donate_argnums=0)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def default_at_once(count: int) -> int:
    """How many of `count` replicas this device computes at once: a CPU one, others all."""
    return 1 if jax.default_backend() == "cpu" else count


def groups(count: int, at_once: int) -> list[range]:
    """The places of `count` replicas in groups of one size, the largest up to `at_once`."""
    size = max(size for size in range(1, min(at_once, count) + 1) if count % size == 0)
    return [range(start, start + size) for start in range(0, count, size)]


def compute(
    program: Program,
    given: Mapping[int, tuple[TrainState, Batch]],
    frozen: Tree,
    rates: np.ndarray,
    at_once: int,
) -> dict[int, tuple[TrainState, dict[str, jax.Array]]]:
    """The next state and metrics of each place given, one group after another.

    program: as `replica_program` makes it; given: the state, which is donated, and the batch, by
    place; rates: of all places, float32; at_once: as `groups` takes it. In a group with some places
    given and some not, copies of the first one take the others' place.
    """
    results: dict[int, Any] = {}
    in_turn = groups(len(rates), at_once)
    # A CPU would begin a group before the last one's end, and hold what both keep.
    if len(in_turn) > 1:
        jax.block_until_ready([state for state, _ in given.values()])
    for group in in_turn:
        present = [place for place in group if place in given]
        if not present:
            continue
        jax.block_until_ready(results)
        taken = [given[place] if place in given else _copy(given[present[0]]) for place in group]
        states, batches = zip(*taken, strict=True)
        states, metrics = program(states, frozen, batches, rates[group.start : group.stop])
        for place, state, found in zip(group, states, metrics, strict=True):
            if place in given:
                results[place] = (state, found)
    return results


def _copy(given: tuple[TrainState, Batch]) -> tuple[TrainState, Batch]:
    state, batch = given
    return jax.tree.map(jnp.copy, state), batch


class Together:
    """Steps of several threads, computed when all have called.

    program, rates, at_once: as `compute` takes them.

    step(i, state, frozen, batch) waits until all runs that have not left have called it, and
    returns the i-th result.
    """

    def __init__(self, program: Program, rates: np.ndarray, at_once: int):
        self._program = program
        self._rates = rates
        self._at_once = at_once
        self._changed = threading.Condition()
        self._present = set(range(len(rates)))
        self._given: dict[int, tuple[TrainState, Batch]] = {}
        self._results: dict[int, Any] = {}
        self._failure: BaseException | None = None

    def step(
        self, place: int, state: TrainState, frozen: Tree, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The next state and metrics of a place. An error of the program is raised in all
        threads."""
        with self._changed:
            self._given[place] = (state, batch)
            self._frozen = frozen
            self._go_on()
            self._changed.wait_for(lambda: place in self._results or self._failure)
            if self._failure:
                raise self._failure
            return self._results.pop(place)

    def leave(self, place: int) -> None:
        """The run at this place takes no further step."""
        with self._changed:
            self._present.discard(place)
            self._go_on()

    def _go_on(self) -> None:
        """Runs the program if all runs that have not left have called `step`."""
        if not self._present or self._given.keys() != self._present:
            return
        try:
            self._results = compute(
                self._program, self._given, self._frozen, self._rates, self._at_once
            )
        except BaseException as error:
            self._failure = error
        self._given = {}
        self._changed.notify_all()


def _run_all(
    runs: Sequence[Run], workdirs: Sequence[Path], together: Together
) -> dict[int, FloatingPointError]:
    """Runs all loops, each in a thread; returns the errors of losses that are not finite, by
    place."""
    raised: dict[int, BaseException] = {}

    def one(place: int, signals: list[int]) -> None:
        run = runs[place]
        try:
            run_steps(run, workdirs[place], signals, _name(run.config))
        except BaseException as error:
            raised[place] = error
            if not isinstance(error, FloatingPointError):
                signals.append(0)  # the others save a checkpoint and stop
        finally:
            together.leave(place)

    with noted_signals() as signals:
        threads = [
            threading.Thread(target=one, args=(place, signals), daemon=True)
            for place, run in enumerate(runs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # New errors, without the frames that hold all trained leaves.
    diverged = {
        at: FloatingPointError(str(one))
        for at, one in raised.items()
        if isinstance(one, FloatingPointError)
    }
    others = [one for at, one in raised.items() if at not in diverged]
    for error in sorted(others, key=lambda one: isinstance(one, Stopped)):
        raise error
    return diverged
