"""A layer's decode step on a GPU in five or six launches: its products with all that is around
them.

    norm, qkv                          decode_product
    adds, rotary, cache, attention     decode_attention
    sum of its parts, o, residual      decode_product
    norm, gate and up                  decode_product
    adds, silu · up, down, residual    decode_product

Forward adapters are columns of the arrays and backward adapters rows, so they are no launch; what
is repeat-and-added is added where it is read. Attention's parts are summed by each program of o
that reads them; those of several rows, or many, in a launch of XLA's before. In a bank a product
keeps of each row what its own adapter read. LoRA's matrices B are another launch for each product,
and so are ffa's pieces of o and down in a bank.

Axis letters as in llama.py; W the width of the residual stream, with zflora's channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import PRODUCTS, AdapterConfig, Layout, Scaled
from flora_jax.models.config import LlamaConfig
from flora_jax.models.decode_attention import decode_attention
from flora_jax.models.decode_product import (
    Behind,
    Columns,
    Gated,
    Normed,
    Pieces,
    Read,
    Term,
    decode_product,
)

Leaves = Mapping[str, Any]
# Of one row. More, or those of several rows, are many loads and sums in each program, and more
# shared memory than there is.
FEW_PARTS = 4
Past = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Riding:
    """What an adapter's forward columns gave: all of z, each piece of all adapters side by side
    (`joined`), and each piece of the row's own adapter (`own`)."""

    z: Columns
    joined: Mapping[str, Columns]
    own: Mapping[str, Columns]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeLayer:
    """One token a row through one layer of a fused model.

    adapter: None for the bare base; layout: of the leaves, fused; select `[B, N]` bool: which one
    of a bank's adapters each row uses, if any. interpret: of the kernels.
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
            parts, present = decode_attention(
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
            few = len(x) == 1 and len(parts.peaks) <= FEW_PARTS
            read = parts if few else parts.summed()
            x = self._write("o", leaves["attention"], read, riding, x)
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

    def _term(self, read: Read, kernel: jax.Array | Scaled, **place: Any) -> Term:
        return Term(read, kernel, transposed=self.layout.transposed, **place)

    def _array(self, leaves: Leaves) -> tuple[jax.Array | Scaled, int]:
        """A product's array, and its columns."""
        array = leaves[self.layout.matrix]
        return array, array.shape[0 if self.layout.transposed else 1]

    def _read(
        self, product: str, leaves: Leaves, norm: Leaves, x: jax.Array
    ) -> tuple[jax.Array, _Riding | None]:
        """What qkv or gate_up gives of the normed stream, with what its pieces return by a matrix;
        and what its pieces are."""
        kernel, columns = self._array(leaves[product])
        width = self.config.hidden_size
        normed = Normed(x, norm["scale"], width, self.config.rms_norm_eps)
        bias = leaves[product].get("bias")
        pieces = self._pieces(product)
        y = self._product([self._term(normed, kernel)], columns, bias=bias, pieces=pieces)
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
        kernel, columns = self._array(leaves[product])
        bias = leaves[product].get("bias")
        behind = {"factor": self.config.residual_multiplier, "residual": x}
        terms = [self._term(read, kernel)]
        if slot.backward and incoming is not None:
            terms.append(self._term(incoming.z, kernel, row=self.config.widths[product][0]))
        stream = self.layout.adapters and self.adapter.row.writes == "stream"
        if stream or not slot.forward:
            adds = tuple(incoming.own.values()) if slot.repeat else ()
            pieces = self._pieces(product)
            return self._product(terms, columns, bias=bias, adds=adds, pieces=pieces, **behind)
        if slot.repeat and self.select is None:
            # ffa: each program computes what it adds, too, from the few columns that all read.
            start = self.config.hidden_size
            own = self._term(read, kernel, repeat=(start, self.adapter.rank))
            return self._product([*terms, own], start, bias=bias, **behind)
        # Its own pieces return to it: all of it has to be there first.
        pieces = self._pieces(product)
        y = self._product(terms, columns, bias=bias, pieces=pieces)
        riding = self._riding(product, y)
        adds = tuple(riding.own[name] for name in slot.repeat)
        terms = self._matrices(product, leaves[product], riding)
        whole = Columns(y, 0, self.config.hidden_size)
        return self._product(terms, self.config.hidden_size, adds=(whole, *adds), **behind)

    def _edges(self, product: str) -> Sequence[int]:
        """Where each projection of a product ends among its columns."""
        return np.cumsum([self.config.widths[name][1] for name in PRODUCTS[product]])

    @functools.cached_property
    def _own(self) -> jax.Array | None:
        """The number of each row's adapter, `[B]`; of none, that of one which the row keeps no
        channel of."""
        return None if self.select is None else jnp.argmax(self.select, axis=1).astype(jnp.int32)

    def _pieces(self, product: str) -> Pieces | None:
        """What becomes of a product's forward columns; None where nothing does."""
        names = self.layout.slot(self.adapter, product).forward
        if not names or (self.select is None and self.adapter.activation == "identity"):
            return None
        width = self.adapter.rank * len(names)
        start = int(self._edges(product)[-1])
        return Pieces(start, width, self.adapter.activation, self.select)

    def _riding(self, product: str, y: jax.Array) -> _Riding | None:
        """The forward pieces among the columns of `y`; None where none ride."""
        names = self.layout.slot(self.adapter, product).forward
        if not names or self.adapter.row.writes == "stream":
            return None
        start = int(self._edges(product)[-1])
        rank = self.adapter.rank
        N = self.layout.adapters
        block = rank * len(names)
        joined = Columns(y, start, N * rank, stride=block, piece=rank if N > 1 else 0)
        own = Columns(y, start, rank, stride=block, own=self._own)
        starts = {name: start + i * rank for i, name in enumerate(names)}
        return _Riding(
            z=Columns(y, start, N * block),
            joined={name: joined._replace(start=at) for name, at in starts.items()},
            own={name: own._replace(start=at) for name, at in starts.items()},
        )

    def _adds(self, product: str, riding: _Riding | None) -> list[Columns | None]:
        """What is repeat-and-added to each projection of qkv or gate_up by whoever reads it."""
        slot = self.layout.slot(self.adapter, product)
        return [riding.own[name] if name in slot.repeat else None for name in PRODUCTS[product]]

    def _matrices(self, product: str, leaves: Leaves, riding: _Riding | None) -> list[Term]:
        """What the pieces of lora and pf_lora return, each through its own B."""
        slot = self.layout.slot(self.adapter, product)
        starts = [0, *map(int, self._edges(product))]
        return [
            self._term(riding.joined[name], leaves[f"{name}_B"], column=start)
            for name, start in zip(PRODUCTS[product], starts, strict=False)
            if name in slot.matrix
        ]


def decode_logits(
    hidden: jax.Array, unembedding: jax.Array, transposed: bool, interpret: bool = False
) -> jax.Array:
    """Logits `[B, V]`, float32, of final normed states `[B, D]`; the unembedding is `[D, V]`,
    transposed `[V, D]`."""
    columns = unembedding.shape[0 if transposed else 1]
    term = Term(hidden, unembedding, transposed=transposed)
    return decode_product([term], columns, interpret=interpret, dtype=jnp.float32)
