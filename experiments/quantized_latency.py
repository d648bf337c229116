"""Time per token over quantised bases beside the float base, with a fused adapter and without.

    python -m experiments.quantized_latency --out experiments/results/quantized/latency

All models are in one process and take turns of a few tokens each; ratios are to the float base in
the same turn. `base_again` is the float base once more, so its ratio is noise. The same command
runs on a CPU and on a GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from experiments.flags import KERNELS, MODEL, Flags, parse
from experiments.report import beside, load_model
from flora_jax.adapters import AdapterConfig, Tree, quantize_base
from flora_jax.analysis.comparison import build, turns
from flora_jax.analysis.results import about_process, header, spread, table
from flora_jax.analysis.timing import (
    Contestant,
    Setting,
    compile_programs,
    interleave,
    paired_ratio,
    summary,
)
from flora_jax.analysis.variants import read_bytes
from flora_jax.errors import positive_integers, run_command, split_names
from flora_jax.files import keep_programs, write_json
from flora_jax.inference.generator import check_kernels
from flora_jax.models.config import LlamaConfig

_REFERENCE = "base"

FLAGS: Flags = {
    **MODEL,
    **KERNELS,
    "--quantizations": dict(default="int8,fp8"),
    "--batch_sizes": dict(default="1,8"),
    "--prompt_length": dict(type=int, default=128),
    "--new_tokens": dict(type=int, default=33),
    "--rounds": dict(type=int, default=6),
    "--turn_tokens": dict(type=int, default=4),
}


def models(args: argparse.Namespace) -> tuple[LlamaConfig, dict[str, tuple[Any, Tree]]]:
    """The models and their served trees by name: each base bare, and with a random adapter."""
    config, floats = load_model(args)
    adapter_config = AdapterConfig(args.method, args.rank)
    out = {}
    for quantization in ("none", *split_names(args.quantizations)):
        check_kernels(args.decode_kernels, config, quantization)
        base = quantize_base(floats, quantization)
        suffix = "" if quantization == "none" else f"_{quantization}"
        for name, own in (("base", None), (args.method, adapter_config)):
            out[name + suffix] = build(name, base, config, own, args.decode_kernels)
    return config, {**out, "base_again": out[_REFERENCE]}


def measure(
    args: argparse.Namespace, config: LlamaConfig, served: dict[str, Any], batch: int
) -> dict[str, Any]:
    """Times and ratios by name."""
    setting = Setting(args.prompt_length, batch, args.new_tokens)
    prompts = setting.prompts(config)
    contestants = {}
    for name, (model, params) in served.items():
        programs = compile_programs(model, params, setting)
        contestants[name] = Contestant(programs, params, prompts, args.rounds, args.turn_tokens)
        contestants[name].warm_up()
    count = args.rounds * turns(args.new_tokens, args.turn_tokens)
    rounds = list(tqdm(interleave(contestants, count), total=count, disable=None))
    reference = [one[_REFERENCE][1] for one in rounds]
    rows = {}
    for name, (_, params) in served.items():
        own = [one[name][1] for one in rounds]
        rows[name] = {
            "tpot": summary(own),
            "ratio": paired_ratio(own, reference),
            "read_bytes": read_bytes(params, config),
        }
    return rows


def markdown(args: argparse.Namespace, about: dict[str, Any], found: dict[str, Any]) -> str:
    """The table, one line for each model."""
    first = next(iter(found.values()))
    heads = ["", "bytes"]
    for batch in found:
        heads += [f"batch {batch}: TPOT ms", "ratio"]
    rows = []
    for name, one in first.items():
        cells = [name, f"{one['read_bytes'] / first[_REFERENCE]['read_bytes']:.3f}"]
        for by_name in found.values():
            cells += [spread(by_name[name]["tpot"], ".2f", 1e3), spread(by_name[name]["ratio"])]
        rows.append(cells)
    shapes = args.preset if args.model == "random" else args.model
    lines = [
        header(f"Time per token over quantised bases: {shapes}", about),
        f"{args.dtype} beside what is quantised; {args.method} at rank {args.rank}; decode "
        f"kernels {args.decode_kernels or 'as by default'}; prompt "
        f"{args.prompt_length}, {args.rounds} rounds of {args.new_tokens} tokens, "
        f"{args.turn_tokens} at a turn. Medians [quartiles]; ratios to the float base's turn.\n",
        *table(heads, rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.quantized_latency", __doc__, FLAGS)
    batches = positive_integers("--batch_sizes", args.batch_sizes)
    keep_programs()
    about = about_process("qwix")
    config, served = models(args)
    found: dict[str, Any] = {}
    for batch in batches:
        found[str(batch)] = measure(args, config, served, batch)
        text = markdown(args, about, found)
        if args.out:
            write_json(beside(args.out, ".json"), {"provenance": about, "results": found})
            beside(args.out, ".md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_command(main)
