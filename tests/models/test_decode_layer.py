"""A layer's decode step in our kernels: each product beside its formula, whole steps beside XLA's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_adapter, spread

from flora_jax.adapters import (
    METHODS,
    AdapterConfig,
    Layout,
    fuse,
    gpu_layout,
    quantize_base,
)
from flora_jax.errors import UserError
from flora_jax.models import decode_layer
from flora_jax.models.config import LlamaConfig
from flora_jax.models.decode_product import (
    Behind,
    Columns,
    Gated,
    Normed,
    Term,
    decode_product,
)
from flora_jax.models.llama import KVCache, Llama, init_base

TINY = LlamaConfig.preset("tiny")
pytestmark = pytest.mark.usefixtures("quick_compile")
product = functools.partial(decode_product, interpret=True)


def draw(seed):
    """Arrays of normal numbers."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


def repeated(z, width):
    return np.tile(z, -(-width // z.shape[1]))[:, :width]


def silu(x):
    return x / (1 + np.exp(-x))


SHAPES = st.tuples(
    st.sampled_from([1, 3, 16]),  # B
    st.sampled_from([8, 96, 300]),  # D_in
    st.sampled_from([0, 4, 24]),  # R_b
    st.sampled_from([1, 40, 130, 2200]),  # D_out
)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_a_normed_product_and_what_is_behind_it(shape, seed):
    """In float64, NumPy: odd widths, rows that fill up the array, pieces inside another array."""
    B, D, R, N = shape
    normal = draw(seed)
    x, scale, kernel, z = normal(B, D), normal(D), normal(D + R + 5, N), normal(B, 40)
    bias, residual = normal((N + 1) // 2), normal(B, N + 1)
    small = normal(7, (N + 2) // 3)
    terms = [
        Term(Normed(x, scale, D - 1, 1e-3), kernel),
        Term(Columns(z, 9, 7), small, column=1),
        Term(Columns(z, 20, 7), small, repeat=(0, 2) if small.shape[1] > 1 else (0, 1)),
    ]
    if R:
        terms.append(Term(Columns(z, 3, R), kernel, row=D))
    behind = Behind(bias=bias, adds=(Columns(z, 2, 7),), factor=0.5, residual=residual)
    found = product(terms, N + 1, behind)

    x, kernel, z = (np.float64(one) for one in (x, kernel, z))
    normed = x / np.sqrt((x**2).sum(-1, keepdims=True) / (D - 1) + 1e-3) * scale
    y = np.zeros((B, N + 1))
    y[:, :N] = normed @ kernel[:D] + z[:, 3 : 3 + R] @ kernel[D : D + R]
    y[:, 1 : 1 + small.shape[1]] += z[:, 9:16] @ small
    y += repeated(z[:, 20:27] @ small[:, :2], N + 1)
    y[:, : len(bias)] += bias
    expected = (y + repeated(z[:, 2:9], N + 1)) * 0.5 + residual
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, adds=st.sampled_from(["", "gate", "up", "gate up"]), seed=st.integers(0, 99))
def test_a_gated_product(shape, adds, seed):
    B, F, R, N = shape
    normal = draw(seed)
    y, kernel = normal(B, 2 * F + 14), normal(F + R, N)
    gate_add, up_add = (
        Columns(y, 2 * F + start, 7) if name in adds.split() else None
        for name, start in (("gate", 0), ("up", 7))
    )
    rows = Columns(y, 1, R) if R and y.shape[1] >= 1 + R else None
    terms = [Term(Gated(y, F, gate_add, up_add), kernel)]
    if rows is not None:
        terms.append(Term(rows, kernel, row=F))
    found = product(terms, N)

    y, kernel = np.float64(y), np.float64(kernel)
    gate, up = y[:, :F], y[:, F : 2 * F]
    if gate_add is not None:
        gate = gate + repeated(y[:, 2 * F : 2 * F + 7], F)
    if up_add is not None:
        up = up + repeated(y[:, 2 * F + 7 :], F)
    expected = silu(gate) * up @ kernel[:F]
    if rows is not None:
        expected = expected + y[:, 1 : 1 + R] @ kernel[F:]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_half_precision():
    """Sums in float32, rounded once: within a bfloat16's last place of the exact product."""
    normal = draw(0)
    x, kernel, residual = (
        jnp.asarray(normal(*shape), jnp.bfloat16) for shape in ((2, 1000), (1000, 70), (2, 70))
    )
    found = product([Term(x, kernel)], 70, Behind(residual=residual))
    assert found.dtype == jnp.bfloat16
    x, kernel, residual = (np.asarray(one, np.float64) for one in (x, kernel, residual))
    np.testing.assert_allclose(np.asarray(found, np.float64), x @ kernel + residual, rtol=2**-8)


def test_too_many_rows():
    with pytest.raises(UserError, match="up to 16 rows, not 17"):
        product([Term(jnp.zeros((17, 8)), jnp.zeros((8, 8)))], 8)


@pytest.fixture
def on_this_machine(monkeypatch):
    layer = functools.partial(decode_layer.DecodeLayer, interpret=True)
    monkeypatch.setattr(decode_layer, "DecodeLayer", layer)


def two_steps(model, params, tokens, select=None):
    """Logits of two tokens a row behind a prompt, and the cache; one prompt is padded in front."""
    step = jax.jit(functools.partial(model.apply, {"params": params}, select=select))
    mask = jnp.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
    _, cache = step(tokens[:, :4], mask=mask, cache=KVCache.empty(model.config, 3, 12))
    logits = []
    for i in (4, 5):
        real = jnp.ones((3, 1), bool)
        found, cache = step(tokens[:, i : i + 1], mask=real, cache=cache)
        logits.append(found)
    return jnp.concatenate(logits, axis=1), cache


def compare(adapter_config, adapter, select=None, config=TINY):
    """Whole steps in our kernels beside XLA's, logits and cache."""
    base = spread(init_base(jax.random.key(0), config))
    params = fuse(base, adapter, config, adapter_config, gpu_layout())
    tokens = jax.random.randint(jax.random.key(2), (3, 6), 0, config.vocab_size)
    plain, ours = (
        two_steps(Llama(config, adapter_config, decode_kernels=kernels), params, tokens, select)
        for kernels in ("none", "layer")
    )
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        bound = 1e-5 * max(1, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(found, expected, atol=bound)


SETTINGS = {
    "activation": AdapterConfig("fpa", 4, activation="silu"),
    "targets": AdapterConfig("lora", 4, targets="q,v,down"),
    "add_to": AdapterConfig("ffba", 4, add_to="k,up,o,down"),
}


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("name", ["base", *(m for m in METHODS if m != "fft"), *SETTINGS])
def test_whole_steps_equal_those_without(name):
    if name == "base":
        compare(None, None)
        return
    adapter_config = SETTINGS.get(name) or AdapterConfig(name, 4)
    compare(adapter_config, random_adapter(TINY, adapter_config, 1))


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("method", ["pf_lora", "ffa", "fpa", "ffba", "ffba_qd_add", "zflora"])
def test_banks(method):
    """Each row its own adapter, or none."""
    adapter_config = AdapterConfig(method, 4)
    adapters = [random_adapter(TINY, adapter_config, seed) for seed in (1, 2)]
    select = jnp.array([[False, True], [False, False], [True, False]])
    compare(adapter_config, adapters, select)


@pytest.mark.usefixtures("on_this_machine")
def test_what_it_does_not_read():
    base = init_base(jax.random.key(0), TINY)
    transposed = Layout(kind="fused", transposed=True)
    quantised = quantize_base(base, "int8")
    tokens = jnp.zeros((1, 1), jnp.int32)
    for params in (
        base,
        fuse(base, None, TINY, None, transposed),
        fuse(quantised, None, TINY, None, gpu_layout(quantized=True)),
    ):
        with pytest.raises(UserError, match="reads a fused model's float kernels"):
            Llama(TINY, decode_kernels="layer").apply({"params": params}, tokens)
    with pytest.raises(UserError, match="decode_kernels='all' is unknown; known: none, attention"):
        Llama(TINY, decode_kernels="all").apply({"params": base}, tokens)
