"""The chunked cross-entropy against optax on whole logits, and what its compiled program holds and
skips."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.training.loss import chunked_cross_entropy, vocabulary_block

D, V = 8, 104
# the values are the same, and compiling is what takes the time
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def whole(hidden, unembedding, targets, weights):
    """The same sum with all logits at once, by optax."""
    logits = jnp.einsum("BTD,VD->BTV", hidden, unembedding, precision="highest").astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(jnp.where(weights != 0, weights * losses, 0.0))


expected_parts = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)), compiler_options=FAST_COMPILE)


def summed(*arguments, **settings):
    """The loss of all rows."""
    return chunked_cross_entropy(*arguments, **settings).sum()


@functools.partial(jax.jit, static_argnums=(4, 5), compiler_options=FAST_COMPILE)
def parts(hidden, unembedding, targets, weights, chunk, block=V):
    """The loss and its gradients with respect to hidden and unembedding."""
    gradient = jax.value_and_grad(summed, argnums=(0, 1))
    return gradient(hidden, unembedding, targets, weights, chunk, block)


def draw(seed, B, T, size=1.0, counted=0.5):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 3.0, (B, T)) * (rng.random((B, T)) < counted)
    return (
        (size * rng.standard_normal((B, T, D))).astype(np.float32),
        rng.standard_normal((V, D)).astype(np.float32),
        rng.integers(0, V, (B, T)).astype(np.int32),
        weights.astype(np.float32),
    )


def assert_same(found, expected, tolerance=2e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-30)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (2, 7), (3, 12)]),
    chunk=st.sampled_from([1, 5, 40]),
    block=st.sampled_from([1, 26, V]),
    counted=st.sampled_from([0.0, 0.2, 0.9]),
    seed=st.integers(0, 99),
    zero_row=st.booleans(),
)
def test_value_and_gradients_are_optaxs(shape, chunk, block, counted, seed, zero_row):
    """Non-binary weights, rows and batches without a counted token, chunks that do not divide the
    row, the vocabulary whole and in blocks."""
    hidden, unembedding, targets, weights = draw(seed, *shape, counted=counted)
    if zero_row:
        weights[0] = 0
    arguments = hidden, unembedding, targets, weights
    assert_same(parts(*arguments, chunk, block), expected_parts(*arguments))


def test_gradient_scales_with_its_cotangent():
    """Each row's with its own."""
    hidden, unembedding, targets, weights = draw(0, 2, 7)
    factors = np.asarray([-2.5, 0.3], np.float32)
    scaled = jax.grad(
        lambda *arguments: factors @ chunked_cross_entropy(*arguments, 5, 26), argnums=(0, 1)
    )
    found = jax.jit(scaled, compiler_options=FAST_COMPILE)(hidden, unembedding, targets, weights)
    _, gradients = expected_parts(hidden, unembedding, targets, factors[:, None] * weights)
    assert_same(found, jax.tree.map(np.asarray, gradients))


@pytest.mark.parametrize("block", [26, V])
def test_huge_logits_stay_finite(block):
    """The second chunk of neither row counts."""
    hidden, unembedding, targets, weights = draw(1, 2, 7, size=1e4)
    weights[:, 4:] = 0
    assert np.abs(hidden @ unembedding.T).max() > 5e4
    found = parts(hidden, unembedding, targets, weights, 5, block)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert_same(found, expected_parts(hidden, unembedding, targets, weights), tolerance=1e-5)


@pytest.mark.parametrize("block", [26, V])
def test_bfloat16_hidden(block):
    """Logits are summed in float32 and the sum kept there: the loss of bfloat16 states is right to
    1e-5."""
    hidden, unembedding, targets, weights = draw(2, 3, 12)
    hidden, unembedding = (
        hidden.astype(jnp.bfloat16),
        np.asarray(unembedding.astype(jnp.bfloat16), np.float32),
    )
    loss, gradients = parts(hidden, unembedding, targets, weights, 5, block)
    exact, expected = expected_parts(hidden.astype(np.float32), unembedding, targets, weights)
    assert loss.dtype == jnp.float32 and abs(loss / exact - 1) < 1e-5
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    for found, right in zip(gradients, expected, strict=True):
        assert np.abs(np.asarray(found, np.float32) - right).max() < 0.02 * np.abs(right).max()


