"""Quantised bases: codes against closed forms and bitsandbytes, what is computed over them against
the floats that they stand for, and what rides in their codes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_adapter, spread

from flora_jax.adapters import (
    METHODS,
    PRODUCTS,
    QUANTIZATIONS,
    AdapterConfig,
    Layout,
    Quantized,
    check_quantization,
    dequantize_base,
    fuse,
    is_quantized,
    join,
    merge,
    paths,
    quantization_of,
    quantize,
    quantize_base,
    served_bytes,
    split,
)
from flora_jax.adapters.quantized import Scaled, dequantize, multiply_quantized
from flora_jax.analysis.variants import serve
from flora_jax.errors import UserError
from flora_jax.inference.generator import Generator
from flora_jax.models import config as models_config
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import from_hf_tensors, to_hf_tensors
from flora_jax.models.llama import Llama, abstract_base, init_base

pytestmark = pytest.mark.usefixtures("quick_compile")

FORMATS = [name for name in QUANTIZATIONS if name != "none"]
ADAPTED = [method for method in METHODS if method != "fft"]
# Blocks of 64 divide its widths; biases, so that these are seen to stay floats.
CONFIG = dataclasses.replace(
    LlamaConfig.preset("tiny"),
    hidden_size=128,
    intermediate_size=192,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    biases=("qkv", "o", "gate_up", "down"),
    eos_token_id=(),
)
TOKENS = jax.random.randint(jax.random.key(3), (2, 12), 0, CONFIG.vocab_size)
REFERENCE = Path(__file__).parent / "reference/nf4.npz"


@pytest.fixture(scope="module")
def base():
    return spread(init_base(jax.random.key(0), CONFIG))


@pytest.fixture(scope="module")
def bases(base):
    return {name: quantize_base(base, name) for name in FORMATS}


def kernel_of(seed, rows, columns):
    """Columns of very unequal size, one of them empty."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((rows, columns)) * np.exp(2 * rng.standard_normal(columns))
    kernel[:, 0] = 0
    return kernel.astype(np.float32)


def unpacked(codes):
    """nf4's codes `[d_in, d_out]`: an even row is in the low half of a byte."""
    return np.stack([codes & 15, codes >> 4], axis=-2).reshape(-1, codes.shape[-1])


def test_the_formats_are_those_that_commands_name():
    assert QUANTIZATIONS == models_config.QUANTIZATIONS


@given(st.integers(0, 10**6), st.sampled_from([64, 128, 192]), st.integers(2, 9))
@settings(max_examples=10, deadline=None)
def test_int8_and_fp8_are_rounded_to_the_nearest(seed, rows, columns):
    kernel = kernel_of(seed, rows, columns)
    for name, largest, kind in (("int8", 127.5, np.int8), ("fp8", 448, ml_dtypes.float8_e4m3fn)):
        found = quantize(kernel, name)
        scale = np.abs(kernel).max(0) / largest
        np.testing.assert_allclose(found.scale[0, 1:], scale[1:], rtol=1e-6)
        assert found.codes.dtype == kind and found.shape == kernel.shape
        values = np.asarray(dequantize(found))
        assert not values[:, 0].any() and np.isfinite(values).all()
        # half a step of an integer; 3 bits of a float behind the first
        step = scale / 2 if name == "int8" else np.maximum(np.abs(kernel) / 16, scale * 2.0**-10)
        assert (np.abs(values - kernel) <= step * 1.001 + 1e-30).all()
        error = np.sqrt(np.square(values - kernel).mean() / np.square(kernel).mean())
        np.testing.assert_allclose(found.error, error, rtol=1e-4)


def test_nf4_has_the_codes_of_bitsandbytes():
    """Its blocks run along a row of `[out, in]`. Our scales are in 8 bits, so values differ by a
    half of their step."""
    theirs = np.load(REFERENCE)
    found = quantize(theirs["weights"].T, "nf4")
    np.testing.assert_array_equal(unpacked(np.asarray(found.codes)), theirs["codes"].T)
    absmax = theirs["absmax"].reshape(len(theirs["weights"]), -1).T
    step, middle = found.span
    scale = np.asarray(found.scale) * step + middle
    assert found.scale.dtype == np.int8
    assert (np.abs(scale - absmax) <= 0.51 * step + 1e-7 * absmax).all()
    values = theirs["table"][theirs["codes"].T] * np.repeat(scale, 64, axis=0)
    np.testing.assert_allclose(dequantize(found), values, rtol=1e-6)


