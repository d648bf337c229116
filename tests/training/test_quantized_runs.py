"""Runs over quantised bases: what they train, go on with, write down, hand over, and refuse."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flora_jax import evaluate, generate, latency, launches
from flora_jax.adapters import dequantize_base, paths, quantize_base
from flora_jax.errors import UserError
from flora_jax.inference.generator import Generator
from flora_jax.interop import exports
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import init_base
from flora_jax.models.loading import load_pretrained
from flora_jax.models.tokenizer import load_tokenizer
from flora_jax.train import run
from flora_jax.training.trained import export_run

pytestmark = pytest.mark.usefixtures("quick_compile")

# Blocks of 64 divide its widths.
WIDE = dataclasses.replace(
    LlamaConfig.preset("tiny"),
    hidden_size=128,
    intermediate_size=192,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)
STEPS = {"train.steps": 4, "train.save_every": 2, "train.eval_every": 2, "train.keep": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A checkpoint, and those of the floats that its codes stand for, by format."""
    folder = tmp_path_factory.mktemp("models")
    base = init_base(jax.random.key(0), WIDE)
    trees = {"none": base}
    trees |= {name: dequantize_base(quantize_base(base, name)) for name in ("int8", "nf4")}
    for name, tree in trees.items():
        path = folder / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(WIDE.to_hf()))
        save_file(dict(to_hf_tensors(WIDE, tree)), path / "model.safetensors")
        load_tokenizer("tiny").save_pretrained(path)
    return folder


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def over_int8(models, small, tmp_path_factory, quick_compile):
    workdir = tmp_path_factory.mktemp("run") / "w"
    fields = {"model.weights": str(models / "none"), "model.quantization": "int8", **STEPS}
    run(small("lora", **fields), workdir)
    return workdir


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_run_over_codes_is_one_over_what_they_stand_for(models, small, tmp_path, name):
    fields = {"model.weights": str(models / "none"), "model.quantization": name, **STEPS}
    summary = run(small("ffba", **fields), tmp_path / "codes")
    floats = {"model.weights": str(models / name), **STEPS}
    owed = run(small("ffba", **floats), tmp_path / "floats")
    np.testing.assert_allclose(losses(tmp_path / "codes"), losses(tmp_path / "floats"), rtol=1e-4)
    for step, loss in owed["validation_losses"].items():
        assert summary["validation_losses"][step] == pytest.approx(loss, rel=1e-4)


def test_a_run_over_codes_goes_on_bit_equal(over_int8, models, small, tmp_path):
    again = tmp_path / "w"
    shutil.copytree(over_int8, again)
    shutil.rmtree(again / "checkpoints/4")
    shutil.rmtree(again / "adapter")
    fields = {"model.weights": str(models / "none"), "model.quantization": "int8", **STEPS}
    run(small("lora", **fields), again)
    one, other = (load_file(w / "adapter/adapter_model.safetensors") for w in (over_int8, again))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    fields["model.quantization"] = "none"
    with pytest.raises(UserError, match=r"model\.quantization='int8', not 'none'"):
        run(small("lora", **fields), again)


def test_an_adapter_says_what_it_was_trained_over(over_int8, models, capsys, tmp_path):
    source, adapter = str(models / "none"), over_int8 / "adapter"
    same = load_adapted(source, adapter, quantization="int8")
    assert not capsys.readouterr().err
    about = json.loads((adapter / "flora_config.json").read_text())
    assert about["quantization"]["format"] == "int8"
    assert 0.002 < about["quantization"]["error"] < 0.02
    other = load_adapted(source, adapter)
    assert f"warning: {adapter} was trained over int8 (0." in capsys.readouterr().err
    assert other.fingerprint == same.fingerprint
    nf4 = load_adapted(source, adapter, quantization="nf4")
    assert "from the floats), this is nf4 (" in capsys.readouterr().err
    assert nf4.fingerprint == same.fingerprint
    damaged = tmp_path / "adapter"
    shutil.copytree(adapter, damaged)
    about["quantization"] = {"format": "int5", "error": 0.1}
    (damaged / "flora_config.json").write_text(json.dumps(about))
    with pytest.raises(
        UserError, match=r"quantization=.*int5.*must have a format, one of none, int8"
    ):
        load_adapted(source, damaged)


