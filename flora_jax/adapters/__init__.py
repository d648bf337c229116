"""The adapters themselves: the method table, its configuration, the layer they ride in."""

from flora_jax.adapters.config import AdapterConfig, Slot
from flora_jax.adapters.forms import as_lora, merge, merged_kernel, widen
from flora_jax.adapters.layer import (
    SAVED,
    FusedDense,
    abstract_adapter,
    check_adapter,
    check_base,
    init_adapter,
    multiply_transposed,
    normal,
    pad_first_layer,
    repeat_and_add,
)
from flora_jax.adapters.layouts import (
    adapter_riders,
    apart,
    check_fused,
    device_layout,
    fuse,
    fused_layers,
    make_room,
    split,
    write_adapter,
)
from flora_jax.adapters.methods import BLOCKS, METHODS, PRODUCTS, PROJECTIONS, Method

__all__ = [
    "BLOCKS",
    "METHODS",
    "PRODUCTS",
    "PROJECTIONS",
    "SAVED",
    "AdapterConfig",
    "FusedDense",
    "Method",
    "Slot",
    "abstract_adapter",
    "adapter_riders",
    "apart",
    "as_lora",
    "check_adapter",
    "check_base",
    "check_fused",
    "device_layout",
    "fuse",
    "fused_layers",
    "init_adapter",
    "make_room",
    "merge",
    "merged_kernel",
    "multiply_transposed",
    "normal",
    "pad_first_layer",
    "repeat_and_add",
    "split",
    "widen",
    "write_adapter",
]
