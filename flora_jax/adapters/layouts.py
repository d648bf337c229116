"""From one layout of the weights to another, by pure functions of variable trees."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from flora_jax.adapters.config import AdapterConfig
from flora_jax.adapters.layer import check_adapter
from flora_jax.adapters.methods import BLOCKS, METHODS
from flora_jax.errors import UserError

Tree = dict[str, Any]


def merge(base: Tree, adapter: Tree, config: Any, adapter_config: AdapterConfig) -> Tree:
    """The base with the adapter's change of W added in: a bare Llama that computes what both did.

    base, adapter: the `params` and `adapter` trees, leaves stacked `[L, …]`. lora and pf_lora: `W + s A B`; ffa:
    `W + s rep(A)`; a piece of A `[L, d_in, r]`, B `[L, r, d_out]`. Sums are taken in float32 and cast once to the
    kernel's dtype; leaves without an adapter are passed on as they are. Raises UserError (a ValueError) for a method
    that is no change of W, and for an adapter of another configuration.
    """
    row = adapter_config.row
    if not row.mergeable:
        able = ", ".join(name for name, other in METHODS.items() if other.mergeable)
        raise UserError(f"{adapter_config.method} cannot be merged into the base: it is no change of W; {able} can")
    check_adapter(adapter, config, adapter_config)
    layers = dict(base["layers"])
    for block, products in BLOCKS.items():
        layers[block] = dict(layers[block])
        for product in products:
            slot = adapter_config.slots[product]
            leaves = adapter["layers"].get(block, {}).get(product, {})
            kernels = layers[block][product] = dict(layers[block][product])
            for i, name in enumerate(slot.forward):
                kernel = kernels[f"{name}_kernel"]
                r = adapter_config.rank
                change = leaves["A"][..., i * r : (i + 1) * r]
                if name in slot.matrix:
                    change = change @ leaves[f"{name}_B"]
                else:
                    change = jnp.tile(change, kernel.shape[-1] // r)
                merged = kernel.astype(jnp.float32) + adapter_config.scale * change
                kernels[f"{name}_kernel"] = merged.astype(kernel.dtype)
    return {**base, "layers": layers}
