"""Where and with what a measurement was taken: the command, the machine, the versions, the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jax


def provenance(module: str, arguments: list[str], packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """JSON-ready; `packages` are named beside jax, jaxlib, flax and numpy, absolute paths in the command by their last
    part."""
    names = ("jax", "jaxlib", "flax", "numpy", *packages)
    device = jax.devices()[0]
    return {
        "command": command_line(module, arguments),
        "device": f"{os.cpu_count()} cores, {_processor()}"
        if device.platform == "cpu"
        else device.device_kind,
        "platform": device.platform,
        "versions": {
            "python": platform.python_version(),
            **{n: importlib.metadata.version(n) for n in names},
        },
        # How many processes wanted a core in the last minute: above 0 before it starts, a CPU was not idle.
        "load_average": os.getloadavg()[0],
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def command_line(module: str, arguments: list[str]) -> str:
    """A command, absolute paths in it by their last part."""
    return shlex.join(["python", "-m", module, *map(_placeless, arguments)])


def _commit() -> str | None:
    """The commit of the code that runs, with `-dirty` behind it where a tracked file differs; None outside a clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed; what lies around it is somebody else's
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _placeless(argument: str) -> str:
    flag, equals, value = (
        argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    )
    return f"{flag}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
