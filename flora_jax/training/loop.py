"""The training loop: steps, what is due between them (log lines, validation, checkpoints), and
what comes of a run.

`train(config, workdir)` is what `python -m flora_jax.train` runs. Called again on the same
directory it resumes, and the losses and the adapter that follow are bit-equal to those of a run
that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flora_jax.commands import noted_signals
from flora_jax.data import eval_batches
from flora_jax.errors import Stopped, expand_path, writing
from flora_jax.training import report
from flora_jax.training.checkpoints import Checkpoints, adapter_meta, check_meta, readable
from flora_jax.training.cluster import settle, together
from flora_jax.training.measure import (
    Clock,
    Flops,
    Trace,
    check_profile,
    peak_flops,
    peak_memory,
)
from flora_jax.training.optimizer import make_schedule
from flora_jax.training.rules import combine
from flora_jax.training.run import Result, Run, prepare
from flora_jax.training.sharding import shard_batch
from flora_jax.training.step import TrainState
from flora_jax.training.workdir import SCHEMA_VERSION, Metrics, begun

Values = dict[str, Any]  # a step's, by name
Losses = dict[int, float]  # on validation, by step

_MULTIPLE = 64  # of positions in validation: a program for every length would be compiled otherwise


def train(config: ml_collections.ConfigDict, workdir: str | Path, profile: int = 0) -> Result:
    """Trains (or goes on training) in `workdir` and returns the best step's adapter. profile: of
    how many steps JAX's profile is written to `workdir/profile`.

    Raises UserError for bad input, FloatingPointError with its step when the loss is not finite,
    Stopped after a SIGTERM, SIGINT or SIGHUP once a checkpoint is written, WriteError for a disk
    that takes no more.
    """
    workdir = Path(expand_path(workdir))
    config = settle(config)
    run = prepare(config, workdir)
    with contextlib.ExitStack() as stack:
        # All have seen what the directory holds: `prepare` lets none through before.
        mine = begun(workdir, config) if _is_first() else contextlib.nullcontext()
        together(lambda: stack.enter_context(mine))
        return _train(run, workdir, profile)


def _is_first() -> bool:
    return jax.process_index() == 0


def _train(run: Run, workdir: Path, profile: int) -> Result:
    """`train`, prepared and alone in its directory."""
    with noted_signals(alone=jax.process_count() == 1) as signals:
        validated = run_steps(run, workdir, signals, profile=profile)
    return result(run, workdir, validated)


def run_steps(
    run: Run, workdir: Path, signals: list[int], name: str = "", profile: int = 0
) -> Losses:
    """All steps that are left of a run, and what is due after each; its validation losses. name: of
    one of several at once. Raises as `train` does; signals: filled while it runs, to stop it."""
    checkpoints = Checkpoints(workdir / "checkpoints", run.config.train.keep)
    validated = resume(run, checkpoints, workdir)
    start = int(run.state.step)
    check_profile(profile, start, run.config.train.steps)
    if _is_first() and not name:
        report.print_start(run, start)
    metrics = None
    trace = Trace(workdir / "profile", start, profile)
    try:
        with writing(
            f"--workdir={workdir}",
            "make room, and the same command goes on after its latest checkpoint",
        ):
            if _is_first() and start < run.config.train.steps:
                metrics = Metrics(workdir, run.config, start)
            noted = _Noted(
                run=run,
                checkpoints=checkpoints,
                metrics=metrics,
                bar=report.Progress(start, run.config.train.steps, name),
                validated=validated,
                trace=trace,
            )
            _steps(noted, start, signals)
    finally:
        trace.close()
        checkpoints.close()
        if metrics:
            metrics.close()
    return validated


class Due(NamedTuple):
    """What comes after a step."""

    logs: bool
    evaluates: bool
    saves: bool


def due(step: int, train: ml_collections.ConfigDict) -> Due:
    """What `config.train` has come after this step; all but a log line come after the last."""

    def comes(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == train.steps)

    return Due(
        logs=step % train.log_every == 0,
        evaluates=comes(train.eval_every),
        saves=comes(train.save_every),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Noted:
    """A run and all places where it is noted how it goes; metrics in the first process alone."""

    run: Run
    checkpoints: Checkpoints
    metrics: Metrics | None
    bar: report.Progress
    validated: Losses
    trace: Trace

    def log(self, step: int, line: dict[str, float]) -> None:
        """A line of values of the step."""
        if self.metrics:
            self.metrics.write(step, line)
        self.bar.log(step, line)

    def advance(self, step: int) -> None:
        """The step is done."""
        self.bar.advance(step)
        if self.trace.after(step, self.run.state):
            self.bar.say(f"the profile of the last steps is in {self.trace.folder}")

    def validate(self, step: int) -> None:
        """The validation loss after the step. Raises FloatingPointError if it is not finite."""
        losses = {"validation loss": validation_loss(self.run)}
        self.validated[step] = loss = _check_finite(step, losses, step)
        if self.metrics:
            self.metrics.write(step, {"validation_loss": loss})
        self.bar.say(f"step {step}: validation loss {loss:.4f}")


def _steps(noted: _Noted, start: int, signals: list[int]) -> None:
    """All steps after `start`, and what is due after each. Raises as `train` does."""
    run = noted.run
    settings = run.config.train
    schedule = make_schedule(run.config)
    flops = Flops.of(run.frozen, run.state.trainable, run.model_config)
    clock = Clock(_peak(run))
    before: Values = {}
    with noted.bar:
        if start == 0 and settings.eval_every:
            noted.validate(0)
        for step in range(start + 1, settings.steps + 1):
            todo = due(step, settings)
            noted.trace.before(step)
            with clock, jax.profiler.StepTraceAnnotation("train", step_num=step):
                values = _step(run, clock, flops)
                # The step before is looked at while this one runs.
                if before:
                    _check_finite(step - 1, before, step - 2)
                before = {name: values[name] for name in ("loss", "gradient_norm")}
                stop = _told_to_stop(signals, noted.checkpoints, step)
                if any(todo) or stop:
                    loss = _check_finite(step, before, step - 1)
            if todo.logs:
                line = {
                    "loss": loss,
                    "learning_rate": float(schedule(step - 1)),
                    "gradient_norm": float(values["gradient_norm"]),
                    "tokens_in_loss": float(values["tokens"]),
                    **clock.lap(),
                    "peak_memory_gb": peak_memory(),
                }
                noted.log(step, line)
            noted.advance(step)
            if todo.evaluates:
                noted.validate(step)
                stop = stop or bool(signals)
            if todo.saves or stop or step == best_step(noted.validated):
                save(run, noted.checkpoints, noted.validated)
            if stop and step < settings.steps:
                raise Stopped(
                    f"stopped by a signal after step {step}, which is saved; the same command "
                    "resumes"
                )


def _told_to_stop(signals: list[int], checkpoints: Checkpoints, step: int) -> bool:
    """Whether this process was; of several, whether all agreed to, since one of them was."""
    if jax.process_count() > 1:
        return checkpoints.reached_preemption(step)
    return bool(signals)


def _peak(run: Run) -> float | None:
    """FLOP/s of all devices together, where they are known."""
    each = peak_flops(jax.devices()[0], run.config.model.dtype)
    return each and each * run.mesh.size


def _step(run: Run, clock: Clock, flops: Flops) -> Values:
    """One step of the run, begun; its values, which are there once it has ended."""
    host_batch = next(run.iterator)
    processes = jax.process_count()
    tokens = int((host_batch["segment_ids"] > 0).sum())
    clock.count(tokens * processes, flops.of_batch(host_batch) * processes)
    run.state, values = run.compiled_step(run.state, run.frozen, shard_batch(host_batch, run.mesh))
    return values


def _check_finite(step: int, values: Values, updates: int) -> float:
    """The first of the values of a step, after so many updates, as a float.

    Raises FloatingPointError if one of them is not finite.
    """
    floats = {name: float(value) for name, value in values.items()}
    for name, value in floats.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {name.replace('_', ' ')} is {value} at step {step}; {_remedy(updates)}, and "
                "start in a new --workdir"
            )
    return next(iter(floats.values()))


def _remedy(updates: int) -> str:
    if updates:
        return "lower config.optim.learning_rate or raise config.optim.warmup_steps"
    # Before the first update no rate has had a part in it.
    return (
        "nothing has trained yet: check config.model.weights, or compute in another "
        "config.model.dtype"
    )


# ---------------------------------------------------------------------------- what comes of a run


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
