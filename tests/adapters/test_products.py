"""The products of training: values, gradients, and the dtypes that XLA is given them in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax import AdapterConfig, Llama, LlamaConfig, init_adapter
from flora_jax.adapters.products import project
from flora_jax.models.llama import init_base
from flora_jax.training.loss import chunked_cross_entropy

TINY = LlamaConfig.preset("tiny")


def loss(x, kernel, times):
    return jnp.sin(times(x, kernel)).sum()


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_the_gradients_are_the_automatic_ones(shape):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (7, 4))
    np.testing.assert_array_equal(project(x, kernel), x @ kernel)
    found = jax.grad(loss, (0, 1))(x, kernel, project)
    wanted = jax.grad(loss, (0, 1))(x, kernel, jnp.matmul)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_once():
    """Of float32 sums, gradients too."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, cotangent = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, [(6, 300), (300, 5), (6, 5)], strict=True)
    )
    y, back = jax.vjp(project, x, kernel)
    wide = [np.asarray(a, np.float64) for a in (x, kernel, cotangent)]
    sums = (wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2])
    for one, exact in zip((y, *back(cotangent)), sums, strict=True):
        assert one.dtype == jnp.bfloat16
        # half a unit in the last of 8 bits, and what the float32 sum is off by
        np.testing.assert_allclose(np.asarray(one, np.float64), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("trains, products", [((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_a_frozen_kernel_has_no_gradient(trains, products):
    """Nor is the input kept for one."""
    x = jnp.ones((3, 7))
    kernel = jnp.ones((7, 4))
    program = jax.make_jaxpr(jax.grad(loss, trains), static_argnums=2)(x, kernel, project)
    assert str(program).count("dot_general") == products


@pytest.mark.parametrize("platform, gives", [("cpu", {"f32"}), ("cuda", {"f32", "bf16"})])
@pytest.mark.parametrize("method", ["fft", "lora", "fpa", "ffba", "zflora"])
@pytest.mark.parametrize("remat", ["products", "full"])
def test_every_product_of_a_step_is_of_bfloat16(method, remat, platform, gives):
    """And for a CPU gives float32: of any other XLA makes a slow one there. For a GPU scores and
    logits alone do, wherever the program is made."""
    adapter_config = AdapterConfig(method, 8)
    model = Llama(TINY, adapter_config, jnp.bfloat16, jnp.bfloat16, remat)

    def total(trained, frozen, tokens):
        variables = {**frozen, **trained}
        hidden, _ = model.apply(variables, tokens, method="hidden")
        unembedding = variables["params"]["embed_tokens"]["embedding"]
        weights = jnp.ones(tokens.shape)
        return chunked_cross_entropy(hidden, unembedding, tokens, weights, 64, 64).sum()

    key = jax.random.key(0)
    base = jax.eval_shape(lambda: {"params": init_base(key, TINY, jnp.bfloat16)})
    adapter = jax.eval_shape(lambda: {"adapter": init_adapter(key, TINY, adapter_config)})
    trained, frozen = (base, {}) if method == "fft" else (adapter, base)
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    traced = jax.jit(jax.grad(total)).trace(trained, frozen, tokens)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    kinds = [
        tuple(re.findall(r"x([a-wyz]+\d+)>", line.rpartition(" : ")[2]))
        for line in program.splitlines()
        if "dot_general" in line
    ]
    assert len(kinds) > 20
    assert set(kinds) == {("bf16", "bf16", kind) for kind in gives}
