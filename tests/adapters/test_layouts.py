"""`merge`, `fuse`, `split` and `unmerge` against the adapted model in the split layout (itself held
to NumPy in test_adapters), and `merge` against the arithmetic of one kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.adapters import (
    METHODS,
    AdapterConfig,
    FusedDense,
    Layout,
    abstract_adapter,
    device_layout,
    fuse,
    make_room,
    merge,
    split,
    widen,
)
from flora_jax.adapters import products as products_module
from flora_jax.analysis.unmerged import SevenDense, UnmergedDense, unmerge
from flora_jax.errors import UserError
from flora_jax.models.architectures import PRODUCTS
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama, abstract_base, init_base

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
# Two heads of 24 to one key/value head, a width of the heads' own, untied, biases everywhere.
ODD = dataclasses.replace(
    TINY,
    hidden_size=64,
    intermediate_size=120,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=24,
    tie_word_embeddings=False,
    biases=PRODUCTS,
)
ADAPTED = [m for m in METHODS if m != "fft"]
TOKENS = jax.random.randint(jax.random.key(3), (2, 12), 0, TINY.vocab_size)


def random_adapter(adapter_config, config=TINY, seed=2):
    return support.random_adapter(config, adapter_config, seed)


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
    assert (
        np.abs(np.asarray(merged).astype(np.float64) - exact)
        <= np.abs(exact) * 2.0**-8 * 1.001 + 1e-12
    ).all()


@pytest.mark.parametrize(
    "method", [m for m, row in METHODS.items() if not row.mergeable and m != "fft"]
)
def test_what_goes_around_the_block_cannot_be_merged(method):
    adapter_config = AdapterConfig(method, 8)
    with pytest.raises(ValueError, match=f"{method} cannot be merged.*lora, pf_lora, ffa can"):
        merge(
            init_base(jax.random.key(0), TINY), random_adapter(adapter_config), TINY, adapter_config
        )


def test_an_adapter_of_another_rank_is_refused():
    base, adapter = init_base(jax.random.key(0), TINY), random_adapter(AdapterConfig("lora", 8))
    with pytest.raises(ValueError, match="rank 4"):
        merge(base, adapter, TINY, AdapterConfig("lora", 4))


# --------------------------------------------------------------------------------------------------
# fuse and split


@functools.cache
def random_base(config, dtype=jnp.float32):
    """With biases and norms that are not at their initial zeros and ones."""
    leaves, structure = jax.tree.flatten(init_base(jax.random.key(0), config))
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [x + 0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.map(lambda x: x.astype(dtype), structure.unflatten(moved))


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="dense")
def logits(config, adapter_config, variables, select=None, tokens=TOKENS, dense=FusedDense):
    return Llama(config, adapter_config, dense=dense).apply(variables, tokens, select=select)


def assert_same_tree(found, expected, ulp=0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        assert (difference <= ulp * np.spacing(np.abs(np.asarray(b, np.float32)))).all()


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("method", ADAPTED)
def test_fused_equals_split_and_is_undone(config, method):
    """With s = 1.5, rows filled to 128 and arrays transposed; then `split` gives both back."""
    activation = "silu" if METHODS[method].activation else "identity"
    adapter_config = AdapterConfig(method, 8, alpha=12.0, activation=activation)
    base, adapter = random_base(config), random_adapter(adapter_config, config)
    expected = logits(config, adapter_config, {"params": base, "adapter": adapter})
    atol = 1e-5 * float(jnp.abs(expected).max())
    assert jnp.abs(expected - logits(config, None, {"params": base})).max() > 0.1
    trees = [fuse(base, adapter, config, adapter_config, row_multiple=128)]
    trees.append(fuse(base, adapter, config, adapter_config, transposed=True))
    if method.startswith("ffba"):
        trees.append(fuse(base, adapter, config, adapter_config, fold_adds=True))
    served = [(tree, FusedDense) for tree in trees]
    if method != "zflora":
        given = (base, adapter, config, adapter_config)
        served.append((unmerge(*given), UnmergedDense))
        served.append((unmerge(*given, seven=True, transposed=True), SevenDense))
    for tree, dense in served:
        found = logits(config, adapter_config, {"params": tree}, dense=dense)
        np.testing.assert_allclose(found, expected, atol=atol)
    for tree in trees[:2]:
        found_base, found_adapter = split(tree, config, adapter_config)
        assert_same_tree(found_base, base)
        assert_same_tree(found_adapter, adapter, ulp=2)


@pytest.mark.parametrize(
    "method, targets",
    [
        ("ffba", "k,v"),
        ("ffba", "q,k,v,gate,up,down"),
        ("ffba_qg_add", "q,gate"),
        ("ffba_qd_add", "q,gate,up,down"),
        ("lora", "v,down"),
        ("pf_lora", "k,up"),
        ("ffa", "o,gate"),
        ("fpa", "gate,up,down"),
    ],
)
def test_some_targets_alone(method, targets):
    """Fused, unmerged, in a bank and back; an ffba need not write where its z is added beside
    it."""
    adapter_config = AdapterConfig(method, 8, alpha=12.0, targets=targets)
    base, adapters = (
        random_base(TINY),
        [random_adapter(adapter_config, seed=seed) for seed in (1, 2)],
    )
    alone = [
        logits(TINY, adapter_config, {"params": base, "adapter": adapter}) for adapter in adapters
    ]
    atol = 1e-5 * float(jnp.abs(alone[0]).max())
    assert jnp.abs(alone[0] - logits(TINY, None, {"params": base})).max() > 0.1
    tree = fuse(base, adapters[0], TINY, adapter_config, row_multiple=128, transposed=True)
    unmerged = unmerge(base, adapters[0], TINY, adapter_config)
    for params, dense in ((tree, FusedDense), (unmerged, UnmergedDense)):
        found = logits(TINY, adapter_config, {"params": params}, dense=dense)
        np.testing.assert_allclose(found, alone[0], atol=atol)
    found_base, found_adapter = split(tree, TINY, adapter_config)
    assert_same_tree(found_base, base)
    assert_same_tree(found_adapter, adapters[0], ulp=2)
    if method != "lora":
        bank = {"params": fuse(base, adapters, TINY, adapter_config)}
        found = logits(TINY, adapter_config, bank, jnp.array([[False, True], [True, False]]))
        np.testing.assert_allclose(found, jnp.stack([alone[1][0], alone[0][1]]), atol=atol)
    if method.startswith("ffba"):
        with pytest.raises(UserError, match=r"fold_adds: .*leave 'o' out"):
            fuse(base, adapters[0], TINY, adapter_config, fold_adds=True)


@pytest.mark.parametrize("places", [1, 4, 16])
@pytest.mark.parametrize(
    "method", ["pf_lora", "ffa", "fpa", "ffba", "ffba_qg_add", "ffba_qd_add", "zflora"]
)
def test_each_row_of_a_bank_has_its_adapters_logits(method, places):
    """Batches of 8 rows in which every adapter has its turn, all with logits far apart; and `split`
    finds each of them at its place."""
    adapter_config, base = AdapterConfig(method, 8, alpha=16.0), random_base(TINY)
    tokens = jax.random.randint(jax.random.key(4), (8, 12), 0, TINY.vocab_size)
    adapters = [random_adapter(adapter_config, seed=seed) for seed in range(places)]
    bank = fuse(
        base,
        adapters,
        TINY,
        adapter_config,
        row_multiple=128 if places == 4 else 1,
        transposed=places == 16,
    )

    @jax.jit
    def of_each(adapter):
        return logits(TINY, adapter_config, {"params": base, "adapter": adapter}, tokens=tokens)

    @jax.jit
    def of_bank(select):
        return logits(TINY, adapter_config, {"params": bank}, select, tokens)

    alone = np.stack([of_each(adapter) for adapter in adapters])
    bare = np.asarray(logits(TINY, None, {"params": base}, tokens=tokens))
    # a split model's row alone and among others differ by up to 1e-5 of it
    atol = 3e-5 * float(np.abs(alone).max())
    np.testing.assert_allclose(of_bank(jnp.zeros((8, places), bool)), bare, atol=atol)
    order = np.random.default_rng(places).permutation(max(places, 8)) % places
    for own in order.reshape(-1, 8):
        found = of_bank(jax.nn.one_hot(own, places, dtype=bool))
        np.testing.assert_allclose(found, alone[own, np.arange(8)], atol=atol)
    assert set(order) == set(range(places))
    apart = np.stack([*alone, bare])
    for i in range(places + 1):
        assert all(np.abs(apart[i] - apart[j]).max(axis=(-2, -1)).min() > 0.1 for j in range(i))
    for place in range(places):
        assert_same_tree(split(bank, TINY, adapter_config, place)[1], adapters[place])


@pytest.mark.parametrize("method", ADAPTED)
def test_the_arrays_are_those_of_the_design(method):
    """Rows and columns of a layer's four arrays at r = 8: D 96, Q 96, K·H 32, F 192; and what else
    is there."""
    r, D, Q, qkv, F = 8, 96, 96, 160, 192
    shapes = {
        "ffa": [(D, qkv + 3 * r), (Q, D + r), (D, 2 * F + 2 * r), (F, D + r)],
        "fpa": [(D, qkv + r), (Q + r, D), (D, 2 * F + r), (F + r, D)],
        "ffba": [(D, qkv + 3 * r), (Q + 3 * r, D), (D, 2 * F + 2 * r), (F + 2 * r, D)],
        "zflora": [(D + r, qkv), (Q, D + r), (D + r, 2 * F), (F, D + r)],
    }
    shapes["lora"] = shapes["pf_lora"] = shapes["ffa"]
    shapes["parallel"], shapes["ffba_qg_add"], shapes["ffba_qd_add"] = (
        shapes["fpa"],
        shapes["ffba"],
        shapes["ffba"],
    )
    adapter_config = AdapterConfig(method, r, alpha=16.0)
    assert (
        TINY.hidden_size,
        TINY.q_width,
        TINY.q_width + 2 * TINY.kv_width,
        TINY.intermediate_size,
    ) == (D, Q, qkv, F)
    adapter = random_adapter(adapter_config)
    tree = fuse(random_base(TINY), adapter, TINY, adapter_config)
    for layer in tree["layers"].values():
        products = {**layer["attention"], **layer["mlp"]}
        assert [
            products[name]["kernel"].shape for name in ("qkv", "o", "gate_up", "down")
        ] == shapes[method]
        further = sum(len(leaves) - 1 for leaves in products.values())
        assert further == (7 if method in ("lora", "pf_lora") else 0)
    assert_same_tree(split(tree, TINY, adapter_config)[1], adapter)  # s = 2: to the bit
    zeros = fuse(random_base(TINY), jax.tree.map(jnp.zeros_like, adapter), TINY, adapter_config)
    assert_same_tree(make_room(tree, TINY, adapter_config, 1), zeros)
    transposed = fuse(random_base(TINY), adapter, TINY, adapter_config, transposed=True)
    for i, layer in transposed["layers"].items():
        for block in ("attention", "mlp"):
            for product, leaves in layer[block].items():
                for name, leaf in tree["layers"][i][block][product].items():
                    np.testing.assert_array_equal(
                        leaves[{"kernel": "weight"}.get(name, name)], leaf.T
                    )


def test_the_bare_base_has_four_arrays_a_layer():
    tree = fuse(random_base(ODD), None, ODD, None)
    assert tree["layers"]["0"]["attention"]["qkv"]["kernel"].shape == (64, 48 + 2 * 24)
    np.testing.assert_allclose(
        logits(ODD, None, {"params": tree}),
        logits(ODD, None, {"params": random_base(ODD)}),
        atol=2e-6,
    )
    base, adapter = split(tree, ODD, None)
    assert adapter == {}
    assert_same_tree(base, random_base(ODD))


@pytest.mark.parametrize("method", ["lora", "ffba_qg_add", "zflora"])
def test_bfloat16(method):
    """Fused and split in bfloat16, each against float32: both are rounded, neither more than the
    other."""
    adapter_config = AdapterConfig(method, 8, alpha=16.0)
    base, adapter = random_base(TINY, jnp.bfloat16), random_adapter(adapter_config)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    exact = logits(TINY, adapter_config, {"params": wide, "adapter": adapter})
    of_split = jnp.abs(
        logits(TINY, adapter_config, {"params": base, "adapter": adapter}) - exact
    ).max()
    fused = fuse(base, adapter, TINY, adapter_config)
    assert {leaf.dtype for leaf in jax.tree.leaves(fused)} == {jnp.dtype(jnp.bfloat16)}
    found = jnp.abs(logits(TINY, adapter_config, {"params": fused}) - exact).max()
    scale = float(jnp.abs(exact).max())
    assert found < max(1.5 * of_split, 0.02 * scale) and found < 0.04 * scale


@settings(max_examples=6, deadline=None)
@given(
    method=st.sampled_from(["lora", "fpa", "ffba_qg_add", "zflora"]),
    rank=st.sampled_from([1, 2, 4]),
    times=st.integers(1, 4),
    rslora=st.booleans(),
)
def test_a_wider_adapter_is_the_same_function(method, rank, times, rslora):
    adapter_config = AdapterConfig(method, rank, alpha=3.0, rslora=rslora)
    adapter = random_adapter(adapter_config)
    times = 2 ** (times - 1) if METHODS[method].adds == "repeat" else times
    wide, wide_config = widen(adapter, adapter_config, rank * times)
    assert wide_config.rank == rank * times and np.isclose(wide_config.scale, adapter_config.scale)
    expected = logits(TINY, adapter_config, {"params": random_base(TINY), "adapter": adapter})
    found = logits(TINY, wide_config, {"params": random_base(TINY), "adapter": wide})
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_what_cannot_be_laid_out_is_refused():
    ffba, base = AdapterConfig("ffba", 8), random_base(TINY)
    adapter = random_adapter(ffba)
    shallow = init_base(jax.random.key(0), dataclasses.replace(TINY, num_hidden_layers=1))
    lora, ffa = AdapterConfig("lora", 8), AdapterConfig("ffa", 8)
    for make, words in [
        (lambda: fuse(base, adapter, TINY, None), "without the adapter_config"),
        (lambda: fuse(base, None, TINY, ffba), "of ffba, but no adapter was given"),
        (lambda: fuse(base, adapter, TINY, AdapterConfig("ffba", 4)), "rank 4"),
        (lambda: fuse(base, adapter, TINY, ffba, row_multiple=0), "row_multiple=0"),
        (lambda: fuse(base, adapter, TINY, ffba, Layout()), "layout.kind='split'"),
        (lambda: Layout(kind="fuse"), "kind='fuse' is unknown; did you mean 'fused'"),
        (
            lambda: fuse(base, [adapter, adapter], TINY, ffba, fold_adds=True),
            "fold_adds takes one adapter",
        ),
        (lambda: split(fuse(base, adapter, TINY, ffba, fold_adds=True), TINY, ffba), "were folded"),
        (
            lambda: make_room(fuse(base, adapter, TINY, ffba, fold_adds=True), TINY, ffba, 2),
            "were folded",
        ),
        (
            lambda: split(fuse(base, None, TINY, None), TINY, ffba),
            "holds no adapter, but adapter_config is of",
        ),
        (
            lambda: split(fuse(base, adapter, TINY, ffba), TINY, ffba, place=1),
            "place=1 must be from 0 to 0",
        ),
        (lambda: split(fuse(base, adapter, TINY, ffba), TINY, ffba, place=-1), "place=-1"),
        (
            lambda: split(fuse(base, adapter, TINY, ffba), TINY, AdapterConfig("ffba", 4)),
            "of rank 8, but",
        ),
        (
            lambda: split(fuse(base, adapter, TINY, ffba), TINY, AdapterConfig("fpa", 8)),
            "fpa at rank 8 has (96, 168)",
        ),
        (
            lambda: split(fuse(base, random_adapter(lora), TINY, lora), TINY, ffa),
            "attention/o/o_B' is (8, 96), but ffa at rank 8 has none",
        ),
        (
            lambda: fuse(shallow, None, TINY, None),
            "base leaf 'layers/attention/o/o_kernel' is (1, 96, 96)",
        ),
        (lambda: fuse(fuse(base, None, TINY, None), None, TINY, None), "fused already"),
        (
            lambda: merge(shallow, random_adapter(lora), TINY, lora),
            "(1, 96, 96), but this configuration has (2,",
        ),
        (lambda: merge(base, None, TINY, lora), "adapter leaf 'layers/attention/o/A' is absent"),
        (lambda: merge(base, {}, TINY, AdapterConfig("fft", 8)), "its base is the result already"),
        (lambda: split(base, TINY, None), "no fused tree"),
        (lambda: widen(adapter, ffba, 12), "multiple of 8"),
        (
            lambda: logits(TINY, None, {"params": unmerge(base, None, TINY, None)}),
            "with dense=UnmergedDense",
        ),
        (
            lambda: unmerge(
                base, random_adapter(AdapterConfig("zflora", 8)), TINY, AdapterConfig("zflora", 8)
            ),
            "fuse it",
        ),
        (
            lambda: fuse(
                base,
                random_adapter(AdapterConfig("fpa", 8)),
                TINY,
                AdapterConfig("fpa", 8),
                fold_adds=True,
            ),
            "ffba, ffba_qg_add, ffba_qd_add have",
        ),
    ]:
        with pytest.raises(UserError) as error:
            make()
        assert words in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_parallel_base_is_refused():
    class OnMesh:
        shape = (2, 96)
        sharding = type(
            "Sharding", (), {"mesh": type("Mesh", (), {"shape": {"data": 1, "tensor": 2}})}
        )

    with pytest.raises(UserError, match="final_norm/scale lies on a mesh with tensor=2"):
        fuse({"final_norm": {"scale": OnMesh()}}, None, TINY, None)


def test_marks_outlive_a_trip_through_paths():
    """Saved by path and read back, a fused tree still says what is in it and that its adds are
    folded."""
    base, ffba = init_base(jax.random.key(0), TINY), AdapterConfig("ffba", 8)
    adapter = random_adapter(ffba)
    for adapters, fold in ((adapter, True), ([adapter, adapter], False)):
        fused = fuse(base, adapters, TINY, ffba, fold_adds=fold)
        again = unflatten_dict(flatten_dict(fused, sep="/"), sep="/")
        assert jax.tree.structure(again) == jax.tree.structure(fused)
        select = None if fold else jnp.array([[True, False], [False, True]])
        expected = Llama(TINY, ffba).apply({"params": base, "adapter": adapter}, TOKENS)
        found = Llama(TINY, ffba).apply({"params": again}, TOKENS, select=select)
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    "preset, method, rows",
    [
        ("llama3.2-1b", "ffba", 2176),
        ("llama3.2-3b", "ffba", 3200),
        ("llama3.2-3b", "zflora", 3200),
    ],
)
def test_rows_as_a_gpu_wants_them(preset, method, rows, monkeypatch):
    """The rows of o, or of zflora's stream, with 96 or 32 riding."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = dataclasses.replace(LlamaConfig.preset(preset), num_hidden_layers=1)
    adapter_config = AdapterConfig(method, 32)
    trees = abstract_base(config), abstract_adapter(config, adapter_config)
    fused = jax.eval_shape(
        lambda *trees: fuse(*trees, config, adapter_config, device_layout()), *trees
    )
    attention = fused["layers"]["0"]["attention"]
    assert attention["qkv" if method == "zflora" else "o"]["kernel"].shape[0] == rows


