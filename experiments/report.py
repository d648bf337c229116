"""What every result file carries: the command, the machine, the versions, the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from typing import Any

import jax


def provenance(*packages: str) -> dict[str, Any]:
    """Where and with what this process ran; `packages` are named beside jax and flax."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    device = jax.devices()[0]
    module = sys.modules["__main__"].__spec__
    return {
        "command": " ".join(["python -m", module.name if module else sys.argv[0], *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {cpu}" if device.platform == "cpu" else device.device_kind,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "flax", *packages)},
        },
        "date": datetime.date.today().isoformat(),
    }


def header(title: str, about: dict[str, Any]) -> str:
    """The Markdown that a results file begins with."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"# {title}\n\n`{about['command']}`  \n{about['machine']}; {versions}; {about['date']}\n"
