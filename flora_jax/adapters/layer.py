"""FusedDense: one of a layer's products, with the adapter that rides in it.

B, T as everywhere; R_f forward channels (pieces of `rank` side by side), R_b backward channels, N
adapters side by side.

On one shape, `ffba` at rank 8 in the attention block of a model with D = 96, Q = 96, K * H = 32:

    qkv:  x [B, T, 96]  ->  z = s · x A,  A [96, 24],  z = (zq | zk | zv) [B, T, 24]
          q [B, T, 96] += rep(zq), k [B, T, 32] += rep(zk), v [B, T, 32] += rep(zv)
    o:    attn [B, T, 96], z [B, T, 24]  ->  attn · W + z · B,  B [24, 96]

In the `split` layout (training) base kernels live in the collection `params` under the paths they
have without an adapter, the adapter's leaves in the collection `adapter` beside them. In the
`fused` layout (serving; fusing.py makes it) one array does both, in `params`:

    qkv:  kernel [96, 96 + 32 + 32 + 24] = [Wq | Wk | Wv | s · A]     x · kernel = (q | k | v | z)
    o:    kernel [96 + 24, 96] = [W ; B]                              (attn | z) · kernel

or, on a device that reads them faster transposed, `weight [d_out, d_in]` in place of `kernel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from flora_jax.adapters.config import ACTIVATIONS, AdapterConfig, Slot
from flora_jax.adapters.layouts import SPLIT, Layout, Widths
from flora_jax.adapters.leaves import Leaf, adapter_leaves, product_leaves
from flora_jax.adapters.methods import PRODUCTS
from flora_jax.adapters.products import (
    is_sum,
    keep_own,
    multiply,
    multiply_transposed,
    project,
    repeat_and_add,
)
from flora_jax.adapters.quantized import Quantized, Scaled, multiply_quantized
from flora_jax.errors import require

# jax.checkpoint's name for the outputs of a FusedDense, adapter included.
SAVED = "product"


def joined(pieces: jax.Array) -> jax.Array:
    """Pieces `[…, n, r]` side by side, `[…, n r]`."""
    return pieces.reshape(*pieces.shape[:-2], -1)


def own_pieces(z: jax.Array, names: Sequence[str], rank: int) -> dict[str, jax.Array]:
    """The pieces by name, `[…, N, r]`, of z `[…, N · P · r]`, which holds the P pieces of each of
    N adapters."""
    z = z.reshape(*z.shape[:-1], -1, len(names), rank)
    pieces = jnp.split(z, len(names), axis=-2)
    return {name: piece.squeeze(-2) for name, piece in zip(names, pieces, strict=True)}


def adapt(
    ys: Sequence[jax.Array],
    names: Sequence[str],
    slot: Slot,
    leaves: Mapping[str, jax.Array],
    own: Mapping[str, jax.Array],
    incoming: jax.Array | None,
    times: Callable[[jax.Array, jax.Array], jax.Array],
) -> list[jax.Array]:
    """What the projections `names` gave, `ys` `[…, d_out]`, with what the adapter adds to each.

    slot says what: a piece of z through a B of its own, the incoming z through rows B, and
    repeat-and-add. own: the pieces read beside them, by name `[…, N, r]`; incoming: those read
    before, `[…, n, r]`; leaves: `<projection>_B`; times: `(z, B)` to their product.
    """
    out = []
    for name, y in zip(names, ys, strict=True):
        if name in slot.matrix:
            y = y + times(joined(own[name]), leaves[f"{name}_B"])
        if name in slot.backward:
            y = y + times(joined(incoming), leaves[f"{name}_B"])
        if name in slot.repeat:
            y = repeat_and_add(y, own.get(name, incoming).sum(-2))
        out.append(y)
    return out


def _times_base(x: jax.Array, kernel: jax.Array | Quantized) -> jax.Array:
    """`x W` in x's dtype."""
    if isinstance(kernel, Quantized):
        return multiply_quantized(x, kernel)
    return project(x, kernel.astype(x.dtype))


