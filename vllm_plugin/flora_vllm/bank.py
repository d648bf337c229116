"""Many adapters in one server: `[W | A1 … AN]`, `[W ; B1 … BN]`, each token with its own.

vLLM's LoRA manager loads adapters, gives each a place (slot) and says which token has which. Where
it would put its own LoRA layers, it puts BankLinear, which writes an adapter's columns and rows
into the product that runs anyway. vLLM 0.32 has no registry for such layers and no check of an
adapter that a model can make: `install` adds both. Beside these two, `masks` reads which token has
which place off a private buffer; nothing else here touches vLLM's inside.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora import utils as lora_utils
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.worker_manager import WorkerLoRAManager

from flora_vllm.linear import FusedLinear
from flora_vllm.plan import PRODUCTS, Plan, check_rank, read_adapter_config

WEIGHTS = "adapter_model.safetensors"


class BankLinear(BaseLayerWithLoRA):
    """A product of the bank as vLLM's manager knows it."""

    def __init__(self, base_layer: FusedLinear):
        super().__init__()
        self.base_layer = base_layer
        self._filled: set[int] = set()

    @classmethod
    def can_replace_layer(cls, source_layer: torch.nn.Module, *_: Any, **__: Any) -> bool:
        """Whether this is the class for a layer."""
        return type(source_layer) is FusedLinear

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any) -> None:
        """The places are there, with zeros. What vLLM reads shapes of its warm-up from: nothing."""
        places = torch.arange(max_loras, device=self.base_layer.weight.device)
        self.register_buffer("places", places, persistent=False)
        nothing = torch.empty(0, 1, 1, 1, dtype=lora_config.lora_dtype)
        self.lora_a_stacked = self.lora_b_stacked = (nothing,)

    def reset_lora(self, index: int) -> None:
        """Zeros in a place."""
        if index in self._filled:
            self._filled.remove(index)
            self._write(index, torch.zeros(()), torch.zeros(()))

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Writes an adapter's columns A `[R_f, D]` or rows B `[out, R_b]` to a place, filled up to
        its rank; the other side is empty. vLLM's warm-up has zeros on both, which no adapter
        has."""
        if lora_a.numel() and lora_b.numel():
            self.reset_lora(index)
            return
        layer = self.base_layer
        self._filled.add(index)
        self._write(
            index,
            _widened_a(lora_a, layer) if lora_a.numel() else lora_a,
            _widened_b(lora_b, layer) if lora_b.numel() else lora_b,
        )

    def _write(self, index: int, columns_a: torch.Tensor, rows_b: torch.Tensor) -> None:
        layer = self.base_layer
        weight = layer.weight.data
        places = layer.plan.places
        if layer.rider.forward:
            weight[sum(layer.sizes) :].unflatten(0, (places, -1))[index] = columns_a
        if layer.rider.backward:
            start, stop = layer.own_z
            own = rows_b[:, start:stop] if rows_b.ndim else rows_b
            first = layer.inputs[0][1] - layer.inputs[0][0]
            weight[:, first:].unflatten(1, (places, -1))[:, index] = own
        layer.quant_method.process_weights_after_loading(layer)

    def forward(
        self, x: torch.Tensor, z: torch.Tensor | None, masks: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """As FusedLinear."""
        return self.base_layer.forward(x, z, masks)


def _widened_a(lora_a: torch.Tensor, layer: FusedLinear) -> torch.Tensor:
    """Columns A at the rank of the places: copies where z is tiled, since the tiling's period
    grows, zeros otherwise."""
    pieces = lora_a.unflatten(0, (len(layer.rider.forward), -1))
    rank = layer.plan.rank
    if layer.plan.repeats:
        return pieces.repeat(1, rank // pieces.shape[1], 1).flatten(0, 1)
    return torch.nn.functional.pad(pieces, (0, 0, 0, rank - pieces.shape[1])).flatten(0, 1)


def _widened_b(lora_b: torch.Tensor, layer: FusedLinear) -> torch.Tensor:
    """Rows B at the rank of the places, with zeros."""
    rank = layer.plan.rank
    pieces = lora_b.unflatten(1, (layer.rider.backward // rank, -1))
    return torch.nn.functional.pad(pieces, (0, rank - pieces.shape[-1])).flatten(1)


def masks(layer: BankLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """`[T, N R_f]` for each product with R_f channels of an adapter as outputs, true for those that
    are not of a token's own adapter. The bare base has none."""
    plan = layer.base_layer.plan
    own = layer.punica_wrapper._token_lora_indices[: x.shape[0]]
    others = (own.unsqueeze(-1) != layer.places).unsqueeze(-1)
    return {
        product: others.expand(-1, -1, plan.rank * len(rider.forward)).flatten(1)
        for product, rider in plan.riders.items()
        if rider.forward
    }


