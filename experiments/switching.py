"""Time to switch an adapter in a Generator, beside that to merge a LoRA of equal parameters.

    python -m experiments.switching --model random --preset llama3.2-1b \
        --out experiments/results/switching

`Generator.use` writes the adapter's columns and rows over those in the served arrays. Merging
computes `W + s A B` for every projection in one compiled function, from a base that is kept beside
the served arrays; joining the results into served arrays is not counted. Both take turns, and are
timed until the last array is ready.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax

from experiments.flags import MODEL, Flags, parse
from experiments.report import load_model, write_result
from flora_jax.adapters import AdapterConfig, merge
from flora_jax.analysis.results import about_process, header, spread, table
from flora_jax.analysis.timing import interleave, paired_ratio, summary
from flora_jax.analysis.variants import random_adapter, rank_for, trained_parameters
from flora_jax.errors import UserError, run_command
from flora_jax.inference.generator import Generator
from flora_jax.models.config import LlamaConfig

Tree = dict[str, Any]

FLAGS: Flags = {
    **MODEL,
    "--rounds": dict(type=int, default=10),
}


def seconds(
    generator: Generator, base: Tree, config: LlamaConfig, lora: AdapterConfig, rounds: int
) -> dict[str, list[float]]:
    """Seconds by round of switching between the generator's adapters "a" and "b", and of merging a
    LoRA."""
    loras = [random_adapter(jax.random.key(i), config, lora) for i in range(2)]
    merged = jax.jit(lambda base, adapter: merge(base, adapter, config, lora)["layers"])
    turn = 0

    def switch() -> float:
        nonlocal turn
        turn += 1  # to the adapter that is not in use
        start = time.perf_counter()
        generator.use("ab"[turn % 2])
        jax.block_until_ready(generator.params)
        return time.perf_counter() - start

    def merging() -> float:
        start = time.perf_counter()
        jax.block_until_ready(merged(base, loras[turn % 2]))
        return time.perf_counter() - start

    contestants = {"switch": switch, "merge": merging}
    for _ in range(2):  # compiles, and writes each adapter once
        switch()
        merging()
    times = list(interleave(contestants, rounds))
    return {name: [one[name] for one in times] for name in contestants}


def markdown(args: argparse.Namespace, about: Tree, rows: list[list[str]], share: Tree) -> str:
    """The table and the sentence under it."""
    lines = [
        header("Switching an adapter beside merging a LoRA", about),
        f"{args.preset or args.model}, {args.dtype}, {args.rounds} rounds in turns; medians "
        "[quartiles].\n",
        *table(["", "rank", "parameters", "ms"], rows, blank=" "),
        f"\nA switch takes {spread(share, '.2%')} of the merge's time.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.switching", __doc__, FLAGS)
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds} must be a positive integer")
    config, base = load_model(args)
    own = AdapterConfig(args.method, args.rank)
    own.check(config.widths)
    lora = AdapterConfig("lora", rank_for("lora", config, trained_parameters(config, own)))
    adapters = {name: random_adapter(jax.random.key(i), config, own) for i, name in enumerate("ab")}
    generator = Generator(config, base, adapters, own, max_length=64, batch_size=1)
    taken = seconds(generator, base, config, lora, args.rounds)
    each = {name: summary(values) | {"rounds": values} for name, values in taken.items()}
    share = paired_ratio(taken["switch"], taken["merge"])
    about = about_process()
    rows = [
        [
            label,
            str(adapter_config.rank),
            f"{trained_parameters(config, adapter_config):,}",
            spread(each[name], ".2f", 1e3),
        ]
        for name, label, adapter_config in (
            ("switch", f"use, {args.method}", own),
            ("merge", "merge, lora", lora),
        )
    ]
    text = markdown(args, about, rows, share)
    write_result(args, about, text, lora_rank=lora.rank, share=share, **each)


if __name__ == "__main__":
    run_command(main)