class FusedDense(nn.Module):
    """`x [..., D_in]` and, where rows B ride, `z [..., R_b]` to `(ys, z_out)`.

    ys: one array per projection of the product, `[..., d_out]`. z_out: `act(x A)`, `[..., R_f]`, or
    None, scaled by s (in the fused layout: where s is in A). Arithmetic is in x's dtype; leaves are
    cast where they are used.

    Fused, with `select` `[B, N]` bool, the arrays hold a bank of N adapters side by side: z is N
    times as wide, and of each row only the channels of its own adapter are kept. zflora's product
    reads the stream `[x | z]` as one x, rows B and all, and writes it as one y.

    Attributes: product, a name of PRODUCTS; widths, (d_in, d_out) by projection; adapter, None for
    the bare base; use_bias, whether the base projections have one; param_dtype of the base; layout
    of the leaves.
    """

    product: str
    widths: Widths
    adapter: AdapterConfig | None = None
    use_bias: bool = False
    param_dtype: Any = jnp.float32
    layout: Layout = SPLIT

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        z: jax.Array | None = None,
        *,
        select: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[list[jax.Array], jax.Array | None]:
        if self.layout.kind == "fused":
            return self._fused(x, z, select)
        ys, z_out = self._split(x, z, deterministic)
        return checkpoint_name(ys, SAVED), z_out

    @property
    def names(self) -> tuple[str, ...]:
        """The projections."""
        return PRODUCTS[self.product]

    @property
    def slot(self) -> Slot:
        """What the adapter puts here."""
        return Slot() if self.adapter is None else self.adapter.slots[self.product]

    # ---------------------------------------------------------------------------------------- split

    def _split(
        self, x: jax.Array, z: jax.Array | None, deterministic: bool
    ) -> tuple[list[jax.Array], jax.Array | None]:
        """The product over base kernels and adapter leaves apart."""
        declared = product_leaves(self.widths, self.product, self.use_bias)
        base = {name: self._base_leaf(name, leaf) for name, leaf in declared.items()}
        ys = [_times_base(x, base[f"{name}_kernel"]) for name in self.names]
        if self.use_bias:
            biases = [base[f"{name}_bias"].astype(x.dtype) for name in self.names]
            ys = [y + bias for y, bias in zip(ys, biases, strict=True)]
        if self.adapter is None:
            return ys, None
        adapter = self.adapter
        slot = self.slot
        declared = adapter_leaves(adapter, self.product, self.widths)
        leaves = {name: self._leaf(name, leaf).astype(x.dtype) for name, leaf in declared.items()}
        z_out = None
        own: dict[str, jax.Array] = {}
        if slot.forward:
            dropout = nn.Dropout(adapter.dropout, rng_collection="dropout")
            read = project(dropout(x, deterministic=deterministic), leaves["A"])
            z_out = checkpoint_name(adapter.scale * ACTIVATIONS[adapter.activation](read), SAVED)
            own = own_pieces(z_out, slot.forward, adapter.rank)
        return adapt(ys, self.names, slot, leaves, own, self.incoming(z), project), z_out

    def _base_leaf(self, name: str, leaf: Leaf) -> jax.Array | Quantized:
        value = self.get_variable("params", name)
        # which `param` would take for a leaf of another shape
        if isinstance(value, Quantized):
            return value
        return self.param(name, leaf.init, leaf.shape, self.param_dtype)

    def _leaf(self, name: str, leaf: Leaf) -> jax.Array:
        def init() -> jax.Array:
            return leaf.init(self.make_rng("params"), leaf.shape, jnp.float32)

        value = self.variable("adapter", name, init).value
        require(
            value.shape == leaf.shape,
            f"adapter leaf {self.name}/{name} has shape {value.shape}, expected {leaf.shape}",
        )
        return value

    def incoming(self, z: jax.Array | None) -> jax.Array | None:
        """z `[…, n r]` as pieces `[…, n, r]`."""
        return None if z is None else z.reshape(*z.shape[:-1], -1, self.adapter.rank)

    # ---------------------------------------------------------------------------------------- fused

    def _fused(
        self, x: jax.Array, z: jax.Array | None, select: jax.Array | None
    ) -> tuple[list[jax.Array], jax.Array | None]:
        """The product over the one array of fusing.py, with what rides in it."""
        slot = self.layout.slot(self.adapter, self.product)
        leaves = {name: leaf.astype(x.dtype) for name, leaf in self.variables["params"].items()}
        y = self._product(x, z, leaves[self.layout.matrix])
        if slot.forward and self.adapter.row.writes == "stream":
            return [self._stream(y, leaves, select)], None
        edges = np.cumsum([self.widths[name][1] for name in self.names])
        *ys, riding = jnp.split(y, edges, axis=-1)
        if self.use_bias:
            biases = jnp.split(leaves["bias"], edges[:-1])
            ys = [y + bias for y, bias in zip(ys, biases, strict=True)]
        if not self.layout.adapters:
            return ys, None
        z_out = None
        own: dict[str, jax.Array] = {}
        if slot.forward:
            z_out = ACTIVATIONS[self.adapter.activation](riding)
            if select is not None:
                z_out = keep_own(z_out, 0, self.adapter.rank * len(slot.forward), select)
            own = own_pieces(z_out, slot.forward, self.adapter.rank)
        slot = dataclasses.replace(slot, backward=())  # rows B have been read with the array
        return adapt(ys, self.names, slot, leaves, own, self.incoming(z), self.times), z_out

    @property
    def times(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The product of rows with a served array."""
        return multiply_transposed if self.layout.transposed else multiply

    def _product(self, x: jax.Array, z: jax.Array | None, kernel: jax.Array) -> jax.Array:
        """x, with the incoming z behind it where rows B ride, times the array, whatever fills up
        its rows."""
        slot = self.layout.slot(self.adapter, self.product)
        inputs = [x, z] if slot.backward and z is not None else [x]
        rows = sum(part.shape[-1] for part in inputs)
        filled, columns = kernel.shape[::-1] if self.layout.transposed else kernel.shape
        if filled > rows:
            if not self.layout.transposed and is_sum(x, rows, columns):
                # GEMMs want rows in blocks; a sum over more rows might be written out
                quantised = isinstance(kernel, Scaled)
                kernel = kernel.corner(rows, columns) if quantised else kernel[:rows]
            else:
                inputs.append(jnp.zeros((*x.shape[:-1], filled - rows), x.dtype))
        return self.times(jnp.concatenate(inputs, axis=-1) if len(inputs) > 1 else x, kernel)

    def _stream(
        self, y: jax.Array, leaves: Mapping[str, jax.Array], select: jax.Array | None
    ) -> jax.Array:
        """What a product writes to zflora's stream, `[D | N r]`: of each row its own adapter's
        channels."""
        width = sum(self.widths[name][1] for name in self.names)
        if self.use_bias:
            y = y + jnp.pad(leaves["bias"], (0, y.shape[-1] - width))
        return y if select is None else keep_own(y, width, self.adapter.rank, select)
