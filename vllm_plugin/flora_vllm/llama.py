"""vLLM's Llama with a fused adapter, or a bank of them, in its four products, and with what sets
the base apart from a plain Llama (`plan.Base`).

T tokens   D hidden_size   S channels of the stream behind it (zflora)   H width of a head
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models import llama
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors

from flora_vllm import bank
from flora_vllm.linear import FusedLinear, Range, share
from flora_vllm.plan import Plan, plan_of

# Where a base's projection lies: its product and its name there.
_PROJECTIONS = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "o_proj": ("o_proj", "o"),
    "gate_proj": ("gate_up_proj", "gate"),
    "up_proj": ("gate_up_proj", "up"),
    "down_proj": ("down_proj", "down"),
}


def _ranks() -> tuple[int, int]:
    """This rank among those of tensor parallelism, and their number."""
    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def _columns(
    plan: Plan,
    product: str,
    d_in: int,
    widths: dict[str, int],
    own: dict[str, Range],
    prefix: str,
) -> FusedLinear:
    """A product whose outputs are shared out."""
    rows = (0, d_in)
    bias = product in plan.base.biases
    return FusedLinear(
        plan, product, widths, own, rows, d_in, reduce=False, bias=bias, prefix=prefix, tp=_ranks()
    )


def _rows(plan: Plan, product: str, d_in: int, rows: Range, d_out: int, prefix: str) -> FusedLinear:
    """A product whose inputs are shared out."""
    bias = product in plan.base.biases
    name = "o" if product == "o" else "down"
    widths = {name: d_out}
    own = {name: (0, d_out)}
    return FusedLinear(
        plan, product, widths, own, rows, d_in, reduce=True, bias=bias, prefix=prefix, tp=_ranks()
    )


def _scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x if factor == 1 else x * factor


class StreamNorm(RMSNorm):
    """Norm of the D own channels of the stream `[T, D + S]`; those behind them are over the same
    rms."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As RMSNorm: the normed stream, and with a residual the sum of both."""
        if x.shape[-1] == self.hidden_size:
            return super().forward(x, residual)
        stream = x if residual is None else x + residual
        own, z = stream.split([self.hidden_size, x.shape[-1] - self.hidden_size], -1)
        square = own.float().pow(2).mean(-1, keepdim=True)
        z = (z.float() * torch.rsqrt(square + self.variance_epsilon)).to(z.dtype)
        normed = torch.cat([super().forward(own.contiguous()), z], -1)
        return normed if residual is None else (normed, stream)


class FinalNorm(RMSNorm):
    """Norm of the stream's own channels."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`[T, D + S]` twice to `[T, D]`."""
        if x.shape[-1] == self.hidden_size:
            return super().forward(x, residual)[0]
        return super().forward((x + residual)[..., : self.hidden_size].contiguous())


