"""FLoRA: fused forward-backward adapters for Llamas, in JAX.

The public names are imported when first used, so that `python -m flora_jax.COMMAND --help` answers
at once.
"""

import importlib
import os

# transformers serves for its tokenizers alone: its notice that torch is absent would only puzzle.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOMES = {
    "AdapterConfig": "flora_jax.adapters",
    "Generator": "flora_jax.inference.generator",
    "Llama": "flora_jax.models.llama",
    "LlamaConfig": "flora_jax.models.config",
    "Message": "flora_jax.data",
    "Sampling": "flora_jax.inference.sampling",
    "encode_prompt": "flora_jax.data",
    "fuse": "flora_jax.adapters",
    "init_adapter": "flora_jax.adapters",
    "load_adapted": "flora_jax.interop.adapter_files",
    "load_pretrained": "flora_jax.models.loading",
    "load_tokenizer": "flora_jax.models.tokenizer",
    "merge": "flora_jax.adapters",
    "split": "flora_jax.adapters",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'flora_jax' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
