"""A layer's decode step on a GPU in six launches: its products with all that is around them.

    norm, qkv              decode_product
    adds, rotary, cache    decode_attention, and the sum over its parts
    o, residual            decode_product
    norm, gate and up      decode_product
    adds, silu · up, down, residual    decode_product

Forward adapters are columns of the arrays and backward adapters rows, so they are no launch; what
is repeat-and-added is added where it is read. What no kernel takes in is left to XLA, in launches
of its own: products with a matrix B of LoRA's, pieces that are added to the output of their own
product (ffa's of o and down), an activation on z, and the choice of a bank's adapters.

Axis letters as in llama.py; W the width of the residual stream, with zflora's channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import (
    ACTIVATIONS,
    PRODUCTS,
    AdapterConfig,
    Layout,
    adapt,
    keep_own,
    multiply,
    own_pieces,
)
from flora_jax.models.config import LlamaConfig
from flora_jax.models.decode_attention import decode_attention
from flora_jax.models.decode_product import Behind, Columns, Gated, Normed, Read, decode_product

Leaves = Mapping[str, Any]
Past = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Riding:
    """What an adapter's forward columns gave: all of z, and each piece's sum over the adapters."""

    z: Columns
    pieces: Mapping[str, Columns]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeLayer:
    """One token a row through one layer of a fused model.

    adapter: None for the bare base; layout: of the leaves, fused and not transposed; select `[B,
    N]` bool: which of a bank's adapters each row uses. interpret: of the kernels.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None
    layout: Layout
    select: jax.Array | None = None
    interpret: bool = False

    def __call__(
        self,
        leaves: Leaves,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        seen: jax.Array,
        past: Past,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The stream `[B, W]` behind the layer, and the cache's `(k, v)`.

        leaves: the layer's; x `[B, W]`; rotary, seen, past: as `decode_attention` takes them.
        """
        with jax.named_scope("attention"):
            qkv, riding = self._read("qkv", leaves["attention"], leaves["attention_norm"], x)
            out, present = decode_attention(
                qkv,
                rotary,
                seen,
                past,
                self.config.num_attention_heads,
                norms=self._head_norms(leaves),
                eps=self.config.rms_norm_eps,
                scale=self.config.attention_scale,
                adds=self._adds("qkv", riding),
                interpret=self.interpret,
            )
            x = self._write("o", leaves["attention"], out, riding, x)
        with jax.named_scope("mlp"):
            y, riding = self._read("gate_up", leaves["mlp"], leaves["mlp_norm"], x)
            gated = Gated(y, self.config.intermediate_size, *self._adds("gate_up", riding))
            x = self._write("down", leaves["mlp"], gated, riding, x)
        return x, present

    def _head_norms(self, leaves: Leaves) -> tuple[jax.Array, jax.Array] | None:
        if not self.config.qk_norm:
            return None
        return leaves["q_norm"]["scale"], leaves["k_norm"]["scale"]

    def _product(
        self, read: Read, leaves: Leaves, rows: Columns | None = None, **behind: Any
    ) -> jax.Array:
        behind = Behind(bias=leaves.get("bias"), **behind)
        return decode_product(read, leaves["kernel"], rows, behind, self.interpret)

    def _read(
        self, product: str, leaves: Leaves, norm: Leaves, x: jax.Array
    ) -> tuple[jax.Array, _Riding | None]:
        """What qkv or gate_up gives of the normed stream, with what its pieces return by a matrix;
        and what its pieces are."""
        width = self.config.hidden_size
        normed = Normed(x, norm["scale"], width, self.config.rms_norm_eps)
        y = self._product(normed, leaves[product])
        riding = self._riding(product, y)
        if self.layout.slot(self.adapter, product).matrix:
            return jnp.concatenate(self._adapted(product, leaves[product], y, riding), -1), riding
        return y, riding

    def _write(
        self, product: str, leaves: Leaves, read: Read, incoming: _Riding | None, x: jax.Array
    ) -> jax.Array:
        """The stream with what o or down writes to it."""
        slot = self.layout.slot(self.adapter, product)
        factor = self.config.residual_multiplier
        rows = incoming.z if slot.backward and incoming is not None else None
        stream = self.layout.adapters and self.adapter.row.writes == "stream"
        if (stream and self.select is None) or not slot.forward:
            adds = ()
            if slot.repeat:
                adds = tuple(incoming.pieces.values())
            return self._product(read, leaves[product], rows, adds=adds, factor=factor, residual=x)
        y = self._product(read, leaves[product], rows)
        if stream:
            width = self.config.hidden_size
            y = keep_own(y[:, None], width, self.adapter.rank, self.select)[:, 0]
        else:
            [y] = self._adapted(product, leaves[product], y, self._riding(product, y))
        return x + y * factor

    def _edges(self, product: str) -> Sequence[int]:
        """Where each projection of a product ends among its columns."""
        return np.cumsum([self.config.widths[name][1] for name in PRODUCTS[product]])

    def _riding(self, product: str, y: jax.Array) -> _Riding | None:
        """The forward pieces among the columns of `y`; None where none ride."""
        names = self.layout.slot(self.adapter, product).forward
        if not names or self.adapter.row.writes == "stream":
            return None
        start = int(self._edges(product)[-1])
        rank = self.adapter.rank
        width = self.layout.adapters * rank * len(names)
        z = Columns(y, start, width)
        activation = self.adapter.activation
        summed = z
        if self.select is not None or activation != "identity":
            own = ACTIVATIONS[activation](y[:, start : start + width])
            if self.select is not None:
                own = keep_own(own[:, None], 0, rank * len(names), self.select)[:, 0]
            z = Columns(own, 0, width)
            by_adapter = own.reshape(len(own), self.layout.adapters, -1)
            summed = Columns(by_adapter.sum(1), 0, rank * len(names))
        pieces = {
            name: Columns(summed.array, summed.start + i * rank, rank)
            for i, name in enumerate(names)
        }
        return _Riding(z=z, pieces=pieces)

    def _adds(self, product: str, riding: _Riding | None) -> list[Columns | None]:
        """What is repeat-and-added to each projection of qkv or gate_up by whoever reads it."""
        slot = self.layout.slot(self.adapter, product)
        return [riding.pieces[name] if name in slot.repeat else None for name in PRODUCTS[product]]

    def _adapted(
        self, product: str, leaves: Leaves, y: jax.Array, riding: _Riding
    ) -> list[jax.Array]:
        """The projections with what their own pieces add to them, by XLA."""
        slot = dataclasses.replace(self.layout.slot(self.adapter, product), backward=())
        z = riding.z.array[:, riding.z.start : riding.z.start + riding.z.width]
        own = own_pieces(z, slot.forward, self.adapter.rank)
        edges = self._edges(product)
        ys = jnp.split(y[:, : edges[-1]], edges[:-1], axis=-1)
        return adapt(ys, PRODUCTS[product], slot, leaves, own, None, multiply)
