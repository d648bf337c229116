"""The baselines of a measurement: an unmerged adapter beside the four or seven products of a layer.

Its A and B are products of their own, as in PEFT and multi-LoRA servers.

    layers/<i>/<block>/<product>/kernel [d_in, d_out]                 merged
    layers/<i>/<block>/<product>/<projection>_kernel [d_in, width]    seven
    layers/<i>/<block>/<product>/<piece>_A [d_in, r], <projection>_B [r, width], bias [d_out]

In a transposed layout all of these but the bias are transposed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import (
    PRODUCTS,
    AdapterConfig,
    FusedDense,
    Layout,
    Slot,
    Tree,
    adapt,
    check_base,
    each_layer,
    has_adapter,
    join,
    own_pieces,
    parts_of,
)
from flora_jax.adapters.config import ACTIVATIONS
from flora_jax.errors import UserError


class UnmergedDense(FusedDense):
    """FusedDense over the leaves of `unmerge`: one product of the base, and the adapter's own."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        z: jax.Array | None = None,
        *,
        select: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[list[jax.Array], jax.Array | None]:
        leaves = {name: leaf.astype(x.dtype) for name, leaf in self.variables["params"].items()}
        ys = self._base(x, leaves)
        if self.use_bias:
            widths = [self.widths[name][1] for name in self.names]
            biases = jnp.split(leaves["bias"], np.cumsum(widths)[:-1])
            ys = [y + bias for y, bias in zip(ys, biases, strict=True)]
        if not self.layout.adapters:
            return ys, None
        z_out = None
        own: dict[str, jax.Array] = {}
        if self.slot.forward:
            read = [self.times(x, leaves[f"{piece}_A"]) for piece in self.slot.forward]
            z_out = ACTIVATIONS[self.adapter.activation](jnp.concatenate(read, axis=-1))
            own = own_pieces(z_out, self.slot.forward, self.adapter.rank)
        return adapt(ys, self.names, self.slot, leaves, own, self.incoming(z), self.times), z_out

    def _base(self, x: jax.Array, leaves: Tree) -> list[jax.Array]:
        widths = [self.widths[name][1] for name in self.names]
        return jnp.split(self.times(x, leaves["kernel"]), np.cumsum(widths)[:-1], axis=-1)


class SevenDense(UnmergedDense):
    """UnmergedDense with one product for each of the base's projections, as they are published."""

    def _base(self, x: jax.Array, leaves: Tree) -> list[jax.Array]:
        return [self.times(x, leaves[f"{name}_kernel"]) for name in self.names]


def unmerge(
    base: Tree,
    adapter: Tree | None,
    config: Any,
    adapter_config: AdapterConfig | None,
    *,
    seven: bool = False,
    transposed: bool = False,
) -> Tree:
    """The baseline's tree from split trees, for `Llama(…, dense=UnmergedDense)`.

    seven: seven products a layer, for `dense=SevenDense`. Raises UserError for zflora, whose
    channels exist only in the fused stream.
    """
    check_base(base, config)
    layout = Layout(kind="unmerged", adapters=0, transposed=transposed)
    parts: Tree = {}
    if has_adapter(adapter_config):
        if adapter_config.row.writes == "stream":
            raise UserError(f"{adapter_config.method} has no products apart; fuse it")
        layout = dataclasses.replace(layout, adapters=1, rank=adapter_config.rank)
        parts = parts_of(adapter, config, adapter_config)

    def product(i: int, block: str, name: str) -> Tree:
        leaves = {path: leaf[i] for path, leaf in base["layers"][block][name].items()}
        out = _base_leaves(leaves, PRODUCTS[name], seven)
        for path, leaf in parts.get(block, {}).get(name, {}).items():
            dtype = base["embed_tokens"]["embedding"].dtype
            out |= _apart(path, leaf[i].astype(dtype), adapter_config.slots[name])
        if not transposed:
            return out
        # A bias has one axis, and .T leaves it as it is.
        return {path: leaf.T for path, leaf in out.items()}

    layers = dict(each_layer(base, config, product, config.hidden_size))
    return layout.mark({**base, "layers": layers})


def _base_leaves(leaves: Tree, names: tuple[str, ...], seven: bool) -> Tree:
    """The leaves of a product of the base, whole or by projection."""
    kernels = {f"{name}_kernel": leaves[f"{name}_kernel"] for name in names}
    if seven:
        out = {path: join([kernel]) for path, kernel in kernels.items()}
    else:
        out = {"kernel": join(list(kernels.values()))}
    if f"{names[0]}_bias" in leaves:
        out["bias"] = jnp.concatenate([leaves[f"{name}_bias"] for name in names])
    return out


def _apart(path: str, leaf: jax.Array, slot: Slot) -> Tree:
    """One of an adapter's parts in one layer, under the names that UnmergedDense reads."""
    if path == "columns":
        pieces = jnp.split(leaf, len(slot.forward), axis=-1)
        return {f"{piece}_A": A for piece, A in zip(slot.forward, pieces, strict=True)}
    if path == "rows":
        return {f"{slot.backward[0]}_B": leaf}
    return {path: leaf}
