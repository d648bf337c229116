"""Llama, or a model like it, with a fused adapter of the FLoRA family (arXiv 2511.00050; zflora:
arXiv 2510.25784).

Forward adapters are extra outputs, backward adapters extra inputs of the projections that Llama
runs anyway. All else is transformers' own Llama, but for what `config.differences` states.
`config.flora` says what rides where; scales are in the weights.
"""

import sys

import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # vLLM looks for this very name
from transformers.models.llama import modeling_llama as llama

from .configuration_flora_llama import FloraLlamaConfig


class FusedLinear(nn.Module):
    """The projections of one input and the adapter's channels in one product:
    `[x | z] · W -> [ys | z_out]`.

    forward(x, z) gives the list of ys, one for each of `widths`, and z_out, without channels where
    nothing rides as outputs. It is no nn.Linear: vLLM puts a layer of its own in the place of
    those. There `quant_method` has it pack the weight on a CPU and leave a function `cpu_linear`.
    """

    def __init__(self, config, product, d_in, widths):
        flora = config.flora
        rider = flora["products"][product]
        riding = flora["rank"] * len(rider["forward"])
        super().__init__()
        self.in_features = d_in + rider["backward"]
        self.out_features = sum(widths.values()) + riding
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features))
        biased = product in config.differences["biases"]
        self.bias = nn.Parameter(torch.empty(self.out_features)) if biased else None
        self.rider = rider
        self.rank = flora["rank"]
        self.sizes = [*widths.values(), riding]
        self.pieces = [self.rank] * len(rider["forward"])
        self.act = None if flora["activation"] == "identity" else ACT2FN[flora["activation"]]
        self.B = nn.ModuleDict(
            {name: nn.Linear(self.rank, widths[name], bias=False) for name in rider["matrix"]}
        )
        # What is added to projections: to which, which piece (None: the sum of those that came in),
        # and through which matrix (None: it is repeated).
        place = {name: i for i, name in enumerate(widths)}
        piece = {name: i for i, name in enumerate(rider["forward"])}
        self.adds = [(place[name], piece[name], name) for name in rider["matrix"]]
        self.adds += [(place[name], piece.get(name), None) for name in rider["repeat"]]
        layers = sys.modules.get("vllm.model_executor.layers.linear")
        if layers is not None:
            self.quant_method = layers.UnquantizedLinearMethod()

    def extra_repr(self):
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"

    def forward(self, x, z=None):
        x = torch.cat([x, z], -1) if self.rider["backward"] else x
        linear = getattr(self, "cpu_linear", nn.functional.linear)
        *ys, out = linear(x, self.weight, self.bias).split_with_sizes(self.sizes, -1)
        out = out if self.act is None else self.act(out)
        pieces = out.split_with_sizes(self.pieces, -1) if self.adds and self.pieces else ()
        for at, i, name in self.adds:
            piece = z.unflatten(-1, (-1, self.rank)).sum(-2) if i is None else pieces[i]
            if name is None:
                ys[at] = repeat_and_add(ys[at], piece)
            else:
                ys[at] = ys[at] + self.B[name](piece)
        return ys, out


def repeat_and_add(y, z):
    """y and z tiled along the last axis to y's width."""
    return (y.unflatten(-1, (-1, z.shape[-1])) + z.unsqueeze(-2)).flatten(-2)


def scaled(x, factor):
    """What a block adds to the stream, or what enters it."""
    return x if factor == 1 else x * factor


# vLLM puts its own norm in the place of one that is nothing but a norm, which these are not.
# transformers sets a norm's weights to one by the name of its class, which must hold "RMSNorm".


class RMSNormOfStream(llama.LlamaRMSNorm):
    """Norm of the hidden_size own channels of the stream; those behind them are over the same
    rms."""

    def forward(self, hidden_states):
        width = self.weight.shape[0]
        x, z = hidden_states.split([width, hidden_states.shape[-1] - width], -1)
        square = x.float().pow(2).mean(-1, keepdim=True)
        z = (z.float() * torch.rsqrt(square + self.variance_epsilon)).to(z.dtype)
        return torch.cat([super().forward(x), z], -1)


class RMSNormAfterStream(llama.LlamaRMSNorm):
    """Norm of the stream's own channels, over the divisor of the logits."""

    def __init__(self, config):
        super().__init__(config.hidden_size, eps=config.rms_norm_eps)
        self.divisor = config.differences["logits_divisor"]

    def forward(self, hidden_states):
        return super().forward(hidden_states[..., : self.weight.shape[0]]) / self.divisor


