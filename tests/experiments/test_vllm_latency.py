"""The table of vLLM's latency; measuring takes vLLM."""

import json

import pytest
from support import ROOT

from experiments import vllm_latency

STORED = sorted((ROOT / "experiments/results/vllm").glob("*.json"))


def test_ratios_are_taken_turn_by_turn():
    base = {"first": [1.0, 2.0], "token": [0.1, 0.2, 0.4], "engines": [0.2, 0.3]}
    own = {"first": [2.0, 6.0], "token": [0.2, 0.2, 0.2], "engines": [0.1, 0.4]}
    heads, _, _, row = vllm_latency.table({"times": {"1": {"base": base, "own": own}}}).splitlines()
    assert heads == "|  | batch 1: TPOT | batch 1: TTFT | batch 1: ms by engine |"
    assert row == "| own | 1.000 [0.500, 2.000] | 2.500 | 100.0, 400.0 |"


@pytest.mark.parametrize("path", STORED, ids=[path.stem for path in STORED])
def test_what_is_stored_is_of_its_json(path):
    assert path.with_suffix(".md").read_text() == vllm_latency.report(json.loads(path.read_text()))
