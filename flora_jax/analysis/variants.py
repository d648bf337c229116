"""The ways of serving a base with an adapter that are timed and planned, as a table.

A variant is a model and the tree it serves, all made from the same base. `base` is the reference of
all ratios (four merged products a layer; `base_7` has seven). `lora`, `lora_7` and `parallel` are
unmerged, `lora_merged` and `ffa_merged` are added to W, and all others are fused into the base's
arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.adapters import (
    METHODS,
    AdapterConfig,
    Layout,
    Tree,
    abstract_adapter,
    fuse,
    merge,
    quantization_format,
    quantize_base,
)
from flora_jax.analysis.unmerged import SevenDense, UnmergedDense, unmerge
from flora_jax.errors import UserError, near_misses, require
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama

# XLA's option against merging LoRA's products with the base's, which it does above batch 1.
NO_DOT_MERGER = {"xla_gpu_dot_merger_threshold_mb": 0}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of serving.

    method: the adapter's, None for the bare base; kind: "fused", "unmerged" (its products beside
    the base's) or "merged" (into W); seven: whether the base has seven products a layer, as it is
    published, rather than four; fold_adds: as in Layout.
    """

    method: str | None
    kind: str = "fused"
    seven: bool = False
    fold_adds: bool = False


VARIANTS: dict[str, Variant] = {
    "base": Variant(None),
    "base_7": Variant(None, "unmerged", seven=True),
    "lora": Variant("lora", "unmerged"),
    "lora_7": Variant("lora", "unmerged", seven=True),
    "lora_merged": Variant("lora", "merged"),
    "pf_lora": Variant("pf_lora"),
    "ffa": Variant("ffa"),
    "ffa_merged": Variant("ffa", "merged"),
    "fpa": Variant("fpa"),
    "parallel": Variant("parallel", "unmerged"),
    "ffba": Variant("ffba"),
    "ffba_folded": Variant("ffba", fold_adds=True),
    "ffba_qg_add": Variant("ffba_qg_add"),
    "ffba_qg_add_folded": Variant("ffba_qg_add", fold_adds=True),
    "ffba_qd_add": Variant("ffba_qd_add"),
    "ffba_qd_add_folded": Variant("ffba_qd_add", fold_adds=True),
    "zflora": Variant("zflora"),
}


def variants() -> dict[str, Variant]:
    """The table, and every further method of METHODS, fused."""
    fused = {name: Variant(name) for name, row in METHODS.items() if row.reads is not None}
    return {**VARIANTS, **{name: fused[name] for name in fused.keys() - VARIANTS.keys()}}


def get_variant(name: str) -> Variant:
    """A variant by name. Raises UserError, with near misses, if there is none."""
    known = variants()
    if name not in known:
        raise UserError(f"method {name!r} is unknown here; {near_misses(name, known)}")
    return known[name]


def check_served(names: Iterable[str], quantization: str) -> None:
    """Raises UserError for a variant that changes the base's weights, if they are quantised."""
    for name in names:
        require(
            quantization == "none" or not get_variant(name).fold_adds,
            f"--methods {name} folds its adds into the base, which --quantization {quantization} "
            "keeps in codes; leave one of the two out",
        )


def trained_parameters(config: LlamaConfig, adapter_config: AdapterConfig) -> int:
    """The number of parameters of the adapter."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_adapter(config, adapter_config)))


def rank_for(method: str, config: LlamaConfig, parameters: int) -> int:
    """The rank at which `method` comes nearest to a number of trained parameters.

    Only ranks that the method can have count. Raises UserError for fft, which has none.
    """
    one = trained_parameters(config, AdapterConfig(method, 1))
    require(
        one and parameters,
        "fft has no adapter, so no rank equals another's parameters; name a method that has one",
    )

    def fits(rank: int) -> bool:
        try:
            AdapterConfig(method, rank).check(config.widths)
        except UserError:
            return False
        return True

    nearest = max(1, round(parameters / one))
    ranks = [rank for rank in range(1, 4 * nearest + 1) if fits(rank)]

    def distance(rank: int) -> int:
        return abs(trained_parameters(config, AdapterConfig(method, rank)) - parameters)

    return min(ranks, key=distance)


def random_adapter(
    key: jax.Array, config: LlamaConfig, adapter_config: AdapterConfig, std: float = 0.02
) -> Tree:
    """An adapter with every leaf drawn from N(0, std), float32: it takes the time of a trained
    one."""
    leaves, structure = jax.tree.flatten(abstract_adapter(config, adapter_config))
    keys = jax.random.split(key, max(1, len(leaves)))
    drawn = [std * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=False)]
    return structure.unflatten(drawn)


def serve(
    name: str,
    base: Tree,
    config: LlamaConfig,
    adapter_config: AdapterConfig | None,
    adapter: Tree | None,
    layout: Layout,
    decode_kernels: str | None = None,
) -> tuple[Llama, Tree]:
    """`(model, params)` of a variant, for `model.apply({"params": params}, tokens)`.

    base, adapter: split trees; adapter_config: of the variant's method, None for the bare base;
    layout: a fused one, of the device; decode_kernels: as in `Llama`. Works on shapes under
    `jax.eval_shape`. Raises UserError for an unknown variant.
    """
    variant = get_variant(name)
    if variant.kind == "unmerged":
        how = {"seven": variant.seven, "transposed": layout.transposed}
        tree = unmerge(base, adapter, config, adapter_config, **how)
        dense = UnmergedDense
        if variant.seven:
            dense = SevenDense
        return Llama(config, adapter_config, decode_kernels=decode_kernels, dense=dense), tree
    if variant.kind == "merged":
        quantization = quantization_format(base)
        base = quantize_base(merge(base, adapter, config, adapter_config), quantization)
        adapter = adapter_config = None
    tree = fuse(base, adapter, config, adapter_config, layout, fold_adds=variant.fold_adds)
    return Llama(config, adapter_config, decode_kernels=decode_kernels), tree


def read_bytes(params: Mapping[str, Any], config: LlamaConfig) -> int:
    """Bytes of weights that one decode step reads.

    An embedding that is not tied does not count: only single rows of it are looked up. A tied one
    is also the unembedding, which is read whole.
    """
    size = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))
    embedding = params["embed_tokens"]["embedding"]
    if not config.tie_word_embeddings:
        size -= embedding.size * jnp.dtype(embedding.dtype).itemsize
    return size
