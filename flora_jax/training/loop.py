"""The training loop: everything is checked and placed first, then steps, logs, validation, checkpoints.

`train(config, workdir)` is what `python -m flora_jax.train` runs. Called again on the same directory it resumes, and
the losses and the adapter that follow are bit-equal to those of a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flora_jax.adapters import AdapterConfig, abstract_adapter, init_adapter
from flora_jax.config import adapter_config as make_adapter_config
from flora_jax.config import check_config
from flora_jax.data import eval_batches, train_iterator
from flora_jax.device import check_jax
from flora_jax.errors import Stopped, UserError, expand_path, hangups, writing
from flora_jax.files import write_json
from flora_jax.models.config import LlamaConfig
from flora_jax.models.fingerprint import base_fingerprint
from flora_jax.models.llama import Llama, abstract_base
from flora_jax.training import report
from flora_jax.training.checkpoints import Checkpoints, adapter_meta, check_meta, readable
from flora_jax.training.cluster import together
from flora_jax.training.inputs import Inputs, load_inputs
from flora_jax.training.optimizer import make_optimizer, make_schedule, trains
from flora_jax.training.rules import combine, partition
from flora_jax.training.runs import check_base, load_base, run_keys
from flora_jax.training.sharding import make_mesh, optimizer_shardings, shard_batch, shardings
from flora_jax.training.step import TrainState, make_eval_step, make_train_step
from flora_jax.training.workdir import SCHEMA_VERSION, Metrics, check_workdir, held

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of before its data and weights, by path: what its leaves are, which train, where they lie."""

    model_config: LlamaConfig
    adapter_config: AdapterConfig
    tokenizer: Any
    mesh: Mesh
    shapes: Tree
    trained: dict[str, bool]
    optimizer: optax.GradientTransformation
    placed: Tree


