"""The `vllm` export: names, shapes and values of its tensors, written out; what vLLM reads beside
them; the way back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import random_adapter, spread

from flora_jax.adapters import METHODS, AdapterConfig, adapter_of, parts_of
from flora_jax.errors import UserError
from flora_jax.export import main
from flora_jax.interop.adapter_files import load_adapter, save_adapter
from flora_jax.interop.exports import MARKER, export
from flora_jax.interop.formats import FORMATS, Trained, remote_config
from flora_jax.interop.vllm_adapter import MAX_LORA_RANKS, max_lora_rank
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import Llama, init_base
from flora_jax.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")

# D = 96, H heads together = 96, F = 192, two layers.
TINY = LlamaConfig.preset("tiny")
QKV, O, GATE_UP, DOWN = (
    "self_attn.qkv_proj.lora_A",
    "self_attn.o_proj.lora_B",
    "mlp.gate_up_proj.lora_A",
    "mlp.down_proj.lora_B",
)
# The leaf of the stacked adapter that each holds.
LEAVES = {
    QKV: "layers/attention/qkv/A",
    O: "layers/attention/o/o_B",
    GATE_UP: "layers/mlp/gate_up/A",
    DOWN: "layers/mlp/down/down_B",
}
# Of each adapter: the scale, which side it is in, and the shapes of a layer.
CASES = {
    "ffba": (
        AdapterConfig("ffba", 8, alpha=12.0),
        (1.5, "A"),
        {QKV: (24, 96), O: (96, 24), GATE_UP: (16, 96), DOWN: (96, 16)},
    ),
    "ffba_qg_add": (
        AdapterConfig("ffba_qg_add", 16, rslora=True),
        (4.0, "A"),
        {QKV: (48, 96), O: (96, 48), GATE_UP: (32, 96), DOWN: (96, 32)},
    ),
    "ffba_qd_add": (
        AdapterConfig("ffba_qd_add", 8, alpha=3.0),
        (0.375, "A"),
        {QKV: (24, 96), O: (96, 24), GATE_UP: (16, 96), DOWN: (96, 16)},
    ),
    "fpa": (
        AdapterConfig("fpa", 8, alpha=20.0, activation="gelu"),
        (2.5, "B"),
        {QKV: (8, 96), O: (96, 8), GATE_UP: (8, 96), DOWN: (96, 8)},
    ),
    "parallel on attention alone": (
        AdapterConfig("parallel", 5, alpha=15.0, activation="silu", targets="q,k,v,o"),
        (3.0, "B"),
        {QKV: (5, 96), O: (96, 5)},
    ),
    "ffba on some": (
        AdapterConfig("ffba", 8, alpha=16.0, targets="q,v,o,up", add_to="v,up"),
        (2.0, "A"),
        {QKV: (16, 96), O: (96, 16), GATE_UP: (8, 96)},
    ),
}
assert {c.method for c, *_ in CASES.values()} == {
    n for n, m in METHODS.items() if m.writes == "block"
}
cases = pytest.mark.parametrize("adapter_config, scale, shapes", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def base():
    return spread(init_base(jax.random.key(0), TINY))


def make(base, adapter_config, **changes):
    trained = Trained(
        config=TINY,
        base=base,
        adapter_config=adapter_config,
        adapter=random_adapter(TINY, adapter_config, 1),
        tokenizer=load_tokenizer("tiny"),
        base_model="some/base",
        fingerprint=base_fingerprint(base),
    )
    return dataclasses.replace(trained, **changes)


def stated(trained, scale, shapes):
    """The tensors: A and B as they were trained, turned, one of them times the scale."""
    factor, side = scale
    leaves = flatten_dict(trained.adapter, sep="/")
    assert leaves.keys() == {LEAVES[name] for name in shapes}
    tensors = {}
    for name, shape in shapes.items():
        for layer in (0, 1):
            value = np.asarray(leaves[LEAVES[name]])[layer].T
            assert value.shape == shape
            s = factor if name.endswith(side) else 1
            tensors[f"base_model.model.model.layers.{layer}.{name}.weight"] = np.float32(s) * value
    return tensors


@cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tensors(tmp_path, base, adapter_config, scale, shapes, dtype):
    trained = make(base, adapter_config)
    report = export(trained, tmp_path / "out", "vllm", dtype=dtype)
    assert report["logits"]["max_change"] <= report["logits"]["bound"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        MARKER,
    }
    wanted = stated(trained, scale, shapes)
    with safe_open(tmp_path / "out/adapter_model.safetensors", framework="np") as file:
        assert set(file.keys()) == wanted.keys() and file.metadata() == {"format": "pt"}
        for name, value in wanted.items():
            found = file.get_tensor(name)
            assert found.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(found, value.astype(dtype), err_msg=name)


@cases
def test_the_configuration(tmp_path, base, adapter_config, scale, shapes):
    trained = make(base, adapter_config)
    export(trained, tmp_path / "out", "vllm")
    rank = adapter_config.rank
    # vLLM multiplies by lora_alpha / r.
    assert json.loads((tmp_path / "out/adapter_config.json").read_text()) == {
        "peft_type": "FLORA_FUSED",
        "format_version": 2,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.split(".")[1] for name in shapes],
        "bias": "none",
        "base_model_name_or_path": "some/base",
        "fingerprint": trained.fingerprint,
        "method": adapter_config.method,
        "model_type": "llama",
        "differences": {
            "biases": [],
            "qk_norm": False,
            "no_rope_layers": [],
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": trained.config.head_dim**-0.5,
            "logits_divisor": 1.0,
        },
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "flora": remote_config(adapter_config)["flora"],
    }


def test_without_a_path_to_the_output(tmp_path, base):
    """Each projection's own z is added to it, and that is all: there are no rows, and no zeros for
    them."""
    trained = make(base, AdapterConfig("ffba", 8, targets="q,gate"))
    export(trained, tmp_path / "out", "vllm")
    shapes = {QKV: (8, 96), GATE_UP: (8, 96)}
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    wanted = stated(trained, (1.0, "A"), shapes)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@cases
def test_the_way_back(tmp_path, base, adapter_config, scale, shapes):
    """From the files alone: the same adapter with s = 1, its scale in its weights."""
    trained = make(base, adapter_config)
    export(trained, tmp_path / "out", "vllm")
    blank = dataclasses.replace(trained, adapter={}, adapter_config=None)
    found_config, found = FORMATS["vllm"].read(blank, tmp_path / "out")
    assert found_config == dataclasses.replace(
        adapter_config, alpha=float(adapter_config.rank), rslora=False
    )
    factor, side = scale
    before = flatten_dict(trained.adapter, sep="/")
    after = flatten_dict(found["adapter"], sep="/")
    assert before.keys() == after.keys()
    for path, value in before.items():
        s = np.float32(factor if path.endswith(side) else 1)
        np.testing.assert_array_equal(after[path], s * np.asarray(value), err_msg=path)
    assert found["params"] is trained.base
    tokens = jnp.arange(60).reshape(2, 30)
    own = {"params": trained.base, "adapter": trained.adapter}
    logits = Llama(TINY, adapter_config).apply(own, tokens)
    off = Llama(TINY, None).apply({"params": trained.base}, tokens)
    assert np.abs(logits - off).max() > 0.1
    assert np.abs(logits - Llama(TINY, found_config).apply(found, tokens)).max() <= 1e-4


@pytest.mark.parametrize(
    "adapter_config",
    [
        *(case[0] for case in CASES.values()),
        AdapterConfig("lora", 4, alpha=6.0, targets="k,v,down"),
        AdapterConfig("ffa", 8, alpha=4.0),
        AdapterConfig("zflora", 8, alpha=4.0),
    ],
    ids=lambda c: c.method,
)
def test_parts_are_put_together_again(adapter_config):
    adapter = random_adapter(TINY, adapter_config, 1)
    parts = parts_of(adapter, TINY, adapter_config)
    before = flatten_dict(adapter, sep="/")
    after = flatten_dict(adapter_of(parts, TINY, adapter_config), sep="/")
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_allclose(after[path], value, rtol=3e-7, err_msg=path)


def test_a_bank_takes_what_a_transformers_export_has_beside_its_base(tmp_path, base):
    trained = make(base, AdapterConfig("ffba_qg_add", 8, alpha=12.0))
    export(trained, tmp_path / "whole", "transformers")
    export(trained, tmp_path / "alone", "vllm")
    whole = load_file(tmp_path / "whole/model.safetensors")
    alone = load_file(tmp_path / "alone/adapter_model.safetensors")
    plain = dict(to_hf_tensors(TINY, base))
    inputs = {"self_attn.qkv": "qkv", "mlp.gate_up": ("gate", "up")}
    outputs = {"self_attn.o": "o", "mlp.down": "down"}
    for layer in (0, 1):
        at = f"model.layers.{layer}"
        for module, names in inputs.items():
            block = module.split(".")[0]
            W = [plain[f"{at}.{block}.{name}_proj.weight"] for name in names]
            A = alone[f"base_model.model.{at}.{module}_proj.lora_A.weight"]
            np.testing.assert_array_equal(
                whole[f"{at}.{module}_proj.weight"], np.concatenate([*W, A])
            )
        for module in outputs:
            W = plain[f"{at}.{module}_proj.weight"]
            B = alone[f"base_model.model.{at}.{module}_proj.lora_B.weight"]
            np.testing.assert_array_equal(
                whole[f"{at}.{module}_proj.weight"], np.concatenate([W, B], axis=1)
            )


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "adapter_config, words",
    [
        (AdapterConfig("fft", 1), "fft has no adapter; --format merged can hold it"),
        (
            AdapterConfig("lora", 4),
            "lora is a LoRA to vLLM, which reads --format peft;"
            " --format merged or peft or transformers can hold it",
        ),
        (AdapterConfig("pf_lora", 4), "pf_lora is a LoRA to vLLM, which reads --format peft; "),
        (AdapterConfig("ffa", 8), "ffa is a LoRA to vLLM, which reads --format peft; "),
        (
            AdapterConfig("zflora", 8),
            "zflora does not go around the blocks, where the bank in vLLM has its places; "
            "--format transformers can hold it",
        ),
        (
            AdapterConfig("ffba_qg_add", 24),
            "rank 24 goes into no --max-lora-rank of vLLM's (1, 8, 16, 32, 64, 128, 256, 320, "
            "512); "
            "--format transformers can hold it",
        ),
    ],
    ids=lambda value: value.method if isinstance(value, AdapterConfig) else "",
)
def test_what_it_cannot_hold(tmp_path, base, adapter_config, words):
    with pytest.raises(UserError) as refused:
        export(make(base, adapter_config), tmp_path / "out", "vllm")
    assert str(refused.value).startswith(f"--format vllm: {words}")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_base_leaves_that_trained_have_no_place(tmp_path, base):
    trained = make(base, AdapterConfig("ffba", 8), params={"final_norm": base["final_norm"]})
    with pytest.raises(UserError) as refused:
        export(trained, tmp_path / "out", "vllm")
    assert str(refused.value) == (
        "--format vllm: an adapter has no place for base leaves, and final_norm/scale trained; "
        "--format transformers can hold it"
    )
    assert not list(tmp_path.iterdir())


def test_it_is_read_back_before_it_is_named(tmp_path, base, monkeypatch):
    """A writer that loses the scale."""
    trained = make(base, AdapterConfig("ffba", 8, alpha=16.0))
    right = FORMATS["vllm"].write

    def wrong(trained, *given):
        plain = dataclasses.replace(trained.adapter_config, alpha=8.0)
        return right(dataclasses.replace(trained, adapter_config=plain), *given)

    monkeypatch.setitem(FORMATS, "vllm", dataclasses.replace(FORMATS["vllm"], write=wrong))
    with pytest.raises(UserError, match="logits differ from those of what was trained"):
        export(trained, tmp_path / "out", "vllm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "adapter_config, wanted",
    [
        (AdapterConfig("fpa", 1), 1),
        (AdapterConfig("fpa", 5), 8),
        (AdapterConfig("fpa", 300), 320),
        (AdapterConfig("fpa", 513), None),
        (AdapterConfig("ffba", 8), 8),
        # A multiple, for a place is filled with copies.
        (AdapterConfig("ffba", 20), 320),
        (AdapterConfig("ffba", 20, add_to=()), 32),
        (AdapterConfig("ffba", 24), None),
    ],
)
def test_max_lora_rank(adapter_config, wanted):
    assert max_lora_rank(adapter_config) == wanted
    assert wanted is None or wanted in MAX_LORA_RANKS


# -------------------------------------------------------------------------------------- the command


def test_the_command_and_its_card(hf_directory, tmp_path, capsys):
    """In float32 unless another dtype is asked for, as the adapter was trained; nothing of the base
    comes along."""
    where = hf_directory(tmp_path / "base")
    (where / "README.md").write_text("---\nlicense: mit\n---\nA base.")
    adapter_config = AdapterConfig("ffba", 4, alpha=8.0)
    trained = {"adapter": random_adapter(TINY, adapter_config, 1), "params": {}}
    # A fingerprint is compared only where one is stored.
    save_adapter(tmp_path / "a", trained, TINY, adapter_config, str(where), "f")
    stored = json.loads((tmp_path / "a/adapter_config.json").read_text())
    del stored["fingerprint"]
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(stored))
    flags = ["--model", where, "--adapter", tmp_path / "a", "--format", "vllm"]
    for dtype in ([], ["--dtype", "bfloat16"]):
        out = tmp_path / "-".join(["out", *dtype])
        main(["export", *map(str, flags), "--out", str(out), *dtype])
        said = capsys.readouterr().out
        name = dtype[-1] if dtype else "float32"
        assert said.endswith(f"vllm, {name}: {out}\n")
        tensors = load_file(out / "adapter_model.safetensors")
        assert {value.dtype for value in tensors.values()} == {jnp.dtype(name)}
        assert {p.name for p in out.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            MARKER,
        }
    card = (tmp_path / "out/README.md").read_text()
    assert "\nlibrary_name: vllm\n" in card and "license: mit" in card and "vllm_plugin/" in card
    assert (
        """```bash
# vLLM with the plugin of flora_jax, vllm_plugin/ in its repository, beside it
vllm serve PATH_OF_THE_BASE --enable-lora --max-lora-rank 8 \\
  --hf-overrides '{"architectures": ["FloraLlamaForCausalLM"], "flora": "THIS_DIRECTORY"}' \\
  --lora-modules NAME=THIS_DIRECTORY
```"""
        in card
    )


def test_it_is_no_adapter_directory_of_ours(tmp_path, base):
    trained = make(base, AdapterConfig("ffba", 8))
    out = tmp_path / "out"
    export(trained, out, "vllm")
    with pytest.raises(UserError) as refused:
        load_adapter(out, TINY)
    assert str(refused.value) == (
        f"{out}/adapter_config.json: peft_type='FLORA_FUSED' is an export for vLLM; what is read "
        "here is the adapter of the run that it was made from"
    )
    own = {"adapter": trained.adapter, "params": {}}
    with pytest.raises(UserError, match="is no adapter directory of ours"):
        save_adapter(out, own, TINY, trained.adapter_config, "src", "f")


def test_tensors_of_another_kind_are_named(tmp_path, base):
    trained = make(base, AdapterConfig("fpa", 8))
    export(trained, tmp_path / "out", "vllm")
    path = tmp_path / "out/adapter_model.safetensors"
    save_file({name: value.astype(np.int32) for name, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match="is stored as I32"):
        FORMATS["vllm"].read(trained, tmp_path / "out")
