"""Speed and memory of training replicas over one base, beside one run alone.

    python -m experiments.replica_speed --out experiments/results/replica_speed

In one process, a step of one run and a step of all replicas take turns, with as many replicas
computed at once as `--at_once` says. Speed is the tokens a second of all replicas over those of the
run in the same round. Peak memory is that of a process of two steps (base, programs and all): one
process has the run alone, one all replicas. The replicas' is divided by that of as many lone runs.

All rows have equally many counted targets. Of rows that differ, the longest of all replicas decides
how many logits are computed.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.flags import Flags, parse
from experiments.process import answer, memory
from experiments.stepping import make_batch, start, stepper, time_steps
from flora_jax.errors import UserError, check_writable, run_command

FLAGS: Flags = {
    "--model": dict(default="smollm2-135m-instruct", help="what load_pretrained takes"),
    "--method": dict(default="ffba"),
    "--rank": dict(type=int, default=32),
    "--replicas": dict(type=int, default=8),
    "--rows": dict(type=int, default=4),
    "--length": dict(type=int, default=256),
    "--answers": dict(type=float, default=0.1, help="share of counted targets"),
    "--remat": dict(default="none"),
    "--at_once": dict(type=int, nargs="+", help="replicas computed at once; by default 1 and all"),
    "--rounds": dict(type=int, default=5),
    "--out": dict(type=Path, help="write OUT.json and OUT.md"),
    # Of so many replicas, so many at once, in this process.
    "--memory": dict(type=int, nargs=2, help=argparse.SUPPRESS),
}
_RATE = 1e-4


def replicas_stepper(
    args: argparse.Namespace, weights: Any, count: int, at_once: int
) -> Callable[[], Any]:
    """A function that does one step of `count` replicas, or, if that is 1, of a lone run.

    weights: the configuration and the base; at_once: replicas computed at once.
    """
    import jax
    import optax

    from flora_jax.adapters import AdapterConfig, init_adapter
    from flora_jax.models.llama import Llama
    from flora_jax.training.replicas import compute, replica_program

    config, base = weights
    adapter_config = AdapterConfig(args.method, args.rank)
    model = Llama(config, adapter_config, remat=args.remat)
    batch = make_batch(args.rows, args.length, config.vocab_size, answers=args.answers)

    def optimizer(peak: float) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(peak))

    def trainable(seed: int) -> dict[str, Any]:
        return {"adapter": init_adapter(jax.random.key(seed), config, adapter_config)}

    frozen = {"params": base}
    if count == 1:
        alone = stepper(model, optimizer(_RATE), trainable(0), frozen, seed=0)
        return functools.partial(alone, batch)
    unit = optimizer(1.0)  # the program multiplies by each replica's rate
    rates = np.full(count, _RATE, np.float32)
    given = {seed: (start(unit, trainable(seed), seed), batch) for seed in range(count)}
    program = replica_program(model, unit)

    def step() -> None:
        nonlocal given
        out = compute(program, given, frozen, rates, at_once)
        jax.block_until_ready(out)
        given = {seed: (state, batch) for seed, (state, _) in out.items()}

    return step


def measure_memory(args: argparse.Namespace) -> float:
    """Peak memory of two steps of the replicas of `--memory`, GB. Call it alone in a process."""
    from flora_jax.models.loading import load_pretrained

    step = replicas_stepper(args, load_pretrained(args.model), *args.memory)
    for _ in range(2):
        step()
    return memory("VmHWM") / 1e9


def measure_speed(args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Tokens a second of all replicas over those of one run, round by round, by `--at_once`."""
    from flora_jax.analysis.timing import paired_ratio
    from flora_jax.models.loading import load_pretrained

    weights = load_pretrained(args.model)
    steps = {"alone": replicas_stepper(args, weights, 1, 1)}
    for at_once in args.at_once:
        steps[str(at_once)] = replicas_stepper(args, weights, args.replicas, at_once)
    seconds = time_steps(steps, args.rounds)
    alone = [args.replicas * one for one in seconds["alone"]]
    return {at_once: paired_ratio(alone, seconds[str(at_once)]) for at_once in args.at_once}


def check(args: argparse.Namespace) -> None:
    """Raises UserError for flags with which no step can be built."""
    from flora_jax.adapters import AdapterConfig, has_adapter
    from flora_jax.models.checks import check_model
    from flora_jax.models.llama import REMAT_POLICIES
    from flora_jax.models.loading import load_config

    if args.replicas < 2 or min(args.rows, args.length, args.rounds) < 1:
        raise UserError("--replicas must be at least 2, --rows, --length and --rounds at least 1")
    for at_once in args.at_once:
        if at_once < 1 or args.replicas % at_once:
            raise UserError(f"--at_once {at_once} must divide --replicas {args.replicas}")
    if not 0 < args.answers <= 1:
        raise UserError(f"--answers {args.answers} must be above 0 and at most 1")
    adapter_config = AdapterConfig(args.method, args.rank)
    if not has_adapter(adapter_config):
        raise UserError(f"--method {args.method} has no adapter, and replicas share the base")
    check_model(load_config(args.model), adapter_config, args.remat, REMAT_POLICIES, None)


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.replica_speed", __doc__, FLAGS)
    if args.memory:
        print(json.dumps(measure_memory(args)))
        return
    # Not above: the processes whose memory is measured do without them.
    from experiments.report import beside
    from flora_jax.analysis.results import about_process, header, spread, table
    from flora_jax.files import write_json

    args.at_once = args.at_once or [1, args.replicas]
    check(args)
    if args.out:
        check_writable(beside(args.out, ".json"), "--out")

    def peak(count: int, at_once: int) -> float:
        flags = [*argv[1:], "--memory", str(count), str(at_once)]
        return answer("experiments.replica_speed", flags)

    alone = peak(1, 1)
    peaks = {at_once: peak(args.replicas, at_once) for at_once in args.at_once}
    speeds = measure_speed(args)
    about = about_process()
    rows = []
    for at_once in args.at_once:
        gigabytes = f"{alone:.2f}", f"{peaks[at_once]:.2f}"
        share = f"{peaks[at_once] / (args.replicas * alone):.3f}"
        rows.append([str(at_once), str(args.replicas), spread(speeds[at_once]), *gigabytes, share])
    lines = [
        header(f"Replicas over one base: {Path(args.model).name}", about),
        f"{args.method} at rank {args.rank}, {args.rows} rows of {args.length} tokens each, "
        f"{args.answers:.0%} of the targets counted, remat {args.remat}, float32; {args.rounds} "
        "rounds, median [quartiles].\n",
        *table(
            ["at once", "replicas", "speed over lone runs", "GB alone", "GB together", "share"],
            rows,
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        found = {"speed": speeds, "peak_gb": peaks, "peak_gb_alone": alone, "provenance": about}
        write_json(beside(args.out, ".json"), found)
        beside(args.out, ".md").write_text(text)


if __name__ == "__main__":
    run_command(main)
