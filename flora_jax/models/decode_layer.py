"""A layer's decode step on a GPU in six launches: its products with all that is around them.

    norm, qkv                          decode_product
    adds, rotary, cache, attention     decode_attention, and the sum over its parts
    o, residual                        decode_product
    norm, gate and up                  decode_product
    adds, silu · up, down, residual    decode_product

Forward adapters are columns of the arrays and backward adapters rows, so they are no launch; what
is repeat-and-added is added where it is read. LoRA's matrices B are another launch for each
product, and so are ffa's pieces of o and down in a bank. An activation on z and the choice of a
bank's adapters are left to XLA.

Axis letters as in llama.py; W the width of the residual stream, with zflora's channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flora_jax.adapters import (
    ACTIVATIONS,
    PRODUCTS,
    AdapterConfig,
    Layout,
    keep_own,
    own_pieces,
)
from flora_jax.models.config import LlamaConfig
from flora_jax.models.decode_attention import decode_attention
from flora_jax.models.decode_product import (
    Behind,
    Columns,
    Gated,
    Normed,
    Read,
    Term,
    decode_product,
)

Leaves = Mapping[str, Any]
Past = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Riding:
    """What an adapter's forward columns gave: all of z, each piece of all adapters side by side
    (`joined`), and each piece's sum over them (`summed`)."""

    z: Columns
    joined: Mapping[str, Columns]
    summed: Mapping[str, Columns]


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

    def _product(self, terms: Sequence[Term], columns: int, **behind: Any) -> jax.Array:
        return decode_product(terms, columns, Behind(**behind), self.interpret)

    def _read(
        self, product: str, leaves: Leaves, norm: Leaves, x: jax.Array
    ) -> tuple[jax.Array, _Riding | None]:
        """What qkv or gate_up gives of the normed stream, with what its pieces return by a matrix;
        and what its pieces are."""
        kernel = leaves[product]["kernel"]
        width = self.config.hidden_size
        normed = Normed(x, norm["scale"], width, self.config.rms_norm_eps)
        bias = leaves[product].get("bias")
        y = self._product([Term(normed, kernel)], kernel.shape[1], bias=bias)
        riding = self._riding(product, y)
        terms = self._matrices(product, leaves[product], riding)
        if terms:
            width = int(self._edges(product)[-1])
            y = self._product(terms, width, adds=(Columns(y, 0, width),))
        return y, riding

    def _write(
        self, product: str, leaves: Leaves, read: Read, incoming: _Riding | None, x: jax.Array
    ) -> jax.Array:
        """The stream with what o or down writes to it."""
        slot = self.layout.slot(self.adapter, product)
        kernel = leaves[product]["kernel"]
        bias = leaves[product].get("bias")
        behind = {"factor": self.config.residual_multiplier, "residual": x}
        terms = [Term(read, kernel)]
        if slot.backward and incoming is not None:
            terms.append(Term(incoming.z, kernel, row=self.config.widths[product][0]))
        stream = self.layout.adapters and self.adapter.row.writes == "stream"
        if stream and self.select is not None:
            y = self._product(terms, kernel.shape[1], bias=bias)
            y = keep_own(y[:, None], self.config.hidden_size, self.adapter.rank, self.select)
            return x + y[:, 0] * self.config.residual_multiplier
        if stream or not slot.forward:
            adds = tuple(incoming.summed.values()) if slot.repeat else ()
            return self._product(terms, kernel.shape[1], bias=bias, adds=adds, **behind)
        if slot.repeat and self.select is None:
            # ffa: each program computes what it adds, too, from the few columns that all read.
            start = self.config.hidden_size
            own = Term(read, kernel, repeat=(start, self.adapter.rank))
            return self._product([*terms, own], start, bias=bias, **behind)
        # Its own pieces return to it: all of it has to be there first.
        y = self._product(terms, kernel.shape[1], bias=bias)
        riding = self._riding(product, y)
        adds = tuple(riding.summed[name] for name in slot.repeat)
        terms = self._matrices(product, leaves[product], riding)
        whole = Columns(y, 0, self.config.hidden_size)
        return self._product(terms, self.config.hidden_size, adds=(whole, *adds), **behind)

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
        N = self.layout.adapters
        z = Columns(y, start, N * rank * len(names))
        activation = self.adapter.activation
        if self.select is not None or activation != "identity":
            own = ACTIVATIONS[activation](y[:, start : start + z.width])
            if self.select is not None:
                own = keep_own(own[:, None], 0, rank * len(names), self.select)[:, 0]
            z = Columns(own, 0, z.width)
        summed = z
        joined = {name: Columns(z.array, z.start + i * rank, rank) for i, name in enumerate(names)}
        if N > 1:
            # One array, as attention takes it.
            summed = Columns(z.array.reshape(len(y), N, -1).sum(1), 0, rank * len(names))
            own = own_pieces(z.array, names, rank)
            joined = {
                name: Columns(piece.reshape(len(y), -1), 0, N * rank) for name, piece in own.items()
            }
        each = {
            name: Columns(summed.array, summed.start + i * rank, rank)
            for i, name in enumerate(names)
        }
        return _Riding(z=z, joined=joined, summed=each)

    def _adds(self, product: str, riding: _Riding | None) -> list[Columns | None]:
        """What is repeat-and-added to each projection of qkv or gate_up by whoever reads it."""
        slot = self.layout.slot(self.adapter, product)
        return [riding.summed[name] if name in slot.repeat else None for name in PRODUCTS[product]]

    def _matrices(self, product: str, leaves: Leaves, riding: _Riding | None) -> list[Term]:
        """What the pieces of lora and pf_lora return, each through its own B."""
        slot = self.layout.slot(self.adapter, product)
        starts = [0, *map(int, self._edges(product))]
        return [
            Term(riding.joined[name], leaves[f"{name}_B"], column=start)
            for name, start in zip(PRODUCTS[product], starts, strict=False)
            if name in slot.matrix
        ]
