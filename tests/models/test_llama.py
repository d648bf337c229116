"""The Llama around the adapters: packing, padding, positions, cache, rematerialisation, and the
trees it refuses. Its logits are held to transformers' in test_loading.py and to NumPy's in
test_adapters.py."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from support import FAST_COMPILE, random_adapter

from flora_jax.adapters import METHODS, AdapterConfig, abstract_adapter, fuse, split
from flora_jax.errors import UserError
from flora_jax.models import attention
from flora_jax.models.architectures import PRODUCTS
from flora_jax.models.attention import attend
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import leaf_shapes
from flora_jax.models.llama import KVCache, Llama, abstract_base, init_base

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False, biases=PRODUCTS)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, TINY.vocab_size, (2, 10)).astype(np.int32)
FFBA = AdapterConfig("ffba", 8, alpha=4.0)


def draw(config, adapter_config):
    """Random variables with ordinary sizes, the adapter's too."""
    rng = np.random.default_rng(1)
    tree = {"params": abstract_base(config)}
    if adapter_config is not None and adapter_config.method != "fft":
        tree["adapter"] = abstract_adapter(config, adapter_config)
    leaves = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        value = rng.standard_normal(leaf.shape).astype(np.float32)
        scaled = path.endswith("_kernel")
        leaves[path] = (
            1 + 0.2 * value
            if path.endswith("scale")
            else value / math.sqrt(leaf.shape[-2])
            if scaled
            else 0.05 * value
            if path.startswith("adapter")
            else value
        )
    return unflatten_dict(leaves, sep="/")


@functools.cache
def model_of(adapter_config, config=TINY):
    """`(variables, forward)`: forward(variables, tokens, **arguments) is the jitted model."""
    model = Llama(config, adapter_config)
    return draw(config, adapter_config), jax.jit(model.apply, compiler_options=FAST_COMPILE)


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# --------------------------------------------------------------------------------------------------
# Packing, padding, masks


@pytest.mark.parametrize("method", ["ffba", "zflora"])
def test_packed_is_each_alone(method):
    """With positions that restart or run on alike: only distances matter to rotary embeddings."""
    variables, forward = model_of(AdapterConfig(method, 8, alpha=4.0))
    alone = [forward(variables, part) for part in (TOKENS[:, :4], TOKENS[:, 4:])]
    segment_ids = np.repeat([[1, 2]], [4, 6], axis=1).repeat(2, 0).astype(np.int32)
    positions = np.concatenate([np.arange(4), np.arange(6)])[None].repeat(2, 0).astype(np.int32)
    for arguments in ({"positions": positions}, {}):
        packed = forward(variables, TOKENS, segment_ids=segment_ids, **arguments)
        assert_close(packed, np.concatenate(alone, 1))
    # the first segment would be seen
    assert np.abs(forward(variables, TOKENS)[:, 4:] - alone[1]).max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_seen(side):
    """Rows of 10 and 6 real tokens, padded with noise; positions count real tokens by default."""
    variables, forward = model_of(FFBA)
    tokens, mask = TOKENS.copy(), np.ones((2, 10), bool)
    real = slice(4, 10) if side == "left" else slice(0, 6)
    tokens[1, real] = TOKENS[1, :6]
    mask[1] = False
    mask[1, real] = True
    found = forward(variables, tokens, mask=mask)
    assert_close(found[:1], forward(variables, TOKENS)[:1])
    assert_close(found[1:, real], forward(variables, TOKENS[1:, :6]))
    noise = np.where(mask, tokens, 7)
    np.testing.assert_array_equal(forward(variables, noise, mask=mask)[1, real], found[1, real])
    assert np.isfinite(found).all()


def test_positions():
    """By default a token's place; shifting all changes nothing, spreading them does."""
    variables, forward = model_of(FFBA)
    place = np.broadcast_to(np.arange(10, dtype=np.int32), (2, 10))
    plain, explicit, shifted, spread = (
        forward(variables, TOKENS, positions=p) for p in (None, place, place + 100, place * 3)
    )
    assert_close(explicit, plain)
    assert_close(shifted, plain)
    assert np.abs(spread - plain).max() > 0.1


