"""What files of results are written with: where and with what a measurement was taken (the command,
the machine, the versions, the date), and tables."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

About = dict[str, Any]


def provenance(module: str, arguments: list[str], packages: tuple[str, ...] = ()) -> About:
    """JSON-ready; `packages` are named beside jax, jaxlib, flax and numpy, absolute paths in the
    command by their last part."""
    import jax  # starts the device; a command may have to say first which one

    names = ("jax", "jaxlib", "flax", "numpy", *packages)
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"{os.cpu_count()} cores, {_processor()}"
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        "command": command_line(module, arguments),
        "device": kind,
        "platform": device.platform,
        "versions": {"python": platform.python_version(), **versions},
        # How many processes wanted a core in the last minute: above 0 before it starts, a CPU was
        # not idle.
        "load_average": os.getloadavg()[0],
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def command_line(module: str, arguments: list[str]) -> str:
    """A command, absolute paths in it by their last part."""
    return shlex.join(["python", "-m", module, *map(_placeless, arguments)])


def about_process(*packages: str, data_dir: str | None = None) -> About:
    """Where and with what this process ran; `packages` as above; the data's place is DIR."""
    module = sys.modules["__main__"].__spec__
    name = module.name if module else sys.argv[0]
    places = {data_dir: "DIR", f"--data_dir={data_dir}": "--data_dir=DIR"}
    return provenance(name, [places.get(one, one) for one in sys.argv[1:]], packages)


def about_run(args: argparse.Namespace) -> About:
    """Where and with what a run trained and was scored, the data's place left out."""
    return about_process("orbax-checkpoint", "grain", "rouge-score", data_dir=args.data_dir)


def about_runs(runs: Sequence[dict[str, Any]], args: argparse.Namespace) -> About:
    """What a table says of the runs in it, wherever it is written: their devices, and when the last
    one ended."""
    made = [run["provenance"] for run in runs]
    devices = " and ".join(dict.fromkeys(one["device"] for one in made))
    return {**about_run(args), "device": devices, "date": max(one["date"] for one in made)}


def versions(about: About) -> str:
    """`python 3.12.1, jax 0.10.2, …`, as tables name them."""
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items())


def header(title: str, about: About) -> str:
    """The Markdown that a results file begins with."""
    return (
        f"# {title}\n\n`{about['command']}`  \n"
        f"{about['device']}; {versions(about)}; {about['date']}\n"
    )


def _commit() -> str | None:
    """The commit of the code that runs, with `-dirty` behind it where a tracked file differs; None
    outside a clone."""
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
    """The argument with an absolute path, behind a flag's `=` too, as that path's last part."""
    flag, equals, value = "", "", argument
    if argument.startswith("--"):
        flag, equals, value = argument.rpartition("=")
    if not Path(value).is_absolute():
        return argument
    return f"{flag}{equals}{Path(value).name}"


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


NONE = "–"  # of a cell that has no value


def line(cells: Iterable[str], blank: str = "  ") -> str:
    """A line of a Markdown table; `blank`: what stands between the bars of an empty cell."""
    return "|" + "|".join(f" {cell} " if cell else blank for cell in cells) + "|"


def table(heads: Sequence[str], rows: Iterable[Iterable[str]] = (), blank: str = "  ") -> list[str]:
    """The lines of a Markdown table; `blank` as in `line`, of its heads alone."""
    return [line(heads, blank), "|---" * len(heads) + "|", *map(line, rows)]


def cell(value: float | None, form: str) -> str:
    """A number as the format `form` has it; None has none."""
    return NONE if value is None else f"{value:{form}}"


def interval(middle: float, low: float, high: float, form: str) -> str:
    """`middle [low, high]`, each number as the format `form` has it."""
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def spread(value: Mapping[str, Any], form: str = ".3f", scale: float = 1) -> str:
    """Median [quartiles] of a `timing.summary`, times `scale`."""
    low, high = value["quartiles"]
    return interval(scale * value["median"], scale * low, scale * high, form)


def percent(value: float | None) -> str:
    """A share in whole percent; None is a cell without a value."""
    return NONE if value is None else f"{100 * value:.0f} %"
