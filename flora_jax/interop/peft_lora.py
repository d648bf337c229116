"""PEFT's LoRA directories: our adapters as PEFT stores them, and anybody's LoRA as ours.

A tensor of PEFT's and its place here, at rank 8 in a layer with D = 96 and Q = 96:

    base_model.model.model.layers.3.self_attn.k_proj.lora_A.weight  [8, 96]
    adapter/layers/attention/qkv/A[3, :, 8:16].T                    the same
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax.adapters import BLOCKS, PRODUCTS, PROJECTIONS, AdapterConfig, Tree, check_tree
from flora_jax.errors import UserError, near_misses, require, told_of
from flora_jax.models.config import LlamaConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EXTRAS = "flora_config.json"  # what PEFT has no field for

# Block -> its module in a layer, as transformers, PEFT and vLLM name it.
HF_BLOCKS = {"attention": "self_attn", "mlp": "mlp"}
# Projection -> its module in a layer.
PEFT_MODULES = {
    p: f"{HF_BLOCKS[block]}.{p}_proj"
    for block, products in BLOCKS.items()
    for product in products
    for p in PRODUCTS[product]
}
_PLACES = {
    p: (block, product)
    for block, products in BLOCKS.items()
    for product in products
    for p in PRODUCTS[product]
}
# Features of PEFT's LoRA that ours lacks. A feature is off where its value is false, empty or
# "none".
_PEFT_REFUSED = (
    "use_dora",
    "modules_to_save",
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "megatron_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "arrow_config",
)
# Initialisations that change the base: on the published base such an adapter means nothing.
_PEFT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _peft_name(layer: int, projection: str, side: str) -> str:
    return f"base_model.model.model.layers.{layer}.{PEFT_MODULES[projection]}.lora_{side}.weight"


def peft_config(adapter_config: AdapterConfig, base_model: str) -> dict[str, Any]:
    """PEFT's configuration of a LoRA over the base of that name."""
    alpha = adapter_config.alpha
    if float(alpha).is_integer():
        alpha = int(alpha)  # the type of PEFT's field
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": adapter_config.rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter_config.dropout,
        "use_rslora": adapter_config.rslora,
        "target_modules": [f"{p}_proj" for p in adapter_config.targets],
        "bias": "none",
        "fan_in_fan_out": False,
    }


def to_peft(
    adapter: Tree, config: LlamaConfig, adapter_config: AdapterConfig
) -> dict[str, np.ndarray]:
    """PEFT's tensors of a stacked adapter: `lora_A [r, in]` and `lora_B [out, r]` by layer."""
    tensors = {}
    for projection in adapter_config.targets:
        block, product = _PLACES[projection]
        leaves = adapter["layers"][block][product]
        pieces = adapter_config.slots[product].forward
        A = np.split(np.asarray(leaves["A"]), len(pieces), axis=-1)[pieces.index(projection)]
        B = np.asarray(leaves[f"{projection}_B"])
        for layer in range(config.num_hidden_layers):
            tensors[_peft_name(layer, projection, "A")] = A[layer].T
            tensors[_peft_name(layer, projection, "B")] = B[layer].T
    return tensors


def from_peft(
    directory: Path,
    stored: Mapping[str, Any],
    method: str,
    tensors: dict[str, np.ndarray],
    config: LlamaConfig,
) -> tuple[AdapterConfig, dict[str, Tree]]:
    """Our `(adapter_config, trained)` from PEFT's configuration `stored` and tensors.

    method: `lora` or `pf_lora`; directory: named in errors. Raises UserError for anything but a
    plain LoRA of this model.
    """
    where = directory / CONFIG
    _check_plain(where, stored)
    require(
        method in ("lora", "pf_lora"),
        f"{directory / EXTRAS}: method={method!r} is not a LoRA; lora and pf_lora are",
    )
    require(
        stored.get("lora_alpha") is not None,
        f"{where}: field 'lora_alpha' is missing, and the scale of the adapter with it",
    )
    adapter_config = make_config(
        where,
        method=method,
        rank=stored.get("r"),
        alpha=stored["lora_alpha"],
        rslora=stored.get("use_rslora") or False,
        targets=_peft_targets(where, stored, tensors, config),
        dropout=stored.get("lora_dropout", 0.0),
    )
    _check_tensors(directory / WEIGHTS, tensors, config, adapter_config)

    def stack(projection: str, side: str) -> np.ndarray:
        return np.stack(
            [tensors[_peft_name(i, projection, side)].T for i in range(config.num_hidden_layers)]
        )

    layers: Tree = {}
    for block, products in BLOCKS.items():
        for product in products:
            if pieces := adapter_config.slots[product].forward:
                layers.setdefault(block, {})[product] = {
                    "A": np.concatenate([stack(p, "A") for p in pieces], axis=-1),
                    **{f"{p}_B": stack(p, "B") for p in pieces},
                }
    return adapter_config, {"adapter": {"layers": layers}, "params": {}}