@functools.cache
def install() -> None:
    """Makes vLLM's LoRA manager know BankLinear, and has an adapter checked before it is loaded, so
    that a wrong one is refused while nothing has changed."""
    lora_utils._all_lora_classes = (BankLinear, *lora_utils._all_lora_classes)
    load = WorkerLoRAManager._load_adapter

    @functools.wraps(load)
    def checked(self: WorkerLoRAManager, request: Any) -> Any:
        check = getattr(self._adapter_manager.model, "check_adapter", None)
        if check is None:
            return load(self, request)
        try:
            check(lora_utils.get_adapter_absolute_path(request.lora_path))
        except FileNotFoundError as error:  # which the server answers with 404
            raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path) from error
        adapter = load(self, request)
        for own in adapter.loras.values():  # vLLM wants both sides to be tensors
            own.lora_a = torch.empty(0) if own.lora_a is None else own.lora_a
            own.lora_b = torch.empty(0) if own.lora_b is None else own.lora_b
            if not (own.lora_a.isfinite().all() and own.lora_b.isfinite().all()):
                raise ValueError(f"{request.lora_path}: {own.module_name} is not finite")
        return adapter

    WorkerLoRAManager._load_adapter = checked


def check_adapter(directory: Path, plan: Plan, config: Any) -> None:
    """Raises ValueError, in one line, for an adapter that has no place in a bank of `plan` over a
    base of `config`: of another method, rank or base, or with a part missing."""
    stored = read_adapter_config(directory)
    own = Plan.of(stored["flora"], directory)
    if not own.fits(plan):
        raise ValueError(
            f"{directory}: an adapter of {stored['method']!r} is not laid out as this bank's are; "
            "serve it from a bank of its own"
        )
    if stored["fingerprint"] != plan.fingerprint:
        raise ValueError(
            f"{directory}: trained on another base, of fingerprint {stored['fingerprint']}; this "
            f"bank's adapters have {plan.fingerprint}"
        )
    check_rank(own, plan.rank, directory)
    expected = _shapes(own, config)
    found = _found(directory / WEIGHTS)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{directory / WEIGHTS}: {name} is {found.get(name, 'missing')}, this base wants "
                f"{expected.get(name, 'none')}"
            )


def _shapes(plan: Plan, config: Any) -> dict[str, tuple[int, int]]:
    """The shape of every tensor of an adapter, by name."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inputs = {"qkv": config.hidden_size, "o": config.num_attention_heads * head_dim}
    inputs |= {"gate_up": config.hidden_size, "down": config.intermediate_size}
    out = {}
    for i in range(config.num_hidden_layers):
        for product in PRODUCTS:
            block = "self_attn" if product in ("qkv", "o") else "mlp"
            name = f"base_model.model.model.layers.{i}.{block}.{product}_proj"
            rider = plan.riders[product]
            if rider.forward:
                shape = (len(rider.forward) * plan.rank, inputs[product])
                out[f"{name}.lora_A.weight"] = shape
            if rider.backward:
                out[f"{name}.lora_B.weight"] = (config.hidden_size, rider.backward)
    return out


def _found(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except Exception as error:
        raise ValueError(f"{path}: no complete safetensors file ({error})") from None