@pytest.mark.parametrize("form, change", [("merged", "requantized"), ("peft", "over_floats")])
def test_exports_hold_floats_and_say_what_that_changes(over_int8, models, tmp_path, form, change):
    report = export_run(over_int8, form, tmp_path / "out")
    about = report["quantization"]
    assert about["format"] == "int8"
    sample = load_tokenizer("tiny")(exports._SAMPLE, add_special_tokens=False).input_ids
    tokens = np.asarray([sample[: exports._SAMPLE_TOKENS]])
    model = load_adapted(str(models / "none"), over_int8 / "adapter", quantization="int8")

    def logits(base, bare=False):
        one = dataclasses.replace(model, base=base, adapter=None if bare else model.adapter)
        return one.model.apply(one.variables, tokens)

    if form == "merged":
        weights = load_pretrained(str(tmp_path / "out"), quantization="int8")[1]
        moved = logits(weights, bare=True)
    else:
        moved = logits(load_pretrained(str(models / "none"))[1])
    owed = np.abs(moved - logits(model.base)).max()
    assert about[change] == pytest.approx(float(owed), rel=0.02)
    assert "trained over an int8 base" in (tmp_path / "out/README.md").read_text()
    if form == "merged":
        _, merged = load_pretrained(str(tmp_path / "out"))
        base = dequantize_base(load_pretrained(str(models / "none"), quantization="int8")[1])
        merged, base = paths(merged), paths(base)
        path = "layers/attention/qkv/q_kernel"
        tensors = load_file(over_int8 / "adapter/adapter_model.safetensors")
        layer = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
        a, b = (tensors[f"{layer}{side}.weight"] for side in "AB")
        np.testing.assert_allclose(merged[path][1], base[path][1] + (b @ a).T, atol=1e-6)
        assert np.abs(b @ a).max() > 1e-3
        same = "embed_tokens/embedding"
        np.testing.assert_array_equal(merged[same], base[same])


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_generating_and_scoring_over_codes(over_int8, models, capsys, tmp_path, name):
    source = str(models / "none")
    flags = ["--model", source, "--adapter", str(over_int8 / "adapter"), "--quantization", name]
    generate.main(["generate", *flags, "--prompt", "1 + 2 =", "--max_new_tokens", "8"])
    model = load_adapted(source, over_int8 / "adapter", quantization=name)
    [answer] = Generator.of(model, 128, 1).generate(["1 + 2 ="], 8)
    assert capsys.readouterr().out == answer.text + "\n"
    out = tmp_path / "scores.json"
    evaluate.main(
        [
            "evaluate",
            *flags,
            "--tasks",
            "chain_sum",
            "--limit",
            "2",
            "--out",
            str(out),
            "--protocol",
            "llm_adapters",
            "--allow_contaminated",
        ]
    )
    said = json.loads(out.read_text())
    assert (said["quantization"], said["generated_in"]) == (name, "int8")


@pytest.mark.slow
def test_latency_over_codes(models, tmp_path):
    flags = [
        "--model",
        str(models / "none"),
        "--prompt_lengths",
        "4",
        "--batch_sizes",
        "1",
        "--rounds",
        "1",
        "--new_tokens",
        "3",
        "--rank",
        "8",
        "--quantization",
        "int8",
    ]
    methods = ["--methods", "base,lora,ffba,lora_merged"]
    latency.main(["latency", *flags, *methods, "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out/latency.json").read_text())["rows"]
    bytes_of = {row["method"]: row["read_bytes"] for row in rows}
    values = sum(d_in * d_out for d_in, d_out in WIDE.widths.values()) * WIDE.num_hidden_layers
    embedding = 4 * WIDE.vocab_size * WIDE.hidden_size
    assert values + embedding < bytes_of["base"] < 1.2 * values + 1.1 * embedding
    assert bytes_of["base"] == bytes_of["lora_merged"] < bytes_of["ffba"] < bytes_of["lora"]
    assert "kernels in int8" in (tmp_path / "out/latency.md").read_text()


@pytest.mark.parametrize("command", [latency, launches])
def test_what_folds_into_the_base_is_refused_at_once(command, models, tmp_path):
    words = "--methods ffba_folded folds its adds into the base, which --quantization int8 keeps"
    own = ["--model", str(models / "none"), "--out", str(tmp_path / "o")]
    if command is launches:
        own = []
    with pytest.raises(UserError, match=words):
        command.main(["x", *own, "--methods", "base,ffba_folded", "--quantization", "int8"])


@pytest.mark.parametrize(
    "method, fields, words",
    [
        (
            "fft",
            {"model.quantization": "int8"},
            "model.quantization='int8': params/layers/attention/o/o_kernel would train",
        ),
        (
            "lora",
            {"model.quantization": "int8", "train.trainable": "params/.*down_kernel"},
            "down_kernel would train",
        ),
        (
            "lora",
            {"model.quantization": "nf4"},
            "config.model: quantization='nf4' has a scale a block of 64 rows",
        ),
        ("lora", {"model.quantization": "int4"}, "model.quantization='int4'"),
    ],
)
def test_what_a_run_refuses(small, tmp_path, method, fields, words):
    with pytest.raises(UserError) as refused:
        run(small(method, **fields), tmp_path / "w")
    assert words in str(refused.value)
    assert not (tmp_path / "w").exists()