@dataclasses.dataclass
class Run:
    """A run that is checked and placed on its devices, ready to step."""

    config: ml_collections.ConfigDict
    model_config: LlamaConfig
    adapter_config: AdapterConfig
    tokenizer: Any
    inputs: Inputs
    iterator: grain.DatasetIterator
    mesh: Mesh
    frozen: Tree
    state: TrainState
    fingerprint: str
    compiled_step: Callable[..., Any]
    compiled_eval: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run gives: the leaves of its best step (its last, where nothing was validated).

    trained: `{"adapter": tree, "params": tree}` of numpy arrays, base leaves only where they trained. variables: base
    and adapter together, on the devices. summary: what `eval.json` begins with.
    """

    run: Run
    trained: Tree
    variables: Tree
    summary: dict[str, Any]


def check_run(config: ml_collections.ConfigDict, workdir: str | Path) -> Setup:
    """Checks all of a run that needs neither its data nor its weights. Raises UserError."""
    check_jax()
    check_config(config)
    check_workdir(Path(expand_path(workdir)), config)
    model_config, tokenizer = check_base(config)
    adapter, mesh = make_adapter_config(config), make_mesh(config)
    dtype = jnp.dtype(config.model.param_dtype)
    shapes = {
        "params": abstract_base(model_config, dtype),
        "adapter": abstract_adapter(model_config, adapter),
    }
    # which no checkpoint can hold
    if any(leaf.size == 0 for leaf in jax.tree.leaves(shapes["adapter"])):
        raise UserError(
            f"config.adapter.method={adapter.method!r} reads q, k and v from the second layer on, and the "
            "model has num_hidden_layers=1; use another method"
        )
    trained = trains(config, shapes)
    optimizer = make_optimizer(config, shapes, trained)
    placed = shardings(shapes, mesh, model_config, adapter)
    return Setup(model_config, adapter, tokenizer, mesh, shapes, trained, optimizer, placed)


def _check_all(config: ml_collections.ConfigDict, workdir: str | Path) -> tuple[Setup, Inputs]:
    """`check_run`, then the data."""
    setup = check_run(config, workdir)
    inputs = load_inputs(config, setup.tokenizer)
    positions = setup.model_config.max_position_embeddings
    longest = max(len(example.tokens) - 1 for example in (*inputs.train, *inputs.validation))
    if longest > positions:
        raise UserError(
            f"config.data.max_length={config.data.max_length} lets in an example of {longest} positions, but the "
            f"model has max_position_embeddings={positions}; lower it (rows longer than "
            "that may be packed of shorter examples)"
        )
    return setup, inputs


def prepare(config: ml_collections.ConfigDict, workdir: str | Path) -> Run:
    """Checks everything that can be checked without weights, then loads and places them. Raises UserError."""
    setup, inputs = together(lambda: _check_all(config, workdir))
    model_config, adapter, mesh, placed = (
        setup.model_config,
        setup.adapter_config,
        setup.mesh,
        setup.placed,
    )
    iterator = train_iterator(
        inputs.train,
        batch_size=config.train.batch_size // jax.process_count(),
        max_length=config.data.max_length,
        seed=config.train.seed,
        packing=config.data.packing,
        parts=inputs.parts,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )

    _, adapter_key, key = run_keys(config)
    # a value that is not finite is met as it is read
    base = together(lambda: load_base(config, placed["params"]))
    fingerprint = base_fingerprint(base)
    variables = {"params": base}
    if setup.shapes["adapter"]:
        init = jax.jit(
            lambda k: init_adapter(k, model_config, adapter), out_shardings=placed["adapter"]
        )
        variables["adapter"] = init(adapter_key)
    trainable, frozen = partition(variables, setup.trained)
    # What trains is float32 whatever the base is stored in: an update is far below bfloat16's resolution.
    trainable = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable)
    trainable_placed, _ = partition(placed, setup.trained)
    everywhere = NamedSharding(mesh, P())
    opt_placed = optimizer_shardings(setup.optimizer, trainable, trainable_placed, mesh)
    # By jit rather than device_put, which takes no key to the devices of other processes.
    step, key = jax.jit(lambda key: (jnp.zeros((), jnp.int32), key), out_shardings=everywhere)(key)
    opt_state = jax.jit(setup.optimizer.init, out_shardings=opt_placed)(trainable)
    state = TrainState(step, trainable, opt_state, key)
    state_placed = TrainState(everywhere, trainable_placed, opt_placed, everywhere)

    compute, stored = jnp.dtype(config.model.dtype), jnp.dtype(config.model.param_dtype)
    model = Llama(
        model_config, adapter, dtype=compute, param_dtype=stored, remat=config.model.remat
    )
    train_step = make_train_step(
        model, setup.optimizer, config.train.accumulation, config.train.chunk_tokens
    )
    compiled_step = jax.jit(train_step, donate_argnums=0, out_shardings=(state_placed, everywhere))
    compiled_eval = jax.jit(
        make_eval_step(model, config.train.chunk_tokens), out_shardings=everywhere
    )
    return Run(
        config,
        model_config,
        adapter,
        setup.tokenizer,
        inputs,
        iterator,
        mesh,
        frozen,
        state,
        fingerprint,
        compiled_step,
        compiled_eval,
    )


def validation_loss(run: Run) -> float:
    """Mean loss over the counted tokens of the validation examples."""
    config, process, processes = run.config, jax.process_index(), jax.process_count()
    rows = config.train.batch_size // config.train.accumulation
    # By length, in batches as long as their longest example needs (a multiple of 64): little is padding. Every
    # process cuts the same batches and holds every n-th row of each.
    examples = sorted(run.inputs.validation, key=lambda example: len(example.tokens))
    total = count = 0.0
    for start in range(0, len(examples), rows):
        batch = examples[start : start + rows]
        length = min(config.data.max_length, -(-(len(batch[-1].tokens) - 1) // 64) * 64)
        # The shortest stands in where the last batch leaves a process without a row, and then counts nothing.
        mine = batch[process::processes] or examples[:1]
        (local,) = eval_batches(mine, batch_size=rows // processes, max_length=length)
        if process >= len(batch):
            local["loss_weights"][:] = 0
        loss, weight = run.compiled_eval(
            run.state.trainable, run.frozen, shard_batch(local, run.mesh)
        )
        total, count = total + float(loss), count + float(weight)
    return total / max(count, 1.0)


@contextlib.contextmanager
def _signals(alone: bool = True) -> Iterator[list[int]]:
    """A list that SIGTERM, SIGINT and SIGHUP are noted in instead of ending the process in the middle of a step. With
    other processes beside this one, JAX has all of them stop after a SIGTERM to one, and a SIGHUP is passed on so."""
    noted: list[int] = []

    def handle(number: int, _: Any) -> None:
        # A second Ctrl-C, perhaps in a long compilation, ends it at once.
        if number == signal.SIGINT and signal.SIGINT in noted:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        noted.append(number)

    def pass_on(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), handle) if alone else {}
    handlers |= dict.fromkeys(hangups(), handle if alone else pass_on)
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not the main thread, as in some notebooks: signals stay as they are
        before = {}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> Result:
    """Trains (or goes on training) in `workdir` and returns the best step's adapter.

    Raises UserError for bad input, FloatingPointError with its step when the loss is not finite, Stopped after a
    SIGTERM, SIGINT or SIGHUP once a checkpoint is written, WriteError for a disk that takes no more.
    """
    workdir = Path(expand_path(workdir))
    run = prepare(config, workdir)
    main = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        # All have seen what the directory holds: `prepare` lets none through before.
        begun = _begun(workdir, config) if main else contextlib.nullcontext()
        together(lambda: stack.enter_context(begun))
        return _train(run, workdir)


@contextlib.contextmanager
def _begun(workdir: Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """The directory with its config.json, held."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from None
    with held(workdir):
        # while this run read its weights another may have begun there, or ended
        check_workdir(workdir, config)
        if not (workdir / "config.json").exists():
            write_json(
                workdir / "config.json",
                {"schema_version": SCHEMA_VERSION, "config": config.to_dict()},
            )
        yield


