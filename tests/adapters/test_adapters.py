"""The adapter family against its equations: configuration, trees, initial values, and the logits of
every method, computed a second time in NumPy float64 from the paper's table, block by block, with
the fused matrices it draws."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FAST_COMPILE

from flora_jax.adapters import (
    METHODS,
    PROJECTIONS,
    AdapterConfig,
    FusedDense,
    abstract_adapter,
    init_adapter,
    repeat_and_add,
)
from flora_jax.adapters import products as products_module
from flora_jax.errors import UserError
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama, abstract_base

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
ADAPTED = [method for method in METHODS if method != "fft"]
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9)).astype(np.int32)


def by_path(tree):
    return flatten_dict(tree, sep="/")


# --------------------------------------------------------------------------------------------------
# Sizes and shapes


def paper_count(method: str, r: int, config: LlamaConfig) -> int:
    """Adapter parameters of a whole model, from the table of the paper."""
    D, Q, K, F = config.hidden_size, config.q_width, config.kv_width, config.intermediate_size
    L = config.num_hidden_layers
    lora, fpa, ffba = r * (7 * D + 2 * Q + 2 * K + 3 * F), 4 * r * D, 10 * r * D
    a_layer = {
        "fft": 0,
        "lora": lora,
        "pf_lora": lora,
        "ffa": r * (5 * D + Q + F),
        "fpa": fpa,
        "parallel": fpa,
        "ffba": ffba,
        "ffba_qg_add": ffba,
        "ffba_qd_add": ffba,
        "zflora": r * (2 * Q + 2 * K + 3 * F),
    }
    # zflora: the first layer has nothing to read, the last writes what nobody would
    return L * a_layer[method] - (r * (Q + 2 * K + F) if method == "zflora" else 0)


def count(config: LlamaConfig, adapter: AdapterConfig) -> int:
    leaves = jax.tree.leaves(abstract_adapter(config, adapter))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    return sum(math.prod(leaf.shape) for leaf in leaves)


@settings(max_examples=12, deadline=None)
@given(
    r=st.integers(1, 9),
    d=st.integers(1, 5),
    f=st.integers(1, 7),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    layers=st.integers(1, 4),
    half=st.integers(1, 3),
)
def test_parameter_counts_are_the_papers(r, d, f, heads, groups, layers, half):
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=r * d,
        intermediate_size=r * f,
        num_hidden_layers=layers,
        num_attention_heads=heads * groups,
        num_key_value_heads=heads,
        head_dim=2 * r * half,
    )
    for method in METHODS:
        assert count(config, AdapterConfig(method, r)) == paper_count(method, r, config), method


def test_parameter_counts_of_a_1b():
    config = LlamaConfig.preset("llama3.2-1b")
    millions = {
        (m, r): round(count(config, AdapterConfig(m, r)) / 1e6, 1)
        for m, r in (("lora", 32), ("ffba", 32), ("ffba", 64))
    }
    assert millions == {("lora", 32): 22.5, ("ffba", 32): 10.5, ("ffba", 64): 21.0}


LORA_TREE = {
    "attention/qkv/A": (2, 96, 24),
    "attention/qkv/q_B": (2, 8, 96),
    "attention/qkv/k_B": (2, 8, 32),
    "attention/qkv/v_B": (2, 8, 32),
    "attention/o/A": (2, 96, 8),
    "attention/o/o_B": (2, 8, 96),
    "mlp/gate_up/A": (2, 96, 16),
    "mlp/gate_up/gate_B": (2, 8, 192),
    "mlp/gate_up/up_B": (2, 8, 192),
    "mlp/down/A": (2, 192, 8),
    "mlp/down/down_B": (2, 8, 96),
}
FPA_TREE = {
    "attention/qkv/A": (2, 96, 8),
    "attention/o/o_B": (2, 8, 96),
    "mlp/gate_up/A": (2, 96, 8),
    "mlp/down/down_B": (2, 8, 96),
}
FFBA_TREE = {
    "attention/qkv/A": (2, 96, 24),
    "attention/o/o_B": (2, 24, 96),
    "mlp/gate_up/A": (2, 96, 16),
    "mlp/down/down_B": (2, 16, 96),
}
TREES = {
    "fft": {},
    "lora": LORA_TREE,
    "pf_lora": LORA_TREE,
    "ffa": {
        "attention/qkv/A": (2, 96, 24),
        "attention/o/A": (2, 96, 8),
        "mlp/gate_up/A": (2, 96, 16),
        "mlp/down/A": (2, 192, 8),
    },
    "fpa": FPA_TREE,
    "parallel": FPA_TREE,
    "ffba": FFBA_TREE,
    "ffba_qg_add": FFBA_TREE,
    "ffba_qd_add": FFBA_TREE,
    "zflora": {
        "attention/qkv/q_B": (1, 8, 96),
        "attention/qkv/k_B": (1, 8, 32),
        "attention/qkv/v_B": (1, 8, 32),
        "attention/o/A": (2, 96, 8),
        "mlp/gate_up/gate_B": (2, 8, 192),
        "mlp/gate_up/up_B": (2, 8, 192),
        "mlp/down/A": (1, 192, 8),
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_tree(method):
    """The expected tree, at rank 8 on tiny (L 2, D = Q = 96, K 32, F 192), is the assertion."""
    tree = by_path(abstract_adapter(TINY, AdapterConfig(method, 8)))
    assert {path: leaf.shape for path, leaf in tree.items()} == {
        f"layers/{k}": v for k, v in TREES[method].items()
    }
    assert {leaf.dtype for leaf in tree.values()} <= {np.dtype(np.float32)}


def test_tree_of_some_targets():
    tree = by_path(abstract_adapter(TINY, AdapterConfig("lora", 8, targets="v,q")))
    assert {path: leaf.shape for path, leaf in tree.items()} == {
        "layers/attention/qkv/A": (2, 96, 16),
        "layers/attention/qkv/q_B": (2, 8, 96),
        "layers/attention/qkv/v_B": (2, 8, 32),
    }


# --------------------------------------------------------------------------------------------------
# Configuration


def test_scale():
    assert AdapterConfig("lora", 16).scale == 1.0
    assert AdapterConfig("lora", 16, alpha=32).scale == 2.0
    assert AdapterConfig("lora", 16, alpha=32, rslora=True).scale == 8.0
    assert AdapterConfig("lora", 16, rslora=True).scale == 4.0


def test_names_as_strings_or_tuples():
    strings = AdapterConfig("ffba", 8, targets="up, q,o,k,v,gate,down", add_to="gate,q")
    assert strings == AdapterConfig("ffba", 8, targets=PROJECTIONS, add_to=("q", "gate"))
    assert hash(strings) == hash(AdapterConfig("ffba", 8, add_to=["gate", "q"]))
    assert strings.add_to == ("q", "gate")
    assert (
        AdapterConfig("ffba", 8, add_to=()).add_to
        == ()
        == AdapterConfig("ffba", 8, add_to="").add_to
    )
    assert AdapterConfig("ffba", 8, targets="q,k,v,o").add_to == ("q", "k", "v")


ATTENTION = "q,k,v,o"
REFUSALS = [
    (dict(method="ffba_qg"), "adapter.method='ffba_qg' is unknown; did you mean 'ffba_qg_add'"),
    (dict(method=None), "adapter.method=None"),
    (dict(rank=0), "adapter.rank=0"),
    (dict(rank=-3), "adapter.rank=-3"),
    (dict(rank=8.0), "adapter.rank=8.0"),
    (dict(rank=True), "adapter.rank=True"),
    (dict(alpha=math.nan), "adapter.alpha=nan"),
    (dict(alpha=0.0), "adapter.alpha=0.0"),
    (dict(alpha=math.inf), "adapter.alpha=inf"),
    (dict(dropout=1.0), "adapter.dropout=1.0"),
    (dict(dropout=-0.1), "adapter.dropout=-0.1"),
    (dict(dropout=math.nan), "adapter.dropout=nan"),
    (
        dict(method="fpa", activation="sillu"),
        "adapter.activation='sillu' is unknown; did you mean 'silu'",
    ),
    (dict(method="lora", activation="silu"), "lora is linear; only fpa, parallel"),
    (dict(method="zflora", activation="relu"), "zflora is linear"),
    (dict(targets="q,donw"), "adapter.targets: projection 'donw' is unknown; did you mean 'down'"),
    (dict(targets=""), "adapter.targets is empty"),
    (dict(targets=5), "adapter.targets=5 must name projections"),
    (
        dict(method="ffba", add_to="gaet"),
        "adapter.add_to: projection 'gaet' is unknown; did you mean 'gate'",
    ),
    (
        dict(method="lora", add_to="q"),
        "adapter.add_to=q: lora has no repeat-and-add; only ffa, ffba",
    ),
    (dict(method="fpa", add_to="q"), "fpa has no repeat-and-add"),
    (
        dict(method="ffba", targets=ATTENTION, add_to="q,gate"),
        "adapter.add_to: 'gate' is not among",
    ),
    (dict(method="ffba", targets="q,o", add_to="k"), "adapter.add_to: 'k' is not among"),
    (dict(method="ffa", add_to="q"), "ffa adds to every target"),
    (dict(method="ffba", targets="o"), "writes 'o' but reads none of q, k, v"),
    (dict(method="ffba_qg_add", targets="q,k"), "the adapter of 'k' would reach nothing; add 'o'"),
    (dict(method="ffba", targets="q,k,v,o,down"), "writes 'down' but reads none of gate, up"),
    (
        dict(method="fpa", targets="q,v,o"),
        "fpa goes around the attention block; name all of q, k, v, o",
    ),
    (dict(method="parallel", targets="q,k,v,o,gate,up"), "parallel goes around the mlp block"),
    (dict(method="fpa", targets="o"), "fpa writes 'o' but reads none"),
    (dict(method="zflora", targets=ATTENTION), "zflora carries channels through every block"),
    (dict(method="lora", zero_init="C"), "adapter.zero_init='C' must be A or B"),
    (
        dict(method="ffba_qg_add", zero_init="B"),
        "adds z as it is (add_to=q,gate), so A must start at zero",
    ),
    (dict(method="fft", zero_init="A"), "fft has no adapter"),
    (dict(method="fft", alpha=16), "adapter.alpha=16.0: fft has no adapter"),
    (dict(method="fft", dropout=0.1), "adapter.dropout=0.1: fft has no adapter"),
    (dict(method="fft", targets="q"), "fft has no adapter"),
]


def test_targets_may_have_the_names_of_peft():
    assert AdapterConfig("lora", 8, targets="q_proj, v_proj") == AdapterConfig(
        "lora", 8, targets="q,v"
    )


def test_numbers_of_numpy_are_plain_ones():
    """One of numpy's would make a bfloat16 model a float32 one where it multiplies."""
    found = AdapterConfig("lora", np.int64(8), alpha=np.float64(16), dropout=np.float32(0.5))
    assert found == AdapterConfig("lora", 8, alpha=16, dropout=0.5)
    assert (type(found.rank), type(found.alpha), type(found.dropout)) == (int, float, float)


