"""Fused adapters of the FLoRA family in vLLM (arXiv 2511.00050; zflora: arXiv 2510.25784).

    vllm serve EXPORT                     a directory of `flora_jax.export --format transformers`
    vllm serve BASE --enable-lora         a bank: each request names its own adapter, a directory of
        --hf-overrides '{…}'              `flora_jax.export --format vllm` (docs/serve.md)

vLLM loads this as a plugin, in each of its processes. Written for vLLM 0.32; what it touches there
that is no public interface is all in bank.py.
"""

from __future__ import annotations

ARCHITECTURE = "FloraLlamaForCausalLM"


def register() -> None:
    """Tells vLLM of the architecture and its configuration. May be called more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from flora_vllm.plan import FloraLlamaConfig

    AutoConfig.register(FloraLlamaConfig.model_type, FloraLlamaConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"flora_vllm.llama:{ARCHITECTURE}")
