"""The decode step's kernel, interpreted: beside attention spelt out in float64, and in whole models
beside XLA's. On a GPU it is held to the same in test_gpu.py."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import interpret_decode_kernels, random_adapter, spread

from flora_jax import AdapterConfig, Generator, Llama, fuse
from flora_jax.adapters import Layout, gpu_layout, quantize_base
from flora_jax.errors import UserError
from flora_jax.models import decode_attention as module
from flora_jax.models.attention import kernel_runs
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import KVCache, init_base

TINY = dataclasses.replace(LlamaConfig.preset("tiny"), eos_token_id=())
TOKENS = jnp.zeros((1, 2), jnp.int32)
pytestmark = pytest.mark.usefixtures("quick_compile")


def attend(*arguments, **how):
    """The kernel's attention, its parts summed."""
    parts, cache = module.decode_attention(*arguments, **how)
    return parts.summed(), cache


interpreted = jax.jit(
    functools.partial(attend, interpret=True),
    static_argnums=4,
    static_argnames=("eps", "scale"),
)


def spelt_out(qkv, rotary, seen, past, heads):
    """Row by row and head by head, in float64: the output `[B, N·H]`, and the cache with the new
    token in it."""
    k, v, index = (np.array(one, np.float64) for one in past)
    qkv, seen = np.asarray(qkv, np.float64), np.asarray(seen)
    cos, sin = (np.asarray(table, np.float64)[:, 0, 0] for table in rotary)
    B, (BK, H, _), index = len(qkv), k.shape, int(index)
    K, out = BK // B, np.zeros((B, heads * H))

    def turned(x, b):
        first, second = np.split(x, 2)
        return np.concatenate([first * cos[b] - second * sin[b], second * cos[b] + first * sin[b]])

    for b in range(B):
        row_heads = qkv[b, : (heads + 2 * K) * H].reshape(-1, H)
        for i in range(K):
            k[b * K + i, :, index] = turned(row_heads[heads + i], b)
            v[b * K + i, index] = row_heads[heads + K + i]
        for n in range(heads):
            row = b * K + n * K // heads
            scores = turned(row_heads[n], b) @ k[row] / np.sqrt(H)
            weights = np.exp(scores - scores[seen[b]].max()) * seen[b]
            out[b, n * H : (n + 1) * H] = weights / weights.sum() @ v[row]
    return out, k, v