def test_a_mask_by_query():
    """`[B, T, S]`, causality on top; the same as the padding mask and as the segments that it
    spells out."""
    variables, forward = model_of(FFBA)
    everything = np.ones((2, 10, 10), bool)
    assert_close(forward(variables, TOKENS, mask=everything), forward(variables, TOKENS))
    segments = np.repeat([1, 2], [4, 6])
    blocks = np.broadcast_to(segments[:, None] == segments[None, :], (2, 10, 10))
    packed = forward(variables, TOKENS, segment_ids=np.broadcast_to(segments, (2, 10)))
    assert_close(forward(variables, TOKENS, mask=blocks), packed)


def test_later_tokens_are_not_seen():
    variables, forward = model_of(FFBA)
    changed = TOKENS.copy()
    changed[:, 6:] = (changed[:, 6:] + 5) % TINY.vocab_size
    one, other = forward(variables, TOKENS), forward(variables, changed)
    np.testing.assert_array_equal(one[:, :6], other[:, :6])
    assert np.abs(one[:, 6:] - other[:, 6:]).max() > 0.1


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [13, 130])
def test_attention_is_jaxs_own(groups, masked, T):
    """Output and gradients equal those of jax.nn.dot_product_attention, in which each head is a
    product of its own."""
    B, K, H = 2, 2, 8
    keys = jax.random.split(jax.random.key(0), 5)
    q, cotangent = (jax.random.normal(key, (B, T, K * groups, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:4])
    mask = (
        jnp.tril(jax.random.bernoulli(keys[4], 0.6, (B, 1, T, T)) | jnp.eye(T, dtype=bool))
        if masked
        else None
    )

    def expected(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=mask is None, implementation="xla"
        )

    found, pull = jax.vjp(lambda *qkv: attend(*qkv, mask), q, k, v)
    wanted, pull_wanted = jax.vjp(expected, q, k, v)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    for one, other in zip(pull(cotangent), pull_wanted(cotangent), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# The cache


def decode(adapter_config, variables, tokens, prompt, mask=None):
    """Logits of a prefill of `prompt` tokens, then of one token at a time."""
    model = Llama(TINY, adapter_config)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(variables, tokens):
        cache = KVCache.empty(TINY, tokens.shape[0], tokens.shape[1] + 3)
        first, cache = model.apply(variables, tokens[:, :prompt], mask=mask, cache=cache)

        def step(cache, token):
            logits, cache = model.apply(variables, token[:, None], cache=cache)
            return cache, logits[:, 0]

        cache, rest = jax.lax.scan(step, cache, tokens[:, prompt:].T)
        return jnp.concatenate([first, rest.swapaxes(0, 1)], 1), cache

    return run(variables, tokens)


# Nothing, a path around the blocks (with an add in `down`), and a stream with a first layer of its
# own; the others do with the cache what these do.
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            m if m != "fft" else None,
            marks=[] if m in ("fft", "ffba_qd_add", "zflora") else pytest.mark.slow,
        )
        for m in METHODS
    ],
)
def test_decoding_is_one_forward_pass(method):
    """Prefill and six single steps, over stacked leaves and over fused ones."""
    adapter_config = None if method is None else AdapterConfig(method, 8, alpha=4.0)
    variables, forward = model_of(adapter_config)
    whole = forward(variables, TOKENS)
    found, cache = decode(adapter_config, variables, TOKENS, prompt=4)
    assert_close(found, whole)
    assert int(cache.index) == 10
    np.testing.assert_array_equal(cache.valid, np.arange(13)[None].repeat(2, 0) < 10)
    fused = {"params": fuse(variables["params"], variables.get("adapter"), TINY, adapter_config)}
    assert_close(decode(adapter_config, fused, TOKENS, prompt=4)[0], whole)