@pytest.mark.parametrize("fields, words", REFUSALS, ids=lambda value: str(value)[:60])
def test_refusals(fields, words):
    with pytest.raises(UserError) as error:
        AdapterConfig(**{"method": "lora", "rank": 8, **fields})
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "method, rank, width, fits",
    [
        ("ffa", 12, 32, ["4", "8", "16"]),  # K and V are 32 wide
        ("ffba", 64, 96, ["8", "16", "32"]),
        # q 96 and gate 192: 48 fits, though it does not fit k
        ("ffba_qg_add", 40, 96, ["32", "48"]),
    ],
)
def test_a_rank_that_does_not_divide_names_those_that_do(method, rank, width, fits):
    with pytest.raises(UserError) as error:
        init_adapter(jax.random.key(0), TINY, AdapterConfig(method, rank))
    message = str(error.value)
    assert f"adapter.rank={rank} does not divide {width}" in message and "\n" not in message
    offered = message.rpartition(": ")[2].split(", ")
    assert set(fits) <= set(offered)
    for good in offered:
        AdapterConfig(method, int(good)).check(TINY.widths)


def test_methods_without_adds_take_any_rank():
    for method in ("lora", "fpa", "zflora"):
        assert count(TINY, AdapterConfig(method, 7)) == paper_count(method, 7, TINY)


