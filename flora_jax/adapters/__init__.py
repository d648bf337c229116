"""The adapters themselves: the method table, its configuration, the layer they ride in."""

from flora_jax.adapters.config import AdapterConfig, Slot, has_adapter
from flora_jax.adapters.forms import as_lora, merge, merged_kernel, widen
from flora_jax.adapters.fusing import (
    adapter_of,
    each_layer,
    fuse,
    fused_layers,
    make_room,
    parts_of,
    split,
    write_adapter,
)
from flora_jax.adapters.layer import SAVED, FusedDense, adapt, own_pieces
from flora_jax.adapters.layouts import FUSED, SPLIT, Layout, device_layout
from flora_jax.adapters.leaves import (
    Tree,
    abstract_adapter,
    base_leaves,
    check_adapter,
    check_base,
    check_fused,
    check_tree,
    init_adapter,
    pad_first_layer,
    paths,
    shapes_of,
    tree,
)
from flora_jax.adapters.methods import BLOCKS, METHODS, PRODUCTS, PROJECTIONS, Method
from flora_jax.adapters.products import multiply_transposed, repeat_and_add

__all__ = [
    "BLOCKS",
    "FUSED",
    "METHODS",
    "PRODUCTS",
    "PROJECTIONS",
    "SAVED",
    "SPLIT",
    "AdapterConfig",
    "FusedDense",
    "Layout",
    "Method",
    "Slot",
    "Tree",
    "abstract_adapter",
    "adapt",
    "adapter_of",
    "as_lora",
    "base_leaves",
    "check_adapter",
    "check_base",
    "check_fused",
    "check_tree",
    "device_layout",
    "each_layer",
    "fuse",
    "fused_layers",
    "has_adapter",
    "init_adapter",
    "make_room",
    "merge",
    "merged_kernel",
    "multiply_transposed",
    "own_pieces",
    "pad_first_layer",
    "parts_of",
    "paths",
    "repeat_and_add",
    "shapes_of",
    "split",
    "tree",
    "widen",
    "write_adapter",
]
