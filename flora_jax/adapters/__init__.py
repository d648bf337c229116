"""The adapters themselves: the method table, its configuration, the layer they ride in."""

from flora_jax.adapters.config import AdapterConfig, Slot
from flora_jax.adapters.layer import (
    FusedDense,
    abstract_adapter,
    check_adapter,
    init_adapter,
    pad_first_layer,
    repeat_and_add,
)
from flora_jax.adapters.layouts import merge
from flora_jax.adapters.methods import BLOCKS, METHODS, PRODUCTS, PROJECTIONS, Method

__all__ = [
    "BLOCKS",
    "METHODS",
    "PRODUCTS",
    "PROJECTIONS",
    "AdapterConfig",
    "FusedDense",
    "Method",
    "Slot",
    "abstract_adapter",
    "check_adapter",
    "init_adapter",
    "merge",
    "pad_first_layer",
    "repeat_and_add",
]
