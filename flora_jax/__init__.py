"""FLoRA: fused forward-backward adapters for Llamas, in JAX."""

from flora_jax.adapters import AdapterConfig, init_adapter
from flora_jax.inference.generator import Generator
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama
from flora_jax.models.loading import load_pretrained
from flora_jax.models.tokenizer import load_tokenizer

__all__ = [
    "AdapterConfig",
    "Generator",
    "Llama",
    "LlamaConfig",
    "init_adapter",
    "load_pretrained",
    "load_tokenizer",
]
