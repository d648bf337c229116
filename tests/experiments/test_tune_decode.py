"""The search for block sizes, interpreted: all products of a layer, and what goes into the table."""

import json

import pytest

from experiments import tune_decode
from flora_jax.errors import run_command
from flora_jax.models.decode_blocks import Blocks, blocks_for


def run(*flags):
    with pytest.raises(SystemExit) as done:
        run_command(tune_decode.main, ["tune_decode", "--preset", "tiny", "--rank", "4", *flags])
    return done.value.code


@pytest.mark.parametrize("quantization", ["none", pytest.param("int8", marks=pytest.mark.slow)])
def test_every_product_is_tried(tmp_path, monkeypatch, quantization):
    monkeypatch.setattr(tune_decode, "device_rates", lambda: {"copy_gb_per_s": 10.0})
    tried = {"_COLUMNS": (16,), "_TILES": (4096,), "_STAGES": (3,), "_WARPS": (2,)}
    for name, values in tried.items():
        monkeypatch.setattr(tune_decode, name, values)
    monkeypatch.setattr(tune_decode, "_ROUNDS", 1)
    monkeypatch.setattr(tune_decode, "_GAIN", float("inf"))  # the noise of this machine decides
    out, file = tmp_path / "blocks", tmp_path / "table.json"
    flags = ["--batch_sizes", "2", "--quantization", quantization]
    assert not run("--out", str(out), "--table", str(file), *flags)
    rows = json.loads((tmp_path / "blocks.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["qkv", "o", "gate_up", "down", "logits"]
    assert (tmp_path / "blocks.md").read_text().count("| 2 | ") == 5
    entries = json.loads(file.read_text())
    # o and down of the tiny model are of one shape where rows are filled up to 256.
    rows = {(row["d_in"], row["d_out"]): row for row in rows}.values()
    assert len(entries) == len(rows)
    monkeypatch.setattr("flora_jax.models.decode_blocks.table", lambda: entries)
    for row in rows:
        shape = tune_decode.Shape(*(row[field] for field in tune_decode.Shape._fields))
        assert blocks_for(shape) == Blocks(*(row[field] for field in Blocks._fields))


def test_wrong_results_are_no_candidates(monkeypatch):
    """Nor are blocks that the compiler refuses."""
    [task, *_] = tune_decode.tasks(arguments(), 1)
    with tune_decode.ThreadPoolExecutor() as pool:
        trials = tune_decode.Trials(task, pool)
        good, wrong, refused = (trials.default._replace(stages=n) for n in (5, 6, 7))
        trials.times([good])
        trials.programs |= {wrong: lambda x, kernels: [x * 0 + 1], refused: None}
        assert trials.times([good, wrong, refused]).keys() == {trials.default, good}


def arguments():
    flags = ["--preset", "tiny", "--rank", "4", "--out", "x"]
    return tune_decode.parse(["", *flags], "", tune_decode.__doc__, tune_decode.FLAGS)


def test_bad_input_is_one_line(tmp_path, capsys):
    file = tmp_path / "table.json"
    file.write_text("[")
    for flags, line in (
        (["--batch_sizes", "17"], "--batch_sizes 17: our products take up to 16"),
        (["--table", str(file)], f"--table {file} is no JSON"),
    ):
        assert run("--out", str(tmp_path / "out"), *flags) == 2
        error = capsys.readouterr().err
        assert line in error and error.startswith("error: ") and error.count("\n") == 1
    assert file.read_text() == "[" and len(list(tmp_path.iterdir())) == 1