@pytest.mark.parametrize("name, share", [("int8", 0.27), ("fp8", 0.27), ("nf4", 0.15)])
def test_kernels_alone_are_quantised_and_take_fewer_bytes(base, bases, name, share):
    plain = paths(base)
    found = paths(bases[name])
    assert found.keys() == plain.keys()
    for path, leaf in found.items():
        assert isinstance(leaf, Quantized) == is_quantized(path) == path.endswith("_kernel"), path
        assert leaf.shape == plain[path].shape
        if not is_quantized(path):
            np.testing.assert_array_equal(leaf, plain[path])
    kernels = [path for path in found if is_quantized(path)]
    parts = jax.tree.leaves([found[path] for path in kernels])
    assert sum(part.nbytes for part in parts) <= share * sum(plain[p].nbytes for p in kernels)
    values = sum(leaf.size for leaf in plain.values())
    kept = sum(leaf.size for path, leaf in plain.items() if not is_quantized(path))
    assert served_bytes(bases[name]) == values - kept + 4 * kept
    assert base_fingerprint(bases[name]) == base_fingerprint(base)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), bases[name])
    assert shapes == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_base(CONFIG, quantization=name)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_base_quantised_as_it_is_read_is_the_same(base, bases, name):
    tensors = dict(to_hf_tensors(CONFIG, base))
    read = from_hf_tensors(CONFIG, tensors, quantization=name)
    for path, leaf in paths(read).items():
        for one, other in zip(
            jax.tree.leaves(leaf), jax.tree.leaves(paths(bases[name])[path]), strict=True
        ):
            # sums of squares in another order
            np.testing.assert_allclose(
                np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-5
            )
    assert quantization_of(read)["format"] == name


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_product_in_bfloat16_scales_in_float32(name):
    """So that no column is off by what bfloat16 would round its scale by, up to 4e-3."""
    kernel = quantize(kernel_of(3, 128, 40), name)
    x = jax.random.normal(jax.random.key(0), (2000, 128)).astype(jnp.bfloat16)
    found = np.asarray(multiply_quantized(x, kernel), np.float64)[:, 1:]
    owed = (np.asarray(x, np.float64) @ np.asarray(dequantize(kernel), np.float64))[:, 1:]
    gain = (found * owed).sum(0) / np.square(owed).sum(0)
    assert np.abs(gain - 1).max() < 5e-4
    cotangent = jnp.zeros((1, 40), jnp.bfloat16).at[0, 5].set(1)
    back = jax.vjp(multiply_quantized, x[:1], kernel)[1](cotangent)[0]
    column = np.asarray(dequantize(kernel))[:, 5]
    np.testing.assert_allclose(np.asarray(back[0], np.float32), column, rtol=2.0**-7)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_and_its_gradient(bases, name):
    kernel = paths(bases[name])["layers/mlp/down/down_kernel"][1]
    floats = dequantize(kernel)
    x = jax.random.normal(jax.random.key(1), (2, 3, floats.shape[0]))
    tol = 1e-5 * float(jnp.abs(x @ floats).max())
    np.testing.assert_allclose(multiply_quantized(x, kernel), x @ floats, atol=tol)
    found = jax.grad(lambda x: jnp.square(multiply_quantized(x, kernel)).sum())(x)
    owed = jax.grad(lambda x: jnp.square(x @ floats).sum())(x)
    np.testing.assert_allclose(found, owed, atol=1e-5 * float(jnp.abs(owed).max()))