# --------------------------------------------------------------------------------------------------
# Initial values

WIDE = dataclasses.replace(TINY, hidden_size=256, intermediate_size=320, num_hidden_layers=3)
fast_init = jax.jit(init_adapter, static_argnums=(1, 2), compiler_options=FAST_COMPILE)


@pytest.mark.parametrize(
    "method, full",
    [
        ("lora", "A"),
        ("fpa", "A"),
        ("ffa", None),
        ("ffba", "B"),
        ("ffba_qg_add", "B"),
        ("zflora", "A"),
        ({"method": "lora", "zero_init": "A"}, "B"),
        ({"method": "fpa", "zero_init": "A"}, "B"),
        ({"method": "ffba", "add_to": (), "zero_init": "B"}, "A"),
    ],
)
def test_initial_values(method, full):
    """One side zero; A uniform within 1/√d_in, B normal with std 1/√rows, layer by layer."""
    adapter = AdapterConfig(rank=16, **(method if isinstance(method, dict) else {"method": method}))
    leaves = by_path(jax.tree.map(np.asarray, fast_init(jax.random.key(3), WIDE, adapter)))
    assert {path: v.shape for path, v in leaves.items()} == {
        path: v.shape for path, v in by_path(abstract_adapter(WIDE, adapter)).items()
    }
    for path, value in leaves.items():
        side = path[-1]
        if side != full:
            assert not value.any(), path
            continue
        for layer in value:
            fan, n = layer.shape[0], layer.size
            if side == "A":
                bound = 1 / math.sqrt(fan)
                assert 0.98 * bound < np.abs(layer).max() <= bound
                # kurtosis of the uniform is 1.8
                variance, spread = bound**2 / 3, math.sqrt(0.8 / n)
            else:
                variance, spread = 1 / fan, math.sqrt(2 / n)
                assert np.abs(layer).max() > 2.5 / math.sqrt(fan)  # tails, so not uniform
            assert abs(layer.var() / variance - 1) < 5 * spread, path
            assert abs(layer.mean()) < 5 * math.sqrt(variance / n), path
        assert not any(np.array_equal(a, b) for i, a in enumerate(value) for b in value[:i]), (
            f"{path}: equal layers"
        )


