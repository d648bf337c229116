"""Time per output token in PyTorch: `transformers` exports beside the bare model and PEFT's unmerged LoRA.

    python -m experiments.export_latency --out experiments/results/export_latency

Same weights, same prompts, all in eager transformers with its growing cache, one run each in every round, the order
turning around; ratios are taken round by round. The LoRA has as many parameters as each export, nearly. Needs the
extra `test` (torch, peft).
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.report import add_model_flags, header, load_model, provenance, write_result
from flora_jax.adapters import AdapterConfig
from flora_jax.analysis.peer import PACKAGES, Peer, check_peer, time_torch, torch_llama
from flora_jax.analysis.timing import Setting, interleave, paired_ratio, summary
from flora_jax.analysis.variants import random_adapter, rank_for, trained_parameters
from flora_jax.config import names
from flora_jax.errors import CommandParser, UserError, positive_integers, run_command
from flora_jax.interop.exports import export
from flora_jax.interop.formats import Trained
from flora_jax.models.fingerprint import base_fingerprint
from flora_jax.models.tokenizer import load_tokenizer


def main(argv: list[str]) -> None:
    """The command."""
    parser = CommandParser(
        prog="python -m experiments.export_latency", description=__doc__.split("\n")[0]
    )
    add_model_flags(parser)
    parser.add_argument(
        "--methods", default="ffba,ffba_qg_add,fpa,zflora", help="comma-separated, exported"
    )
    parser.add_argument("--batch_sizes", default="1,8", help="comma-separated")
    parser.add_argument("--prompt_length", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args(argv[1:])
    check_peer()
    batches = positive_integers("--batch_sizes", args.batch_sizes)
    if args.new_tokens < 2 or args.rounds < 1 or args.prompt_length < 1:
        raise UserError("--new_tokens must be at least 2, --rounds and --prompt_length at least 1")
    import transformers

    config, base = load_model(args)
    parameters = trained_parameters(config, AdapterConfig(args.method, args.rank))
    variants = {
        name: AdapterConfig(name, rank_for(name, config, parameters))
        for name in names(args.methods)
    }
    tokenizer = load_tokenizer("random" if args.model == "random" else args.model)
    peer = Peer(config, base, rank_for("lora", config, parameters))
    models: dict[str, Any] = {"bare": torch_llama(config, base), "peft lora": peer.model}
    counts = {
        "bare": ("–", 0),
        "peft lora": (rank_for("lora", config, parameters), peer.parameters),
    }
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
    del base

    def run(name: str, setting: Setting) -> float:
        cache = transformers.DynamicCache(config=models[name].config)
        return time_torch(models[name], setting.prompts(config), setting.new_tokens, cache)[1]

    results = []
    for batch in batches:
        setting = Setting(args.prompt_length, batch, args.new_tokens)
        contestants = {name: functools.partial(run, name, setting) for name in models}
        for one in contestants.values():
            one()
        rounds = interleave(contestants, args.rounds)
        times = list(
            tqdm(
                rounds, f"batch {batch}", args.rounds, unit="round", disable=not sys.stderr.isatty()
            )
        )
        cell: dict[str, Any] = {"batch_size": batch}
        for name in contestants:
            own = [t[name] for t in times]
            cell[name] = {
                **summary(own),
                "rounds": own,
                "over bare": paired_ratio(own, [t["bare"] for t in times]),
                "over peft": paired_ratio(own, [t["peft lora"] for t in times]),
            }
        results.append(cell)

    about = provenance(*PACKAGES)
    lines = [
        header("Exports in PyTorch", about),
        f"{args.preset or args.model}, {args.dtype}, prompt {args.prompt_length}, {args.new_tokens} new tokens, "
        f"eager transformers, {args.rounds} interleaved rounds; medians [quartiles] of TPOT and its ratios.\n",
        "| | rank | parameters | "
        + " | ".join(f"batch {b}: ms | over bare | over PEFT" for b in batches)
        + " |",
        "|---" * (3 + 3 * len(batches)) + "|",
    ]
    for name, (rank, count) in counts.items():
        cells = [name, str(rank), f"{count:,}"]
        for cell in results:
            cells.append(f"{1e3 * cell[name]['median']:.1f}")
            for ratio in (cell[name]["over bare"], cell[name]["over peft"]):
                cells.append(
                    f"{ratio['median']:.3f} [{ratio['quartiles'][0]:.3f}, {ratio['quartiles'][1]:.3f}]"
                )
        lines.append(f"| {' | '.join(cells)} |")
    write_result(args, about, "\n".join(lines) + "\n", parameters=counts, results=results)


if __name__ == "__main__":
    run_command(main)
