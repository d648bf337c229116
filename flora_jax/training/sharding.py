"""The placement of arrays: a mesh with the axes (data, fsdp, tensor), and one table of path rules.

Batches are split over data and fsdp. A weight is split over fsdp along the model width, and over
tensor along its heads or ffn channels. Adapters are small and split over fsdp alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flora_jax.adapters import AdapterConfig
from flora_jax.errors import UserError, require
from flora_jax.models.config import LlamaConfig
from flora_jax.training.rules import decide, paths, tree

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


def make_mesh(config: ml_collections.ConfigDict, devices: list[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh` over `devices`, by default all.

    Raises UserError unless the axes multiply to their number, and where the batch or the processes
    do not divide.
    """
    if devices is None:
        devices = jax.devices()
    sizes = [config.mesh[axis] for axis in AXES]
    require(
        sizes.count(-1) <= 1,
        f"config.mesh: only one axis may be -1, but data,fsdp,tensor={','.join(map(str, sizes))}",
    )
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    require(
        math.prod(sizes) == len(devices),
        f"config.mesh data,fsdp,tensor={','.join(map(str, sizes))} does not fit "
        f"{len(devices)} device(s): the axes must multiply to that number",
    )
    require(
        sizes[0] * sizes[1] % jax.process_count() == 0,
        f"config.mesh data x fsdp = {sizes[0] * sizes[1]} must be a multiple of "
        f"{jax.process_count()} processes, since each feeds rows of its own; keep the tensor "
        "axis within one process",
    )
    rows = config.train.batch_size // config.train.accumulation
    require(
        rows % (sizes[0] * sizes[1]) == 0,
        f"config.train.batch_size={config.train.batch_size} in {config.train.accumulation} "
        f"micro-batch(es) of {rows} rows does not split over data x fsdp = "
        f"{sizes[0] * sizes[1]} devices",
    )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def sharding_rules(config: LlamaConfig, adapter: AdapterConfig) -> list[tuple[str, P]]:
    """The mesh axes of every leaf of a model with this configuration; leaves of layers begin with
    L."""
    rules = [
        (r"params/embed_tokens/embedding", P("tensor", "fsdp")),
        (r"params/.*norm/scale", P()),
        (r"params/layers/.*/(q|k|v|gate|up)_kernel", P(None, "fsdp", "tensor")),
        (r"params/layers/.*/(o|down)_kernel", P(None, "tensor", "fsdp")),
    ]
    if config.biases:
        rules.append((r"params/layers/.*_bias", P()))
    if not config.tie_word_embeddings:
        rules.append((r"params/lm_head/kernel", P("fsdp", "tensor")))
    slots = adapter.slots.values()
    if any(slot.forward for slot in slots):
        rules.append((r"adapter/layers/.*/A", P(None, "fsdp", None)))
    if any(slot.matrix or slot.backward for slot in slots):
        rules.append((r"adapter/layers/.*_B", P(None, None, "fsdp")))
    return rules


def shardings(
    variables: Mapping[str, Any], mesh: Mesh, config: LlamaConfig, adapter: AdapterConfig
) -> dict[str, Any]:
    """A NamedSharding for each leaf of the variables (arrays or shapes, `params` and `adapter`).

    Raises UserError for a mesh axis that does not divide an axis of a leaf.
    """
    leaves = paths(variables)
    specs = decide(sharding_rules(config, adapter), list(leaves), "sharding rules")
    for name, spec in specs.items():
        for axis, (size, mesh_axis) in enumerate(zip(leaves[name].shape, spec, strict=False)):
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise UserError(
                    f"config.mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide axis {axis} "
                    f"({size}) of {name}; choose a mesh axis that does"
                )
    return tree({name: NamedSharding(mesh, spec) for name, spec in specs.items()})


def optimizer_shardings(
    optimizer: optax.GradientTransformation,
    trainable: Mapping[str, Any],
    leaf_shardings: Mapping[str, Any],
    mesh: Mesh,
) -> Any:
    """The shardings of the optimizer's state: a moment's is its leaf's, and the rest is on all
    devices."""
    state = jax.eval_shape(optimizer.init, trainable)
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        leaf_shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch, split over data and fsdp, from this process's rows.

    Leaves `[B / processes, T]` become `[B, T]`.
    """
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
