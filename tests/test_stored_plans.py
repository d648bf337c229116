"""The launch plans in experiments/results keep what the README says of the fused methods, cell by cell."""

import json

import pytest
from conftest import ROOT

LORA = {"lora", "lora, dot merger off"}
FUSED = {"ffba", "ffba_qg_add", "ffba_qg_add_folded", "fpa", "zflora"}
# (model, method, target, batch): launches a layer, and arrays of a weight's size a layer, more than the base has. XLA
# for an H100 writes the products of o with riding rows out at batch 1 before it sums them; nothing that was tried
# (launches_tried.md) keeps it from that.
EXCEPTIONS = {("3b", "fpa", "h100", 1): (1, 1), ("3b", "ffba_qg_add_folded", "h100", 1): (1, 1),
              ("3b", "ffba", "h100", 1): (2, 1), ("3b", "ffba_qg_add", "h100", 1): (2, 1)}  # fmt: skip


@pytest.mark.parametrize("model", ["1b", "3b"])
def test_stored_plans_keep_the_promises(model):
    result = json.loads((ROOT / f"experiments/results/launches_{model}/launches.json").read_text())
    rows, layers = result["rows"], result["settings"]["num_hidden_layers"]
    cells = {(row["target"], row["mode"], row["batch"]): row for row in rows if row["label"] == "base"}
    targets, modes, batches = (set(part) for part in zip(*cells, strict=True))
    assert len(cells) == 12 and targets == {"h100", "a100"} and modes == {"triton", "cublas"} and batches == {1, 8, 32}
    seen = []
    for row in rows:
        base = cells[row["target"], row["mode"], row["batch"]]
        more = {part: row["layer"][part] - base["layer"][part] for part in row["layer"]}
        place = (model, row["label"], row["target"], row["batch"])
        seen.append(row["label"])
        if row["label"] in FUSED:
            if place in EXCEPTIONS:
                assert (more["launches"], more["weight_copies"]) == EXCEPTIONS[place], place
            else:
                assert more["launches"] <= 1 and more["weight_copies"] <= 0, place
            assert more["gemms"] == 0 and max(more["cache_copies"], more["activation_copies"]) <= 0, place
            # Around the layers, too, nothing is copied that the base does not.
            for part in ("weight_copies", "cache_copies", "activation_copies"):
                outside = [of["step"][part] - layers * of["layer"][part] for of in (row, base)]
                assert outside[0] <= outside[1], (place, part)
        elif row["method"] == "lora":
            assert more["launches"] >= 10, place
    assert {label: seen.count(label) for label in {*FUSED, *LORA}} == dict.fromkeys({*FUSED, *LORA}, 12)