def _train(run: Run, workdir: Path) -> Result:
    """`train`, prepared and alone in its directory."""
    config, main = run.config, jax.process_index() == 0
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep)
    latest = checkpoints.latest
    validated: dict[int, float] = {}
    if latest is not None:
        where = f"checkpoint {latest} of --workdir={workdir}"
        older = [step for step in checkpoints.steps if step < latest]
        rest = f"from step {older[-1]}" if older else "from the beginning"
        damaged = workdir / "checkpoints" / str(latest)
        with readable(where, f"move {damaged} elsewhere, and the same command goes on {rest}"):
            meta = checkpoints.meta(latest)
            check_meta(
                meta, run.adapter_config, run.fingerprint, run.inputs.account["sha256"], where
            )
            run.state = checkpoints.restore(latest, run.state, run.iterator)
        validated = {int(step): loss for step, loss in meta["validation_losses"].items()}
    start = int(run.state.step)
    if main:
        report.print_start(run, start)
    metrics = None
    try:
        with writing(
            f"--workdir={workdir}",
            "make room, and the same command goes on after its latest checkpoint",
        ):
            if main and start < config.train.steps:
                metrics = Metrics(workdir, start)
            _steps(run, checkpoints, metrics, start, validated)
    finally:
        checkpoints.close()
        if metrics:
            metrics.close()
    return _result(run, workdir, validated)