def test_loss_of_uniform_logits():
    _, unembedding, targets, weights = draw(3, 2, 7)
    loss, _ = parts(np.zeros((2, 7, D), np.float32), unembedding, targets, weights, 5)
    assert loss == pytest.approx(weights.sum() * math.log(V), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# The compiled program. B · T · V = 4992, V · D = 832, B · chunk · V = 624, B · chunk · block = 156.

B, T, CHUNK, BLOCK = 2, 24, 3, 26


def program(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def shapes(text):
    """Every array shape of an HLO text."""
    return {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
    }


def dots(text):
    """The result shapes of its dots, without axes of length 1."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:dot|custom-call)\(", text)
    return {tuple(n for n in map(int, dims.split(",")) if n > 1) for dims in found if dims}


@functools.cache
def texts():
    arguments = draw(4, B, T)
    ours = functools.partial(summed, chunk=CHUNK, block=V)
    blocks = functools.partial(summed, chunk=CHUNK, block=BLOCK)
    return {
        "whole": program(jax.value_and_grad(whole), *arguments),
        "frozen": program(jax.value_and_grad(ours), *arguments),
        "both": program(jax.value_and_grad(ours, argnums=(0, 1)), *arguments),
        "value": program(ours, *arguments),
        "blocks": program(jax.value_and_grad(blocks, argnums=(0, 1)), *arguments),
    }


def largest(text):
    """Elements of the largest array with a vocabulary axis."""
    return max(math.prod(shape) for shape in shapes(text) if V in shape)


def test_no_array_holds_all_logits():
    assert largest(texts()["whole"]) == B * T * V
    for name in ("frozen", "both", "value", "blocks"):
        assert largest(texts()[name]) <= max(V * D, B * CHUNK * V), name


def test_no_array_holds_a_chunks_logits_where_the_vocabulary_is_cut():
    def logits(text, entries):
        return {
            shape
            for shape in shapes(text)
            if shape[-1] == entries and math.prod(shape) == B * CHUNK * entries
        }

    assert logits(texts()["both"], V)
    assert logits(texts()["blocks"], BLOCK) and not logits(texts()["blocks"], V)
    stacked = {shape for shape in shapes(texts()["blocks"]) if shape[-1] == BLOCK}
    assert max(map(math.prod, stacked)) < B * CHUNK * V


def test_blocks_of_the_vocabulary(monkeypatch):
    """A divisor that fits a cache, of SmolLM2, Llama 3 and Llama 2; all of a prime, of few, and on
    a GPU."""
    assert [vocabulary_block(n) for n in (49152, 128256, 32000, 32003, 300)] == [
        2048,
        2004,
        2000,
        32003,
        300,
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert vocabulary_block(49152) == 49152


def test_a_frozen_unembedding_has_no_gradient():
    """Nothing of V x D is computed unless something asks for it; likewise, no gradient at all for a
    value."""
    weight_gradient = {(V, D), (D, V)}
    assert dots(texts()["both"]) & weight_gradient
    assert dots(texts()["frozen"]) and not dots(texts()["frozen"]) & weight_gradient

    def count(name):
        return len(re.findall(r" dot\(", texts()[name]))

    assert count("value") < count("frozen") < count("both")


def test_chunks_without_counted_tokens_are_skipped():
    """Two chunks' worth of positions count, wherever they lie; all others are NaN, and nobody looks
    at them."""
    assert "conditional(" in texts()["frozen"]
    hidden, unembedding, targets, _ = draw(5, B, T)
    weights = np.zeros((B, T), np.float32)
    for row in range(B):
        weights[row, np.random.default_rng(row).permutation(T)[: 2 * CHUNK]] = 0.5
    clean = hidden.copy()
    hidden[weights == 0] = np.nan
    found = parts(hidden, unembedding, targets, weights, CHUNK, BLOCK)
    assert_same(found, expected_parts(clean, unembedding, targets, weights))
    assert not np.asarray(found[1][0])[weights == 0].any()