def test_initial_values_are_the_keys():
    adapter = AdapterConfig("lora", 16)
    first, again, other = (by_path(fast_init(jax.random.key(k), WIDE, adapter)) for k in (0, 0, 1))
    for path, value in first.items():
        np.testing.assert_array_equal(value, again[path])
        assert path.endswith("B") or not np.array_equal(value, other[path])


def test_init_touches_no_base():
    """Making a 1B's adapter holds the adapter, not the 1.2 billion parameters it will sit in."""
    config, adapter = LlamaConfig.preset("llama3.2-1b"), AdapterConfig("ffba", 8)
    memory = fast_init.lower(jax.random.key(0), config, adapter).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 3 * 4 * paper_count(
        "ffba", 8, config
    )
    assert init_adapter(jax.random.key(0), config, AdapterConfig("fft", 8)) == {}


# --------------------------------------------------------------------------------------------------
# The whole Llama in NumPy float64


@functools.cache
def base_tree():
    """Random base leaves of ordinary size, norm scales not 1."""
    rng = np.random.default_rng(1)
    leaves = {}
    for path, leaf in by_path(abstract_base(TINY)).items():
        value = rng.standard_normal(leaf.shape)
        value = 1 + 0.2 * value if path.endswith("scale") else value / math.sqrt(leaf.shape[-2])
        leaves[path] = (value if "embed" not in path else rng.standard_normal(leaf.shape)).astype(
            np.float32
        )
    return unflatten_dict(leaves, sep="/")


def random_adapter(adapter: AdapterConfig, seed=2, std=0.05):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (std * rng.standard_normal(leaf.shape)).astype(np.float32),
        abstract_adapter(TINY, adapter),
    )


