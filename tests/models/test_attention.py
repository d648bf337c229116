"""Attention of training and prompts: who computes it. That packed rows hold nothing of `[T, T]`,
and what a GPU's kernels compute, is in test_gpu.py."""

import dataclasses
import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import FAST_COMPILE, packed

from flora_jax import LlamaConfig
from flora_jax.models import attention
from flora_jax.models.attention import attend, attend_segments, cudnn_runs, kernel_runs, pallas_runs

TINY = LlamaConfig.preset("tiny")


def draw(B, T, K, G, H):
    """q, k, v and a cotangent of the output, all normal."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, K * G, H), (B, T, K, H), (B, T, K, H), (B, T, K * G, H)]
    return [jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]


def compare(found, mask, q, k, v, cotangent, atol):
    """`found(q, k, v)` and its gradients beside jax.nn's attention under `mask` `[B, 1, T, T]`."""

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
    def run(attention, *qkv):
        out, pull = jax.vjp(attention, *qkv)
        return out, *pull(cotangent)

    expected = functools.partial(jax.nn.dot_product_attention, mask=mask, implementation="xla")
    ours, theirs = run(found, q, k, v), run(expected, q, k, v)
    assert ours[0].shape == q.shape
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


def spelt_out(segments):
    return jnp.tril(segments[:, None, :, None] == segments[:, None, None, :])


@pytest.mark.parametrize("rows", [[[4, 7, 1]], [[100, 77, 90], [130, 100]], [[900, 300], [50]]])
def test_packed_rows_see_their_segments(rows):
    """Short rows in one block, longer ones in four parts, long ones in blocks of each part."""
    segments = packed(*rows)
    arrays = draw(*segments.shape, K=2, G=2, H=8)
    by_segments = functools.partial(attend, segments=segments)
    compare(by_segments, spelt_out(segments), *arrays, atol=2e-5)


@pytest.mark.parametrize("T", [96, 1100])
def test_long_rows_under_a_mask(T):
    """A mask by query, which need not be one of segments."""
    ones = jax.random.bernoulli(jax.random.key(1), 0.6, (1, 1, T, T))
    mask = jnp.tril(ones | jnp.eye(T, dtype=bool))
    compare(functools.partial(attend, mask=mask), mask, *draw(1, T, K=1, G=3, H=8), atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*ops.gpu.attention is deprecated")
@pytest.mark.parametrize("rows, H", [([[100, 77, 90], [130, 100]], 64), ([[20, 12]], 128)])
def test_pallas_kernel_interpreted(rows, H):
    """Rows that do not fill its tiles, padding, groups."""
    segments = packed(*rows)
    arrays = draw(*segments.shape, K=1, G=2, H=H)
    kernel = functools.partial(attend_segments, segments=segments, interpret=True)
    compare(kernel, spelt_out(segments), *arrays, atol=2e-5)


@pytest.mark.parametrize(
    "capability, dtype, head_dim, devices, cudnn, pallas, decode",
    [
        ("9.0", jnp.bfloat16, 64, 1, True, True, True),
        ("8.0", jnp.float16, 128, 1, True, True, True),
        (
            "9.0",
            jnp.bfloat16,
            64,
            8,
            True,
            False,
            True,
        ),  # XLA cannot split a Pallas call over a mesh
        ("7.5", jnp.bfloat16, 64, 1, False, False, False),  # a T4
        ("7.5", jnp.float16, 64, 1, False, False, False),
        ("9.0", jnp.float32, 64, 1, False, False, True),
        ("9.0", jnp.bfloat16, 256, 1, False, False, True),
        ("9.0", jnp.bfloat16, 80, 1, True, False, False),
        ("9.0", jnp.bfloat16, 60, 1, False, False, False),
        ("gfx90a", jnp.bfloat16, 64, 1, False, False, False),  # AMD names its devices otherwise
        (None, jnp.bfloat16, 64, 1, False, False, False),
    ],
)
def test_which_devices_run_what(
    capability, dtype, head_dim, devices, cudnn, pallas, decode, monkeypatch
):
    """cuDNN's and Triton's kernels need compute capability 8.0; what they cannot, XLA does."""
    known = {} if capability is None else {"compute_capability": capability}
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**known)] * devices)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    q = jax.ShapeDtypeStruct((1, 128, 4, head_dim), dtype)
    assert (cudnn_runs(q), pallas_runs(q)) == (cudnn, pallas)
    assert kernel_runs(dataclasses.replace(TINY, head_dim=head_dim)) == decode


@pytest.mark.parametrize("capability", ["7.5", None])
def test_a_t4_takes_xlas_path(capability, monkeypatch):
    """In bfloat16: no call of a kernel that would fail there."""
    known = {} if capability is None else {"compute_capability": capability}
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**known)])
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in draw(1, 32, K=1, G=2, H=64))
    for segments in (None, packed([20, 12])):
        found = str(jax.make_jaxpr(lambda *qkv, s=segments: attend(*qkv, segments=s))(q, k, v))
        assert "pallas_call" not in found and "cudnn" not in found


def test_what_an_h100_is_given(monkeypatch):
    """Segments go to Pallas's kernel as they are, and no mask is made of them."""
    device = types.SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    segments = packed([700, 324])
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in draw(1, 1024, K=1, G=2, H=64))
    found = str(jax.make_jaxpr(lambda *qkv: attend(*qkv, segments=segments))(q, k, v))
    assert "mha_forward" in found and "1024,1024" not in found


def test_what_replaces_the_kernel_is_written_down():
    """jax 0.11 deprecates it, and names tokamax; where it says so, nothing of ours repeats it."""
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "import jax, jax.numpy as jnp\n"
        "from flora_jax.models.attention import attend_segments\n"
        "q = jnp.ones((1, 128, 1, 64))\n"
        "attend_segments(q, q, q, jnp.ones((1, 128), jnp.int32), interpret=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "deprecated" not in done.stderr
    assert "tokamax" in attention.__doc__