class FloraLlamaAttention(llama.LlamaAttention):
    """Attention with q, k and v in one product."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        D = config.hidden_size + config.flora["stream"]
        Q = config.num_attention_heads * self.head_dim
        K = config.num_key_value_heads * self.head_dim
        self.qkv_proj = FusedLinear(config, "qkv", D, {"q": Q, "k": K, "v": K})
        self.o_proj = FusedLinear(config, "o", Q, {"o": D})
        differences = config.differences
        self.qk_norm = differences["qk_norm"]
        self.turned = layer_idx not in differences["no_rope_layers"]
        self.scaling = differences["attention_multiplier"]
        self.residual_multiplier = differences["residual_multiplier"]
        if self.qk_norm:
            self.q_norm = llama.LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = llama.LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def __setattr__(self, name, value):
        # vLLM hangs its own attention here, which has the heads of one device.
        if name == "attn" and value.num_heads != self.config.num_attention_heads:
            raise NotImplementedError(
                "flora_llama is not split over devices: tensor_parallel_size must be 1"
            )
        super().__setattr__(name, value)

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        shape = hidden_states.shape[:-1]
        ys, z = self.qkv_proj(hidden_states)
        q, k, v = (y.view(*shape, -1, self.head_dim) for y in ys)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.turned:
            q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        cache = kwargs.pop("cache", past_key_values)  # its name since transformers 5.24
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        implementation = self.config._attn_implementation
        attend = llama.eager_attention_forward
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, attend)
        elif implementation != "eager":  # transformers 5.0
            attend = ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        (out,), _ = self.o_proj(out.reshape(*shape, -1).contiguous(), z)
        return scaled(out, self.residual_multiplier), weights


class FloraLlamaMLP(nn.Module):
    """SwiGLU with gate and up in one product."""

    def __init__(self, config):
        super().__init__()
        D, F = config.hidden_size + config.flora["stream"], config.intermediate_size
        self.gate_up_proj = FusedLinear(config, "gate_up", D, {"gate": F, "up": F})
        self.down_proj = FusedLinear(config, "down", F, {"down": D})
        self.residual_multiplier = config.differences["residual_multiplier"]
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        (gate, up), z = self.gate_up_proj(x)
        (out,), _ = self.down_proj(self.act_fn(gate) * up, z)
        return scaled(out, self.residual_multiplier)


class FloraLlamaDecoderLayer(llama.LlamaDecoderLayer):
    """Llama's layer with its parts replaced."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn, self.mlp = FloraLlamaAttention(config, layer_idx), FloraLlamaMLP(config)
        if config.flora["stream"]:
            D, eps = config.hidden_size, config.rms_norm_eps
            self.input_layernorm = RMSNormOfStream(D, eps=eps)
            self.post_attention_layernorm = RMSNormOfStream(D, eps=eps)


class FloraLlamaPreTrainedModel(llama.LlamaPreTrainedModel):
    """What the model with and without its head share."""

    config_class = FloraLlamaConfig
    _no_split_modules = ["FloraLlamaDecoderLayer"]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, FusedLinear):  # as a Linear
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class FloraLlamaModel(FloraLlamaPreTrainedModel, llama.LlamaModel):
    """Llama's stack, its stream as wide as the adapter needs it."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(
            FloraLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        if config.flora["stream"] or config.differences["logits_divisor"] != 1:
            self.norm = RMSNormAfterStream(config)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = scaled(x, self.config.differences["embedding_multiplier"])
        x = nn.functional.pad(x, (0, self.config.flora["stream"]))
        cache = kwargs.pop("cache", past_key_values)  # its name since transformers 5.24
        return super().forward(None, attention_mask, position_ids, cache, x, **kwargs)


class FloraLlamaForCausalLM(FloraLlamaPreTrainedModel, llama.LlamaForCausalLM):
    """What AutoModelForCausalLM gives."""

    def __init__(self, config):
        if config.tie_word_embeddings and transformers.__version__ == "5.3.0":
            raise ImportError(
                "transformers 5.3.0 draws the tied lm_head of a model with code of its own at "
                "random; take another version"
            )
        super().__init__(config)
        self.model = FloraLlamaModel(config)
        self.post_init()
