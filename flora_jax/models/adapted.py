"""A model as it is scored, served and exported: a base, and over it an adapter where there is
one."""

from __future__ import annotations

import dataclasses

from flora_jax.adapters import AdapterConfig, Tree
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama
from flora_jax.tokens import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """What belongs together whenever a model is used.

    base: parameters as `Llama` takes them; arithmetic is in their dtype. tokenizer: None where
    prompts are token ids and texts are not asked for. fingerprint: of the base as it was before
    anything trained, None where nobody asks. adapter, adapter_config: None without an adapter;
    full fine-tuning has an adapter without leaves, `{}`.
    """

    config: LlamaConfig
    base: Tree
    tokenizer: Tokenizer | None = None
    fingerprint: str | None = None
    adapter_config: AdapterConfig | None = None
    adapter: Tree | None = None

    @property
    def model(self) -> Llama:
        """The Llama that computes it."""
        return Llama(self.config, self.adapter_config if self.adapter is not None else None)

    @property
    def variables(self) -> dict[str, Tree]:
        """What `model` is applied to; without an adapter's collection where it has no leaves."""
        return {"params": self.base, **({"adapter": self.adapter} if self.adapter else {})}

    @property
    def dtype(self) -> str:
        """The name of the dtype that it computes in."""
        return str(self.base["embed_tokens"]["embedding"].dtype)