def test_a_long_prefill_is_one_forward_pass(monkeypatch):
    """150 and 131 tokens in an empty cache of 150: attention goes block by block, and products have
    hundreds of rows; the arrays are those of a CPU."""
    variables, forward = model_of(FFBA)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 150)).astype(np.int32)
    mask = np.arange(150) < np.array([[150], [131]])
    fused = {"params": fuse(variables["params"], variables["adapter"], TINY, FFBA, transposed=True)}
    blocks = []
    grouped = attention.attend_grouped
    monkeypatch.setattr(
        attention, "attend_grouped", lambda q, *rest: blocks.append(q.shape[1]) or grouped(q, *rest)
    )
    found, cache = Llama(TINY, FFBA).apply(
        fused, tokens, mask=mask, cache=KVCache.empty(TINY, 2, 150)
    )
    assert blocks == [38, 38, 38, 36] * TINY.num_hidden_layers
    whole = forward(variables, tokens)
    for row, length in enumerate((150, 131)):
        assert_close(found[row, :length], whole[row, :length])
    np.testing.assert_array_equal(cache.valid, mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_after_padded_prompts(side):
    """Prompts of 4 and 2 tokens, the shorter padded: each row decodes as if alone."""
    variables, forward = model_of(FFBA)
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]], bool)
    found, _ = decode(FFBA, variables, TOKENS, prompt=4, mask=mask)
    keep = np.concatenate([mask, np.ones((2, 6), bool)], 1)
    for row in range(2):
        tokens = TOKENS[row : row + 1, keep[row]]
        assert_close(found[row : row + 1, keep[row]], forward(variables, tokens))


def test_segments_with_a_cache_are_refused():
    variables, _ = model_of(FFBA)
    with pytest.raises(UserError, match="segment_ids are for packed training rows"):
        Llama(TINY, FFBA).apply(
            variables, TOKENS, segment_ids=TOKENS, cache=KVCache.empty(TINY, 2, 12)
        )


# --------------------------------------------------------------------------------------------------
# Rematerialisation


@functools.cache
def compiled_gradient(remat, method="ffba"):
    """`(value and gradient of a loss with dropout, compiled, variables)`."""
    adapter_config = AdapterConfig(method, 8, alpha=4.0, dropout=0.2)
    model, variables = Llama(TINY, adapter_config, remat=remat), draw(TINY, adapter_config)

    def loss(adapter, params):
        rngs = {"dropout": jax.random.key(3)}
        logits = model.apply(
            {"params": params, "adapter": adapter}, TOKENS, deterministic=False, rngs=rngs
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()

    step = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)
    return step.lower(variables["adapter"], variables["params"]).compile(), variables


