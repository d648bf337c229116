"""The same function in another form: repeat-and-adds folded into the base, an adapter of a larger
rank, one merged into the base, one as a LoRA. Pure functions of variable trees in the split layout,
leaves stacked [L, …]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.adapters.config import AdapterConfig
from flora_jax.adapters.leaves import Tree, check_adapter, check_base
from flora_jax.adapters.methods import BLOCKS, METHODS, PRODUCTS, Method
from flora_jax.adapters.quantized import dequantize_base
from flora_jax.errors import UserError, require


def folded(
    base: Tree, adapter: Tree, adapter_config: AdapterConfig
) -> tuple[Tree, Tree, AdapterConfig]:
    """Base, adapter and configuration with every repeat-and-add of an ffba folded: into W where z
    is read beside (`W + s rep(A)`), into B where it is added to the block's output (`B` plus
    stacked tilings of the identity)."""
    _check_foldable(adapter_config)
    slots = adapter_config.slots
    layers = jax.tree.map(lambda leaf: leaf, base["layers"])
    trained = jax.tree.map(lambda leaf: leaf, adapter["layers"])
    for block, (inputs, output) in BLOCKS.items():
        kernels = layers[block][inputs]
        for name in slots[inputs].forward:
            if name in slots[inputs].repeat:
                path = f"{name}_kernel"
                leaves = trained[block][inputs]
                kernels[path] = merged_kernel(kernels[path], leaves, adapter_config, name)
        if output in slots[output].repeat:
            B = trained[block][output][f"{output}_B"]
            r = adapter_config.rank
            identity = jnp.tile(jnp.eye(r, dtype=B.dtype), (B.shape[1] // r, B.shape[2] // r))
            trained[block][output][f"{output}_B"] = B + identity
    base = {**base, "layers": layers}
    return base, {"layers": trained}, dataclasses.replace(adapter_config, add_to=())


def _check_foldable(adapter_config: AdapterConfig) -> None:
    def foldable(row: Method) -> bool:
        return row.adds == "repeat" and row.writes == "block"

    able = ", ".join(name for name, row in METHODS.items() if foldable(row))
    require(
        foldable(adapter_config.row),
        f"fold_adds: {adapter_config.method} has no adds beside a path around the block; {able} "
        "have",
    )
    slots = adapter_config.slots
    for inputs, output in BLOCKS.values():
        require(
            bool(slots[output].backward) or not slots[inputs].forward,
            "fold_adds: no z would reach anything but W, since adapter.targets="
            f"{','.join(adapter_config.targets)} leave {output!r} out; serve it without",
        )


def widen(adapter: Tree, adapter_config: AdapterConfig, rank: int) -> tuple[Tree, AdapterConfig]:
    """The same function at a larger rank, so that adapters of several ranks share a bank.

    New rows of B are zeros. New channels of A are zeros too, or, for a method that repeats z,
    copies of the old ones, since the tiling's period grows: `rank` must then be a multiple of the
    adapter's. Raises UserError otherwise.
    """
    r = adapter_config.rank
    row = adapter_config.row
    repeats = row.adds == "repeat"
    need = (
        f"a multiple of {r}, since {adapter_config.method} tiles z" if repeats else f"at least {r}"
    )
    require(
        rank >= r and not (repeats and rank % r),
        f"an adapter of rank {r} cannot be widened to rank {rank}; it must be {need}",
    )

    def grown(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> jax.Array:
        is_A = path[-1].key == "A"
        axis = leaf.ndim - (1 if is_A else 2)
        pieces = jnp.split(leaf, leaf.shape[axis] // r, axis=axis)
        if is_A and repeats:
            wide = [piece for piece in pieces for _ in range(rank // r)]
        else:
            shape = (*leaf.shape[:axis], rank - r, *leaf.shape[axis + 1 :])
            room = jnp.zeros_like(leaf, shape=shape)
            wide = [part for piece in pieces for part in (piece, room)]
        return jnp.concatenate(wide, axis=axis)

    alpha = adapter_config.scale * (rank**0.5 if adapter_config.rslora else rank)
    wide_config = dataclasses.replace(adapter_config, rank=rank, alpha=alpha)
    return jax.tree_util.tree_map_with_path(grown, adapter), wide_config


def merge(base: Tree, adapter: Tree, config: Any, adapter_config: AdapterConfig) -> Tree:
    """The base with the adapter's change of W added in: a bare Llama that computes what both did.

    base, adapter: the `params` and `adapter` trees, leaves stacked `[L, …]`. lora and pf_lora:
    `W + s A B`; ffa: `W + s rep(A)`; a piece of A `[L, d_in, r]`, B `[L, r, d_out]`. Sums are taken
    in float32 and cast once to the kernel's dtype; leaves without an adapter are passed on as they
    are, those of a quantised base as what its codes stand for. Raises UserError (a ValueError) for
    a method that is no change of W, and for an adapter of another configuration.
    """
    row = adapter_config.row
    if not row.mergeable:
        able = ", ".join(name for name, other in METHODS.items() if other.mergeable)
        why = "its base is the result already" if row.reads is None else "it is no change of W"
        raise UserError(
            f"{adapter_config.method} cannot be merged into the base: {why}; {able} can"
        )
    check_base(base, config)
    check_adapter(adapter, config, adapter_config)
    base = dequantize_base(base)
    layers = dict(base["layers"])
    for block, products in BLOCKS.items():
        layers[block] = dict(layers[block])
        for product in products:
            kernels = layers[block][product] = dict(layers[block][product])
            for name in adapter_config.slots[product].forward:
                leaves = adapter["layers"][block][product]
                kernels[f"{name}_kernel"] = merged_kernel(
                    kernels[f"{name}_kernel"], leaves, adapter_config, name
                )
    return {**base, "layers": layers}


def merged_kernel(
    kernel: jax.Array,
    leaves: Mapping[str, jax.Array],
    adapter_config: AdapterConfig,
    projection: str,
) -> jax.Array:
    """`W + s A B` or `W + s rep(A)` of one projection, in the kernel's dtype: kernel
    `[…, d_in, d_out]` and the adapter leaves of its product, of all layers or of one. Sums are
    taken in float32 and cast once."""
    slot = next(
        slot for product, slot in adapter_config.slots.items() if projection in PRODUCTS[product]
    )
    r = adapter_config.rank
    start = slot.forward.index(projection) * r
    change = leaves["A"][..., start : start + r]
    if projection in slot.matrix:
        change = jnp.matmul(change, leaves[f"{projection}_B"], precision=jax.lax.Precision.HIGHEST)
    else:
        change = jnp.tile(change, kernel.shape[-1] // r)
    return (kernel.astype(jnp.float32) + adapter_config.scale * change).astype(kernel.dtype)


def as_lora(
    adapter: Tree, config: Any, adapter_config: AdapterConfig
) -> tuple[Tree, AdapterConfig]:
    """The same function as a `lora`: a lora or pf_lora as it is, an ffa with the fixed tiling
    `[I I … I]` as its B's. Raises UserError for a method that is no change of W, and for an adapter
    of another configuration."""
    row = adapter_config.row
    if not row.mergeable:
        why = "it has no adapter" if row.reads is None else "it is no change of W"
        raise UserError(f"{adapter_config.method} is no LoRA: {why}")
    check_adapter(adapter, config, adapter_config)
    layers: Tree = {}
    for block, products in BLOCKS.items():
        for product in products:
            for name in adapter_config.slots[product].forward:
                leaves = layers.setdefault(block, {}).setdefault(
                    product, dict(adapter["layers"][block][product])
                )
                if row.adds == "repeat":
                    shape = (adapter_config.rank, config.widths[name][1])
                    tiling = jnp.tile(
                        jnp.eye(shape[0], dtype=leaves["A"].dtype), shape[1] // shape[0]
                    )
                    leaves[f"{name}_B"] = jnp.broadcast_to(
                        tiling, (config.num_hidden_layers, *shape)
                    )
    return {"layers": layers}, dataclasses.replace(adapter_config, method="lora", add_to=())
