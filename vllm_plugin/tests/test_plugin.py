"""Exports on vLLM's own Llama: tokens and logprobs are those of our own model.

    FLORA_VLLM_EXPORTS=exports python -m pytest vllm_plugin/tests

in an environment with vLLM and this plugin; make_exports.py writes the directory in one with
flora_jax.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPT, bank_settings, check, expected, generate, rows, settings

METHODS = ["lora", "pf_lora", "ffa", "fpa", "fpa_gelu", "parallel"]
METHODS += ["ffba", "ffba_qg_add", "ffba_qd_add", "zflora"]
ON_TWO = {"ffba": "ffba", "zflora": "zflora", "bank": "ffba_0"}


def wanted(entry: dict, adapter: Path | None = None) -> list:
    return [[prompt, adapter and str(adapter)] for prompt in entry["prompts"]]


@pytest.mark.parametrize("name", METHODS)
def test_every_method(exports, name):
    import vllm

    owed = expected(exports)[name]
    llm = vllm.LLM(**settings(exports / name))
    check(generate(llm, wanted(owed)), rows(owed))


def test_a_lora_of_peft(exports):
    """Its fused export here, beside vLLM's own LoRA on the files that PEFT wrote."""
    import vllm

    prompts = expected(exports)["base"]
    fused = generate(vllm.LLM(**settings(exports / "from_peft")), wanted(prompts))
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    own = generate(
        vllm.LLM(**settings(exports / "base", **lora)), wanted(prompts, exports / "peft")
    )
    check(fused, own)
    assert [tokens for tokens, _ in own] != prompts["tokens"]


@pytest.mark.parametrize("name", ["ffba", "zflora"])
def test_compiled(exports, name):
    import vllm

    owed = expected(exports)[name]
    llm = vllm.LLM(**settings(exports / name, enforce_eager=False))
    assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
    check(generate(llm, wanted(owed)), rows(owed))


def test_a_compiled_bank(exports, monkeypatch):
    """vLLM compiles nothing on a CPU where LoRA is enabled; on a GPU it does. What it would compile
    is compiled here, adapters being written after it was."""
    import vllm
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    decide = CpuPlatform.check_and_update_config.__func__

    def compiled(cls, vllm_config):
        decide(cls, vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(compiled))
    owed = expected(exports / "bank")
    llm = vllm.LLM(**bank_settings(exports, "ffba_0", 2, enforce_eager=False))
    for name in ("ffba_0", "ffba_1", "ffba_3"):
        check(generate(llm, wanted(owed[name], exports / "bank" / name)), rows(owed[name]))
    check(generate(llm, wanted(owed["base"])), rows(owed["base"]))


@pytest.mark.parametrize("name", ON_TWO)
def test_tensor_parallel(exports, name):
    """Two ranks: slots, slices of z, and in a bank of two places four adapters with the base."""
    if name == "bank":
        names = ["ffba_0", "base", "ffba_1", "ffba_2", "ffba_3"]
        owed = expected(exports / "bank")
        given = bank_settings(exports, ON_TWO[name], 2)
        paths = {own: exports / "bank" / own for own in names if own != "base"}
        asked = [row for own in names for row in wanted(owed[own], paths.get(own))]
        answers = [row for own in names for row in rows(owed[own])]
    else:
        owed = expected(exports)[name]
        given = settings(exports / name)
        asked = wanted(owed)
        answers = rows(owed)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([{**given, "tensor_parallel_size": 2}, asked])],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert found, done.stderr[-3000:]
    check(json.loads(found[0].removeprefix("ANSWERS ")), answers)


@pytest.mark.parametrize("start, stop, rank", [(0, 12, 4), (6, 12, 4), (3, 9, 8)])
def test_repeat_and_add_of_a_share(start, stop, rank):
    """Of any range of a projection's outputs, as of the whole, where a rank's share cuts a tile."""
    import torch

    from flora_vllm.linear import repeat_and_add

    y = torch.randn(2, stop - start)
    z = torch.randn(2, rank)
    whole = z.repeat(1, stop)[:, start:stop]
    plain = start % rank == 0 and (stop - start) % rank == 0
    owed = y + whole
    repeat_and_add(y, z, None if plain else torch.arange(start, stop) % rank)
    assert torch.equal(y, owed)
