"""Exports in vLLM's Transformers backend: tokens and logprobs are those of our own model."""

import pytest
from conftest import BACKEND, METHODS, check, expected, generate, on_ranks, rows, settings, wanted


@pytest.mark.parametrize("name", ["base", *METHODS])
def test_tokens_and_logprobs_are_ours(exports, name):
    import vllm

    owed = expected(exports)[name]
    llm = vllm.LLM(**settings(exports / name, **BACKEND))
    check(generate(llm, wanted(owed)), rows(owed))


def test_two_devices_are_refused(exports):
    """While the model is built, in one line, not with the first prompt."""
    case = [settings(exports / "ffba", **BACKEND), []]
    line = "flora_llama is not split over devices: tensor_parallel_size must be 1"
    with pytest.raises(AssertionError, match=line):
        on_ranks([case], tensor_parallel_size=2)
