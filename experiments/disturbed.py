"""Runs of a tiny model that faults are put into, each command in a process of its own.

In the end they must leave the same files as an undisturbed run.
"""

from __future__ import annotations

import collections
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flora_jax.training.measure import MEASURED

CONFIG = Path("configs/tiny.py").absolute()
FIELDS = {
    "data.generator.train": 60,
    "data.generator.validation": 10,
    "data.generator.test": 6,
    "data.validation_size": 8,
    "train.batch_size": 4,
    "train.steps": 12,
    "train.log_every": 1,
    "train.eval_every": 4,
    "train.save_every": 3,
    "eval.tasks": "chain_sum",
    "eval.limit": 4,
    "eval.max_new_tokens": 8,
}
# To reach the fault soon: few optimizations, and compiled programs are kept.
_QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_SECONDS = 300.0  # a process that takes longer hangs
_WHOLE = ("run/adapter", "exported")  # directories that must be complete or absent


class Wrong(Exception):
    """A run did what it must not."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    error: str


def ended(process: subprocess.Popen, seconds: float = _SECONDS) -> Ended:
    """Waits for the end of a process. Raises Wrong if it hangs."""
    try:
        error = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise Wrong(f"hangs: {process.communicate()[1][-500:]}") from None
    return Ended(process.returncode, error)


class Run:
    """One run in a folder of its own. Its commands name paths relative to that, so that two runs
    leave equal files."""

    def __init__(self, root: Path, cache: Path):
        self.root = root
        self.kills: list[dict[str, str]] = []
        self.trace = root.with_suffix(".trace")
        places = {"FLORA_CACHE": str(cache), "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
        self.environment = {**os.environ, **places, **_QUICK}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or all would compile the code anew
        root.mkdir()

    def start(
        self, command: str, fault: Mapping[str, Any] | None = None, *flags: str, name: str = ""
    ) -> subprocess.Popen:
        """Starts `train` or `export` with more flags. name: ends the name of its trace, where
        several processes run at once."""
        trace = f"{self.trace}{name}"
        Path(trace).unlink(missing_ok=True)
        given = {
            "train": ["--config", str(CONFIG), "--workdir", "run"]
            + [f"--config.{field}={value}" for field, value in FIELDS.items()],
            "export": ["--workdir", "run", "--format", "transformers", "--out", "exported"],
        }
        traced = [sys.executable, "-m", "experiments.traced", trace, json.dumps(fault or {})]
        return subprocess.Popen(
            [*traced, f"flora_jax.{command}", *given[command], *flags],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def go(self, command: str, fault: Mapping[str, Any] | None = None) -> Ended:
        """Runs a command to its end and notes a kill. Does nothing if the export exists already."""
        self.trace.unlink(missing_ok=True)
        if command == "export" and (self.root / "exported").exists():
            return Ended(0, "")
        end = ended(self.start(command, fault))
        if fault and "signal" in fault and (phase := self.struck()) is not None:
            self.kills.append({"signal": fault["signal"], "phase": phase})
        return end

    def finish(self) -> None:
        """Resumes training, and exports. Raises Wrong unless both succeed."""
        for command in ("train", "export"):
            check_code(self.go(command), 0)

    def lines(self) -> list[list[str]]:
        """The lines of the trace as words: time, event, phase."""
        text = self.trace.read_text() if self.trace.exists() else ""
        return [line.split() for line in text.splitlines()]

    def struck(self) -> str | None:
        """The phase that the fault came in; None if the process ended before it."""
        return next((phase for _, event, phase in self.lines() if event == "fault"), None)

    def contents(self) -> dict[str, bytes | str]:
        """What the run computed, by file, without times, speeds and memory."""
        places = [self.root / name for name in _WHOLE]
        found = {
            str(file.relative_to(self.root)): file.read_bytes()
            for place in places
            for file in sorted(place.rglob("*"))
            if file.is_file()
        }
        for name in ("run/eval.json", "run/metrics.jsonl"):
            if (self.root / name).exists():
                found[name] = _no_speed((self.root / name).read_text())
        return found

    def check_whole(self, owed: Mapping[str, bytes | str]) -> None:
        """Raises Wrong if the adapter, the export or eval.json is half-written."""
        found = self.contents()
        for name in _WHOLE:
            if (self.root / name).exists() and _part(found, name) != _part(owed, name):
                raise Wrong(f"{name} exists and is not as in the undisturbed run")
        if "run/eval.json" in found:
            json.loads((self.root / "run/eval.json").read_text())

    def check_equal(self, owed: Mapping[str, bytes | str]) -> None:
        """Raises Wrong if a file is not as in the undisturbed run."""
        found = self.contents()
        other = [name for name in {*found, *owed} if found.get(name) != owed.get(name)]
        if other:
            raise Wrong(f"not as in the undisturbed run: {', '.join(sorted(other))}")


def check_code(end: Ended, *codes: int) -> None:
    """Raises Wrong for another exit code or a traceback."""
    if end.code not in codes or "Traceback" in end.error:
        raise Wrong(f"exit code {end.code}: {end.error[-1500:]}")


def seconds_of_phases(lines: Sequence[Sequence[str]]) -> dict[str, float]:
    """The median length of each phase of a trace, in seconds."""
    begun: dict[str, float] = {}
    found = collections.defaultdict(list)
    for when, event, phase in lines:
        if event == "begin":
            begun[phase] = float(when)
        else:
            found[phase].append(float(when) - begun[phase])
    return {phase: statistics.median(lengths) for phase, lengths in found.items()}


def wait_for(process: subprocess.Popen, run: Run, phase: str) -> None:
    """Returns once the process is in a phase. Raises Wrong if it ends before."""
    while not any(one[2:] == [phase] for one in run.lines()):
        if process.poll() is not None:
            raise Wrong(f"ended before {phase}: {process.communicate()[1][-500:]}")
        time.sleep(0.01)


def _part(found: Mapping[str, bytes | str], name: str) -> dict[str, bytes | str]:
    return {file: data for file, data in found.items() if file.startswith(f"{name}/")}


def _no_speed(text: str) -> str:
    """JSON text without the lines (in a log: the fields) of times, speeds and memory."""
    text = re.sub(rf',? *"({"|".join(MEASURED)})": [^,}}]*', "", text)
    return re.sub(r'\n *"seconds": [^\n]*', "", text)
