"""Runs that are killed, starved and disturbed: each must end like an undisturbed run.

    python -m experiments.faults --kills 200 --others 10 --out experiments/results/faults

A run trains a tiny model for 12 steps, writes its adapter, scores it and exports it. It is killed
(SIGKILL, SIGTERM, SIGINT, SIGHUP) and started again a dozen times, each time at a random moment of
some phase, and then left alone. In the end its adapter, metrics, eval.json and export must be those
of an undisturbed run, bit by bit. After a kill nothing may be half-written, and no signal may cause
a traceback. The other faults:

    small file     from some moment on, no file may grow beyond a limit
    full disk      the run's disk (a tmpfs) is too small
    read-only      the run's disk is read-only, from the start or after a kill
    second run     another process wants the directory of a run that is under way
    cluster        one of the two processes of a run is killed

Only root can mount the disks; for others these two faults are left out.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.disturbed import (
    Run,
    Wrong,
    check_code,
    ended,
    seconds_of_phases,
    wait_for,
)
from experiments.flags import Flags, parse
from experiments.report import beside
from experiments.traced import PHASES
from flora_jax.analysis.results import about_process, header, table
from flora_jax.errors import check_writable, run_command
from flora_jax.files import write_json

FLAGS: Flags = {
    "--kills": dict(type=int, default=200),
    "--others": dict(type=int, default=10, help="of each other fault"),
    "--seed": dict(type=int, default=0),
    "--out": dict(type=Path, help="write OUT.json and OUT.md"),
}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
_STOPPED = (0, 1, -1, -2, -9, -15)  # exit codes; 0: the process had all but ended
_REFUSED = (0, 1, 2)
_ROOM = "64m"  # the size of a disk that is large enough
_CLUSTER_SECONDS = 180.0  # in which the other process must end; JAX waits 100


class Place:
    """A folder for runs; the files, bytes and seconds of each phase of an undisturbed one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made = 0
        first = self.run()
        first.finish()  # compiles, so that the second's phases are timed without
        self.owed = first.contents()
        self.bytes = sum(file.stat().st_size for file in first.root.rglob("*") if file.is_file())
        second = self.run()
        self.seconds: dict[str, float] = {}
        for command in ("train", "export"):
            check_code(second.go(command), 0)
            self.seconds |= seconds_of_phases(second.lines())
        second.check_equal(self.owed)
        self._cluster: dict[str, Any] | None = None

    def run(self) -> Run:
        """A new run, which becomes `latest`."""
        self._made += 1
        self.latest = Run(self.folder / f"run{self._made}", self.folder / "cache")
        return self.latest

    def moment(self, phase: str, rng: random.Random) -> dict[str, Any]:
        """A random moment of a phase, or shortly after it."""
        entry = rng.randint(1, 3) if phase == "step" else 1
        return {"phase": phase, "entry": entry, "after": rng.uniform(0, 1.1 * self.seconds[phase])}

    def cluster(self) -> dict[str, Any]:
        """The files of an undisturbed run of two processes."""
        if self._cluster is None:
            run = self.run()
            for process in start_cluster(run):
                check_code(ended(process), 0)
            self._cluster = run.contents()
        return self._cluster


# ------------------------------------------------------------------------------------- the faults


def kills(place: Place, rng: random.Random) -> None:
    """A run is killed a dozen times, then left alone."""
    run = place.run()
    phases = ["loading", "step", "validation", "checkpoint"] * 2
    rng.shuffle(phases)
    phases += ["adapter", "adapter", "evaluation", "evaluation"]
    for command, own in (("train", phases), ("export", ["export", "export"])):
        for phase in own:
            fault = {**place.moment(phase, rng), "signal": rng.choice(SIGNALS)}
            check_code(run.go(command, fault), *_STOPPED)
            run.check_whole(place.owed)
        check_code(run.go(command), 0)
    run.check_equal(place.owed)


def small_file(place: Place, rng: random.Random) -> None:
    """From some moment on, no file may grow beyond a limit."""
    run = place.run()
    phase = rng.choice(("loading", "step", "validation", "checkpoint", "adapter", "evaluation"))
    limit = rng.randrange(4096, 60_000)
    check_code(run.go("train", {**place.moment(phase, rng), "limit": limit}), *_REFUSED)
    run.check_whole(place.owed)
    check_code(run.go("train"), 0)
    check_code(run.go("export", {**place.moment("export", rng), "limit": limit}), *_REFUSED)
    run.check_whole(place.owed)
    run.finish()
    run.check_equal(place.owed)


@contextlib.contextmanager
def disk(run: Run, size: str) -> Iterator[Callable[[str], None]]:
    """Gives the run a disk of its own; yields a function that changes its mount options."""

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(run.root)]
        subprocess.run(command, check=True, capture_output=True)

    mount(f"size={size}")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(run.root)], check=True)


