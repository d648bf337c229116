"""Exports in vLLM's Transformers backend: tokens and logprobs are those of our own model.

    FLORA_VLLM_EXPORTS=exports python -m pytest vllm_plugin/tests/test_backend.py

in an environment with vLLM; make_exports.py writes the directory in one with flora_jax.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if "FLORA_VLLM_EXPORTS" not in os.environ:
    pytest.skip("FLORA_VLLM_EXPORTS names no output of make_exports.py", allow_module_level=True)
EXPORTS = Path(os.environ["FLORA_VLLM_EXPORTS"])
EXPECTED = json.loads((EXPORTS / "expected.json").read_text())
SETTINGS = {"trust_remote_code": True, "model_impl": "transformers", "enforce_eager": True}
SETTINGS |= {"dtype": "float32", "max_model_len": 256}
# On a CPU: one process, no core of its own, a cache of 1 GB.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.mark.parametrize("name", EXPECTED)
def test_tokens_and_logprobs_are_ours(name):
    import vllm

    owed = EXPECTED[name]
    llm = vllm.LLM(model=str(EXPORTS / name), **SETTINGS)
    prompts = [{"prompt_token_ids": prompt} for prompt in owed["prompts"]]
    asked = vllm.SamplingParams(
        temperature=0, max_tokens=len(owed["tokens"][0]), logprobs=5, ignore_eos=True
    )
    found = [answer.outputs[0] for answer in llm.generate(prompts, asked, use_tqdm=False)]
    assert [list(answer.token_ids) for answer in found] == owed["tokens"]
    for answer, logprobs in zip(found, owed["logprobs"], strict=True):
        steps = zip(answer.logprobs, answer.token_ids, strict=True)
        assert [step[token].logprob for step, token in steps] == pytest.approx(logprobs, abs=1e-4)


def test_two_devices_are_refused():
    """While the model is built, in one line, not with the first prompt."""
    script = (
        f"import vllm; vllm.LLM({str(EXPORTS / 'ffba')!r}, tensor_parallel_size=2, **{SETTINGS})"
    )
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "CPU_VISIBLE_MEMORY_NODES": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"if __name__ == '__main__':\n    {script}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode
    line = "flora_llama is not split over devices: tensor_parallel_size must be 1"
    assert line in done.stdout + done.stderr
