"""A run: what it is made of, checked before anything is read, then placed on its devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flora_jax.adapters import (
    AdapterConfig,
    Tree,
    abstract_adapter,
    init_adapter,
    quantize_base,
)
from flora_jax.config import adapter_config as make_adapter_config
from flora_jax.config import check_config, weights_source
from flora_jax.data import train_iterator
from flora_jax.device import check_jax
from flora_jax.errors import expand_path, require, told_of
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama, abstract_base, init_base
from flora_jax.models.loading import check_weights, load_config, load_pretrained
from flora_jax.models.tokenizer import check_tokenizer, load_tokenizer
from flora_jax.tokens import Tokenizer
from flora_jax.training.cluster import together
from flora_jax.training.inputs import Inputs, load_inputs
from flora_jax.training.loggers import check_logger
from flora_jax.training.optimizer import make_optimizer, trains
from flora_jax.training.rules import partition, paths
from flora_jax.training.sharding import make_mesh, optimizer_shardings, shardings
from flora_jax.training.step import TrainState, make_eval_step, make_train_step
from flora_jax.training.workdir import check_workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run is made of before its data and weights.

    Trees are by path: shapes, what its leaves are; trained, which of them train; placed, where they
    lie on the mesh.
    """

    model_config: LlamaConfig
    adapter_config: AdapterConfig
    tokenizer: Any
    mesh: Mesh
    shapes: Tree
    trained: dict[str, bool]
    optimizer: optax.GradientTransformation
    placed: Tree


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run that is checked and placed on its devices, ready to step."""

    config: ml_collections.ConfigDict
    model_config: LlamaConfig
    adapter_config: AdapterConfig
    tokenizer: Any
    inputs: Inputs
    iterator: grain.DatasetIterator
    mesh: Mesh
    model: Llama
    frozen: Tree
    state: TrainState
    fingerprint: str
    compiled_step: Callable[..., Any]
    compiled_eval: Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run gives: the leaves of its best step (its last, if nothing was validated).

    trained: `{"adapter": tree, "params": tree}` of numpy arrays, base leaves only where they
    trained. variables: base and adapter together, on the devices. summary: what `eval.json` begins
    with.
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
    check_logger(config.train.logger)
    model_config, tokenizer = check_base(config)
    adapter = make_adapter_config(config)
    mesh = make_mesh(config)
    shapes = {
        "params": _abstract_base(config, model_config),
        "adapter": abstract_adapter(model_config, adapter),
    }
    # which no checkpoint can hold
    require(
        not any(leaf.size == 0 for leaf in jax.tree.leaves(shapes["adapter"])),
        f"config.adapter.method={adapter.method!r} reads q, k and v from the second layer on, "
        "and the model has num_hidden_layers=1; use another method",
    )
    trained = trains(config, shapes)
    return Setup(
        model_config=model_config,
        adapter_config=adapter,
        tokenizer=tokenizer,
        mesh=mesh,
        shapes=shapes,
        trained=trained,
        optimizer=make_optimizer(config, shapes, trained),
        placed=shardings(shapes, mesh, model_config, adapter),
    )


def _abstract_base(config: ml_collections.ConfigDict, model_config: LlamaConfig) -> Tree:
    with told_of("config.model"):
        return abstract_base(
            model_config, jnp.dtype(config.model.param_dtype), config.model.quantization
        )


def prepare(
    config: ml_collections.ConfigDict, workdir: str | Path, base: Tree | None = None
) -> Run:
    """Checks all that can be checked without weights, then loads and places them.

    base: the run's, if another has placed it. Raises UserError.
    """
    setup, inputs = together(lambda: _check_all(config, workdir))
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
    # a value that is not finite is met as it is read
    if base is None:
        base = together(lambda: load_base(config, setup.placed["params"]))
    fingerprint = base_fingerprint(base)
    trainable, frozen = partition(_variables(config, setup, base), setup.trained)
    state, placed = _start(config, setup, trainable)
    model = _model(config, setup)
    chunk = config.train.chunk_tokens
    train_step = make_train_step(model, setup.optimizer, config.train.accumulation, chunk)
    eval_step = make_eval_step(model, chunk)
    everywhere = NamedSharding(setup.mesh, P())
    return Run(
        config=config,
        model_config=setup.model_config,
        adapter_config=setup.adapter_config,
        tokenizer=setup.tokenizer,
        inputs=inputs,
        iterator=iterator,
        mesh=setup.mesh,
        model=model,
        frozen=frozen,
        state=state,
        fingerprint=fingerprint,
        compiled_step=jax.jit(train_step, donate_argnums=0, out_shardings=(placed, everywhere)),
        compiled_eval=jax.jit(eval_step, out_shardings=everywhere),
    )


def _check_all(config: ml_collections.ConfigDict, workdir: str | Path) -> tuple[Setup, Inputs]:
    """`check_run`, then the data."""
    setup = check_run(config, workdir)
    inputs = load_inputs(config, setup.tokenizer)
    positions = setup.model_config.max_position_embeddings
    longest = max(len(example.tokens) - 1 for example in (*inputs.train, *inputs.validation))
    require(
        longest <= positions,
        f"config.data.max_length={config.data.max_length} lets in an example of {longest} "
        f"positions, but the model has max_position_embeddings={positions}; lower it (rows "
        "longer than that may be packed of shorter examples)",
    )
    return setup, inputs


def _variables(config: ml_collections.ConfigDict, setup: Setup, base: Tree) -> Tree:
    """The base with an adapter as it starts, made where it lies; none for fft."""
    if not setup.shapes["adapter"]:
        return {"params": base}
    _, key, _ = run_keys(config)
    init = jax.jit(
        lambda k: init_adapter(k, setup.model_config, setup.adapter_config),
        out_shardings=setup.placed["adapter"],
    )
    return {"params": base, "adapter": init(key)}


def _start(
    config: ml_collections.ConfigDict, setup: Setup, trainable: Tree
) -> tuple[TrainState, TrainState]:
    """The state before the first step, and the shardings of its leaves."""
    # What trains is float32 whatever the base is stored in: an update is far below bfloat16's
    # resolution.
    trainable = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable)
    trainable_placed, _ = partition(setup.placed, setup.trained)
    opt_placed = optimizer_shardings(setup.optimizer, trainable, trainable_placed, setup.mesh)
    everywhere = NamedSharding(setup.mesh, P())
    # By jit rather than device_put, which takes no key to the devices of other processes.
    place = jax.jit(lambda key: (jnp.zeros((), jnp.int32), key), out_shardings=everywhere)
    step, key = place(run_keys(config)[2])
    opt_state = jax.jit(setup.optimizer.init, out_shardings=opt_placed)(trainable)
    return (
        TrainState(step, trainable, opt_state, key),
        TrainState(everywhere, trainable_placed, opt_placed, everywhere),
    )


def _model(config: ml_collections.ConfigDict, setup: Setup) -> Llama:
    return Llama(
        setup.model_config,
        setup.adapter_config,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
        remat=config.model.remat,
    )


# -------------------------------------------------------------------------------------------- base


def model_config(config: ml_collections.ConfigDict) -> LlamaConfig:
    """The architecture that a run trains."""
    source = weights_source(config)
    if source == "random":
        return LlamaConfig.preset(config.model.preset)
    return load_config(source)


def check_base(config: ml_collections.ConfigDict) -> tuple[LlamaConfig, Tokenizer]:
    """A run's architecture and tokenizer.

    Raises UserError if they do not fit each other, or weights that are at hand are not whole.
    """
    source = weights_source(config)
    architecture = model_config(config)
    tokenizer = load_tokenizer(source, config.data.template_arguments)
    check_tokenizer(tokenizer, architecture)
    if source != "random":
        check_weights(source)
    return architecture, tokenizer


def load_base(config: ml_collections.ConfigDict, shardings: Tree | None = None) -> Tree:
    """The base's parameters as a run starts from them: loaded, or drawn from its seed."""
    check_jax()
    source = weights_source(config)
    dtype = jnp.dtype(config.model.param_dtype)
    if source == "random":
        base = init_base(run_keys(config)[0], model_config(config), dtype, shardings)
        return quantize_base(base, config.model.quantization)
    placed = None if shardings is None else paths(shardings).__getitem__
    quantization = config.model.quantization
    return load_pretrained(source, dtype, shardings=placed, quantization=quantization)[1]


def run_keys(config: ml_collections.ConfigDict) -> jax.Array:
    """The run's three keys: of a random base, of the adapter's start, of dropout."""
    return jax.random.split(jax.random.key(config.train.seed), 3)
