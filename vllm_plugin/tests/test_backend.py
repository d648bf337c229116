"""Exports in vLLM's Transformers backend: tokens and logprobs are those of our own model."""

import os
import subprocess
import sys

import pytest
from conftest import BACKEND, METHODS, check, expected, generate, rows, settings, wanted


@pytest.mark.parametrize("name", ["base", *METHODS])
def test_tokens_and_logprobs_are_ours(exports, name):
    import vllm

    owed = expected(exports)[name]
    llm = vllm.LLM(**settings(exports / name, **BACKEND))
    check(generate(llm, wanted(owed)), rows(owed))


def test_two_devices_are_refused(exports):
    """While the model is built, in one line, not with the first prompt."""
    given = settings(exports / "ffba", **BACKEND, tensor_parallel_size=2)
    done = subprocess.run(
        [sys.executable, "-c", f"if __name__ == '__main__':\n    import vllm; vllm.LLM(**{given})"],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode
    line = "flora_llama is not split over devices: tensor_parallel_size must be 1"
    assert line in done.stdout + done.stderr
