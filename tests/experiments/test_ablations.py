"""The ablations: that each name is the run it says, and the script over a tiny group of them."""

import csv
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import ablations
from flora_jax.adapters import AdapterConfig
from flora_jax.analysis.variants import trained_parameters
from flora_jax.config import adapter_config, check_config
from flora_jax.config_files import read_config
from flora_jax.errors import UserError
from flora_jax.files import write_json
from flora_jax.models.config import LlamaConfig

SMOLLM2 = LlamaConfig.preset("smollm2-135m")
GROUPS = runpy.run_path(str(ablations.CONFIGS))["GROUPS"]
NAMES = [name for group in GROUPS.values() for name in group]


def config_of(name):
    return read_config(f"{ablations.CONFIGS}:{name}")


def test_every_ablation_is_a_run_that_can_be_made():
    assert len(NAMES) == len(set(NAMES)) > 30
    for name in NAMES:
        config = config_of(name)
        check_config(config)
        adapter_config(config).check(SMOLLM2.widths)
    assert config_of("add_qkv,llama3.2-1b").model.preset == "llama3.2-1b"
    with pytest.raises(UserError, match="ablation 'add_qgg' is unknown; did you mean 'add_qg'"):
        config_of("add_qgg")


def test_budgets_and_adds_are_what_the_names_say():
    counts = {name: trained_parameters(SMOLLM2, adapter_config(config_of(name))) for name in NAMES}
    budget = trained_parameters(SMOLLM2, AdapterConfig("ffba_qg_add", 32))
    # three of half a budget, three of one, three of two
    for place, name in enumerate(GROUPS["rank"]):
        assert abs(counts[name] / (budget * 2.0 ** (place // 3 - 1)) - 1) < 0.02
    assert {counts[name] for name in GROUPS["add_set"]} == {budget}
    adds = {
        name: "".join(p[0] for p in adapter_config(config_of(name)).add_to)
        for name in GROUPS["add_set"]
    }
    assert adds == {
        "add_none": "",
        "add_q": "q",
        "add_qg": "qg",
        "add_qd": "qd",
        "add_qkv": "qkv",
        "add_inputs": "qkvgu",
        "add_all": "qkvogud",
    }
    assert [adapter_config(config_of(name)).scale for name in GROUPS["scale"]] == pytest.approx(
        [0.5, 1, 2, 4, 32**0.5]
    )
    for name in GROUPS["initialisation"]:
        assert adapter_config(config_of(name)).zero_init == name[-1]


def test_the_script(tmp_path, hf_directory, caches, monkeypatch, capsys, quick_compile):
    """Two names of one run, one that differs, one that trains leaves of the base; then again, and
    asked otherwise."""
    monkeypatch.setenv("FLORA_CACHE", str(caches / "data"))
    monkeypatch.chdir(tmp_path)  # where runs/ is
    (tmp_path / "samsum").mkdir()
    for split, first in (("train", 0), ("test", 500)):
        lines = [
            json.dumps({"dialogue": f"A: I am {i}.", "summary": f"A is {i}."})
            for i in range(first, first + 30)
        ]
        (tmp_path / "samsum" / f"{split}.jsonl").write_text("\n".join(lines))
    model, small = hf_directory(tmp_path / "model"), tmp_path / "ablations.py"
    # The same file at ranks that a tiny model has.
    small.write_text(
        ablations.CONFIGS.read_text()
        .replace("    return config\n", "    config.adapter.rank = 8\n    return config\n")
        .replace(
            "GROUPS = {", "_KEPT = ('add_qg', 'add_none', 'scale_1', 'free_q_gate')\nGROUPS = {"
        )
        .replace(
            "\n\ndef get_config",
            "GROUPS = {g: {n: c for n, c in v.items() if n in _KEPT} for g, v in "
            "GROUPS.items() if g in ('add_set', 'scale', 'low_rank')}\n\ndef get_config",
        )
    )
    monkeypatch.setattr(ablations, "CONFIGS", small)
    trained, given = [], ablations.train

    def train(setup, workdir):
        assert workdir.parent == Path(f"runs/ablations{tmp_path}/out")
        trained.append(workdir.name)
        return given(setup, workdir)

    monkeypatch.setattr(ablations, "train", train)

    def run(*flags):
        ablations.main(
            [
                "ablations",
                "--data_dir",
                str(tmp_path),
                "--model",
                str(model),
                "--task",
                "samsum",
                "--max_length",
                "128",
                "--steps",
                "2",
                "--limit",
                "5",
                "--out",
                "out",
                *flags,
            ]
        )
        return capsys.readouterr().out

    table = run()
    # the reference first, scale_1 is it
    assert trained == ["add_qg-seed0", "add_none-seed0", "free_q_gate-seed0"]
    assert "| scale_1 |" in table and "## low_rank" in table and "q_kernel,gate_kernel" in table
    assert (tmp_path / "out.md").read_text() in table + "\n" and (
        tmp_path / "out.png"
    ).stat().st_size > 5000
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert found["scale_1-seed0"]["same_run_as"] == "add_qg"
    assert found["scale_1-seed0"]["reference_losses"] == found["add_qg-seed0"]["reference_losses"]
    assert len(found["add_none-seed0"]["reference_losses"]) == 5
    assert str(tmp_path) not in json.dumps(
        [v for k, v in flatten_dict(found).items() if "data" in k]
    )
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "out.csv").open())}
    assert float(rows["scale_1"]["difference"]) == 0 and rows["add_qg"]["difference"] == ""
    none = found["add_none-seed0"]
    assert rows["add_none"]["stderr_over"] == "items" and "(± standard error over items)" in table
    assert float(rows["add_none"]["stderr"]) == pytest.approx(
        np.std(none["reference_losses"], ddof=1) / 5**0.5
    )
    assert float(rows["add_none"]["minutes"]) == pytest.approx(none["minutes"])
    assert re.search(rf"\| 1 \| {none['minutes']:.1f} \| \d\.\d+ \| \d\.\d+ ± 0\.\d+ \|", table)
    again = run()
    # above: command and time
    assert again.splitlines()[4:] == table.splitlines()[4:] and len(trained) == 3
    part = run("--groups", "scale")
    # what was run before stays in the tables
    assert part.splitlines()[4:] == table.splitlines()[4:]
    with pytest.raises(UserError, match="--seeds '0,0' must be integers, 0 or more, each once"):
        run("--seeds", "0,0")
    with pytest.raises(UserError, match=r"--out=.* cannot be written"):
        run("--out", str(tmp_path / "ablations.py"))
    other = tmp_path / "out/add_none-seed1.json"
    other.write_text("{}")
    with pytest.raises(UserError, match=r"add_none-seed1\.json is not the result of a run"):
        run()
    other.unlink()
    with pytest.raises(UserError, match=r"was run with train.steps=2 \(now 3\)"):
        run("--steps", "3")
    # Nor is a run whose name now means what another name has run.
    scale = tmp_path / "out/scale_1-seed0.json"
    kept = json.loads(scale.read_text())
    write_json(scale, {**kept, "asked": {**kept["asked"], "test_items": 1}})
    with pytest.raises(UserError, match=r"scale_1-seed0\.json was run with test_items=1"):
        run()
    write_json(scale, kept)
    for split in ("train", "test"):
        records = tmp_path / "samsum" / f"{split}.jsonl"
        kept = records.read_text()
        records.write_text(kept.partition("\n")[2])
        with pytest.raises(UserError, match=f"is of other records of samsum/{split} than"):
            run()
        records.write_text(kept)
    with pytest.raises(UserError, match="--groups ',' names none"):
        run("--groups", ",")
    with pytest.raises(UserError, match="--groups: 'add_sets' is unknown; did you mean 'add_set'"):
        run("--groups", "add_sets")