def rep(z, n):
    return np.tile(z, n // z.shape[-1])


def silu(x):
    return x / (1 + np.exp(-x))


def numpy_logits(
    method,
    r,
    s,
    adapter,
    *,
    targets=PROJECTIONS,
    add_to=(),
    act=lambda z: z,
    base=None,
    config=TINY,
    tokens=TOKENS,
    segments=None,
):
    """Logits `[B, T, V]` of tokens, float64; a token sees its segment alone."""

    def to64(tree):
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)

    base, adapter = to64(base or base_tree()), to64(adapter).get("layers", {})
    D, H, N, K = (
        config.hidden_size,
        config.head_dim,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    B, T = tokens.shape
    segments = np.zeros((B, T)) if segments is None else np.asarray(segments)
    kernels, stream = base["layers"], method == "zflora"

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    def rope(x):
        angle = np.arange(T)[:, None] * config.rope_theta ** (-2 * np.arange(H // 2) / H)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., : H // 2], x[..., H // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(q, k, v):
        q, k, v = (y.reshape(B, T, -1, H) for y in (q, k, v))
        q, k, v = rope(q), np.repeat(rope(k), N // K, 2), np.repeat(v, N // K, 2)
        scores = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H)
        scores = np.where(
            np.tril(segments[:, None, :, None] == segments[:, None, None]), scores, -np.inf
        )
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bnts,bsnh->btnh", p / p.sum(-1, keepdims=True), v).reshape(B, T, -1)

    def leaf(block, product, name, layer):
        value = adapter.get(block, {}).get(product, {}).get(name)
        if value is not None and stream and product == "qkv":
            return np.zeros_like(value[0]) if layer == 0 else value[layer - 1]
        if value is not None and stream and product == "down" and layer == len(value):
            return np.zeros_like(value[0])
        return None if value is None else value[layer]

    def project(block, product, names, layer, x, carried):
        """The projections `names` of one product over x; carried is the z that arrives. Returns
        (ys, z)."""
        W = [kernels[block][product][f"{p}_kernel"][layer] for p in names]
        widths = np.cumsum([w.shape[1] for w in W])
        A = leaf(block, product, "A", layer)
        Bs = {p: leaf(block, product, f"{p}_B", layer) for p in names}
        fused = np.concatenate(W if A is None else [*W, A], axis=1)
        if method not in ("lora", "pf_lora") and any(b is not None for b in Bs.values()):
            rows = np.concatenate([Bs[p] for p in names], axis=1)
            if A is not None:
                rows = np.concatenate([rows, np.zeros((len(rows), A.shape[1]))], axis=1)
            x, fused = np.concatenate([x, carried], -1), np.concatenate([fused, rows])
        *ys, z = np.split(x @ fused, widths, axis=-1)
        z = s * act(z)
        adapted = [p for p in names if p in targets]
        if method in ("lora", "pf_lora") and adapted:
            for p, piece in zip(adapted, np.split(z, len(adapted), -1), strict=True):
                ys[names.index(p)] += piece @ Bs[p]
        if method == "ffa" and adapted:
            for p, piece in zip(adapted, np.split(z, len(adapted), -1), strict=True):
                ys[names.index(p)] += rep(piece, ys[names.index(p)].shape[-1])
        if method.startswith("ffba"):
            if product in ("qkv", "gate_up"):
                for p, piece in zip(adapted, np.split(z, max(1, len(adapted)), -1), strict=False):
                    if p in add_to:
                        ys[names.index(p)] += rep(piece, ys[names.index(p)].shape[-1])
            elif names[0] in add_to:
                for piece in np.split(carried, carried.shape[-1] // r, -1):
                    ys[0] += rep(piece, D)
        return ys, z

    def beside(z, x):
        return z / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) if stream else z

    x, z = base["embed_tokens"]["embedding"][tokens], np.zeros((B, T, r))
    for l in range(config.num_hidden_layers):
        (q, k, v), inner = project(
            "attention",
            "qkv",
            ["q", "k", "v"],
            l,
            norm(x, kernels["attention_norm"]["scale"][l]),
            beside(z, x),
        )
        (y,), written = project("attention", "o", ["o"], l, attention(q, k, v), inner)
        x, z = x + y, z + written if stream else z
        (gate, up), inner = project(
            "mlp",
            "gate_up",
            ["gate", "up"],
            l,
            norm(x, kernels["mlp_norm"]["scale"][l]),
            beside(z, x),
        )
        (y,), written = project("mlp", "down", ["down"], l, silu(gate) * up, inner)
        x, z = x + y, z + written if stream else z
    return norm(x, base["final_norm"]["scale"]) @ base["embed_tokens"]["embedding"].T


def apply(adapter_config, adapter, base=None):
    variables = {"params": base or base_tree()} | ({"adapter": adapter} if adapter else {})
    return np.asarray(compiled(adapter_config)(variables))


@functools.cache
def compiled(adapter_config):
    return jax.jit(
        lambda variables: Llama(TINY, adapter_config).apply(variables, TOKENS),
        compiler_options=FAST_COMPILE,
    )


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_base_is_numpys():
    assert_close(apply(None, {}), numpy_logits("fft", 1, 1.0, {}))


DEFAULT_ADDS = {
    "ffba": ("q", "k", "v", "gate", "up"),
    "ffba_qg_add": ("q", "gate"),
    "ffba_qd_add": ("q", "down"),
}


@pytest.mark.parametrize(  # ranks below and above head_dim 16
    "method, rank",
    [(m, 8) for m in ADAPTED]
    + [
        pytest.param(
            m, 32, marks=[] if m in ("lora", "ffa", "ffba", "zflora") else pytest.mark.slow
        )
        for m in ADAPTED
    ],
)
def test_method_is_its_equation(method, rank):
    """With one side zero, as at step 0, the logits are the base's bit for bit; with random leaves
    (s = 1/2) they are NumPy's, and not the base's."""
    adapter_config = AdapterConfig(method, rank, alpha=rank / 2)
    bare, adapter = apply(None, {}), random_adapter(adapter_config)
    zero = "B" if method in ("lora", "pf_lora", "fpa", "parallel", "zflora") else "A"
    fresh = {path: leaf * (path[-1] != zero) for path, leaf in by_path(adapter).items()}
    np.testing.assert_array_equal(apply(adapter_config, unflatten_dict(fresh, sep="/")), bare)
    found = apply(adapter_config, adapter)
    assert np.abs(found - bare).max() > 0.1
    assert_close(
        found, numpy_logits(method, rank, 0.5, adapter, add_to=DEFAULT_ADDS.get(method, ()))
    )


VARIANTS = [
    (dict(method="lora", rank=8, alpha=4.0, rslora=True), dict(s=4 / math.sqrt(8))),
    (dict(method="zflora", rank=8, alpha=6.0, rslora=True), dict(s=6 / math.sqrt(8))),
    (dict(method="ffba", rank=32, add_to="q,down"), dict(add_to=("q", "down"))),
    (dict(method="ffba", rank=8, add_to="down,o", alpha=12.0), dict(add_to=("o", "down"), s=1.5)),
    (dict(method="ffba", rank=8, add_to=()), dict(add_to=())),
    (dict(method="fpa", rank=8, activation="silu", alpha=16.0), dict(act=silu, s=2.0)),
    (dict(method="lora", rank=8, targets="q,v"), dict(targets=("q", "v"))),
    (dict(method="lora", rank=8, targets="k,up,down"), dict(targets=("k", "up", "down"))),
    (
        dict(method="ffba", rank=8, targets=ATTENTION),
        dict(targets=("q", "k", "v", "o"), add_to=("q", "k", "v")),
    ),
    (
        dict(method="ffba", rank=8, targets="k,v,o", add_to="v,o"),
        dict(targets=("k", "v", "o"), add_to=("v", "o")),
    ),
    (dict(method="ffa", rank=8, targets="o,down"), dict(targets=("o", "down"))),
    (dict(method="fpa", rank=8, targets="gate,up,down"), dict(targets=("gate", "up", "down"))),
]


def written(fields):
    """Short enough for the name of a test, and the same in every process."""
    return ",".join(getattr(value, "__name__", str(value)) for value in fields.values())[:50]


@pytest.mark.parametrize("fields, expected", VARIANTS, ids=written)
def test_variant_is_its_equation(fields, expected):
    adapter_config = AdapterConfig(**fields)
    adapter = random_adapter(adapter_config)
    found = apply(adapter_config, adapter)
    assert np.abs(found - apply(None, {})).max() > 0.1
    expected = numpy_logits(
        adapter_config.method, adapter_config.rank, adapter=adapter, **{"s": 1.0, **expected}
    )
    assert_close(found, expected)


@pytest.mark.parametrize("one, other", [("lora", "pf_lora"), ("fpa", "parallel")])
def test_two_layouts_of_one_function(one, other):
    first, second = (AdapterConfig(method, 8, alpha=4.0) for method in (one, other))
    adapter = random_adapter(first)
    np.testing.assert_array_equal(apply(first, adapter), apply(second, adapter))


@pytest.mark.parametrize(
    "block, product, names, out",
    [("attention", "qkv", "qkv", "o"), ("mlp", "gate_up", ["gate", "up"], "down")],
)
def test_ffba_is_ffa_merged_plus_fpa(block, product, names, out):
    """Repeat-and-add is linear in x: fold it into W, and what is left is fpa of as many ranks as
    there are pieces."""
    targets, r, s = (*names, out), 8, 0.5
    ffba = AdapterConfig("ffba", r, alpha=r * s, targets=targets)
    fpa = AdapterConfig("fpa", r * len(names), alpha=r * len(names) * s, targets=targets)
    adapter = random_adapter(ffba)
    leaves = by_path(base_tree())
    A = adapter["layers"][block][product]["A"]
    for p, piece in zip(names, np.split(A, len(names), axis=-1), strict=True):
        path = f"layers/{block}/{product}/{p}_kernel"
        leaves[path] = leaves[path] + s * rep(piece, leaves[path].shape[-1])
    assert_close(apply(ffba, adapter), apply(fpa, adapter, unflatten_dict(leaves, sep="/")))


def test_ffa_is_lora_with_the_tiling_as_b():
    r = 8
    ffa, lora = (AdapterConfig(method, r, alpha=4.0) for method in ("ffa", "lora"))
    adapter = random_adapter(ffa)
    leaves = by_path(adapter)
    for path, leaf in by_path(abstract_adapter(TINY, lora)).items():
        if path.endswith("_B"):
            leaves[path] = np.stack(
                [rep(np.eye(r, dtype=np.float32), leaf.shape[-1])] * leaf.shape[0]
            )
    assert_close(apply(ffa, adapter), apply(lora, unflatten_dict(leaves, sep="/")))


def test_fft_is_the_base():
    np.testing.assert_array_equal(apply(AdapterConfig("fft", 8), {}), apply(None, {}))


# --------------------------------------------------------------------------------------------------
# Dropout and half precision


@functools.cache
def dropped(adapter_config):
    def logits(variables, key):
        model = Llama(TINY, adapter_config)
        return model.apply(variables, TOKENS, deterministic=False, rngs={"dropout": key})

    return jax.jit(logits, compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("method", ["lora", "zflora"])
def test_dropout_is_on_the_adapters_input_alone(method):
    adapter_config = AdapterConfig(method, 8, alpha=4.0, dropout=0.5)
    adapter = random_adapter(adapter_config)
    # A deterministic model ignores the rate.
    still = apply(adapter_config, adapter)
    np.testing.assert_array_equal(
        still, apply(dataclasses.replace(adapter_config, dropout=0.0), adapter)
    )
    variables = {"params": base_tree(), "adapter": adapter}
    one, again, other = (
        np.asarray(dropped(adapter_config)(variables, jax.random.key(k))) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - still).max() > 0.1 and np.abs(one - other).max() > 0.1
    # Nothing of the base's path is dropped.
    zero = jax.tree.map(np.zeros_like, adapter)
    base_only = dropped(adapter_config)({"params": base_tree(), "adapter": zero}, jax.random.key(0))
    np.testing.assert_array_equal(base_only, apply(None, {}))


def test_each_layer_draws_its_own_mask():
    """Two equal layers, of which the base adds nothing and the adapter one at a time: only the mask
    can differ."""
    adapter_config = AdapterConfig("lora", 8, targets="o", dropout=0.5)
    base, adapter = by_path(base_tree()), by_path(random_adapter(adapter_config))
    for leaves in (base, adapter):
        for path, leaf in leaves.items():
            if "layers" in path:
                leaves[path] = np.stack([leaf[0]] * 2) * (
                    not path.endswith(("o_kernel", "down_kernel"))
                )
    path = "layers/attention/o/o_B"
    only = [
        {**adapter, path: adapter[path] * np.eye(2, dtype=np.float32)[l][:, None, None]}
        for l in range(2)
    ]
    first, second = (
        {"params": unflatten_dict(base, sep="/"), "adapter": unflatten_dict(leaves, sep="/")}
        for leaves in only
    )
    np.testing.assert_array_equal(compiled(adapter_config)(first), compiled(adapter_config)(second))
    key = jax.random.key(0)
    assert (
        np.abs(dropped(adapter_config)(first, key) - dropped(adapter_config)(second, key)).max()
        > 0.1
    )


def fused_dense(method, rate):
    rng = np.random.default_rng(4)
    adapter_config = AdapterConfig(method, 8, dropout=rate)
    dense = FusedDense("qkv", TINY.widths, adapter_config, name="qkv")

    def draw(shape):
        return rng.standard_normal(shape).astype(np.float32)

    params = {f"{p}_kernel": draw(TINY.widths[p]) for p in "qkv"}
    layer = jax.tree.map(lambda leaf: draw(leaf.shape[1:]), abstract_adapter(TINY, adapter_config))[
        "layers"
    ]
    return dense, params, layer["attention"]["qkv"], draw((3, 96))


def test_dropout_keeps_the_mean():
    dense, params, leaves, x = fused_dense("lora", 0.3)
    variables = {"params": params, "adapter": leaves}

    def q(key):
        return dense.apply(variables, x, deterministic=False, rngs={"dropout": key})[0][0]

    draws = np.asarray(jax.jit(jax.vmap(q))(jax.random.split(jax.random.key(0), 3000)), np.float64)
    still = dense.apply(variables, x)[0][0]
    error = (draws.mean(0) - still) / (draws.std(0) / math.sqrt(len(draws)))
    assert draws.std(0).min() > 0.1 and np.abs(error).max() < 5
    assert abs(np.sqrt((error**2).mean()) - 1) < 0.2


def test_one_dropout_mask_a_product():
    """With equal A's, q, k and v see equal z: they read one masked input, as the fused product [W |
    A] does."""
    dense, params, leaves, x = fused_dense("ffa", 0.5)
    leaves = {"A": np.tile(leaves["A"][:, :8], 3)}
    variables = {"params": params, "adapter": leaves}
    _, z = dense.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    zq, zk, zv = np.split(np.asarray(z), 3, -1)
    np.testing.assert_allclose(zq, zk, rtol=1e-6)
    np.testing.assert_allclose(zq, zv, rtol=1e-6)
    assert np.abs(zq - x @ leaves["A"][:, :8]).max() > 1


@pytest.mark.parametrize("method", ["lora", "ffba", "zflora"])
def test_bfloat16_compute(method):
    """Base in bfloat16, adapter in float32: logits float32, within 4 % of max |logit| of float32
    arithmetic."""
    adapter_config = AdapterConfig(method, 8, alpha=4.0)
    adapter = random_adapter(adapter_config)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base_tree())
    found = compiled(adapter_config)({"params": half, "adapter": adapter})
    assert found.dtype == jnp.float32
    exact = apply(adapter_config, adapter, jax.tree.map(lambda leaf: leaf.astype(np.float32), half))
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.04  # it did compute in bfloat16


# one row of copies, several, a prime number of them
@pytest.mark.parametrize("copies", [1, 6, 64, 96, 131, 256])
def test_repeat_and_add_is_the_same_on_every_device(copies):
    """What a CPU runs, what others run, and tiling in NumPy; the gradient is the sum over a
    channel's copies."""
    y, z = (jax.random.normal(jax.random.key(i), (2, 3, n)) for i, n in enumerate((5 * copies, 5)))
    expected = np.asarray(y) + np.tile(z, copies)
    for add in (repeat_and_add, products_module._add_copies, products_module._add_broadcast):
        np.testing.assert_array_equal(jax.jit(add)(y, z), expected)
    half, low = jnp.asarray(y, jnp.bfloat16), jnp.asarray(z, jnp.bfloat16)
    assert repeat_and_add(half, low).dtype == jnp.bfloat16
    weights = jax.random.normal(jax.random.key(2), y.shape)
    dy, dz = jax.grad(lambda y, z: (weights * repeat_and_add(y, z)).sum(), argnums=(0, 1))(y, z)
    np.testing.assert_array_equal(dy, weights)
    np.testing.assert_allclose(
        dz, np.asarray(weights).reshape(2, 3, copies, 5).sum(2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("tokens, most", [(1, 5 * 7), (1, 5 * 7 - 1), (3, 5 * 7)])
def test_a_product_that_is_a_sum_is_taken_in_float32(tokens, most, monkeypatch):
    """That of one token with few weights; then one rounding of the result is all that is lost."""
    monkeypatch.setattr(products_module, "_SUMMED", most)
    summed = tokens == 1 and most == 5 * 7
    rng = np.random.default_rng(0)
    x, W = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, tokens, 5), (5, 7)))
    # A function of its own, since a trace is kept by function.
    (product,) = (
        eqn
        for eqn in jax.make_jaxpr(lambda *arrays: products_module.multiply(*arrays))(x, W).eqns
        if eqn.primitive.name == "dot_general"
    )
    assert product.outvars[0].aval.dtype == (jnp.float32 if summed else jnp.bfloat16)
    found, x64, W64 = (
        np.asarray(array, np.float64) for array in (products_module.multiply(x, W), x, W)
    )
    bound = 2**-8 * (abs(x64 @ W64) + 1e-3 if summed else 5 * abs(x64) @ abs(W64))
    assert (abs(found - x64 @ W64) <= bound).all() and products_module.multiply(
        x, W
    ).dtype == jnp.bfloat16
    for other in (W[:4], jnp.pad(W, ((0, 3), (0, 0)))):
        with pytest.raises(TypeError):
            products_module.multiply(x, other)


@pytest.mark.parametrize(
    "dtype, tokens, narrow, rows",
    [
        ("bfloat16", 1, 8, 2),
        ("bfloat16", 1, 7, 1),
        ("bfloat16", 3, 8, 3),
        ("float32", 1, 8, 1),
    ],
)
def test_one_token_with_few_outputs_is_given_twice(dtype, tokens, narrow, rows, monkeypatch):
    """In half precision, where a GPU's compiler would make a sum that it writes out first."""
    monkeypatch.setattr(products_module, "_COUNTING", 5 * 7 - 1)
    monkeypatch.setattr(products_module, "_NARROW", narrow)
    rng = np.random.default_rng(0)
    x, W = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((1, tokens, 5), (5, 7)))
    (product,) = (
        eqn
        for eqn in jax.make_jaxpr(lambda *arrays: products_module.multiply(*arrays))(x, W).eqns
        if eqn.primitive.name == "dot_general"
    )
    assert np.prod(product.outvars[0].aval.shape) == rows * 7
    assert products_module.is_sum(x, 5, 7) == (rows == tokens == 1)
    found = products_module.multiply(x, W)
    x64, W64 = (np.asarray(array, np.float64) for array in (x, W))
    np.testing.assert_allclose(np.asarray(found, np.float64), x64 @ W64, atol=0.1)
    assert found.shape == (1, tokens, 7) and found.dtype == x.dtype
