"""A method is one row of the table: one that is defined here, at run time, trains, is fused,
served, exported and read back, and nothing else knows of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support import random_adapter, spread

from flora_jax.adapters import METHODS, AdapterConfig, FusedDense, Method, fuse, split
from flora_jax.adapters.layouts import FUSED
from flora_jax.analysis.variants import serve
from flora_jax.inference.generator import Generator
from flora_jax.interop.adapter_files import load_adapted, load_adapter
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama, init_base
from flora_jax.train import run
from flora_jax.training.trained import export_run

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 12))
# LoRA's way back for what reads the blocks' inputs, and ffba's way around them: no method of the
# family does both.
ROW = Method(reads="input", adds="matrix", writes="block", zero="B")


@pytest.fixture
def row(monkeypatch):
    monkeypatch.setitem(METHODS, "both", ROW)
    return AdapterConfig("both", 8, alpha=12.0)


def by_hand(base, adapter, config, scale):
    """A layer's qkv in NumPy: its input, what the projections give, and z."""
    x = np.random.default_rng(1).standard_normal((3, config.hidden_size)).astype(np.float32)
    qkv = {
        name: np.asarray(leaf[0]) for name, leaf in adapter["layers"]["attention"]["qkv"].items()
    }
    kernels = {
        name: np.asarray(leaf[0]) for name, leaf in base["layers"]["attention"]["qkv"].items()
    }
    z = scale * x @ qkv["A"]
    pieces = np.split(z, 3, axis=-1)
    ys = [
        x @ kernels[f"{p}_kernel"] + piece @ qkv[f"{p}_B"]
        for p, piece in zip("qkv", pieces, strict=True)
    ]
    return x, ys, z


def test_it_computes_what_its_row_says(row):
    base, adapter = init_base(jax.random.key(0), TINY), random_adapter(TINY, row, 1)
    x, expected, z = by_hand(base, adapter, TINY, row.scale)
    leaves = {
        "params": jax.tree.map(lambda leaf: leaf[0], base["layers"]["attention"]["qkv"]),
        "adapter": jax.tree.map(lambda leaf: leaf[0], adapter["layers"]["attention"]["qkv"]),
    }
    ys, found = FusedDense("qkv", TINY.widths, row).apply(leaves, jnp.asarray(x))
    for y, wanted in zip([*ys, found], [*expected, z], strict=True):
        np.testing.assert_allclose(y, wanted, atol=1e-4)


def test_it_is_fused_and_served(row, prompts):
    base, adapter = spread(init_base(jax.random.key(0), TINY)), random_adapter(TINY, row, 1)
    variables = {"params": base, "adapter": adapter}
    expected = np.asarray(Llama(TINY, row).apply(variables, TOKENS))
    bare = np.asarray(Llama(TINY, None).apply({"params": base}, TOKENS))
    assert np.abs(expected - bare).max() > 0.1
    model, params = serve("both", base, TINY, row, adapter, FUSED)
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(model.apply({"params": params}, TOKENS), expected, atol=atol)
    found = split(fuse(base, adapter, TINY, row), TINY, row)[1]
    for path, leaf in flatten_dict(adapter, sep="/").items():
        np.testing.assert_allclose(flatten_dict(found, sep="/")[path], leaf, rtol=1e-6)
    generator = Generator(TINY, base, {"a": adapter}, row, max_length=64)
    tokens = generator.generate(prompts[:1], 4)[0].tokens
    ids = list(prompts[0])
    for token in tokens:
        assert int(np.argmax(Llama(TINY, row).apply(variables, np.array([ids]))[0, -1])) == token
        ids.append(token)


def test_it_trains_is_exported_and_read_back(row, small, tmp_path, hf_directory):
    source = str(hf_directory(tmp_path / "base"))
    run(small("both", **{"model.weights": source, "adapter.alpha": 12.0}), tmp_path / "run")
    model = load_adapted(source, tmp_path / "run/adapter")
    assert model.adapter_config == row
    start = {
        path: leaf for path, leaf in flatten_dict(model.adapter, sep="/").items() if "B" in path
    }
    assert len(start) == 7 and all(np.abs(leaf).max() > 0 for leaf in start.values())
    report = export_run(tmp_path / "run", "transformers", tmp_path / "out")
    assert report["logits"]["moved_by_training"] > 0
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    ).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS)).logits.numpy()
    variables = {"params": model.base, "adapter": model.adapter}
    expected = np.asarray(Llama(TINY, row).apply(variables, TOKENS))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    again, trained = load_adapter(tmp_path / "run/adapter", TINY)
    assert again == row and set(flatten_dict(trained["adapter"], sep="/")) == set(
        flatten_dict(model.adapter, sep="/")
    )