@pytest.mark.parametrize("remat", ["products", "full"])
def test_remat_changes_no_number(remat):
    """Loss and gradients with dropout: the recomputed masks are the same ones."""
    (step, variables), (plain, _) = compiled_gradient(remat), compiled_gradient("none")
    found, expected = (f(variables["adapter"], variables["params"]) for f in (step, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for path, gradient in flatten_dict(expected[1], sep="/").items():
        assert_close(flatten_dict(found[1], sep="/")[path], gradient)
        assert np.abs(gradient).max() > 0


def test_remat_keeps_less():
    none, products, full = (
        compiled_gradient(r)[0].memory_analysis().temp_size_in_bytes
        for r in ("none", "products", "full")
    )
    assert full < products < none


@pytest.mark.parametrize("method", ["ffba", "lora"])
def test_no_product_is_computed_twice(method):
    """Beside attention's, which `attend` recomputes whatever is kept, the program has the products
    it has without."""
    none, products = (
        len(re.findall(r" dot\(", compiled_gradient(remat, method)[0].as_text()))
        for remat in ("none", "products")
    )
    assert products == none + (method == "lora")  # o's A reads what attention gives


def test_an_unknown_remat_is_refused():
    with pytest.raises(UserError, match="remat='some' is unknown; known: none, products, full"):
        Llama(TINY, None, remat="some").apply(model_of(None)[0], TOKENS)


# --------------------------------------------------------------------------------------------------
# Trees


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied-biased"])
def test_base_tree_is_the_hf_tables(config):
    leaves = flatten_dict(abstract_base(config, jnp.bfloat16), sep="/")
    assert {path: leaf.shape for path, leaf in leaves.items()} == leaf_shapes(config)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}


def test_random_base():
    """HF's initialisation: kernels and embedding with std 0.02, scales one; a key of its own for
    each layer."""
    leaves = flatten_dict(init_base(jax.random.key(0), UNTIED), sep="/")
    assert {path: leaf.shape for path, leaf in leaves.items()} == leaf_shapes(UNTIED)
    for path, leaf in leaves.items():
        if path.endswith(("kernel", "embedding")):
            assert float(leaf.std()) == pytest.approx(0.02, rel=0.05), path
            assert "layers" not in path or not np.array_equal(leaf[0], leaf[1]), path
        else:
            np.testing.assert_array_equal(leaf, np.ones_like(leaf) * path.endswith("scale"))


def test_untied_head_and_biases():
    """Logits are the final states times the head's own kernel; each bias matters."""
    variables, forward = model_of(FFBA, UNTIED)
    logits = forward(variables, TOKENS)
    model = Llama(UNTIED, FFBA)
    hidden, _ = model.apply(variables, TOKENS, method="hidden")
    head = variables["params"]["lm_head"]["kernel"]
    assert_close(logits, np.asarray(hidden) @ head)
    np.testing.assert_array_equal(model.apply(variables, method="unembedding"), head.T)
    leaves = flatten_dict(variables, sep="/")
    for path in [path for path in leaves if path.endswith("_bias")]:
        without = unflatten_dict({**leaves, path: np.zeros_like(leaves[path])}, sep="/")
        moved = np.abs(forward(without, TOKENS) - logits).max()
        # A key's bias turns with its position, so here it matters; without rotary embeddings it
        # would not.
        assert moved > 1e-2, path


def change(leaves, case):
    path = "adapter/layers/attention/o/o_B"
    if case == "missing":
        del leaves[path]
    if case == "extra":
        leaves["adapter/layers/attention/o/A"] = np.zeros((2, 96, 8), np.float32)
    if case == "shape":
        leaves[path] = np.zeros((2, 16, 96), np.float32)
    if case == "all":
        leaves = {path: leaf for path, leaf in leaves.items() if path.startswith("params")}
    return unflatten_dict(leaves, sep="/")


@pytest.mark.parametrize(
    "case, words",
    [
        ("missing", "adapter leaf 'layers/attention/o/o_B' is absent, but ffba at rank 8"),
        (
            "extra",
            "adapter leaf 'layers/attention/o/A' is (2, 96, 8), but ffba at rank 8 on this model "
            "has none",
        ),
        (
            "shape",
            "'layers/attention/o/o_B' is (2, 16, 96), but ffba at rank 8 on this model has (2, "
            "24, 96)",
        ),
        ("all", "is absent, but ffba at rank 8"),
    ],
)
def test_a_tree_of_another_adapter_is_refused(case, words):
    variables = change(flatten_dict(model_of(FFBA)[0], sep="/"), case)
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda v: Llama(TINY, FFBA).apply(v, TOKENS), variables)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "served_by, places, words",
    [
        (
            None,
            None,
            "the fused tree holds an adapter of rank 8, but adapter_config is of no adapter",
        ),
        (
            AdapterConfig("ffba", 4),
            None,
            "the fused tree holds an adapter of rank 8, but adapter_config is of an adapter of "
            "rank 4",
        ),
        (AdapterConfig("lora", 8), None, "but lora at rank 8"),
        (AdapterConfig("zflora", 8), None, "zflora at rank 8"),
        (FFBA, 2, "a bank of 1 adapters and needs select [B, 1]; found=2"),
    ],
)
def test_a_fused_tree_of_another_adapter_is_refused(served_by, places, words):
    variables = model_of(FFBA)[0]
    fused = {"params": fuse(variables["params"], variables["adapter"], TINY, FFBA)}
    select = None if places is None else jnp.ones((2, places), bool)
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda v: Llama(TINY, served_by).apply(v, TOKENS, select=select), fused)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_fused_tree_of_a_deeper_model_is_refused():
    variables = model_of(FFBA)[0]
    fused = fuse(variables["params"], variables["adapter"], TINY, FFBA)
    shallow = dataclasses.replace(TINY, num_hidden_layers=1)
    words = r"fused leaf 'layers/1/attention/o/kernel' is .* has none of that name"
    with pytest.raises(UserError, match=words):
        Llama(shallow, FFBA).apply({"params": fused}, TOKENS)
    with pytest.raises(UserError, match=words):
        split(fused, shallow, FFBA)


