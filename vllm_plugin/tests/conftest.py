"""What the tests share: exports of make_exports.py, and engines that run in this process."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
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
METHODS = ["lora", "pf_lora", "ffa", "fpa", "fpa_gelu", "parallel"]
METHODS += ["ffba", "ffba_qg_add", "ffba_qd_add", "zflora"]
BACKEND = {"model_impl": "transformers", "trust_remote_code": True}
RANKS = 2


@pytest.fixture(scope="session")
def exports() -> Path:
    """The output of make_exports.py."""
    if "FLORA_VLLM_EXPORTS" not in os.environ:
        pytest.skip("FLORA_VLLM_EXPORTS names no output of make_exports.py")
    return Path(os.environ["FLORA_VLLM_EXPORTS"])


@pytest.fixture(scope="session")
def slow_exports(exports: Path) -> Path:
    """The output of make_slow_exports.py, beside the other."""
    if not (exports / "slow").is_dir():
        pytest.skip("FLORA_VLLM_EXPORTS has no folder `slow`, the output of make_slow_exports.py")
    return exports / "slow"


def expected(directory: Path) -> dict:
    """What our own model answers, by name."""
    return json.loads((directory / "expected.json").read_text())


def settings(model: Path, **more) -> dict:
    """Arguments of vllm.LLM."""
    common = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    common["skip_tokenizer_init"] = True
    return {"model": str(model), **common, **more}


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


def check(found: list, owed: list, tolerance: float = 1e-4) -> None:
    """Logprobs are within the tolerance, and tokens are equal, up to one that leads by less than
    that (which none does in float32)."""
    for (tokens, logprobs), (own, own_logprobs, leads) in zip(found, owed, strict=True):
        steps = range(len(own))
        same = next((i for i in steps if tokens[i] != own[i]), len(own))
        assert len(tokens) == len(own)
        assert same == len(own) or leads[same] < tolerance
        assert logprobs[:same] == pytest.approx(own_logprobs[:same], abs=tolerance)


def rows(entry: dict) -> list:
    """Tokens, logprobs and leads by prompt, of an entry of expected.json."""
    return list(zip(entry["tokens"], entry["logprobs"], entry["leads"], strict=True))


def wanted(entry: dict, adapter: Path | None = None) -> list:
    """The prompts of an entry of expected.json, as `generate` takes them."""
    return [[prompt, adapter and str(adapter)] for prompt in entry["prompts"]]


def mixed(bank: Path, names: list[str]) -> tuple[list, list]:
    """A batch of every prompt with every adapter of a directory or the base, and what is owed."""
    owed = expected(bank)
    paths = {name: str(bank / name) for name in names if name != "base"}
    pairs = [(prompt, name) for prompt in range(3) for name in names]
    asked = [[owed[name]["prompts"][i], paths.get(name)] for i, name in pairs]
    return asked, [rows(owed[name])[i] for i, name in pairs]


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def on_ranks(cases: list, launched: bool = True, **parallel: int) -> list:
    """Answers of engines on two ranks, [settings, wanted] each. launched: the two ranks are
    processes that all engines share, started here; else vLLM starts some for each engine, as its
    server does."""
    if launched:
        parallel["distributed_executor_backend"] = "external_launcher"
    asked = json.dumps([[{**settings, **parallel}, wanted] for settings, wanted in cases])
    common = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not launched))}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(RANKS)} if launched else {}
    with contextlib.ExitStack() as stack:
        started = []
        for rank in range(RANKS if launched else 1):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if launched else {}
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, "ranks.py", asked],
                env={**common, **own},
                cwd=Path(__file__).parent,
                stdout=log,
                stderr=log,
            )
            stack.callback(process.kill)
            started.append((process, log))
        printed = []
        for process, log in started:
            process.wait(timeout=900)
            log.seek(0)
            printed.append(log.read())
    found = [line for line in printed[0].splitlines() if line.startswith("ANSWERS ")]
    assert found, "\n\n".join(text[-3000:] for text in printed)
    return json.loads(found[0].removeprefix("ANSWERS "))
