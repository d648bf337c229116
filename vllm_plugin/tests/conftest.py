"""What the tests share: exports of make_exports.py, and engines that run in this process."""

import json
import os
from pathlib import Path

import pytest

# On a CPU: no core of its own, one thread, a cache of 1 GB.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CPU_VISIBLE_MEMORY_NODES", "0")

NEW_TOKENS = 16
# For two ranks, which are processes: one script a case, so that nothing is left behind.
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from conftest import generate
    import vllm
    settings, wanted = json.loads(sys.argv[1])
    print("ANSWERS", json.dumps(generate(vllm.LLM(**settings), wanted)))
"""


@pytest.fixture(scope="session")
def exports() -> Path:
    """The output of make_exports.py."""
    if "FLORA_VLLM_EXPORTS" not in os.environ:
        pytest.skip("FLORA_VLLM_EXPORTS names no output of make_exports.py")
    return Path(os.environ["FLORA_VLLM_EXPORTS"])


def expected(directory: Path) -> dict:
    """What our own model answers, by name."""
    return json.loads((directory / "expected.json").read_text())


def settings(model: Path, **more) -> dict:
    """Arguments of vllm.LLM."""
    common = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    return {"model": str(model), **common, "skip_tokenizer_init": True, **more}


def bank_settings(exports: Path, like: str, places: int, **more) -> dict:
    """Those of a bank of adapters like the one named, of rank 8."""
    flora = str(exports / "bank" / like)
    overrides = {"architectures": ["FloraLlamaForCausalLM"], "flora": flora}
    bank = {"enable_lora": True, "max_loras": places, "max_cpu_loras": 8, "max_lora_rank": 8}
    return settings(exports / "base", hf_overrides=overrides, **bank, **more)


_NUMBERS: dict[str, int] = {}  # by which vLLM knows adapters, across calls


def _number(path: str) -> int:
    return _NUMBERS.setdefault(path, len(_NUMBERS) + 1)


def generate(llm, wanted: list) -> list:
    """Tokens and their logprobs for [prompt, directory of an adapter or None], all in one batch."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = [path and LoRARequest(path, _number(path), path) for _, path in wanted]
    asked = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in wanted]
    answers = llm.generate(prompts, asked, use_tqdm=False, lora_request=requests)
    rows = []
    for answer in answers:
        own = answer.outputs[0]
        steps = zip(own.logprobs, own.token_ids, strict=True)
        rows.append([list(own.token_ids), [step[token].logprob for step, token in steps]])
    return rows


def check(found: list, owed: list) -> None:
    """Tokens are equal, logprobs within 1e-4."""
    for (tokens, logprobs), (own, own_logprobs) in zip(found, owed, strict=True):
        assert tokens == own
        assert logprobs == pytest.approx(own_logprobs, abs=1e-4)


def rows(entry: dict) -> list:
    """Tokens and logprobs by prompt, of an entry of expected.json."""
    return list(zip(entry["tokens"], entry["logprobs"], strict=True))