class FloraAttention(nn.Module):
    """Attention with q, k and v in one product. Norms of q and k are of what the product and its
    adapter give."""

    def __init__(self, config: Any, plan: Plan, cache_config: Any, prefix: str):
        super().__init__()
        rank, ranks = _ranks()
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
            raise ValueError(
                f"tensor_parallel_size={ranks}: {heads} heads and {kv_heads} of k and v cannot be "
                "shared out so"
            )
        H = getattr(config, "head_dim", None) or config.hidden_size // heads
        D = config.hidden_size + plan.stream
        Q = heads * H
        K = kv_heads * H
        q = share(Q, rank, ranks)
        # with more ranks than heads of k and v, several ranks have the same
        own_kv_heads = max(1, kv_heads // ranks)
        first = rank * kv_heads // ranks * H
        kv = (first, first + own_kv_heads * H)
        own = {"q": q, "k": kv, "v": kv}
        widths = {"q": Q, "k": K, "v": K}
        self.qkv_proj = _columns(plan, "qkv", D, widths, own, f"{prefix}.qkv_proj")
        self.o_proj = _rows(plan, "o", Q, q, D, f"{prefix}.o_proj")
        self.head_dim = H
        self.q_norm = None
        if plan.base.qk_norm:
            self.q_norm = RMSNorm(H, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(H, eps=config.rms_norm_eps)
        self.rotary_emb = None
        if extract_layer_index(prefix) not in plan.base.no_rope_layers:
            self.rotary_emb = get_rope(
                H,
                max_position=config.max_position_embeddings,
                rope_parameters=config.rope_parameters,
            )
        self.attn = Attention(
            heads // ranks,
            H,
            plan.base.attention_multiplier,
            num_kv_heads=own_kv_heads,
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, masks: Mapping[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """`[T, D + S]`."""
        (q, k, v), z = self.qkv_proj(x, None, masks)
        if self.q_norm is not None:
            q = self._normed(q, self.q_norm)
            k = self._normed(k, self.k_norm)
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(positions, q, k)
        (out,), _ = self.o_proj(self.attn(q, k, v), z, masks)
        return out

    def _normed(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`[T, heads H]`, normed head by head."""
        return norm(x.unflatten(-1, (-1, self.head_dim)).contiguous()).flatten(-2)


class FloraMLP(nn.Module):
    """SwiGLU with gate and up in one product."""

    def __init__(self, config: Any, plan: Plan, prefix: str):
        super().__init__()
        D = config.hidden_size + plan.stream
        F = config.intermediate_size
        own = share(F, *_ranks())
        both = {"gate": F, "up": F}
        self.gate_up_proj = _columns(
            plan, "gate_up", D, both, dict.fromkeys(both, own), f"{prefix}.gate_up_proj"
        )
        self.down_proj = _rows(plan, "down", F, own, D, f"{prefix}.down_proj")
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, masks: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        """`[T, D + S]`."""
        (gate, up), z = self.gate_up_proj(x, None, masks)
        (out,), _ = self.down_proj(self.act(gate) * up, z, masks)
        return out


class FloraDecoderLayer(nn.Module):
    """A layer."""

    def __init__(self, config: Any, plan: Plan, cache_config: Any, prefix: str):
        super().__init__()
        self.self_attn = FloraAttention(config, plan, cache_config, f"{prefix}.self_attn")
        self.mlp = FloraMLP(config, plan, f"{prefix}.mlp")
        self.input_layernorm = StreamNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = StreamNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.multiplier = plan.base.residual_multiplier

    def forward(
        self,
        positions: torch.Tensor,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        masks: Mapping[str, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is to be added to the residual, and the residual."""
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = _scaled(self.self_attn(positions, x, masks), self.multiplier)
        x, residual = self.post_attention_layernorm(x, residual)
        return _scaled(self.mlp(x, masks), self.multiplier), residual


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": 0,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class FloraLlamaModel(nn.Module):
    """The stack, its stream as wide as the adapter needs it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.plan = plan_of(config, vllm_config.lora_config)
        tied = config.tie_word_embeddings and get_pp_group().is_last_rank
        self.embed_tokens = PPMissingLayer()
        if get_pp_group().is_first_rank or tied:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: FloraDecoderLayer(config, self.plan, vllm_config.cache_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.norm = FinalNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size + self.plan.stream
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[T]` to `[T, D]`."""
        return _scaled(self.embed_tokens(input_ids), self.plan.base.embedding_multiplier)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """`[T, D]`, normed."""
        if get_pp_group().is_first_rank:
            x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            x = nn.functional.pad(x, (0, self.plan.stream)) if self.plan.stream else x
            residual = None
        else:
            x = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        masks = None
        if self.plan.bank:
            first = self.layers[self.start_layer]
            masks = bank.masks(first.self_attn.qkv_proj, x)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x, residual = layer(positions, x, residual, masks)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x, "residual": residual})
        return self.norm(x, residual)


class FloraLlamaForCausalLM(llama.LlamaForCausalLM):
    """What vLLM makes of an export, and of a base that has a bank."""

    # An adapter names products, and has nothing for embeddings.
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {}
    embedding_modules: ClassVar[dict[str, str]] = {}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        if vllm_config.quant_config is not None:
            name = vllm_config.quant_config.get_name()
            raise ValueError(f"quantization={name!r}: fused adapters are floats here; leave it out")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if get_pp_group().is_last_rank:
            self.logits_processor.scale = 1 / self.model.plan.base.logits_divisor
        if self.model.plan.bank:
            bank.install()

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", **_: Any) -> FloraLlamaModel:
        return FloraLlamaModel(vllm_config=vllm_config, prefix=prefix)

    def check_adapter(self, directory: str) -> None:
        """Raises ValueError for an adapter that has no place in this bank."""
        bank.check_adapter(Path(directory), self.model.plan, self.config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Of an export, or of a plain Llama whose projections lie apart."""
        params = dict(self.named_parameters())
        loaded = set()
        for name, whole in weights:
            if "rotary_emb" in name or (
                name.startswith("lm_head.") and self.config.tie_word_embeddings
            ):
                continue
            module, _, leaf = name.rpartition(".")
            parent, _, last = module.rpartition(".")
            how = []
            if self.model.plan.bank and last in _PROJECTIONS:
                product, projection = _PROJECTIONS[last]
                name = f"{parent}.{product}.{leaf}"
                how = [projection]
            if is_pp_missing_parameter(name, self):
                continue
            if name not in params:
                raise ValueError(
                    f"{name!r} of the checkpoint has no place in {type(self).__name__}"
                )
            load = getattr(params[name], "weight_loader", default_weight_loader)
            load(params[name], whole, *how)
            loaded.add(name)
        return loaded