def _steps(
    run: Run,
    checkpoints: Checkpoints,
    metrics: Metrics | None,
    start: int,
    validated: dict[int, float],
) -> None:
    config, steps = run.config, run.config.train.steps
    schedule = make_schedule(config)
    alone = jax.process_count() == 1

    def save() -> None:
        meta = {
            "adapter": adapter_meta(run.adapter_config),
            "base_fingerprint": run.fingerprint,
            "data": run.inputs.account["sha256"],
            "validation_losses": {str(step): value for step, value in validated.items()},
        }
        checkpoints.save(run.state, run.iterator, meta, _best(validated))

    def validate(step: int) -> None:
        validated[step] = loss = _check_finite(
            step, {"validation loss": validation_loss(run)}, step
        )
        if metrics:
            metrics.write(step, {"validation_loss": loss})
        bar.say(f"step {step}: validation loss {loss:.4f}")

    bar = report.Progress(start, steps)
    clock, tokens = time.perf_counter(), 0
    with _signals(alone) as signals, bar:
        if start == 0 and config.train.eval_every:
            validate(0)
            clock = time.perf_counter()
        before: tuple[int, dict[str, Any]] | None = None
        for step in range(start + 1, steps + 1):
            host_batch = next(run.iterator)
            tokens += int((host_batch["segment_ids"] > 0).sum()) * jax.process_count()
            run.state, values = run.compiled_step(
                run.state, run.frozen, shard_batch(host_batch, run.mesh)
            )
            # The step before is looked at while this one runs.
            if before is not None:
                _check_finite(*before, step - 2)
            before = (step, {name: values[name] for name in ("loss", "gradient_norm")})
            stop = bool(signals) if alone else checkpoints.reached_preemption(step)
            logs = step % config.train.log_every == 0
            evaluates = bool(config.train.eval_every) and (
                step % config.train.eval_every == 0 or step == steps
            )
            saves = step % config.train.save_every == 0 or step == steps
            if logs or evaluates or saves or stop:
                loss = _check_finite(*before, step - 1)
            if logs:
                elapsed = time.perf_counter() - clock
                line = {
                    "loss": loss,
                    "learning_rate": float(schedule(step - 1)),
                    "gradient_norm": float(values["gradient_norm"]),
                    "tokens_in_loss": float(values["tokens"]),
                    "tokens_per_second": tokens / elapsed,
                }
                if metrics:
                    metrics.write(step, line)
                bar.log(step, line)
                clock, tokens = time.perf_counter(), 0
            bar.advance(step)
            if evaluates:
                validate(step)
                stop = stop or (alone and bool(signals))
            if saves or stop or step == _best(validated):
                save()
            if evaluates or saves:
                clock, tokens = time.perf_counter(), 0
            if stop and step < steps:
                raise Stopped(
                    f"stopped by a signal after step {step}, which is saved; the same command resumes"
                )


def _best(validated: dict[int, float]) -> int | None:
    """The trained step of lowest validation loss, the latest among equals; None if none was validated."""
    return min(
        (step for step in validated if step),
        key=lambda step: (validated[step], -step),
        default=None,
    )


def _check_finite(step: int, values: dict[str, Any], updates: int) -> float:
    """The first of the values by name, after so many updates, as a float; FloatingPointError if one is not finite."""
    floats = {name: float(value) for name, value in values.items()}
    for name, value in floats.items():
        if not math.isfinite(value):
            # Before the first update no rate has had a part in it.
            remedy = (
                "lower config.optim.learning_rate or raise config.optim.warmup_steps"
                if updates
                else "nothing has trained yet: check config.model.weights, or compute in another config.model.dtype"
            )
            raise FloatingPointError(
                f"the {name.replace('_', ' ')} is {value} at step {step}; {remedy}, and start in "
                "a new --workdir"
            )
    return next(iter(floats.values()))


def _result(run: Run, workdir: Path, validated: dict[int, float]) -> Result:
    """The best step's leaves by validation loss (the last step's where nothing was validated), gathered whole."""
    best = _best(validated) or int(run.state.step)
    state = run.state
    if best != int(state.step):
        checkpoints = Checkpoints(workdir / "checkpoints", run.config.train.keep)
        where = f"checkpoint {best} of --workdir={workdir}, the best on validation,"
        there = " or ".join(str(step) for step in checkpoints.steps if step != best)
        remedy = f"flora_jax.export takes another with --step {there}, or train anew in another --workdir"
        with contextlib.closing(checkpoints), readable(where, remedy):
            state = checkpoints.restore(best, state)
    # Leaf by leaf onto the host: a whole copy on each device may not fit.
    whole = jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(run.mesh, P()))
    trained = jax.tree.map(lambda leaf: np.asarray(whole(leaf)), state.trainable)
    variables = combine(state.trainable, run.frozen)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "step": best,
        "validation_losses": {str(step): loss for step, loss in validated.items()},
        "data": run.inputs.account,
        "base_fingerprint": run.fingerprint,
        "adapter": adapter_meta(run.adapter_config),
        "seed": run.config.train.seed,
    }
    return Result(run, {"adapter": {}, "params": {}, **trained}, variables, summary)