@pytest.mark.parametrize(
    "name, method",
    [
        *(("int8", method) for method in ADAPTED),
        *(
            (name, method)
            for name in ("fp8", "nf4")
            for method in ("lora", "ffba_qg_add", "zflora")
        ),
    ],
)
def test_every_method_over_codes(bases, name, method):
    """Logits and gradients are those over the floats that the codes stand for; fused, the adapter
    is in codes, too."""
    adapter_config = AdapterConfig(method, 8, alpha=6.0)
    adapter = random_adapter(CONFIG, adapter_config, 1, std=0.05)
    model = Llama(CONFIG, adapter_config, remat="full")
    floats = dequantize_base(bases[name])

    def loss(adapter, base):
        logits = model.apply({"params": base, "adapter": adapter}, TOKENS)
        return jnp.square(logits).mean(), logits

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), grads = compute(adapter, bases[name])
    (_, owed), owed_grads = compute(adapter, floats)
    np.testing.assert_allclose(logits, owed, atol=2e-5 * float(jnp.abs(owed).max()))
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(owed_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(other).max()))
    bare = Llama(CONFIG).apply({"params": floats}, TOKENS)
    effect = float(jnp.abs(logits - bare).max())
    assert effect > 0.03 * float(jnp.abs(bare).max())
    if name == "nf4":
        return
    for transposed in (False, True):
        fused = fuse(bases[name], adapter, CONFIG, adapter_config, transposed=transposed)
        found = Llama(CONFIG, adapter_config).apply({"params": fused}, TOKENS)
        off = float(jnp.abs(found - logits).max())
        assert 0 < off < {"int8": 0.03, "fp8": 0.08}[name] * effect


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_bare_base_is_served_as_it_is(bases, name):
    """Its codes and scales are in the arrays to the bit, beside an adapter or not."""
    adapter_config = AdapterConfig("ffba", 8)
    adapter = random_adapter(CONFIG, adapter_config, 1)
    fused = fuse(bases[name], adapter, CONFIG, adapter_config, row_multiple=128)
    own = paths(bases[name])
    for product, block in (
        ("qkv", "attention"),
        ("o", "attention"),
        ("gate_up", "mlp"),
        ("down", "mlp"),
    ):
        leaf = fused["layers"]["1"][block][product]["kernel"]
        assert isinstance(leaf, Scaled)
        edge = 0
        for projection in PRODUCTS[product]:
            kernel = own[f"layers/{block}/{product}/{projection}_kernel"][1]
            rows, width = kernel.shape
            np.testing.assert_array_equal(leaf.codes[:rows, edge : edge + width], kernel.codes)
            np.testing.assert_array_equal(leaf.scale[edge : edge + width], kernel.scale[0])
            edge += width
        if leaf.factor is not None:
            assert (np.asarray(leaf.factor[:rows]) == 1).all() and leaf.codes.shape[0] % 128 == 0
            # of the adapter's rows: powers of two, which are exact
            exponents = np.log2(np.asarray(leaf.factor[rows:]))
            np.testing.assert_array_equal(exponents, np.round(exponents))
    tokens = Llama(CONFIG).apply({"params": fuse(bases[name], None, CONFIG, None)}, TOKENS)
    owed = Llama(CONFIG).apply({"params": bases[name]}, TOKENS)
    np.testing.assert_allclose(tokens, owed, atol=1e-5 * float(jnp.abs(owed).max()))


@pytest.mark.parametrize(
    "name, method",
    [
        ("int8", "ffba_qg_add"),
        ("int8", "zflora"),
        ("int8", "pf_lora"),
        ("fp8", "fpa"),
        ("nf4", "ffba"),
    ],
)
def test_switching_and_banks(bases, prompts, name, method):
    """An adapter that was written over another answers as one that was fused alone, and so does
    each row of a bank."""
    adapter_config = AdapterConfig(method, 8, alpha=12.0)
    adapters = {one: random_adapter(CONFIG, adapter_config, i) for i, one in enumerate("abc")}
    settings = {"max_length": 64, "batch_size": 8}
    alone = {None: Generator(CONFIG, bases[name], **settings).generate(prompts, 6)}
    for one, adapter in adapters.items():
        only = Generator(CONFIG, bases[name], {one: adapter}, adapter_config, **settings)
        alone[one] = only.generate(prompts, 6)
    generator = Generator(CONFIG, bases[name], adapters, adapter_config, **settings)
    for one in ("b", None, "c"):
        generator.use(one)
        assert generator.generate(prompts, 6) == alone[one]
    names = ["b", None, "a", "c", "b"]
    expected = [alone[one][i] for i, one in enumerate(names)]
    assert generator.generate(prompts, 6, adapter_names=names) == expected
    assert len({tuple(one[1].tokens) for one in alone.values()}) == 4


