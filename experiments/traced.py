"""Runs a command of flora_jax, notes its phases, and puts a fault into one of them.

    python -m experiments.traced TRACE FAULT flora_jax.train --config …

TRACE gets a line when a phase begins and when it ends. FAULT is JSON: {} for none, or `phase`,
`entry` (the n-th time that it is entered), `after` (seconds), and either `signal`, which the
process sends to itself, or `limit`, bytes that no file may grow beyond from then on.
experiments.faults uses it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from flora_jax.errors import run_command

# Where each phase is called from, `module:name`.
PHASES = {
    "loading": "flora_jax.training.loop:prepare",
    "step": "flora_jax.training.loop:_step",
    "validation": "flora_jax.training.loop:validation_loss",
    "checkpoint": "flora_jax.training.checkpoints:Checkpoints.save",
    "adapter": "flora_jax.finetune:save_adapter",
    "evaluation": "flora_jax.finetune:evaluate_tasks",
    "export": "flora_jax.training.trained:export_run",
}


class Trace:
    """Notes phases in a file, and strikes with a fault."""

    def __init__(self, path: str, fault: dict[str, Any]):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._fault = fault
        self._entries = 0
        self._open: list[str] = []

    def note(self, what: str, phase: str) -> None:
        """Writes a line without a buffer, which a kill would lose."""
        os.write(self._file, f"{time.monotonic():.4f} {what} {phase}\n".encode())

    def during(self, phase: str, work: Callable) -> Callable:
        """`work`, noted as this phase. A step ends when its values are ready."""

        @functools.wraps(work)
        def noted(*given: Any, **named: Any) -> Any:
            self._open.append(phase)
            self.note("begin", phase)
            self._arm(phase)
            try:
                found = work(*given, **named)
                return jax.block_until_ready(found) if phase == "step" else found
            finally:
                self._open.pop()
                self.note("end", phase)

        return noted

    def _arm(self, phase: str) -> None:
        if phase != self._fault.get("phase"):
            return
        self._entries += 1
        if self._entries == self._fault["entry"]:
            timer = threading.Timer(self._fault["after"], self._strike)
            timer.daemon = True
            timer.start()

    def _strike(self) -> None:
        self.note("fault", self._open[-1] if self._open else "none")
        if "limit" in self._fault:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._fault["limit"], hard))
        else:
            os.kill(os.getpid(), getattr(signal, self._fault["signal"]))


def main(argv: list[str]) -> None:
    """The command."""
    path, fault, command, *rest = argv[1:]
    # A shell's background jobs ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trace = Trace(path, json.loads(fault))
    for phase, place in PHASES.items():
        module, _, names = place.partition(":")
        *owners, name = names.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, name, trace.during(phase, getattr(owner, name)))
    importlib.import_module(command).main([command, *rest])


if __name__ == "__main__":
    run_command(main, sys.argv)
