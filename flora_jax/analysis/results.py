"""Parts of result files: provenance (command, machine, versions, date) and tables."""

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
    """Where and with what a measurement was taken, JSON-ready.

    packages: named with their versions beside jax, jaxlib, flax and numpy. Absolute paths in the
    command are shortened to their last part.
    """
    import jax  # starts the device, and a command may have to choose it first

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
        # Processes that wanted a core in the last minute: a CPU was idle if this is about 0 at the
        # start.
        "load_average": os.getloadavg()[0],
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def command_line(module: str, arguments: list[str]) -> str:
    """A command line, absolute paths shortened to their last part."""
    return shlex.join(["python", "-m", module, *map(_placeless, arguments)])


def about_process(*packages: str, data_dir: str | None = None) -> About:
    """`provenance` of this process; the path of the data is written DIR."""
    name = sys.argv[0]
    if module := sys.modules["__main__"].__spec__:
        name = module.name
    places = {data_dir: "DIR", f"--data_dir={data_dir}": "--data_dir=DIR"}
    return provenance(name, [places.get(one, one) for one in sys.argv[1:]], packages)


def about_run(args: argparse.Namespace) -> About:
    """`about_process` of a script that trains and scores runs."""
    return about_process("orbax-checkpoint", "grain", "rouge-score", data_dir=args.data_dir)


def about_runs(runs: Sequence[dict[str, Any]], args: argparse.Namespace) -> About:
    """`about_run` of a table of runs: their devices, and the date of the last one, wherever the
    table is written."""
    made = [run["provenance"] for run in runs]
    devices = " and ".join(dict.fromkeys(one["device"] for one in made))
    return {**about_run(args), "device": devices, "date": max(one["date"] for one in made)}


def versions(about: About) -> str:
    """The versions as tables name them: `python 3.12.1, jax 0.10.2, …`."""
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items())


def header(title: str, about: About) -> str:
    """The beginning of a results file, as Markdown."""
    return (
        f"# {title}\n\n`{about['command']}`  \n"
        f"{about['device']}; {versions(about)}; {about['date']}\n"
    )


def _commit() -> str | None:
    """The commit of the running code, with `-dirty` if a tracked file differs; None outside a
    clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed: a repository around it is another one
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _placeless(argument: str) -> str:
    """The argument with an absolute path, also behind a flag's `=`, shortened to its last part."""
    flag, equals, value = "", "", argument
    if argument.startswith("--"):
        flag, equals, value = argument.rpartition("=")
    if not Path(value).is_absolute():
        return argument
    return f"{flag}{equals}{Path(value).name}"


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


NONE = "–"  # a cell without a value


def line(cells: Iterable[str], blank: str = "  ") -> str:
    """A line of a Markdown table; blank: the text between the bars of an empty cell."""
    return "|" + "|".join(_padded(cell, blank) for cell in cells) + "|"


def _padded(cell: str, blank: str) -> str:
    if not cell:
        return blank
    return f" {cell} "


def table(heads: Sequence[str], rows: Iterable[Iterable[str]] = (), blank: str = "  ") -> list[str]:
    """The lines of a Markdown table; blank: as in `line`, for the heads alone."""
    return [line(heads, blank), "|---" * len(heads) + "|", *map(line, rows)]


def cell(value: float | None, form: str) -> str:
    """A number in the format `form`; None is a cell without a value."""
    if value is None:
        return NONE
    return f"{value:{form}}"


def interval(middle: float, low: float, high: float, form: str) -> str:
    """`middle [low, high]`, each number in the format `form`."""
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def spread(value: Mapping[str, Any], form: str = ".3f", scale: float = 1) -> str:
    """Median [quartiles] of a `timing.summary`, times `scale`."""
    low, high = value["quartiles"]
    return interval(scale * value["median"], scale * low, scale * high, form)


def percent(value: float | None) -> str:
    """A share in whole percent; None is a cell without a value."""
    if value is None:
        return NONE
    return f"{100 * value:.0f} %"
