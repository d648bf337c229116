"""Exports on vLLM's own Llama: tokens and logprobs are those of our own model.

    FLORA_VLLM_EXPORTS=exports python -m pytest vllm_plugin/tests

in an environment with vLLM and this plugin; make_exports.py writes the directory in one with
flora_jax.
"""

import pytest
from conftest import (
    METHODS,
    bank_settings,
    check,
    expected,
    generate,
    mixed,
    on_ranks,
    rows,
    settings,
    wanted,
)


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
    check(fused, [(*answer, [1.0] * len(answer[0])) for answer in own])
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


def test_tensor_parallel(exports):
    """Two ranks: slots, slices of z, and in a bank of two places four adapters with the base."""
    owed = expected(exports)
    asked, answers = mixed(exports / "bank", ["ffba_0", "base", "ffba_1", "ffba_2", "ffba_3"])
    cases = [[settings(exports / name), wanted(owed[name])] for name in ("ffba", "zflora")]
    cases.append([bank_settings(exports, "ffba_0", 2), asked])
    found = on_ranks(cases, tensor_parallel_size=2)
    for own, right in zip(found, [rows(owed["ffba"]), rows(owed["zflora"]), answers], strict=True):
        check(own, right)


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
