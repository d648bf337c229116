"""`merge` against the adapted model, and against the arithmetic of one kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.adapters import METHODS, AdapterConfig, init_adapter, merge
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama, init_base

TINY = LlamaConfig.preset("tiny")


def random_adapter(adapter_config):
    shapes = init_adapter(jax.random.key(1), TINY, adapter_config)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return structure.unflatten([0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize(
    "adapter_config",
    [
        AdapterConfig("lora", 8, alpha=12.0),
        AdapterConfig("pf_lora", 4, targets="q,v,down", rslora=True),
        AdapterConfig("ffa", 16, alpha=8.0),
        AdapterConfig("ffa", 8, targets="k,o"),
    ],
    ids=lambda a: f"{a.method}-{len(a.targets)}",
)
def test_the_merged_base_computes_the_same(adapter_config):
    base, adapter = init_base(jax.random.key(0), TINY), random_adapter(adapter_config)
    tokens = jax.random.randint(jax.random.key(3), (2, 12), 0, TINY.vocab_size)
    bare = Llama(TINY).apply({"params": base}, tokens)
    adapted = Llama(TINY, adapter_config).apply({"params": base, "adapter": adapter}, tokens)
    merged = merge(base, adapter, TINY, adapter_config)
    found = Llama(TINY).apply({"params": merged}, tokens)
    assert jnp.abs(adapted - bare).max() > 0.1
    np.testing.assert_allclose(found, adapted, atol=1e-5 * float(jnp.abs(adapted).max()))
    # Exactly the targeted kernels changed.
    changed = {
        path[-1].key.removesuffix("_kernel")
        for path, same in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: bool((a == b).all()), base, merged)
        )
        if not same
    }
    assert changed == set(adapter_config.targets)


def test_bfloat16_is_rounded_once():
    """The k projection's kernel by hand in NumPy: float32 sum, one cast."""
    adapter_config = AdapterConfig("lora", 8, alpha=12.0)
    base, adapter = init_base(jax.random.key(0), TINY, jnp.bfloat16), random_adapter(adapter_config)
    leaves = adapter["layers"]["attention"]["qkv"]
    k = np.asarray(base["layers"]["attention"]["qkv"]["k_kernel"]).astype(np.float64)
    change = np.asarray(leaves["A"], np.float64)[..., 8:16] @ np.asarray(leaves["k_B"], np.float64)
    merged = merge(base, adapter, TINY, adapter_config)["layers"]["attention"]["qkv"]["k_kernel"]
    assert merged.dtype == jnp.bfloat16
    exact = k + 1.5 * change
    # Half a unit in the last place of bfloat16's eight bits.
    assert (np.abs(np.asarray(merged).astype(np.float64) - exact) <= np.abs(exact) * 2.0**-8 * 1.001 + 1e-12).all()


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if not row.mergeable and m != "fft"])
def test_what_goes_around_the_block_cannot_be_merged(method):
    adapter_config = AdapterConfig(method, 8)
    with pytest.raises(ValueError, match=f"{method} cannot be merged.*lora, pf_lora, ffa can"):
        merge(init_base(jax.random.key(0), TINY), random_adapter(adapter_config), TINY, adapter_config)


def test_an_adapter_of_another_rank_is_refused():
    base, adapter = init_base(jax.random.key(0), TINY), random_adapter(AdapterConfig("lora", 8))
    with pytest.raises(ValueError, match="rank 4"):
        merge(base, adapter, TINY, AdapterConfig("lora", 4))
