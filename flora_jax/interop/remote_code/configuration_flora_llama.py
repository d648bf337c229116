"""The configuration of a Llama with a fused adapter."""

from transformers.models.llama.configuration_llama import LlamaConfig


class FloraLlamaConfig(LlamaConfig):
    """LlamaConfig, `differences` of the base from a plain Llama, and `flora`, what rides in each
    layer's four projections.

    differences = {"biases": the projections of the four that have one, "qk_norm": whether q and k
    pass norms, "no_rope_layers": layers without rotary embeddings, "embedding_multiplier",
    "residual_multiplier", "attention_multiplier" and "logits_divisor"}.

    flora = {"method", "rank", "activation", "stream", "stream_norm", "products"}. stream: channels
    that the residual stream carries behind its hidden_size own (zflora); stream_norm: whether they
    are read over the norms' rms, as they were not always. products: for each of qkv, o,
    gate_up and down {"forward": pieces of `rank` extra outputs, by name, "matrix": outputs that a
    piece reaches through a matrix B, "repeat": outputs that a piece is repeat-and-added to,
    "backward": number of extra inputs}.
    """

    model_type = "flora_llama"
    base_model_tp_plan = None  # the fused projections are not split over devices
    flora: dict | None = None
    differences: dict | None = None
