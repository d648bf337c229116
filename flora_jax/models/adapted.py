"""A model as it is scored, served and exported: a base, and an adapter over it if there is one.

A base is identified by a digest of its parameters, so that no adapter is used on another base
unnoticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import AdapterConfig, Quantized, Tree, paths, sums_of
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama
from flora_jax.tokens import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """The parts of a model, which travel together.

    config: the architecture; base: parameters as `Llama` takes them, and arithmetic is in their
    dtype; tokenizer: None where prompts are token ids and no text is needed; fingerprint: of the
    base before anything trained, None where it is not needed; adapter, adapter_config: None without
    an adapter. Full fine-tuning has an adapter without leaves, `{}`.
    """

    config: LlamaConfig
    base: Tree
    tokenizer: Tokenizer | None = None
    fingerprint: str | None = None
    adapter_config: AdapterConfig | None = None
    adapter: Tree | None = None

    @property
    def model(self) -> Llama:
        """The Llama that computes with these parts."""
        if self.adapter is None:
            return Llama(self.config, None)
        return Llama(self.config, self.adapter_config)

    @property
    def variables(self) -> dict[str, Tree]:
        """The variables of `model`; an adapter without leaves has no collection there."""
        variables = {"params": self.base}
        if self.adapter:
            variables["adapter"] = self.adapter
        return variables

    @property
    def dtype(self) -> str:
        """The name of the dtype that the model computes in."""
        return str(self.base["embed_tokens"]["embedding"].dtype)


_AT_ONCE = 2**24  # values; XLA on a CPU writes their mixed bits to memory before it sums them


_sums = jax.jit(sums_of)


def _digest(leaf: jax.Array | Quantized) -> list[int]:
    """The sums of a whole leaf, the same on every mesh; for a quantised one the sums of its
    floats."""
    if isinstance(leaf, Quantized):
        return np.asarray(leaf.sums).sum(0, dtype=np.uint32).tolist()
    row = math.prod(leaf.shape[1:])
    rows = leaf.shape[0]
    if len(leaf.sharding.device_set) == 1:
        rows = max(1, _AT_ONCE // row)
    total = np.zeros(2, np.uint32)
    for i in range(0, leaf.shape[0], rows):
        total += np.asarray(_sums(leaf[i : i + rows], jnp.uint32(i * row % 2**32)))
    return total.tolist()


def base_fingerprint(params: Mapping[str, Any]) -> str:
    """A hex digest of every base parameter's path, shape and value, however they are sharded.

    Values are rounded to bfloat16 first, so that a checkpoint has one fingerprint whether it is
    loaded in float32, in bfloat16 or quantised.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(paths(params).items()):
        digest.update(f"{path} {leaf.shape} {_digest(leaf)}\n".encode())
    return digest.hexdigest()[:32]
