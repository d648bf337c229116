"""Speed and memory of training replicas in one program, beside one run alone.

    python -m experiments.replica_speed --out experiments/results/replica_speed

Steps of one run and of all replicas together alternate in one process: speed is the tokens a second
of all replicas over those of the one run in the same round. Peak memory is taken in a process of
its own for each, whole (base, program and all), and set beside that of so many lone runs.

All rows have equally many targets that count. Of rows that differ the longest decides how much of
the vocabulary's product is done, and it is the longest of all replicas'.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.flags import Flags, parse
from experiments.report import beside
from experiments.stepping import make_batch
from flora_jax.errors import check_writable, run_command

FLAGS: Flags = {
    "--model": dict(default="smollm2-135m-instruct", help="what load_pretrained takes"),
    "--method": dict(default="ffba"),
    "--rank": dict(type=int, default=32),
    "--replicas": dict(type=int, default=8),
    "--rows": dict(type=int, default=4),
    "--length": dict(type=int, default=256),
    "--answers": dict(type=float, default=0.1, help="share of counted targets"),
    "--remat": dict(default="none"),
    "--rounds": dict(type=int, default=5),
    "--out": dict(type=Path, help="write OUT.json and OUT.md"),
    "--memory": dict(type=int, help=argparse.SUPPRESS),  # of so many replicas, in this process
}


def stepper(args: Any, weights: tuple[Any, Any], count: int) -> Callable[[], None]:
    """A function that does one step of so many replicas, of a lone run if there is one."""
    import jax
    import jax.numpy as jnp
    import optax

    from flora_jax.adapters import AdapterConfig, init_adapter
    from flora_jax.models.llama import Llama
    from flora_jax.training.replicas import replica_program
    from flora_jax.training.step import TrainState, make_train_step

    config, base = weights
    adapter_config = AdapterConfig(args.method, args.rank)
    model = Llama(config, adapter_config, remat=args.remat)
    batch = make_batch(args.rows, args.length, config.vocab_size, answers=args.answers)
    rate = 1e-4
    peak = rate if count == 1 else 1.0
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(peak))

    def start(seed: int) -> TrainState:
        key = jax.random.key(seed)
        trainable = {"adapter": init_adapter(key, config, adapter_config)}
        moments = jax.jit(optimizer.init)(trainable)
        return TrainState(jnp.zeros((), jnp.int32), trainable, moments, key)

    frozen = {"params": base}
    states: Any = tuple(start(seed) for seed in range(count))
    batches: Any = (batch,) * count
    program: Any = replica_program(model, optimizer, [rate] * count)
    if count == 1:
        [states], [batches] = states, batches
        program = jax.jit(make_train_step(model, optimizer), donate_argnums=0)

    def step() -> None:
        nonlocal states
        states, metrics = program(states, frozen, batches)
        jax.block_until_ready(metrics)

    return step


def measure_memory(args: Any) -> float:
    """Run alone in this process: peak resident memory of two steps, GB."""
    from flora_jax.models.loading import load_pretrained

    step = stepper(args, load_pretrained(args.model), args.memory)
    step(), step()
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 1e6


def measure_speed(args: Any) -> dict[str, Any]:
    """Tokens a second of all replicas over one run's, round by round."""
    from flora_jax.analysis.timing import interleave, paired_ratio
    from flora_jax.models.loading import load_pretrained

    weights = load_pretrained(args.model)
    counts = {"alone": 1, "together": args.replicas}
    steps = {name: stepper(args, weights, count) for name, count in counts.items()}

    def timed(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    for step in steps.values():
        step(), step()
    contestants = {name: functools.partial(timed, step) for name, step in steps.items()}
    times = list(interleave(contestants, args.rounds))
    alone = [args.replicas * one["alone"] for one in times]
    return paired_ratio(alone, [one["together"] for one in times])


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.replica_speed", __doc__, FLAGS)
    if args.memory:
        print(json.dumps(measure_memory(args)))
        return
    if args.out:
        check_writable(beside(args.out, ".json"), "--out")
    # not in a process whose memory is measured
    from flora_jax.analysis.results import about_process, header, spread, table
    from flora_jax.files import write_json

    peaks = {}
    for count in (1, args.replicas):
        command = [sys.executable, "-m", "experiments.replica_speed", *argv[1:]]
        done = subprocess.run(
            [*command, "--memory", str(count)], check=True, capture_output=True, text=True
        )
        peaks[count] = json.loads(done.stdout.splitlines()[-1])
    speed = measure_speed(args)
    about = about_process()
    share = peaks[args.replicas] / (args.replicas * peaks[1])
    row = [str(args.replicas), spread(speed), *(f"{peak:.2f}" for peak in peaks.values())]
    lines = [
        header(f"Replicas in one program: {Path(args.model).name}", about),
        f"{args.method} at rank {args.rank}, {args.rows} rows of {args.length} tokens each, "
        f"{args.answers:.0%} of the targets counted, remat {args.remat}, float32; {args.rounds} "
        "rounds, median [quartiles].\n",
        *table(
            ["replicas", "speed over lone runs", "GB alone", "GB together", "over lone runs"],
            [[*row, f"{share:.3f}"]],
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        found = {"speed": speed, "peak_gb": peaks, "share": share, "provenance": about}
        write_json(beside(args.out, ".json"), found)
        beside(args.out, ".md").write_text(text)


if __name__ == "__main__":
    run_command(main)
