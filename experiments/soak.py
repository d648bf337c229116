"""Faults, spoilt files and requests for some minutes, from a new seed each time.

    python -m experiments.soak --minutes 30

Each takes a third of the time: runs that are killed and disturbed (experiments.faults), spoilt
files for the readers in turn (experiments.fuzz), and requests (experiments.load). Prints what went
wrong, and a table. The exit code is 1 if anything did; the same --seed repeats it.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.faults import Place, possible, runs
from experiments.flags import Flags, parse
from experiments.fuzz import inputs
from experiments.fuzz_readers import READERS
from experiments.load import Models, calls
from flora_jax.analysis.results import about_process, header, table
from flora_jax.errors import UserError, run_command

FLAGS: Flags = {
    "--minutes": dict(type=float, default=30.0),
    "--seed": dict(type=int, help="default: drawn"),
}
_LEAST = 5.0  # seconds for a reader, once its process has started

Row = tuple[str, str | None]  # what was tried, and what went wrong


def _faults(seed: int) -> Iterator[Row]:
    """A run that is killed a dozen times, and one of each other fault, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        sources = {name: runs(place, name, seed) for name in possible()}
        for name in itertools.cycle(sources):
            one = next(sources[name])
            wrong = None
            if "wrong" in one:
                wrong = f"run {one['run']}: {one['wrong']}"
            yield name, wrong


def _files(seed: int, seconds: float) -> Iterator[Row]:
    """Spoilt inputs of the readers, in a random order."""
    names = list(READERS)
    random.Random(seed).shuffle(names)
    for turn, name in enumerate(itertools.cycle(names)):
        until = math.inf
        for one in inputs(name, seed + 10**6 * (turn // len(names)), 10**6):
            until = min(until, time.monotonic() + max(_LEAST, seconds / len(names)))
            wrong = None
            if one["became"] not in ("accepted", "refused"):
                wrong = f"seed {one['seed']}: {one['fault']}: {one['line']}"
            yield name, wrong
            if time.monotonic() > until:
                break


def _requests(seed: int) -> Iterator[Row]:
    for judged in calls(Models("ffba_qg_add"), seed):
        for one in judged:
            yield "request", None if one["equal"] else one["request"]


def soak(minutes: float, seed: int) -> dict[str, list[str | None]]:
    """What went wrong at each try, by name; None where nothing did."""
    share = minutes * 60 / 3
    found: dict[str, list[str | None]] = {}
    for rows in (_faults(seed), _files(seed, share), _requests(seed)):
        until = time.monotonic() + share
        for name, wrong in rows:
            found.setdefault(name, []).append(wrong)
            if wrong:
                print(f"{name}: {wrong}", flush=True)
            if time.monotonic() > until:
                break
        rows.close()
    return found


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.soak", __doc__, FLAGS)
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g} must be positive")
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    found = soak(args.minutes, seed)
    rows = [
        [name, f"{len(own):,}", str(sum(one is not None for one in own))]
        for name, own in found.items()
    ]
    print(header(f"Soak, seed {seed}", about_process("orbax-checkpoint", "tokenizers")))
    print("\n".join(table(["", "tried", "wrong"], rows)))
    if any(map(any, found.values())):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
