"""The configuration of a Llama with a fused adapter."""

from transformers.models.llama.configuration_llama import LlamaConfig


class FloraLlamaConfig(LlamaConfig):
    """LlamaConfig and `flora`, what rides in each layer's four projections.

    flora = {"method", "rank", "activation", "stream", "products"}. stream: channels that the
    residual stream carries behind its hidden_size own (zflora). products: for each of qkv, o,
    gate_up and down {"forward": pieces of `rank` extra outputs, by name, "matrix": outputs that a
    piece reaches through a matrix B, "repeat": outputs that a piece is repeat-and-added to,
    "backward": number of extra inputs}.
    """

    model_type = "flora_llama"
    base_model_tp_plan = None  # the fused projections are not split over devices
    flora: dict | None = None
