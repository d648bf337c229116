"""The search for block sizes, interpreted: all products of a layer, and what an entry serves."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from support import interpret_decode_kernels

from experiments import tune_decode
from flora_jax.adapters import AdapterConfig, abstract_adapter, fuse, gpu_layout
from flora_jax.errors import run_command
from flora_jax.models import decode_blocks
from flora_jax.models.config import LlamaConfig
from flora_jax.models.decode_blocks import blocks_for
from flora_jax.models.llama import KVCache, Llama, abstract_base


def run(*flags):
    with pytest.raises(SystemExit) as done:
        run_command(tune_decode.main, ["tune_decode", "--preset", "tiny", "--rank", "4", *flags])
    return done.value.code


@pytest.mark.parametrize("quantization", ["none", pytest.param("int8", marks=pytest.mark.slow)])
def test_every_product_is_tried(tmp_path, monkeypatch, quantization):
    """Other blocks than the default's are compiled, and give the same."""
    monkeypatch.setattr(tune_decode, "device_rates", lambda: {"copy_gb_per_s": 10.0})
    tried = {"_COLUMNS": (16,), "_TILES": (4096,), "_STAGES": (3,), "_WARPS": (2,), "_ROUNDS": 1}
    for name, values in tried.items():
        monkeypatch.setattr(tune_decode, name, values)
    trials = []

    def best(self):
        trials.append(self)
        return BEST(self)

    monkeypatch.setattr(tune_decode.Trials, "best", best)
    flags = ["--batch_sizes", "2", "--quantization", quantization]
    assert not run("--out", str(tmp_path / "blocks"), *flags)
    rows = json.loads((tmp_path / "blocks.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["qkv", "o", "gate_up", "down", "logits"]
    assert (tmp_path / "blocks.md").read_text().count("| 2 | ") == 5
    for one in trials:
        assert len(one.programs) > 1 and None not in one.programs.values()


BEST = tune_decode.Trials.best


@pytest.mark.parametrize(
    "preset, quantization",
    [
        ("tiny", "none"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("tiny", "int8"), ("qwen2.5-7b", "none"), ("llama3.1-8b", "int8"))
        ),
    ],
)
def test_an_entry_serves_what_was_measured(preset, quantization, monkeypatch):
    """The shapes of a model's own arrays, and of its unembedding, tied or not."""
    args = arguments("--preset", preset, "--quantization", quantization)
    measured = [
        {**task.shape._asdict(), "columns": 16, "rows": 64, "stages": 7, "warps": 1}
        for task in tune_decode.tasks(args, 1)
    ]
    monkeypatch.setattr(decode_blocks, "table", lambda: tune_decode.entries(measured))
    config = LlamaConfig.preset(preset)
    adapter_config = AdapterConfig("ffba", 4)
    served = []

    def spy(shape):
        served.append(blocks_for(shape))
        return served[-1]

    monkeypatch.setattr("flora_jax.models.decode_product.blocks_for", spy)
    interpret_decode_kernels(monkeypatch)
    config = dataclasses.replace(config, num_hidden_layers=1)
    base = abstract_base(config, jnp.bfloat16, quantization)
    layout = gpu_layout(quantization != "none", in_kernels=True)

    def step(base, adapter, tokens):
        params = fuse(base, adapter, config, adapter_config, layout)
        model = Llama(config, adapter_config, decode_kernels="layer")
        return model.apply(
            {"params": params}, tokens, cache=KVCache.empty(config, 1, 8, jnp.bfloat16)
        )

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    jax.eval_shape(step, base, abstract_adapter(config, adapter_config), tokens)
    assert len(served) == 5 and all(blocks.stages == 7 for blocks in served)


def test_what_is_no_candidate(monkeypatch, capsys):
    """Another result, and what cannot be compiled."""
    [task, *_] = tune_decode.tasks(arguments(), 1)
    step = task.step

    def odd(x, kernel, blocks):
        if blocks.stages == 7:
            raise ValueError("too much shared memory")
        return step(x, kernel, blocks) + (blocks.stages == 6)

    task = dataclasses.replace(task, step=odd)
    with tune_decode.ThreadPoolExecutor() as pool:
        trials = tune_decode.Trials(task, pool)
        good, wrong, refused = (trials.default._replace(stages=n) for n in (5, 6, 7))
        assert trials.times([good, wrong, refused]).keys() == {trials.default, good}
    said = capsys.readouterr().out
    assert "another result than the default's" in said and "too much shared memory" in said


def test_what_is_not_faster_has_no_entry():
    rows = [{"us": us, "default_us": 10.0} for us in (9.5, 9.8)]
    assert tune_decode.faster(rows) == rows[:1]


def arguments(*flags):
    flags = ["--preset", "tiny", "--rank", "4", "--out", "x", *flags]
    return tune_decode.parse(["", *flags], "", tune_decode.__doc__, tune_decode.FLAGS)


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    file = tmp_path / "table.json"
    file.write_text("[")
    table = ["--table", str(file)]
    cases = [
        (["--batch_sizes", "17"], "--batch_sizes 17: our products take up to 16"),
        (["--minutes", "0"], "--minutes 0 must be more than 0"),
        (table, "there is no GPU here to measure"),
    ]
    for flags, line in cases:
        assert_refused(flags, line, tmp_path, capsys)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for text in ("[", "{", '[{"device": "a card"}]', '{"a": 1}', "7"):
        file.write_text(text)
        assert_refused(table, f"{file} holds results that are damaged", tmp_path, capsys)


def assert_refused(flags, line, folder, capsys):
    before = [file.read_text() for file in folder.iterdir()]
    assert run("--out", str(folder / "out"), *flags) == 2
    error = capsys.readouterr().err
    assert line in error and error.startswith("error: ") and error.count("\n") == 1
    assert [file.read_text() for file in folder.iterdir()] == before