@pytest.mark.parametrize(
    "backend, row_multiple, transposed", [("gpu", 128, False), ("cpu", 1, True), ("tpu", 1, False)]
)
def test_the_layout_of_a_device(backend, row_multiple, transposed, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    expected = Layout(kind="fused", row_multiple=row_multiple, transposed=transposed)
    assert device_layout() == expected


@pytest.mark.parametrize(
    "tokens, most, read", [(1, 10**7, "own"), (1, 0, "all"), (3, 10**7, "all")]
)
def test_one_token_reads_no_rows_that_fill_up(tokens, most, read, monkeypatch):
    """Where its product is a sum; the logits are the same either way."""
    monkeypatch.setattr(products_module, "_SUMMED", most)
    config = AdapterConfig("ffba", 8)
    base, adapter = init_base(jax.random.key(0), TINY), random_adapter(config)
    tokens = TOKENS[:1, :tokens]
    plain, filled = (
        {"params": fuse(base, adapter, TINY, config, row_multiple=rows)} for rows in (1, 128)
    )
    model = Llama(TINY, config)
    expected = model.apply(plain, tokens)
    np.testing.assert_allclose(
        model.apply(filled, tokens), expected, atol=1e-5 * float(jnp.abs(expected).max())
    )
    shapes = {
        eqn.invars[1].aval.shape
        for eqn in jax.make_jaxpr(lambda t: model.apply(filled, t))(tokens).eqns
        if eqn.primitive.name == "dot_general"
    }
    o = {
        name: tree["params"]["layers"]["0"]["attention"]["o"]["kernel"].shape
        for name, tree in (("own", plain), ("all", filled))
    }
    assert o["own"] != o["all"] and o[read] in shapes and not shapes & set(o.values()) - {o[read]}
