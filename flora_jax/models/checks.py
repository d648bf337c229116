"""The checks of a Llama before it computes; each raises UserError.

They refuse variables of another configuration, which flax would ignore, and arguments that JAX
would clamp, broadcast or read as NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import (
    AdapterConfig,
    Layout,
    check_adapter,
    check_base,
    check_fused,
    has_adapter,
)
from flora_jax.errors import UserError, require
from flora_jax.models.config import DECODE_KERNELS, LlamaConfig


def check_model(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    remat: str,
    policies: Collection[str],
    decode_kernels: str | None,
) -> None:
    """Refuses wrong fields of the model."""
    require(remat in policies, f"remat={remat!r} is unknown; known: {', '.join(policies)}")
    require(
        decode_kernels in (None, *DECODE_KERNELS),
        f"decode_kernels={decode_kernels!r} is unknown; known: {', '.join(DECODE_KERNELS)}",
    )
    kernels = decode_kernels in ("attention", "layer")
    require(
        not (kernels and config.head_dim & (config.head_dim - 1)),
        f"decode_kernels={decode_kernels!r} needs a head_dim that is a power of two, not "
        f"{config.head_dim}",
    )
    if adapter is not None:
        adapter.check(config.widths)


def check_variables(
    variables: Mapping[str, Any], config: LlamaConfig, adapter: AdapterConfig | None
) -> None:
    """Refuses trees of another configuration."""
    params = variables["params"]
    require(
        has_adapter(adapter) or not variables.get("adapter"),
        "variables hold an adapter, but the model was built without one; pass its AdapterConfig",
    )
    require(
        not config.tie_word_embeddings or "lm_head" not in params,
        "params hold an lm_head, but the configuration has tie_word_embeddings=True",
    )
    kind = Layout.of(params).kind
    if kind == "fused":
        check_fused(params, config, adapter)
    if kind == "split":
        check_base(params, config)
        if has_adapter(adapter):
            check_adapter(variables.get("adapter", {}), config, adapter)


def check_dense(layout: Layout, fuses: bool) -> None:
    """Refuses an unmerged tree where the layer computes a fused or split one (`fuses`)."""
    require(
        not fuses or layout.kind != "unmerged",
        "these variables have products apart; serve them with dense=UnmergedDense or "
        "SevenDense (flora_jax.analysis.unmerged)",
    )


def check_decode_kernels(decode_kernels: str | None, params: Mapping[str, Any]) -> None:
    """Refuses whole layers in kernels over arrays that these do not read."""
    if decode_kernels != "layer":
        return
    require(
        Layout.of(params).kind == "fused",
        "decode_kernels='layer' reads a fused model's arrays (fuse with "
        "device_layout(in_kernels=True)); with others take 'attention'",
    )


def check_tokens(tokens: jax.Array, vocab_size: int) -> None:
    """Refuses tokens that are not ids `[B, T]` of the vocabulary."""
    require(
        tokens.ndim == 2 and jnp.issubdtype(tokens.dtype, jnp.integer),
        f"tokens must be integers [B, T], not {tokens.dtype} {list(tokens.shape)}",
    )
    if isinstance(tokens, jax.core.Tracer) or not tokens.size:  # under jit there are no values
        return
    ids = np.asarray(tokens)
    least = ids.min()
    most = ids.max()
    require(
        least >= 0 and most < vocab_size,
        f"tokens from {least} to {most} are not all of the model's vocabulary: "
        f"vocab_size={vocab_size}",
    )


def check_select(select: jax.Array | None, layout: Layout) -> None:
    """Refuses a select without a bank, a bank without one, and one of another size."""
    if select is None and layout.adapters <= 1:
        return
    require(
        layout.kind != "split", "select is for a bank of fused adapters; these variables are split"
    )
    found = None
    if select is not None:
        found = select.shape[-1]
    places = layout.adapters
    require(
        found == places,
        f"the fused tree is a bank of {places} adapters and needs select [B, {places}]; {found=}",
    )


def check_dropout(deterministic: bool, layout: Layout, adapter: AdapterConfig | None) -> None:
    """Refuses dropout where the tree computes none."""
    if layout.kind == "split" or deterministic or adapter is None or not adapter.dropout:
        return
    raise UserError(
        "a fused tree is served without dropout; pass deterministic=True, or train the split one"
    )


def check_room(
    tokens: jax.Array, index: jax.Array, slots: int, segment_ids: jax.Array | None
) -> None:
    """Refuses tokens that do not fit into a cache, and segments beside one.

    slots: the cache's; index: how many of them are taken.
    """
    T = tokens.shape[1]
    taken = 0
    if not isinstance(index, jax.core.Tracer):
        taken = int(index)
    require(
        taken + T <= slots,
        f"{T} tokens from slot {taken} on do not fit into a cache of {slots} slots; make a "
        "longer one",
    )
    require(
        segment_ids is None,
        "segment_ids are for packed training rows and cannot be combined with a cache",
    )
