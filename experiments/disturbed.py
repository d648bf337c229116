"""Runs of a tiny model that faults are put into, in processes of their own, and what they must
leave: the files that a run leaves which nothing met."""

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
# A process is to reach the fault soon: what is compiled is kept, and compiled without much care.
_QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_SECONDS = 300.0  # after which a process hangs
_WHOLE = ("run/adapter", "exported")  # directories that are there whole or not at all


class Wrong(Exception):
    """What a run did that it must not."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    error: str


def ended(process: subprocess.Popen, seconds: float = _SECONDS) -> Ended:
    """The process at its end. Raises Wrong for one that hangs."""
    try:
        error = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise Wrong(f"hangs: {process.communicate()[1][-500:]}") from None
    return Ended(process.returncode, error)


class Run:
    """One run in a folder of its own, whose commands name no other path than those in it."""

    def __init__(self, root: Path, cache: Path):
        self.root = root
        self.kills: list[dict[str, str]] = []
        self.trace = root.with_suffix(".trace")
        places = {"FLORA_CACHE": str(cache), "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
        self.environment = {**os.environ, **places, **_QUICK}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile it anew
        root.mkdir()

    def start(
        self, command: str, fault: Mapping[str, Any] | None = None, *flags: str, name: str = ""
    ) -> subprocess.Popen:
        """A process of `train` or `export`, with more flags. name: of one of several at once."""
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
        """The process at its end, its kill noted; nothing is done where the export is there
        already."""
        self.trace.unlink(missing_ok=True)
        if command == "export" and (self.root / "exported").exists():
            return Ended(0, "")
        end = ended(self.start(command, fault))
        if fault and "signal" in fault and (phase := self.struck()) is not None:
            self.kills.append({"signal": fault["signal"], "phase": phase})
        return end

    def finish(self) -> None:
        """What is left of training, and the export. Raises Wrong where one does not end well."""
        for command in ("train", "export"):
            check_code(self.go(command), 0)

    def lines(self) -> list[list[str]]:
        """The words of the trace: time, what, phase."""
        text = self.trace.read_text() if self.trace.exists() else ""
        return [line.split() for line in text.splitlines()]

    def struck(self) -> str | None:
        """The phase that the fault came in, None where the process had ended before."""
        return next((phase for _, what, phase in self.lines() if what == "fault"), None)

    def contents(self) -> dict[str, bytes | str]:
        """What the run computed, by file; of metrics.jsonl all but the speed."""
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
        """Raises Wrong where something half-written stands in a whole thing's place."""
        found = self.contents()
        for name in _WHOLE:
            if (self.root / name).exists() and _part(found, name) != _part(owed, name):
                raise Wrong(f"{name} is there and is not what it should be")
        if "run/eval.json" in found:
            json.loads((self.root / "run/eval.json").read_text())

    def check_equal(self, owed: Mapping[str, bytes | str]) -> None:
        """Raises Wrong where a file is not as in the run that nothing met."""
        found = self.contents()
        other = [name for name in {*found, *owed} if found.get(name) != owed.get(name)]
        if other:
            raise Wrong(f"other than undisturbed: {', '.join(sorted(other))}")


def check_code(end: Ended, *codes: int) -> None:
    """Raises Wrong for another exit code or a traceback."""
    if end.code not in codes or "Traceback" in end.error:
        raise Wrong(f"exit code {end.code}: {end.error[-1500:]}")


def seconds_of_phases(lines: Sequence[Sequence[str]]) -> dict[str, float]:
    """The median length of each phase of a trace."""
    begun: dict[str, float] = {}
    found = collections.defaultdict(list)
    for when, what, phase in lines:
        if what == "begin":
            begun[phase] = float(when)
        else:
            found[phase].append(float(when) - begun[phase])
    return {phase: statistics.median(lengths) for phase, lengths in found.items()}


def wait_for(process: subprocess.Popen, run: Run, phase: str) -> None:
    """Returns once the process is in a phase. Raises Wrong where it ends before."""
    while not any(one[2:] == [phase] for one in run.lines()):
        if process.poll() is not None:
            raise Wrong(f"ended before {phase}: {process.communicate()[1][-500:]}")
        time.sleep(0.01)


def _part(found: Mapping[str, bytes | str], name: str) -> dict[str, bytes | str]:
    return {file: data for file, data in found.items() if file.startswith(f"{name}/")}


def _no_speed(text: str) -> str:
    """JSON text without the lines, or in a log the fields, that say how long something took, or
    with how much memory."""
    text = re.sub(rf',? *"({"|".join(MEASURED)})": [^,}}]*', "", text)
    return re.sub(r'\n *"seconds": [^\n]*', "", text)
