"""vLLM's server with a bank, asked by the openai client: adapters come and go while it serves.

    FLORA_VLLM_EXPORTS=exports python -m pytest vllm_plugin/tests/test_server.py
    FLORA_VLLM_EXPORTS=exports python -m pytest vllm_plugin/tests/test_server.py -m slow -s

The second sends 500 requests from 8 threads, some of them cancelled.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from conftest import NEW_TOKENS, expected, free_port
from safetensors.torch import load_file, save_file

NAMES = ["ffba_0", "ffba_1", "ffba_2", "ffba_3"]
START_S = 600


@dataclasses.dataclass
class Server:
    """A process that serves, and where."""

    process: subprocess.Popen
    url: str
    bank: Path
    expected: dict

    def client(self, **more) -> openai.OpenAI:
        given = {"timeout": 120, "max_retries": 0, **more}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **given)

    def post(self, what: str, **body) -> tuple[int, str]:
        """Status and text of an answer to `POST /v1/what`."""
        request = urllib.request.Request(
            f"{self.url}/v1/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def load(self, name: str, directory: Path) -> tuple[int, str]:
        return self.post("load_lora_adapter", lora_name=name, lora_path=str(directory))

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("unload_lora_adapter", lora_name=name)

    def answers_rightly(self, model: str, name: str) -> None:
        """`model` answers as the expected adapter (or the base) `name` does."""
        owed = self.expected[name]
        answer = self.client().completions.create(
            model=model,
            prompt=owed["prompts"],
            max_tokens=NEW_TOKENS,
            temperature=0,
            logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        assert [choice.token_ids for choice in choices] == owed["tokens"]
        for choice, logprobs in zip(choices, owed["logprobs"], strict=True):
            assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)

    def lives(self) -> bool:
        return self.process.poll() is None and self.get_health()

    def get_health(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False

    def memory(self) -> int:
        """Bytes that the processes of the server hold."""
        root = psutil.Process(self.process.pid)
        return sum(own.memory_info().rss for own in (root, *root.children(recursive=True)))


@pytest.fixture(scope="module")
def server(exports, tmp_path_factory):
    bank = exports / "bank"
    flora = str(bank / "ffba_0")
    overrides = {"architectures": ["FloraLlamaForCausalLM"], "flora": flora}
    port = free_port()
    flags = {"model": exports / "base", "served-model-name": "base", "port": port}
    flags |= {"host": "127.0.0.1", "dtype": "float32", "max-model-len": 64}
    flags |= {"max-loras": 2, "max-cpu-loras": 8, "max-lora-rank": 8}
    # A small cache and short steps, so that both are soon used to the full and memory shows what
    # else grows: oneDNN keeps a kernel for every number of tokens that a step had.
    flags |= {"num-gpu-blocks-override": 64, "max-num-batched-tokens": 64, "max-num-seqs": 16}
    flags |= {"hf-overrides": json.dumps(overrides), "lora-modules": f"first={flora}"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command += ["--enable-lora", "--enforce-eager"]
    # vLLM 0.32 on a CPU dies of a seed where a prompt is cut into steps
    command += ["--no-enable-chunked-prefill"]
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    own = Server(process, f"http://127.0.0.1:{port}", bank, expected(bank))
    family = []
    try:
        start = time.monotonic()
        while not own.get_health():
            started = process.poll() is None and time.monotonic() - start < START_S
            assert started, f"no server: {log}\n{log.read_text()[-3000:]}"
            time.sleep(1)
        family = psutil.Process(process.pid).children(recursive=True)
        yield own
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in family:
            if child.is_running():
                child.kill()


@pytest.fixture
def loaded(server):
    """Loads adapters, each under its own name, and unloads them at the end."""
    names = []

    def load(name: str, directory: Path) -> None:
        assert server.load(name, directory)[0] == 200
        names.append(name)

    yield load
    for name in names:
        server.unload(name)


def test_the_base_and_what_was_there_at_the_start(server):
    assert [model.id for model in server.client().models.list()] == ["base", "first"]
    server.answers_rightly("base", "base")
    server.answers_rightly("first", "ffba_0")


def test_more_adapters_than_places(server, loaded):
    """Loaded while it serves; asked one after another, then all at once."""
    for name in NAMES:
        loaded(name, server.bank / name)
    order = [*NAMES, *NAMES[::-1], "base"]
    for name in order:
        server.answers_rightly(name, name)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(server.answers_rightly, order, order))


def test_an_adapter_that_goes(server):
    """Who asks for it then gets a 404, and its name is free for another."""
    assert server.load("passing", server.bank / "ffba_1")[0] == 200
    server.answers_rightly("passing", "ffba_1")
    assert server.unload("passing")[0] == 200
    with pytest.raises(openai.NotFoundError, match="passing"):
        server.answers_rightly("passing", "ffba_1")
    assert server.unload("passing")[0] == 404
    assert server.load("passing", server.bank / "ffba_3")[0] == 200
    server.answers_rightly("passing", "ffba_3")
    assert server.unload("passing")[0] == 200
    server.answers_rightly("base", "base")


GONE = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
NARROW = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"


def damaged(source: Path, directory: Path, name: str) -> Path:
    """A copy without one of its tensors, with NaNs in it, or made for a narrower base."""
    if name not in ("missing", "narrow", "nan"):
        return source / name
    shutil.copytree(source / "ffba_1", directory)
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    if name == "missing":
        del tensors[GONE]
    elif name == "nan":
        tensors[GONE][0, 0] = float("nan")
    else:
        tensors[NARROW] = tensors[NARROW][:, :-32].contiguous()
    save_file(tensors, path)
    return directory


@pytest.mark.parametrize(
    "name, status, why",
    [
        ("fpa_0", 500, "an adapter of 'fpa' is not laid out as this bank's are"),
        ("large", 500, "rank 16 is above --max-lora-rank 8"),
        ("missing", 500, f"{GONE} is missing, this base wants (128, 12)"),
        ("narrow", 500, f"{NARROW} is (12, 96), this base wants (12, 128)"),
        ("nan", 500, "o_proj is not finite"),
        ("nowhere", 404, "No adapter found"),
    ],
)
def test_wrong_adapters_are_refused(server, tmp_path, name, status, why):
    """By the call that loads them, in one line, and nothing has changed."""
    found, text = server.load("wrong", damaged(server.bank, tmp_path / "adapter", name))
    message = json.loads(text)["error"]["message"]
    assert found == status
    assert why in message
    assert "\n" not in message
    with pytest.raises(openai.NotFoundError):
        server.answers_rightly("wrong", "base")
    assert server.lives()
    server.answers_rightly("first", "ffba_0")
    server.answers_rightly("base", "base")


# ----------------------------------------------------------------------------------- many requests

REQUESTS = 500
THREADS = 8
WARM = 100  # requests after which memory stays what it is
GROWTH = 1.05


def draw(rng: random.Random) -> dict:
    """A request: which model, what, how, and whether it is given up."""
    return {
        "model": rng.choice(["base", *NAMES]),
        "prompt": [rng.randrange(512) for _ in range(rng.randint(1, 50))],
        "max_tokens": rng.randint(1, 12),
        "temperature": rng.choice([0, 0, 0.7, 1.0]),
        "seed": rng.randrange(2**31),
        "end": rng.choices(["wait", "close", "timeout"], [8, 1, 1])[0],
    }


def ask(server: Server, request: dict, **extra) -> list[int] | None:
    """The tokens of the answer, None where it was given up."""
    body = {name: value for name, value in request.items() if name != "end"}
    body["extra_body"] = {"return_token_ids": True, "ignore_eos": True, **extra}
    if request["end"] == "close":
        with server.client().completions.create(**body, stream=True) as pieces:
            next(iter(pieces))
        return None
    if request["end"] == "timeout":
        with contextlib.suppress(openai.APITimeoutError):
            server.client(timeout=0.05).completions.create(**body)
        return None
    return server.client().completions.create(**body).choices[0].token_ids


@pytest.mark.slow
def test_many_requests_at_once(server, loaded):
    """Every one that is not given up has its answer, a greedy one that which it has alone, and
    memory does not grow."""
    for name in NAMES:
        loaded(name, server.bank / name)
    rng = random.Random(0)
    requests = [draw(rng) for _ in range(REQUESTS)]
    done = itertools.count(1)
    memory = {}
    lock = threading.Lock()

    def one(request: dict) -> list[int] | None:
        tokens = ask(server, request)
        with lock:
            number = next(done)
            if number % WARM == 0:
                memory[number] = server.memory()
        return tokens

    start = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(one, requests))
    seconds = time.monotonic() - start
    pairs = list(zip(requests, answers, strict=True))
    waited = [(request, tokens) for request, tokens in pairs if request["end"] == "wait"]
    assert all(len(tokens) == request["max_tokens"] for request, tokens in waited)

    greedy = [(request, tokens) for request, tokens in waited if request["temperature"] == 0]
    wrong = []
    for i, (request, tokens) in enumerate(greedy):
        alone = ask(server, request, cache_salt=str(i))  # nothing of an earlier prompt is reused
        if tokens != alone:
            wrong.append((request, tokens, alone))
    print(
        f"\n{REQUESTS} requests in {seconds:.0f} s, {len(waited)} answered, "
        f"{REQUESTS - len(waited)} given up; {len(greedy)} greedy, {len(wrong)} differ; "
        f"MB: { {number: held >> 20 for number, held in memory.items()} }"
    )
    assert not wrong
    assert max(memory.values()) <= GROWTH * memory[WARM]
    for name in ("base", *NAMES):
        server.answers_rightly(name, name)
