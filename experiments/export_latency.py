"""Time per output token in PyTorch of `transformers` exports, the bare model and PEFT's LoRA.

    python -m experiments.export_latency --out experiments/results/export_latency

All have the same base and prompts, about the same number of adapter parameters, and run in eager
transformers with its growing cache. Each runs once a round, the order is reversed from round to
round, and ratios are taken round by round. Needs the extra `test` (torch, peft).
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.flags import MODEL, Flags, parse
from experiments.report import check_generation, load_model, write_result
from flora_jax.adapters import AdapterConfig
from flora_jax.analysis.peer import PACKAGES, Peer, check_peer, time_torch, torch_llama
from flora_jax.analysis.results import NONE, about_process, header, spread, table
from flora_jax.analysis.timing import Setting, interleave, paired_ratio, summary
from flora_jax.analysis.variants import random_adapter, rank_for, trained_parameters
from flora_jax.errors import positive_integers, run_command, split_names
from flora_jax.interop.exports import export
from flora_jax.interop.formats import Trained
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.tokenizer import load_tokenizer

Tree = dict[str, Any]

FLAGS: Flags = {
    **MODEL,
    "--methods": dict(default="ffba,ffba_qg_add,fpa,zflora", help="to export, comma-separated"),
    "--batch_sizes": dict(default="1,8", help="comma-separated"),
    "--prompt_length": dict(type=int, default=128),
    "--new_tokens": dict(type=int, default=33),
    "--rounds": dict(type=int, default=8),
}


def build(
    args: argparse.Namespace, config: LlamaConfig, base: Tree
) -> tuple[dict[str, Any], dict[str, tuple[Any, int]]]:
    """The models by name, and the rank and the parameters of each one's adapter."""
    import transformers

    parameters = trained_parameters(config, AdapterConfig(args.method, args.rank))
    variants = {
        name: AdapterConfig(name, rank_for(name, config, parameters))
        for name in split_names(args.methods)
    }
    tokenizer = load_tokenizer(args.model)
    rank = rank_for("lora", config, parameters)
    peer = Peer(config, base, rank)
    models = {"bare": torch_llama(config, base), "peft lora": peer.model}
    counts: dict[str, tuple[Any, int]] = {"bare": (NONE, 0), "peft lora": (rank, peer.parameters)}
    with tempfile.TemporaryDirectory() as folder:
        for method, adapter_config in variants.items():
            adapter = random_adapter(jax.random.key(1), config, adapter_config)
            trained = Trained(
                config=config,
                base=base,
                tokenizer=tokenizer,
                fingerprint=base_fingerprint(base),
                adapter_config=adapter_config,
                adapter=adapter,
                base_model=args.model,
            )
            out = Path(folder) / method
            export(trained, out, "transformers", dtype=args.dtype)
            load = transformers.AutoModelForCausalLM.from_pretrained
            models[method] = load(out, trust_remote_code=True).eval().to(peer.model.device)
            counts[method] = adapter_config.rank, trained_parameters(config, adapter_config)
    return models, counts


def measure(
    models: Mapping[str, Any], config: LlamaConfig, setting: Setting, rounds: int
) -> dict[str, Any]:
    """TPOT of every model at a setting, and its ratios to the bare model's and PEFT's."""
    import transformers

    def run(name: str) -> float:
        cache = transformers.DynamicCache(config=models[name].config)
        return time_torch(models[name], setting.prompts(config), setting.new_tokens, cache)[1]

    contestants = {name: functools.partial(run, name) for name in models}
    for one in contestants.values():
        one()
    what = f"batch {setting.batch_size}"
    times = list(tqdm(interleave(contestants, rounds), what, rounds, unit="round", disable=None))
    taken = {name: [one[name] for one in times] for name in contestants}
    cell: dict[str, Any] = {"batch_size": setting.batch_size}
    for name, own in taken.items():
        cell[name] = {
            **summary(own),
            "rounds": own,
            "over bare": paired_ratio(own, taken["bare"]),
            "over peft": paired_ratio(own, taken["peft lora"]),
        }
    return cell


def markdown(args: argparse.Namespace, about: Tree, counts: Tree, results: list[Tree]) -> str:
    """The table, one line for each model."""
    heads = ["", "rank", "parameters"]
    for cell in results:
        heads += [f"batch {cell['batch_size']}: ms", "over bare", "over PEFT"]
    rows = []
    for name, (rank, count) in counts.items():
        cells = [name, str(rank), f"{count:,}"]
        for cell in results:
            own = cell[name]
            cells += [f"{1e3 * own['median']:.1f}", spread(own["over bare"])]
            cells.append(spread(own["over peft"]))
        rows.append(cells)
    lines = [
        header("Exports in PyTorch", about),
        f"{args.preset or args.model}, {args.dtype}, prompt {args.prompt_length}, "
        f"{args.new_tokens} new tokens, eager transformers, {args.rounds} interleaved rounds; "
        "medians [quartiles] of TPOT and its ratios.\n",
        *table(heads, rows, blank=" "),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.export_latency", __doc__, FLAGS)
    check_peer()
    batches = positive_integers("--batch_sizes", args.batch_sizes)
    check_generation(args)
    config, base = load_model(args)
    models, counts = build(args, config, base)
    del base
    results = [
        measure(models, config, Setting(args.prompt_length, batch, args.new_tokens), args.rounds)
        for batch in batches
    ]
    about = about_process(*PACKAGES)
    text = markdown(args, about, counts, results)
    write_result(args, about, text, parameters=counts, results=results)


if __name__ == "__main__":
    run_command(main)