def test_a_zflora_of_another_rank_is_refused():
    """Its stream may be filled up, so that shapes alone would let rank 16 pass for rank 8, and two
    places for one."""
    config = AdapterConfig("zflora", 16)
    base, adapter = init_base(jax.random.key(0), TINY), random_adapter(TINY, config, 1)
    for made_of, served_by, words in [
        (
            adapter,
            AdapterConfig("zflora", 8),
            "rank 16, but adapter_config is of an adapter of rank 8",
        ),
        ([adapter, adapter], config, "a bank of 2 adapters and needs select [B, 2]; found=None"),
    ]:
        fused = {"params": fuse(base, made_of, TINY, config)}
        with pytest.raises(UserError, match=re.escape(words)):
            Llama(TINY, served_by).apply(fused, TOKENS)


def test_what_would_be_ignored_or_clamped_is_refused():
    base = init_base(jax.random.key(0), TINY)
    untied = init_base(jax.random.key(0), dataclasses.replace(TINY, tie_word_embeddings=False))
    shallow = init_base(jax.random.key(0), dataclasses.replace(TINY, num_hidden_layers=1))
    dropout = AdapterConfig("ffba", 8, dropout=0.5)
    fused = fuse(base, random_adapter(TINY, dropout, 1), TINY, dropout)
    full = KVCache.empty(TINY, 2, 8).replace(index=jnp.int32(6))
    for adapter_config, params, arguments, words in [
        (None, untied, {}, "params hold an lm_head"),
        (None, shallow, {}, "base leaf 'layers/attention/o/o_kernel' is"),
        (None, base, {"select": jnp.ones((2, 1), bool)}, "these variables are split"),
        (None, base, {"cache": full}, "tokens from slot 6 on do not fit into a cache of 8 slots"),
        (dropout, fused, {"deterministic": False}, "served without dropout"),
    ]:
        with pytest.raises(UserError, match=words):
            Llama(TINY, adapter_config).apply({"params": params}, TOKENS, **arguments)
    for tokens, words in [
        (np.full((1, 3), TINY.vocab_size), "tokens from 320 to 320 are not all"),
        (np.array([[-1]]), "vocab_size=320"),
        (np.zeros(3, int), "not int64 [3]"),
        (np.zeros((1, 3)), "must be integers [B, T], not float64 [1, 3]"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            Llama(TINY).apply({"params": base}, tokens)


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1, :1]], ids=["batch", "one token"])
@pytest.mark.parametrize("transposed", [False, True])
def test_logits_of_a_bfloat16_model_are_not_rounded(transposed, tokens):
    """They are sums in float32 of products of bfloat16 numbers, whatever the layout and however
    many."""
    base = init_base(jax.random.key(0), TINY, jnp.bfloat16)
    fused = {"params": fuse(base, None, TINY, None, transposed=transposed)}
    model = Llama(TINY)
    hidden, _ = model.apply(fused, tokens, method=Llama.hidden)
    expected = (
        np.asarray(hidden, np.float64) @ np.asarray(base["embed_tokens"]["embedding"], np.float64).T
    )
    np.testing.assert_allclose(
        model.apply(fused, tokens), expected, atol=1e-5 * np.abs(expected).max()
    )


def test_an_adapter_without_its_config_is_refused():
    variables, _ = model_of(FFBA)
    for nobody in (None, AdapterConfig("fft", 8)):
        with pytest.raises(UserError, match="built without one"):
            Llama(TINY, nobody).apply(variables, TOKENS)


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"adapter.rank=64 does not divide"):
        Llama(TINY, AdapterConfig("ffba", 64)).apply(model_of(FFBA)[0], TOKENS)