def _check_plain(where: Path, stored: Mapping[str, Any]) -> None:
    """Raises UserError for features of PEFT's that ours lacks."""
    for field in _PEFT_REFUSED:
        value = stored.get(field)
        # `False == 0`, and a layer 0 is no False.
        require(
            value is None or value is False or value in ("none", [], {}),
            f"{where}: {field}={value!r} is not supported; only plain LoRA loads",
        )
    init = stored.get("init_lora_weights")
    require(
        not (isinstance(init, str) and init.startswith(_PEFT_CHANGES_BASE)),
        f"{where}: init_lora_weights={init!r} changed the base; convert the adapter to plain LoRA",
    )


def _check_tensors(
    where: Path,
    tensors: Mapping[str, np.ndarray],
    config: LlamaConfig,
    adapter_config: AdapterConfig,
) -> None:
    """Raises UserError unless the tensors are exactly those of the LoRA."""
    r = adapter_config.rank
    expected = {}
    for projection in adapter_config.targets:
        d_in, d_out = config.widths[projection]
        for layer in range(config.num_hidden_layers):
            expected[_peft_name(layer, projection, "A")] = (r, d_in)
            expected[_peft_name(layer, projection, "B")] = (d_out, r)
    found = {name: tensor.shape for name, tensor in sorted(tensors.items())}

    def say(name: str, there: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> str:
        return (
            f"{where}: tensor {name!r}: expected {wanted or 'no such tensor'} for this model, "
            f"found {there or 'nothing'}"
        )

    check_tree(found, dict(sorted(expected.items())), say)


def _peft_targets(
    where: Path, stored: Mapping[str, Any], tensors: Mapping[str, Any], config: LlamaConfig
) -> tuple[str, ...]:
    """The adapted projections: `target_modules` without `exclude_modules`.

    Where `target_modules` is a pattern, the projections that have tensors. Raises UserError where
    either field names a projection in some layers alone.
    """
    modules = stored.get("target_modules")
    excluded = stored.get("exclude_modules") or []
    if isinstance(modules, str):
        found = [p for p in PROJECTIONS if any(f".{PEFT_MODULES[p]}." in name for name in tensors)]
    else:
        found = _peft_projections(where, modules)
    targets = []
    for p in found:
        keys = [f"model.layers.{i}.{PEFT_MODULES[p]}" for i in range(config.num_hidden_layers)]
        _peft_matches_all(where, "target_modules", modules, keys)
        if not _peft_matches_all(where, "exclude_modules", excluded, keys):
            targets.append(p)
    return tuple(targets)


def _peft_projections(where: Path, modules: Any) -> list[str]:
    """The projections that a list of `target_modules` names, each once."""
    names = {f"{p}_proj": p for p in PROJECTIONS}
    require(
        isinstance(modules, list) and modules,
        f"{where}: target_modules={modules!r} must name projections such as 'q_proj'",
    )
    found = []
    for module in modules:
        if (last := str(module).rpartition(".")[2]) not in names:
            near = near_misses(str(module), names)
            raise UserError(f"{where}: target_modules has {module!r}, not supported; {near}")
        found.append(names[last])
    return list(dict.fromkeys(found))


def _peft_matches_all(where: Path, field: str, value: str | list[str], keys: list[str]) -> bool:
    """Whether a field of PEFT's names a projection in all layers; keys: the paths of its modules.

    Raises UserError where it names it in some layers alone.
    """
    matched = [_peft_matches(where, field, value, key) for key in keys]
    if any(matched) and not all(matched):
        projection = keys[0].rpartition(".")[2]
        raise UserError(
            f"{where}: {field}={value!r} names {projection} in some layers alone, which is not "
            "supported: an adapter here is the same in every layer"
        )
    return any(matched)


def _peft_matches(where: Path, field: str, value: str | list[str], key: str) -> bool:
    """Whether a field of PEFT's names a module: a list by the end of its path, a text as a pattern
    of the whole path."""
    if isinstance(value, list):
        return any(f".{key}".endswith(f".{name}") for name in value)
    try:
        return re.fullmatch(value, key) is not None
    except (TypeError, re.error) as error:
        raise UserError(
            f"{where}: {field}={value!r} must be a list of names or a pattern ({error})"
        ) from None


def make_config(where: Path, **fields: Any) -> AdapterConfig:
    """An AdapterConfig; its errors name the file."""
    with told_of(str(where)):
        return AdapterConfig(**fields)
