"""What comes of a run: its loss on validation, the checkpoints it goes on from, and its result."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flora_jax.data import eval_batches
from flora_jax.training.checkpoints import Checkpoints, adapter_meta, check_meta, readable
from flora_jax.training.rules import combine
from flora_jax.training.run import Result, Run
from flora_jax.training.sharding import shard_batch
from flora_jax.training.step import TrainState
from flora_jax.training.workdir import SCHEMA_VERSION

Losses = dict[int, float]  # on validation, by step

_MULTIPLE = 64  # of positions: a program for every length would be compiled otherwise


def validation_loss(run: Run) -> float:
    """Mean loss over the counted tokens of the validation examples.

    They are scored by length, in batches as long as their longest example needs: little is padding.
    Every process cuts the same batches and holds every n-th row of each.
    """
    process = jax.process_index()
    processes = jax.process_count()
    rows = run.config.train.batch_size // run.config.train.accumulation
    examples = sorted(run.inputs.validation, key=lambda example: len(example.tokens))
    total = 0.0
    count = 0.0
    for start in range(0, len(examples), rows):
        batch = examples[start : start + rows]
        needed = math.ceil((len(batch[-1].tokens) - 1) / _MULTIPLE) * _MULTIPLE
        length = min(run.config.data.max_length, needed)
        # The shortest stands in where the last batch leaves a process without a row, and then
        # counts nothing.
        mine = batch[process::processes] or examples[:1]
        (local,) = eval_batches(mine, batch_size=rows // processes, max_length=length)
        if process >= len(batch):
            local["loss_weights"][:] = 0
        placed = shard_batch(local, run.mesh)
        loss, weight = run.compiled_eval(run.state.trainable, run.frozen, placed)
        total += float(loss)
        count += float(weight)
    return total / max(count, 1.0)


def best_step(validated: Losses) -> int | None:
    """The trained step of lowest validation loss, the latest among equals; None without any."""
    trained = [step for step in validated if step]
    return min(trained, key=lambda step: (validated[step], -step), default=None)


def save(run: Run, checkpoints: Checkpoints, validated: Losses) -> None:
    """Writes a checkpoint of the run as it stands."""
    meta = {
        "adapter": adapter_meta(run.adapter_config),
        "base_fingerprint": run.fingerprint,
        "data": run.inputs.account["sha256"],
        "validation_losses": _by_name(validated),
    }
    checkpoints.save(run.state, run.iterator, meta, best_step(validated))


def resume(run: Run, checkpoints: Checkpoints, workdir: Path) -> Losses:
    """Takes the run to its latest checkpoint, if there is one; the validation losses up to there.

    Raises UserError for one that is damaged, or of another adapter, base or data.
    """
    latest = checkpoints.latest
    if latest is None:
        return {}
    where = f"checkpoint {latest} of --workdir={workdir}"
    older = [step for step in checkpoints.steps if step < latest]
    rest = f"from step {older[-1]}" if older else "from the beginning"
    damaged = workdir / "checkpoints" / str(latest)
    with readable(where, f"move {damaged} elsewhere, and the same command goes on {rest}"):
        meta = checkpoints.meta(latest)
        check_meta(meta, run.adapter_config, run.fingerprint, run.inputs.account["sha256"], where)
        run.state = checkpoints.restore(latest, run.state, run.iterator)
    return {int(step): loss for step, loss in meta["validation_losses"].items()}


def result(run: Run, workdir: Path, validated: Losses) -> Result:
    """The leaves of the best step on validation (of the last without any), gathered whole."""
    best = best_step(validated) or int(run.state.step)
    state = _state_at(run, workdir, best)
    # Leaf by leaf onto the host: a whole copy on each device may not fit.
    whole = jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(run.mesh, P()))
    trained = jax.tree.map(lambda leaf: np.asarray(whole(leaf)), state.trainable)
    return Result(
        run=run,
        trained={"adapter": {}, "params": {}, **trained},
        variables=combine(state.trainable, run.frozen),
        summary={
            "schema_version": SCHEMA_VERSION,
            "step": best,
            "validation_losses": _by_name(validated),
            "data": run.inputs.account,
            "base_fingerprint": run.fingerprint,
            "adapter": adapter_meta(run.adapter_config),
            "seed": run.config.train.seed,
        },
    )


def _state_at(run: Run, workdir: Path, step: int) -> TrainState:
    """The run's state at a step, which is kept unless it is the last. Raises UserError."""
    if step == int(run.state.step):
        return run.state
    checkpoints = Checkpoints(workdir / "checkpoints", run.config.train.keep)
    where = f"checkpoint {step} of --workdir={workdir}, the best on validation,"
    there = " or ".join(str(other) for other in checkpoints.steps if other != step)
    remedy = (
        f"flora_jax.export takes another with --step {there}, or train anew in another --workdir"
    )
    with contextlib.closing(checkpoints), readable(where, remedy):
        return checkpoints.restore(step, run.state)


def _by_name(validated: Losses) -> dict[str, Any]:
    """The losses as JSON has them, whose names are strings."""
    return {str(step): loss for step, loss in validated.items()}
