"""Measurements in a process of their own: its memory, and its answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def memory(field: str) -> int:
    """Memory of this process in bytes, as Linux counts it.

    field: VmHWM is the peak (getrusage's includes the parent's), VmRSS what is held now, RssAnon
    the part of that which no file backs.
    """
    [size] = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(size) * 1024


def answer(module: str, flags: Sequence[str]) -> Any:
    """The last line that `python -m module` with these flags prints, as JSON."""
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])