def draw(B, K, G, H, S, index, extra, seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    angles = rng.uniform(0, 6, (B, 1, 1, H // 2))
    seen = (rng.random((B, S)) < 0.6) & (np.arange(S) <= index) | (np.arange(S) == index)
    past = normal(B * K, H, S), normal(B * K, S, H), jnp.int32(index)
    rotary = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    return normal(B, (G + 2) * K * H + extra), rotary, jnp.asarray(seen), past, G * K


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from(
        [(1, 1, 1, 16, 20, 0), (2, 2, 3, 4, 300, 7), (1, 3, 17, 4, 600, 0), (2, 1, 4, 16, 1, 5)]
    ),
    place=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_equals_attention_spelt_out(shape, place, seed):
    B, K, G, H, S, extra = shape
    index = round(place * (S - 1))  # anywhere: before, inside and behind every part
    arguments = draw(B, K, G, H, S, index, extra, seed)
    out, (k, v) = interpreted(*arguments)
    expected = spelt_out(*arguments)
    for got, wanted in zip((out, k, v), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    old_k, old_v, _ = arguments[3]
    others = np.arange(S) != index
    np.testing.assert_array_equal(np.asarray(k)[..., others], np.asarray(old_k)[..., others])
    np.testing.assert_array_equal(np.asarray(v)[:, others], np.asarray(old_v)[:, others])


def test_half_precision():
    qkv, rotary, seen, (k, v, index), heads = draw(2, 2, 4, 32, 300, 290, 0, 1)
    qkv, k, v = (x.astype(jnp.bfloat16) for x in (qkv, k, v))
    out, (k_new, _) = interpreted(qkv, rotary, seen, (k, v, index), heads)
    assert out.dtype == k_new.dtype == jnp.bfloat16
    expected, _, _ = spelt_out(qkv, rotary, seen, (k, v, index), heads)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2e-2)


def test_many_parts_and_long_scores():
    """More slots than parts of 256, and scores that would overflow without their peak taken off, in
    part 0 or not."""
    qkv, rotary, seen, (k, v, index), heads = draw(1, 1, 2, 8, 32 * 256 + 100, 32 * 256 + 90, 0, 2)
    for scaled in (k.at[..., :10].mul(300.0), k.at[..., -200:].mul(300.0)):
        past = scaled, v, index
        out, _ = interpreted(qkv, rotary, seen, past, heads)
        np.testing.assert_allclose(out, spelt_out(qkv, rotary, seen, past, heads)[0], atol=1e-4)


@pytest.fixture
def on_this_machine(monkeypatch):
    interpret_decode_kernels(monkeypatch)


@pytest.mark.parametrize("method", [None, "ffba", "fpa", "zflora", "ffa", "pf_lora"])
def test_whole_steps_equal_those_without(method, on_this_machine):
    config = TINY
    adapter_config = None if method is None else AdapterConfig(method, 4)
    base = spread(init_base(jax.random.key(0), config))
    adapter = None if method is None else random_adapter(config, adapter_config, 1)
    fused = {"params": fuse(base, adapter, config, adapter_config)}
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, config.vocab_size)
    outs = []
    for kernels in ("none", "attention"):
        model = Llama(config, adapter_config, decode_kernels=kernels)
        step = jax.jit(model.apply)
        cache = KVCache.empty(config, 2, 12)
        mask = jnp.array([[1, 1, 1, 1], [0, 1, 1, 1]], bool)
        logits, cache = step(fused, tokens[:, :4], mask=mask, cache=cache)
        steps = [logits[:, -1:]]
        for i in (4, 5):
            logits, cache = step(
                fused, tokens[:, i : i + 1], mask=jnp.ones((2, 1), bool), cache=cache
            )
            steps.append(logits)
        outs.append((jnp.concatenate(steps, axis=1), cache))
    (plain, cache), (ours, our_cache) = outs
    np.testing.assert_allclose(ours, plain, atol=1e-5 * float(jnp.abs(plain).max()))
    for a, b in zip(jax.tree.leaves(our_cache), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_bank_generates_the_same_text(on_this_machine, monkeypatch):
    """In a GPU's layouts, that of whole layers transposed."""
    monkeypatch.setattr("flora_jax.inference.generator.device_layout", gpu_layout)
    config, adapter_config = TINY, AdapterConfig("ffba", 4)
    base = spread(init_base(jax.random.key(0), config))
    adapters = {name: random_adapter(config, adapter_config, i) for i, name in enumerate("ab")}
    prompts, names = [[1, 2, 3], [4, 5], [6, 7, 8, 9]], ["a", None, "b"]
    sizes = {"max_length": 40, "batch_size": 3}
    texts = []
    for kernels in ("none", "attention", "layer"):
        how = {**sizes, "decode_kernels": kernels}
        generator = Generator(config, base, adapters, adapter_config, **how)
        assert Layout.of(generator.params).transposed == (kernels == "layer")
        found = generator.generate(prompts, 12, adapter_names=names)
        texts.append([one.tokens for one in found])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="on a GPU it runs")
def test_only_a_gpu_runs_it():
    config = dataclasses.replace(TINY, head_dim=64)
    assert not kernel_runs(config)
    with pytest.raises(UserError, match="decode_kernels='attention' needs an NVIDIA GPU"):
        Generator(config, init_base(jax.random.key(0), config), decode_kernels="attention")
    with pytest.raises(UserError, match=r"decode_kernels='Layer'.*'layer'"):
        Generator(config, init_base(jax.random.key(0), config), decode_kernels="Layer")
    odd = dataclasses.replace(TINY, head_dim=24)
    base = fuse(init_base(jax.random.key(0), odd), None, odd, None)
    with pytest.raises(UserError, match="power of two, not 24"):
        Llama(odd, decode_kernels="attention").apply({"params": base}, TOKENS)


@pytest.mark.usefixtures("on_this_machine")
def test_float8_before_ada_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("flora_jax.inference.generator.capability", lambda: (8, 0))
    base = quantize_base(init_base(jax.random.key(0), TINY), "fp8")
    with pytest.raises(UserError, match=r"reads a base in fp8 on a GPU from Ada on.*or int8"):
        Generator(TINY, base, decode_kernels="layer")


@pytest.mark.parametrize(
    "capability, head_dim, runs",
    [
        ("9.0", 64, True),
        ("8.0", 128, True),
        ("12.0", 32, True),
        ("7.5", 64, False),
        ("gfx90a", 64, False),
        ("9.0", 80, False),
        ("9.0", 16, False),
        (None, 64, False),
    ],
)
def test_which_devices_run_it(capability, head_dim, runs, monkeypatch):
    """XLA compiles Triton from compute capability 8.0 on; AMD's devices name theirs otherwise, a
    CPU has none."""
    device = types.SimpleNamespace(
        **({} if capability is None else {"compute_capability": capability})
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert kernel_runs(dataclasses.replace(TINY, head_dim=head_dim)) == runs
