"""The launch plans in experiments/results keep what the README says of the fused methods, cell by
cell."""

import json

import pytest
from support import ROOT

from flora_jax.models.config import LlamaConfig

LORA = {"lora", "lora, dot merger off"}
FUSED = {"ffba", "ffba_qg_add", "ffba_qg_add_folded", "fpa", "zflora"}


BOTH = {"h100", "a100"}


def stored(model):
    return json.loads((ROOT / f"experiments/results/launches_{model}/launches.json").read_text())


# What an adapter of rank 32 adds to the bytes: its own and the rows filled up; zflora's are of the
# whole stream.
LARGE = {"zflora": 1.05, "ffba": 1.015}
SMALL = {"zflora": 1.12, "ffba": 1.03}


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("model, whole", [("1b", 0.61), ("8b", 0.55)])
def test_stored_plans_over_codes_keep_the_promises(quantization, model, whole):
    """In Triton's products no weight is written out, and an adapter is one launch a step at
    most."""
    result = stored(f"{quantization}_{model}")
    assert result["settings"]["quantization"] == quantization
    assert result["settings"]["row_multiple"] == 256
    base = {row["batch"]: row for row in result["rows"] if row["label"] == "base"}
    assert base.keys() == {1, 8, 32}
    for row in result["rows"]:
        assert row["mode"] == "triton" and row["step"]["weight_copies"] == 0 and not row["copies"]
        assert row["step"]["launches"] <= base[row["batch"]]["step"]["launches"] + 1
    assert {row["label"] for row in result["rows"]} == {
        "base",
        "ffba",
        "ffba_qg_add",
        "fpa",
        "zflora",
    }
    # of a step's weights in bfloat16; the cache and the states are in what it moves
    config = LlamaConfig.preset("llama3.2-1b" if model == "1b" else "llama3.1-8b")
    kernels = sum(d_in * d_out for d_in, d_out in config.widths.values())
    weights = 2 * (kernels * config.num_hidden_layers + config.vocab_size * config.hidden_size)
    assert base[1]["step"]["moved"] <= whole * weights + 1e8


@pytest.mark.parametrize(
    "model, planned, sizes, left_out, bounds",
    [
        ("1b", BOTH, {1, 8, 32}, set(), LARGE),
        ("3b", BOTH, {1, 8, 32}, set(), LARGE),
        ("1b_cuda13", {"h100"}, {1, 8, 32}, {"ffba_qg_add_folded"}, LARGE),
        ("qwen3_0.6b", {"h100"}, {1, 8}, set(), SMALL),
        ("qwen2.5_0.5b", {"h100"}, {1, 8}, set(), SMALL),
    ],
)
def test_stored_plans_keep_the_promises(model, planned, sizes, left_out, bounds):
    result = stored(model)
    rows, layers = result["rows"], result["settings"]["num_hidden_layers"]
    cells = {
        (row["target"], row["mode"], row["batch"]): row for row in rows if row["label"] == "base"
    }
    targets, modes, batches = (set(part) for part in zip(*cells, strict=True))
    assert targets == planned and modes == {"triton", "cublas"} and batches == sizes
    assert len(cells) == 2 * len(sizes) * len(planned)
    seen = []
    for row in rows:
        base = cells[row["target"], row["mode"], row["batch"]]
        more = {part: row["layer"][part] - base["layer"][part] for part in row["layer"]}
        label, batch = row["label"], row["batch"]
        place = (model, label, row["target"], row["mode"], batch)
        seen.append(label)
        if label in FUSED:
            assert more["launches"] <= 1 and more["gemms"] == 0, place
            assert row["layer"]["weight_copies"] == row["step"]["weight_copies"] == 0, place
            assert max(more["cache_copies"], more["activation_copies"]) <= 0, place
            bound = bounds.get(label, bounds["ffba"])
            assert 1 < row["step"]["moved"] / base["step"]["moved"] < bound, place
            # Around the layers, too, nothing is copied that the base does not.
            for part in ("weight_copies", "cache_copies", "activation_copies"):
                outside = [of["step"][part] - layers * of["layer"][part] for of in (row, base)]
                assert outside[0] <= outside[1], (place, part)
        elif row["method"] == "lora":
            assert more["launches"] >= 10, place
    labels = {*FUSED, *LORA} - left_out
    assert {label: seen.count(label) for label in labels} == dict.fromkeys(labels, len(cells))


def test_both_versions_of_cuda_plan_the_same():
    """But for LoRA under the dot merger above batch 1, which only the older XLA joins to copies of
    the weights."""

    def place(row):
        return (row["target"], row["mode"], row["batch"], row["label"])

    before = {place(row): row["layer"] for row in stored("1b")["rows"]}
    for row in stored("1b_cuda13")["rows"]:
        old, new = before[place(row)], row["layer"]
        if row["label"] == "lora" and row["batch"] > 1:
            assert old["weight_copies"] == 4 and new["weight_copies"] == 0, place(row)
        else:
            same = (
                "launches",
                "gemms",
                "products",
                "weight_copies",
                "cache_copies",
                "activation_copies",
            )
            assert {part: old[part] for part in same} == {part: new[part] for part in same}, place(
                row
            )