@pytest.mark.parametrize("narrow", [1, 1e-2, 1e-4])
def test_a_narrow_column_does_not_cost_the_others(narrow):
    """Rows share their columns' scales: of one far below the rest at most its value is lost."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((64, 32)).astype(np.float32)
    kernel[:, 7] *= narrow
    rows = 0.1 * rng.standard_normal((8, 32)).astype(np.float32)
    rows[3] = 0
    array = join([quantize(kernel, "int8")]).padded(72, 32).with_rows(jnp.asarray(rows), 64)
    found = array.factor[64:, None] * array.codes[64:].astype(jnp.float32) * array.scale
    error = np.linalg.norm(found - rows, axis=1)
    cut = np.abs(rows[:, 7]) if narrow < 1 else 0
    assert (error <= 0.01 * np.linalg.norm(rows, axis=1) + cut).all()
    assert (np.abs(found) <= np.abs(rows) + array.factor[64:, None] * array.scale).all()
    assert not found[3].any()


def test_the_baselines_over_codes(bases):
    """LoRA's products beside the base's four or seven in codes; and merged, in codes again."""
    adapter_config = AdapterConfig("lora", 8)
    adapter = random_adapter(CONFIG, adapter_config, 1)
    variables = {"params": bases["int8"], "adapter": adapter}
    unfused = Llama(CONFIG, adapter_config).apply(variables, TOKENS)
    layout = Layout(kind="fused", transposed=True)
    merged = quantize_base(merge(bases["int8"], adapter, CONFIG, adapter_config), "int8")
    requantized = Llama(CONFIG).apply({"params": merged}, TOKENS)
    for variant, owed in (("lora", unfused), ("lora_7", unfused), ("lora_merged", requantized)):
        model, params = serve(variant, bases["int8"], CONFIG, adapter_config, adapter, layout)
        found = model.apply({"params": params}, TOKENS)
        np.testing.assert_allclose(found, owed, atol=1e-5 * float(jnp.abs(owed).max()))


def test_merging_gives_floats(bases):
    adapter_config = AdapterConfig("lora", 8)
    adapter = random_adapter(CONFIG, adapter_config, 1)
    merged = merge(bases["int8"], adapter, CONFIG, adapter_config)
    found = Llama(CONFIG).apply({"params": merged}, TOKENS)
    variables = {"params": bases["int8"], "adapter": adapter}
    owed = Llama(CONFIG, adapter_config).apply(variables, TOKENS)
    np.testing.assert_allclose(found, owed, atol=2e-5 * float(jnp.abs(owed).max()))


def test_what_is_refused(bases):
    with pytest.raises(UserError, match=r"quantization='int4'.*int8"):
        check_quantization("int4", CONFIG)
    narrow = LlamaConfig.preset("tiny")
    with pytest.raises(UserError, match=r"nf4.*blocks? of 64 rows.*96 rows.*use int8 or fp8"):
        check_quantization("nf4", narrow)
    check_quantization("int8", narrow)
    floats = init_base(jax.random.key(0), narrow)
    for name, base, words in (
        ("int4", floats, "quantization='int4'"),
        ("nf4", floats, "96 rows"),
        ("int8", bases["nf4"], "the base is in nf4 already"),
    ):
        with pytest.raises(UserError, match=words):
            quantize_base(base, name)
    with pytest.raises(UserError, match="the base is in int8; HF tensors are those of"):
        next(to_hf_tensors(CONFIG, bases["int8"]))
    adapter_config = AdapterConfig("ffba", 8)
    adapter = random_adapter(CONFIG, adapter_config, 1)
    with pytest.raises(UserError, match="fold_adds changes the base, and this one is quantised"):
        fuse(bases["int8"], adapter, CONFIG, adapter_config, fold_adds=True)
    fused = fuse(bases["int8"], adapter, CONFIG, adapter_config)
    assert Layout.of(fused).adapters == 1
    with pytest.raises(UserError, match="split takes no quantised tree"):
        split(fused, CONFIG, adapter_config)