def full_disk(place: Place, rng: random.Random) -> None:
    """The disk is too small, until somebody makes room."""
    run = place.run()
    with disk(run, str(int(place.bytes * rng.uniform(0.05, 0.95)))) as change:
        commands = ["train"]
        if rng.random() < 0.7:
            commands.append("export")
        for command in commands:
            check_code(run.go(command), *_REFUSED)
            run.check_whole(place.owed)
        change(f"size={_ROOM}")
        run.finish()
        run.check_equal(place.owed)


def read_only(place: Place, rng: random.Random) -> None:
    """The disk is read-only, from the start or after a kill, until somebody changes that."""
    run = place.run()
    with disk(run, _ROOM) as change:
        if rng.random() < 0.7:
            phase = rng.choice(("step", "validation", "checkpoint", "adapter", "evaluation"))
            run.go("train", {**place.moment(phase, rng), "signal": "SIGKILL"})
        before = run.contents()
        change("ro")
        for command in ("train", "export"):
            check_code(run.go(command), 1, 2)
        run.check_equal(before)
        change("rw")
        run.finish()
        run.check_equal(place.owed)


def second_run(place: Place, rng: random.Random) -> None:
    """Another process wants the directory and is refused; the first does not notice."""
    run = place.run()
    first = run.start("train")
    wait_for(first, run, "step")
    time.sleep(rng.uniform(0, 1))
    other = ended(run.start("train", name=".other"))
    running = first.poll() is None
    check_code(ended(first), 0)
    if running:
        check_code(other, 2)
    run.finish()
    run.check_equal(place.owed)


def start_cluster(run: Run, faults: tuple[dict[str, Any], ...] = ({}, {})) -> list[Any]:
    """Starts the two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fields = {
        "distributed.coordinator": f"127.0.0.1:{port}",
        "distributed.processes": 2,
        "mesh.fsdp": 2,
        "eval.tasks": "",
    }
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    return [
        run.start("train", fault, *flags, f"--config.distributed.process_id={i}", name=f".{i}")
        for i, fault in enumerate(faults)
    ]


def cluster(place: Place, rng: random.Random) -> None:
    """One of two processes is killed; the other ends, and both go on when started again."""
    run = place.run()
    owed = place.cluster()
    fault = place.moment(rng.choice(("step", "validation", "checkpoint")), rng)
    fault |= {"entry": rng.randint(1, 2), "signal": "SIGKILL"}
    faults = [fault, {}]
    rng.shuffle(faults)
    for process in start_cluster(run, tuple(faults)):
        if ended(process, _CLUSTER_SECONDS).code == 0:
            raise Wrong("a process succeeded though one of the two was killed")
    for process in start_cluster(run):
        check_code(ended(process), 0)
    run.check_equal(owed)


FAULTS = {
    "kills": kills,
    "small file": small_file,
    "full disk": full_disk,
    "read-only": read_only,
    "second run": second_run,
    "cluster": cluster,
}


# ---------------------------------------------------------------------------------- all of them


def possible() -> list[str]:
    """The faults that this user can make: only root can mount a disk."""
    return [name for name in FAULTS if os.geteuid() == 0 or name not in ("full disk", "read-only")]


def runs(place: Place, name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yields runs with one kind of fault without end: the kills of each, and what it did wrong."""
    for i in itertools.count():
        one: dict[str, Any] = {"fault": name, "run": i}
        try:
            FAULTS[name](place, random.Random(f"{name} {seed} {i}"))
        except Wrong as error:
            one["wrong"] = str(error)
        yield one | {"kills": place.latest.kills}


def markdown(about: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """The tables: kills by phase and signal, and the runs."""
    every = [kill for one in found for kill in one["kills"]]
    counts = collections.Counter((kill["phase"], kill["signal"]) for kill in every)
    rows = [[phase, *(str(counts[phase, name]) for name in SIGNALS)] for phase in (*PHASES, "none")]
    lines = [
        header("Faults", about),
        f"{len(every)} kills, by the phase that they came in (none: between two):\n",
        *table(["", *SIGNALS], rows),
        "\nRuns that did not end as the undisturbed one, or did what they must not:\n",
    ]
    rows = []
    for name in FAULTS:
        own = [one for one in found if one["fault"] == name]
        rows.append([name, str(len(own)), str(sum("wrong" in one for one in own))])
    return "\n".join([*lines, *table(["fault", "runs", "wrong"], rows)]) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.faults", __doc__, FLAGS)
    if args.out:
        check_writable(beside(args.out, ".json"), "--out")
    about = about_process("orbax-checkpoint", "grain")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for name in possible():
            wanted = args.kills if name == "kills" else args.others
            done = 0
            bar = tqdm(desc=name, total=wanted, disable=None)
            source = runs(place, name, args.seed)
            while done < wanted:
                one = next(source)
                found.append(one)
                more = len(one["kills"]) if name == "kills" else 1
                done += more
                bar.update(more)
                if "wrong" in one:
                    print(f"{name}, run {one['run']}: {one['wrong']}", flush=True)
            bar.close()
            if args.out:
                write_json(beside(args.out, ".json"), {"provenance": about, "faults": found})
                beside(args.out, ".md").write_text(markdown(about, found))
    print(markdown(about, found))


if __name__ == "__main__":
    run_command(main)
