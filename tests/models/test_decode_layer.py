"""A layer's decode step in our kernels: products beside their formula, whole steps beside XLA's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import triton
from support import interpret_decode_kernels, random_adapter, spread

from flora_jax.adapters import (
    PRODUCTS,
    AdapterConfig,
    Scaled,
    fuse,
    gpu_layout,
    quantize_base,
)
from flora_jax.errors import UserError
from flora_jax.models import decode_layer
from flora_jax.models.config import LlamaConfig
from flora_jax.models.decode_attention import decode_attention
from flora_jax.models.decode_blocks import Blocks
from flora_jax.models.decode_product import (
    Behind,
    Columns,
    Gated,
    Normed,
    Parts,
    Pieces,
    Term,
    decode_product,
)
from flora_jax.models.llama import KVCache, Llama, init_base
from flora_jax.models.presets import PRESETS

TINY = LlamaConfig.preset("tiny")
LAYOUT = gpu_layout(in_kernels=True)
pytestmark = pytest.mark.usefixtures("quick_compile")
product = functools.partial(decode_product, interpret=True)
XLA_SUMS = Parts.summed
CODES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@pytest.fixture(autouse=True)
def nothing_is_read_outside(monkeypatch):
    """The interpreter moves what lies outside an array to its edge; here it is NaN, or what no test
    expects, but where it is masked."""
    load = triton.load

    def checked(ref, mask=None, other=None):
        values = load(ref, mask=mask, other=other)
        outside = jnp.zeros(values.shape, bool)
        for index, size in zip(ref.transforms[-1].indices, ref.ref.shape, strict=True):
            outside = outside | (jnp.asarray(index) < 0) | (jnp.asarray(index) >= size)
        if mask is not None:
            outside = outside & mask
        if jnp.issubdtype(values.dtype, jnp.floating):
            return jnp.where(outside, jnp.nan, values)
        return (
            values ^ outside
            if values.dtype == bool
            else values ^ (outside * 85).astype(values.dtype)
        )

    monkeypatch.setattr(triton, "load", checked)


def slow(*names):
    """Parameters that take the paths of faster tests."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def draw(seed):
    """Arrays of normal numbers."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


def repeated(z, width):
    return np.tile(z, -(-width // z.shape[1]))[:, :width]


def silu(x):
    return x / (1 + np.exp(-x))


def stored(kernel, form, normal):
    """A kernel as it is stored, what it stands for in float64, and how it lies."""
    codes, _, lies = form.partition(" ")
    transposed = lies == "transposed"
    value, array = np.float64(kernel), kernel.T if transposed else kernel
    if codes in CODES:
        array = jnp.asarray(np.clip(30 * array, -127, 127)).astype(CODES[codes])
        scale, factor = normal(kernel.shape[1]), 2.0 ** np.round(normal(kernel.shape[0]))
        value = np.asarray(array.T if transposed else array, np.float64) * scale * factor[:, None]
        array = Scaled(array, scale, np.float32(factor), transposed)
    return array, value, {"transposed": transposed}


SHAPES = st.tuples(
    st.sampled_from([1, 3, 16]),  # B
    st.sampled_from([8, 96, 300]),  # D_in
    st.sampled_from([0, 4, 24]),  # R_b
    st.sampled_from([1, 40, 130, 2200]),  # D_out
)
FORMS = st.sampled_from(["float", "float transposed", "int8 transposed", "fp8 transposed", "int8"])


BLOCKS = st.sampled_from([None, Blocks(64, 32, 2, 2), Blocks(16, 1024, 3, 4)])


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, form=FORMS, blocks=BLOCKS, seed=st.integers(0, 99))
def test_a_normed_product_and_what_is_behind_it(shape, form, blocks, seed):
    """In float64, NumPy: odd widths, rows that fill up the array, pieces inside another array."""
    B, D, R, N = shape
    normal = draw(seed)
    x, scale, z = normal(B, D), normal(D), normal(B, 40)
    bias, residual = normal((N + 1) // 2), normal(B, N + 1)
    kernel, exact, how = stored(normal(D + R + 5, N), form, normal)
    small, exact_small, _ = stored(normal(7, (N + 2) // 3), form, normal)
    terms = [
        Term(Normed(x, scale, D - 1, 1e-3), kernel, **how),
        Term(Columns(z, 9, 7), small, column=1, **how),
        Term(Columns(z, 20, 7), small, repeat=(0, min(2, (N + 2) // 3)), **how),
    ]
    if R:
        terms.append(Term(Columns(z, 3, R), kernel, row=D, **how))
    behind = Behind(bias=bias, adds=(Columns(z, 2, 7),), factor=0.5, residual=residual)
    found = product(terms, N + 1, behind, blocks=blocks)

    x, z = np.float64(x), np.float64(z)
    normed = x / np.sqrt((x**2).sum(-1, keepdims=True) / (D - 1) + 1e-3) * scale
    y = np.zeros((B, N + 1))
    y[:, :N] = normed @ exact[:D] + z[:, 3 : 3 + R] @ exact[D : D + R]
    y[:, 1 : 1 + exact_small.shape[1]] += z[:, 9:16] @ exact_small
    y += repeated(z[:, 20:27] @ exact_small[:, :2], N + 1)
    y[:, : len(bias)] += bias
    expected = (y + repeated(z[:, 2:9], N + 1)) * 0.5 + residual
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@settings(max_examples=12, deadline=None)
@given(
    B=st.sampled_from([1, 3, 16]),
    N=st.sampled_from([1, 3, 5]),
    r=st.sampled_from([1, 4, 6]),
    activation=st.sampled_from(["identity", "silu"]),
    seed=st.integers(0, 99),
)
def test_a_bank(B, N, r, activation, seed):
    for found, expected in products_of_a_bank(product, B, N, r, activation, seed):
        assert_close(found, expected)


def products_of_a_bank(product, B, N, r, activation="identity", seed=0, dtype=jnp.float32):
    """What a product keeps of each row's adapter, and how the next one reads it; each beside what
    it is in float64."""
    normal = draw(seed)
    x, kernel, back, matrix = (
        jnp.asarray(normal(*size), dtype)
        for size in ((B, 20), (20, 16 + N * 2 * r), (N * 2 * r, 30), (N * r, 30))
    )
    own = np.random.default_rng(seed).integers(-1, N, B)
    select = own[:, None] == np.arange(N)
    pieces = Pieces(13, 2 * r, activation, jnp.asarray(select))
    y = product([Term(x, kernel)], kernel.shape[1], Behind(pieces=pieces, factor=2.0))
    x, kernel = (np.asarray(one, np.float64) for one in (x, kernel))
    exact = x @ kernel
    z = exact[:, 13:-3]
    z = (silu(z) if activation == "silu" else z).reshape(B, N, 2, r) * select[:, :, None, None]
    yield y, np.concatenate([exact[:, :13], z.reshape(B, -1), np.zeros((B, 3))], 1) * 2

    block = jnp.asarray(np.maximum(own, 0), jnp.int32)
    terms = [
        Term(Columns(y, 13, N * 2 * r), back),
        Term(Columns(y, 13 + r, N * r, stride=2 * r, piece=r), matrix),
    ]
    found = product(terms, 30, Behind(adds=(Columns(y, 13, r, stride=2 * r, own=block),)))
    z, back, matrix = (np.asarray(one, np.float64) for one in (y[:, 13:-3], back, matrix))
    pieces = z.reshape(B, N, 2, r)
    second = pieces[:, :, 1].reshape(B, -1) @ matrix
    yield found, z @ back + second + repeated(pieces[:, :, 0].sum(1), 30)


@settings(max_examples=12, deadline=None)
@given(
    B=st.sampled_from([1, 3, 16]),
    P=st.sampled_from([1, 2, 5]),
    N=st.sampled_from([1, 3]),
    H=st.sampled_from([16, 32]),
    seed=st.integers(0, 99),
)
def test_attention_in_parts(B, P, N, H, seed):
    for found, expected in product_of_parts(product, B, P, N, H, seed):
        assert_close(found, expected)


def product_of_parts(product, B, P, N, H, seed=0, dtype=jnp.float32):
    """What XLA makes of attention's parts, and a product that sums what it reads, scores far apart
    included, and parts of no slot at all; each beside what it is in float64."""
    normal = draw(seed)
    sums, peaks, totals = normal(P, B, N, H), 60 * normal(P, B, N), np.exp(normal(P, B, N))
    sums[1:, 0], totals[1:, 0], peaks[1:, 0] = 0, 0, np.finfo(np.float32).min
    kernel = jnp.asarray(normal(N * H, 30), dtype)
    parts = Parts(*map(jnp.asarray, (sums, peaks, totals)), dtype)
    shares = np.exp(np.float64(peaks) - peaks.max(0))
    whole = (shares[..., None] * sums).sum(0) / (shares * totals).sum(0)[..., None]
    whole = whole.reshape(B, N * H)
    yield parts.summed(), whole
    yield product([Term(parts, kernel)], 30), whole @ np.asarray(kernel, np.float64)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1e-3, np.abs(expected).max()))


@settings(max_examples=15, deadline=None)
@given(
    shape=SHAPES,
    adds=st.sampled_from(["", "gate", "up", "gate up"]),
    form=FORMS,
    seed=st.integers(0, 99),
)
def test_a_gated_product(shape, adds, form, seed):
    B, F, R, N = shape
    normal = draw(seed)
    y = normal(B, 2 * F + 14)
    kernel, exact, how = stored(normal(F + R, N), form, normal)
    gate_add, up_add = (
        Columns(y, 2 * F + start, 7) if name in adds.split() else None
        for name, start in (("gate", 0), ("up", 7))
    )
    terms = [Term(Gated(y, F, gate_add, up_add), kernel, **how)]
    if R:
        terms.append(Term(Columns(y, 1, R), kernel, row=F, **how))
    found = product(terms, N)

    y = np.float64(y)
    gate, up = y[:, :F], y[:, F : 2 * F]
    if gate_add is not None:
        gate = gate + repeated(y[:, 2 * F : 2 * F + 7], F)
    if up_add is not None:
        up = up + repeated(y[:, 2 * F + 7 :], F)
    expected = silu(gate) * up @ exact[:F] + y[:, 1 : 1 + R] @ exact[F:]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_half_precision():
    """Sums in float32, rounded once: within a bfloat16's last place of the exact product; not at
    all where float32 is asked for."""
    normal = draw(0)
    x, kernel, residual = (
        jnp.asarray(normal(*shape), jnp.bfloat16) for shape in ((2, 1000), (1000, 70), (2, 70))
    )
    found = product([Term(x, kernel)], 70, Behind(residual=residual))
    assert found.dtype == jnp.bfloat16
    logits = decode_layer.decode_logits(x, kernel.T, transposed=True, interpret=True)
    assert logits.dtype == jnp.float32
    x, kernel, residual = (np.asarray(one, np.float64) for one in (x, kernel, residual))
    np.testing.assert_allclose(np.asarray(found, np.float64), x @ kernel + residual, rtol=2**-8)
    assert_close(logits, x @ kernel)


def test_too_many_rows():
    with pytest.raises(UserError, match="up to 16 rows, not 17"):
        product([Term(jnp.zeros((17, 8)), jnp.zeros((8, 8)))], 8)


@pytest.fixture
def on_this_machine(monkeypatch):
    interpret_decode_kernels(monkeypatch)


def two_steps(model, params, tokens, select=None, slots=12):
    """Logits of two tokens a row behind a prompt, and the cache; one prompt is padded in front."""
    step = jax.jit(functools.partial(model.apply, {"params": params}, select=select))
    rows = len(tokens)
    mask = (jnp.arange(4) > 0)[None, :] | (jnp.arange(rows) != 1)[:, None]
    _, cache = step(tokens[:, :4], mask=mask, cache=KVCache.empty(model.config, rows, slots))
    logits = []
    for i in (4, 5):
        real = jnp.ones((rows, 1), bool)
        found, cache = step(tokens[:, i : i + 1], mask=real, cache=cache)
        logits.append(found)
    return jnp.concatenate(logits, axis=1), cache


def last_logits_in_float64(config, adapter_config, base, adapter, tokens):
    """What `two_steps` gives, of whole rows at once, unfused, each product in float64."""
    mask = np.ones(tokens.shape, bool)
    mask[1, 0] = False
    with jax.enable_x64(True):
        base, adapter = jax.tree.map(lambda x: x.astype(jnp.float64), (base, adapter))
        variables = {"params": base, "adapter": adapter}
        return Llama(config, adapter_config).apply(variables, tokens, mask=mask)[:, 4:]


def varied(path, leaf):
    """Biases and scales that are not all alike."""
    name = jax.tree_util.keystr(path)
    if "bias" not in name and "scale" not in name:
        return leaf
    return leaf + 0.3 * jax.random.normal(jax.random.key(len(name)), leaf.shape)


def base_of(config):
    return jax.tree_util.tree_map_with_path(varied, init_base(jax.random.key(0), config))


def random_tokens(config, rows):
    return jax.random.randint(jax.random.key(2), (rows, 6), 0, config.vocab_size)


def compare(
    adapter_config,
    adapter,
    select=None,
    config=TINY,
    rows=3,
    format="none",
    layout=LAYOUT,
    slots=12,
):
    """Whole steps in our kernels beside XLA's, logits and cache."""
    base = quantize_base(spread(base_of(config)), format)
    params = fuse(base, adapter, config, adapter_config, layout)
    tokens = random_tokens(config, rows)
    plain, ours = (
        two_steps(
            Llama(config, adapter_config, decode_kernels=kernels), params, tokens, select, slots
        )
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
@pytest.mark.parametrize(
    "name",
    [
        *("base", "lora", "ffa", "ffba", "zflora"),
        *slow(
            "fpa",
            "activation",
            "add_to",
            "pf_lora",
            "parallel",
            "ffba_qg_add",
            "ffba_qd_add",
            "targets",
        ),
    ],
)
def test_whole_steps_equal_those_without(name):
    if name == "base":
        compare(None, None)
        return
    adapter_config = SETTINGS.get(name) or AdapterConfig(name, 4)
    compare(adapter_config, random_adapter(TINY, adapter_config, 1))


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize(
    "method", ["pf_lora", "ffba", *slow("ffa", "fpa", "ffba_qd_add", "zflora")]
)
def test_banks(method):
    """Each row its own adapter, or none."""
    adapter_config = AdapterConfig(method, 4)
    adapters = [random_adapter(TINY, adapter_config, seed) for seed in (1, 2, 3)]
    select = jnp.array([[False, True, False], [False] * 3, [False, False, True]])
    compare(adapter_config, adapters, select)


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize(
    "method, format, banked",
    [
        ("ffba", "int8", False),
        *(
            pytest.param(method, format, banked, marks=pytest.mark.slow)
            for method, format in (("zflora", "fp8"), ("ffa", "int8"), ("pf_lora", "int8"))
            for banked in (False, True)
        ),
    ],
)
def test_codes(method, format, banked):
    """Quantised arrays are read as they are."""
    adapter_config = AdapterConfig(method, 4)
    adapters = [random_adapter(TINY, adapter_config, seed) for seed in (1, 2)]
    if not banked:
        compare(adapter_config, adapters[0], format=format)
        return
    select = jnp.array([[False, True], [False, False], [True, False]])
    compare(adapter_config, adapters, select, format=format)


@pytest.mark.slow
@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("dtype, share", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_shapes_of_presets(preset, dtype, share):
    """One layer of each, with a vocabulary that is soon computed, beside float64 and XLA's steps.
    Weights that are spread would make attention's scores so large at these widths that any rounding
    is seen."""
    one_layer = {"num_hidden_layers": 1, "vocab_size": 1000, "no_rope_layers": ()}
    config = dataclasses.replace(LlamaConfig.preset(preset), **one_layer)
    adapter_config = AdapterConfig("ffba_qg_add", 32)
    adapter = random_adapter(config, adapter_config, 1, std=0.05)
    base, adapter = jax.tree.map(lambda x: x.astype(dtype), (base_of(config), adapter))
    params = fuse(base, adapter, config, adapter_config, LAYOUT)
    tokens = random_tokens(config, 2)
    ours, plain = (
        two_steps(Llama(config, adapter_config, decode_kernels=kernels), params, tokens)[0]
        for kernels in ("layer", "none")
    )
    exact = last_logits_in_float64(config, adapter_config, base, adapter, tokens)
    for expected in (exact, plain):
        bound = share * float(jnp.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=bound)


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("few, by_xla", [(8, False), (1, True)])
def test_who_sums_the_parts_of_attention(few, by_xla, monkeypatch):
    """Two parts of 256 slots: the programs of o, or, where they are too many, XLA."""
    monkeypatch.setattr(decode_layer, "FEW_PARTS", few)
    summed = []
    monkeypatch.setattr(Parts, "summed", lambda self: summed.append(0) or XLA_SUMS(self))
    adapter_config = AdapterConfig("ffba", 4)
    compare(adapter_config, random_adapter(TINY, adapter_config, 1), rows=1, slots=300)
    assert bool(summed) == by_xla


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("method", ["ffba", *slow("ffa", "pf_lora", "zflora")])
def test_arrays_that_are_not_transposed(method):
    """And an unembedding of its own, which never is."""
    config = dataclasses.replace(TINY, tie_word_embeddings=False)
    adapter_config = AdapterConfig(method, 4)
    adapter = random_adapter(config, adapter_config, 1)
    compare(adapter_config, adapter, config=config, layout=gpu_layout())


# All in which an architecture differs from a Llama.
OTHER = dataclasses.replace(
    TINY,
    biases=tuple(PRODUCTS),
    qk_norm=True,
    residual_multiplier=0.4,
    attention_multiplier=0.2,
    embedding_multiplier=3.0,
    logits_divisor=2.0,
    no_rope_layers=(1,),
)


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("method", ["ffa", "zflora", *slow("pf_lora", "ffba_qd_add")])
def test_other_architectures(method, banked):
    adapter_config = AdapterConfig(method, 4)
    adapters = [random_adapter(OTHER, adapter_config, seed) for seed in (1, 2)]
    if banked:
        select = jnp.array([[False, True], [False, False], [True, False]])
        compare(adapter_config, adapters, select, OTHER)
    else:
        compare(adapter_config, adapters[0], config=OTHER)


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("rows, in_kernels", [(1, 9), (16, 9), (17, 0)])
def test_rows(rows, in_kernels):
    """Four products a layer and the logits. One row is read as one; more than 16 are left to XLA,
    but for attention."""
    adapter_config = AdapterConfig("ffba", 4)
    adapter = random_adapter(TINY, adapter_config, 1)
    if in_kernels:
        compare(adapter_config, adapter, rows=rows)
    base = init_base(jax.random.key(0), TINY)
    params = fuse(base, adapter, TINY, adapter_config, LAYOUT)
    model = Llama(TINY, adapter_config, decode_kernels="layer")
    cache = KVCache.empty(TINY, rows, 12)
    step = functools.partial(model.apply, {"params": params}, cache=cache)
    jaxpr = jax.make_jaxpr(step)(jnp.zeros((rows, 1), jnp.int32))
    assert str(jaxpr).count("name=decode_product") == in_kernels


def test_adds_lie_in_one_array():
    z = jnp.ones((1, 4))
    adds = (Columns(z, 0, 4), None, Columns(z + 1, 0, 4))
    with pytest.raises(UserError, match="adds that lie in one array"):
        decode_attention(
            jnp.zeros((1, 24)),
            (jnp.ones((1, 1, 1, 4)),) * 2,
            jnp.ones((1, 5), bool),
            (jnp.zeros((1, 8, 5)), jnp.zeros((1, 5, 8)), jnp.int32(2)),
            1,
            adds=adds,
            interpret=True,
        )


def test_what_it_does_not_read():
    base = init_base(jax.random.key(0), TINY)
    tokens = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(UserError, match="reads a fused model's arrays"):
        Llama(TINY, decode_kernels="layer").apply({"params": base}, tokens)
    with pytest.raises(UserError, match="decode_kernels='all' is unknown; known: none, attention"):
        Llama(TINY, decode_kernels="all").apply({"params": base}, tokens)
