"""The launch plans in experiments/results keep what the README says of the fused methods, cell by cell."""

import json

import pytest
from support import ROOT

LORA = {"lora", "lora, dot merger off"}
FUSED = {"ffba", "ffba_qg_add", "ffba_qg_add_folded", "fpa", "zflora"}


BOTH = {"h100", "a100"}


def stored(model):
    return json.loads((ROOT / f"experiments/results/launches_{model}/launches.json").read_text())


@pytest.mark.parametrize("model, planned, left_out", [
    ("1b", BOTH, set()), ("3b", BOTH, set()), ("1b_cuda13", {"h100"}, {"ffba_qg_add_folded"}),
])  # fmt: skip
def test_stored_plans_keep_the_promises(model, planned, left_out):
    result = stored(model)
    rows, layers = result["rows"], result["settings"]["num_hidden_layers"]
    cells = {
        (row["target"], row["mode"], row["batch"]): row for row in rows if row["label"] == "base"
    }
    targets, modes, batches = (set(part) for part in zip(*cells, strict=True))
    assert targets == planned and modes == {"triton", "cublas"} and batches == {1, 8, 32}
    assert len(cells) == 6 * len(planned)
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
            # The adapter's own bytes and the rows filled up; those of zflora are of the whole stream.
            bound = 1.05 if label == "zflora" else 1.015
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
    """But for LoRA under the dot merger above batch 1, which only the older XLA joins to copies of the weights."""

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
