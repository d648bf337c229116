"""Adapters around the blocks as directories for vLLM: one slot of a bank `[W | A1 … AN]`,
`[W ; B1 … BN]`.

A product's columns are its `lora_A` and its rows its `lora_B`, as PyTorch stores them and with the
scale in them. A product has one of the two. At rank 8, ffba with D = 96:

    base_model.model.model.layers.3.self_attn.qkv_proj.lora_A.weight  [24, 96]
    adapter/layers/attention/qkv/A[3].T, times s                      the same
    base_model.model.model.layers.3.mlp.down_proj.lora_B.weight       [96, 16]
    adapter/layers/mlp/down/down_B[3].T                               the same

vLLM's own loader reads such a directory. The layers that compute with it are in `vllm_plugin/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flora_jax.adapters import BLOCKS, AdapterConfig, adapter_of, parts_of
from flora_jax.interop.peft_lora import HF_BLOCKS
from flora_jax.models.config import LlamaConfig

Tree = dict[str, Any]

KIND = "FLORA_FUSED"  # the peft_type
FORMAT_VERSION = 2
# Fused product -> its module in a layer, as vLLM and our own code for transformers name it.
MODULES = {
    product: f"{HF_BLOCKS[block]}.{product}_proj"
    for block, products in BLOCKS.items()
    for product in products
}
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM takes
_SIDES = {"columns": "lora_A", "rows": "lora_B"}


def _name(layer: int, product: str, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.{MODULES[product]}.{_SIDES[part]}.weight"


def max_lora_rank(adapter_config: AdapterConfig) -> int | None:
    """The least --max-lora-rank of vLLM whose slots hold the adapter; None if there is none.

    A slot's further channels hold zeros, or copies of the adapter's where they are
    repeat-and-added.
    """
    rank = adapter_config.rank
    filled = [n for n in MAX_LORA_RANKS if n >= rank and not (adapter_config.add_to and n % rank)]
    return min(filled, default=None)


def vllm_config(
    flora: Mapping[str, Any],
    differences: Mapping[str, Any],
    config: LlamaConfig,
    base_model: str,
    fingerprint: str,
) -> dict[str, Any]:
    """The content of the configuration file.

    flora: what each product carries, from `remote_config`; differences: the base's from a Llama,
    from `base_config`. The scale is in the weights, so lora_alpha is r: vLLM multiplies by
    lora_alpha / r.
    """
    products = flora["products"].items()
    return {
        "peft_type": KIND,
        "format_version": FORMAT_VERSION,
        "r": flora["rank"],
        "lora_alpha": flora["rank"],
        "target_modules": [
            f"{p}_proj" for p, held in products if held["forward"] or held["backward"]
        ],
        "bias": "none",
        "base_model_name_or_path": base_model,
        "fingerprint": fingerprint,
        "method": flora["method"],
        "model_type": config.model_type,
        "differences": dict(differences),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "flora": dict(flora),
    }


def to_vllm(
    adapter: Tree, config: LlamaConfig, adapter_config: AdapterConfig
) -> dict[str, np.ndarray]:
    """The tensors of a stacked adapter by layer, `lora_A [R_f, d_in]` and `lora_B [d_out, R_b]`."""
    return {
        _name(layer, product, part): value.T
        for products in parts_of(adapter, config, adapter_config).values()
        for product, parts in products.items()
        for part, stacked in parts.items()
        for layer, value in enumerate(np.asarray(stacked))
    }


def from_vllm(
    tensors: Mapping[str, np.ndarray], config: LlamaConfig, adapter_config: AdapterConfig
) -> Tree:
    """The stacked adapter from the tensors of `to_vllm`."""
    layers = range(config.num_hidden_layers)
    parts: Tree = {}
    for block, products in BLOCKS.items():
        for product in products:
            slot = adapter_config.slots[product]
            for part, there in (("columns", slot.forward), ("rows", slot.backward)):
                if there:
                    found = np.stack([tensors[_name(i, product, part)].T for i in layers])
                    parts.setdefault(block, {}).setdefault(product, {})[part] = found
    return adapter_of(parts, config, adapter_config)
