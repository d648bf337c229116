"""How the weights lie in memory, said once for a whole tree.

    split      base and adapter apart, leaves stacked [L, …]: what is trained
    fused      four arrays a layer, one set of leaves a layer: what is served (`fuse`, undone by
               `split`)
    unmerged   one set of leaves a layer, products apart: what a server without fused adapters runs,
               the baseline of a measurement (analysis/unmerged.py)

A method says what is computed, a layout how it lies in memory; neither knows of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.adapters.config import AdapterConfig, Slot
from flora_jax.adapters.methods import PRODUCTS
from flora_jax.errors import require, require_known

Widths = Mapping[str, tuple[int, int]]

KINDS = ("split", "fused", "unmerged")
_MARK = "layout"  # the leaf of a tree that says how the others lie


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies.

    kind: a name of KINDS.
    adapters: how many lie side by side in the arrays; 0: the bare base. A split tree has none in
        them.
    rank: r of each of them, 0 without any.
    row_multiple: products with rows B (for zflora: the whole stream) are filled up with zeros to a
        multiple of it. 128 or 256 keep a GPU's compiler from padding at run time; on a CPU it is
        wasted bandwidth.
    transposed: `weight [d_out, d_in]` in place of `kernel [d_in, d_out]`, which a CPU and our
        decode kernels read faster.
    fold_adds: repeat-and-adds (of an ffba) lie in W and B, and are not computed any more.
    """

    kind: str = "split"
    adapters: int = 0
    rank: int = 0
    row_multiple: int = 1
    transposed: bool = False
    fold_adds: bool = False

    def __post_init__(self):
        require_known(self.kind, KINDS, f"kind={self.kind!r}")
        require(
            self.row_multiple >= 1, f"row_multiple={self.row_multiple} must be a positive integer"
        )

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Layout:
        """The layout of a tree of parameters; no other place reads it off one."""
        if _MARK not in params:
            return cls()
        _, kind, adapters, rank, row_multiple, transposed, fold_adds = params[_MARK].shape
        return cls(
            kind=KINDS[kind],
            adapters=adapters,
            rank=rank,
            row_multiple=row_multiple,
            transposed=bool(transposed),
            fold_adds=bool(fold_adds),
        )

    def mark(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The tree with a leaf that records the layout. The leaf is empty and its shape holds the
        fields, so that they survive jit, eval_shape and files."""
        fields = (
            getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "kind"
        )
        shape = (0, KINDS.index(self.kind), *map(int, fields))
        return {**params, _MARK: jnp.zeros(shape, params["embed_tokens"]["embedding"].dtype)}

    @staticmethod
    def unmarked(params: Mapping[str, Any]) -> dict[str, Any]:
        """The tree without that leaf."""
        return {name: leaf for name, leaf in params.items() if name != _MARK}

    @property
    def matrix(self) -> str:
        """The name of a product's array."""
        return "weight" if self.transposed else "kernel"

    def turned(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """A product's leaves from `kernel [d_in, d_out]` to how they are stored, or back: in a
        transposed layout all are turned but the bias."""
        if not self.transposed:
            return dict(leaves)
        swap = {"kernel": "weight", "weight": "kernel"}
        return {
            swap.get(name, name): leaf if name == "bias" else leaf.T
            for name, leaf in leaves.items()
        }

    def filled(self, rows: int) -> int:
        """`rows` filled up to the multiple."""
        return -(-rows // self.row_multiple) * self.row_multiple

    def stream(self, width: int, adapter: AdapterConfig | None) -> int:
        """The width of the residual stream: the model's, and in zflora's fused layout the channels
        of all adapters behind it."""
        if self.kind != "fused" or self.adapters == 0 or adapter.row.writes != "stream":
            return width
        return self.filled(width + self.adapters * self.rank)

    def slot(self, adapter: AdapterConfig | None, product: str) -> Slot:
        """What rides in a fused product."""
        return adapter.slots[product] if self.adapters else Slot()

    def fused_shape(
        self, widths: Widths, adapter: AdapterConfig | None, product: str
    ) -> tuple[int, int]:
        """Rows and columns of a product's one array `[d_in (+ N R_b + fill), d_out (+ N R_f)]`,
        before it is transposed."""
        names = PRODUCTS[product]
        rows = widths[names[0]][0]
        columns = sum(widths[name][1] for name in names)
        slot = self.slot(adapter, product)
        if self.adapters and adapter.row.writes == "stream":
            stream = self.stream(widths["o"][1], adapter)
            return (stream, columns) if slot.backward else (rows, stream)
        if slot.backward:
            rows = self.filled(rows + self.adapters * slot.backward_rank)
        return rows, columns + self.adapters * self.rank * len(slot.forward)

    def fused_shapes(
        self, widths: Widths, adapter: AdapterConfig | None, product: str, use_bias: bool
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of all leaves of a fused product: its array, bias `[d_out]`, and `<projection>_B
        [N r, width]` for lora and pf_lora alone."""
        shapes = {"kernel": self.fused_shape(widths, adapter, product)}
        for name in self.slot(adapter, product).matrix:
            shapes[f"{name}_B"] = (self.adapters * self.rank, widths[name][1])
        if self.transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
            shapes["weight"] = shapes.pop("kernel")
        if use_bias:
            shapes["bias"] = (sum(widths[name][1] for name in PRODUCTS[product]),)
        return shapes


SPLIT = Layout()
FUSED = Layout(kind="fused")


def device_layout(quantized: bool = False, in_kernels: bool = False) -> Layout:
    """The fused layout that this device reads fastest, without copies: on a GPU rows in blocks,
    larger ones for 8-bit codes; on a CPU transposed arrays. in_kernels: by decode kernels of ours
    (`decode_kernels="layer"`)."""
    backend = jax.default_backend()
    if backend == "gpu":
        return gpu_layout(quantized, in_kernels)
    return Layout(kind="fused", transposed=backend == "cpu")


def gpu_layout(quantized: bool = False, in_kernels: bool = False) -> Layout:
    """`device_layout` of a GPU, on any machine. Kernels of ours read transposed arrays: what a
    program reads is then contiguous at any rank, and a thread's codes are neighbours."""
    row_multiple = 256 if quantized else 128
    return Layout(kind="fused", row_multiple=row_multiple, transposed=in_kernels)
