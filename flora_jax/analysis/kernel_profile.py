"""The time of a decode step on the device, kernel by kernel, from JAX's own profiler.

    with traced(folder):
        run()
    summarise(device_events(folder), steps=8, layers=16)

On a GPU an event is a kernel or a copy on one of its streams. On a CPU, for rehearsals, it is an
operation of the compiled program. XLA uses no CUDA graphs while it is profiled, unless a program
was compiled with `GRAPHS_TOO`; the host's trace then has the launches of the graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from flora_jax.analysis.results import table as markdown_table

# XLA's option that keeps its CUDA graphs while a program is profiled.
GRAPHS_TOO = {"xla_enable_command_buffers_during_profiling": True}
_GRAPH_LAUNCHES = ("cuGraphLaunch", "cudaGraphLaunch")
# A CPU's trace has the operations inside these as well.
_CONTAINERS = ("while", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Event:
    """One launch: its kernel's name, its start and its duration in nanoseconds."""

    name: str
    start: float
    duration: float


@contextlib.contextmanager
def traced(folder: Path) -> Iterator[None]:
    """Profiles the block into `folder`, without Python's own calls."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        yield


def _planes(folder: Path) -> list[Any]:
    files = sorted(folder.rglob("*.xplane.pb"))
    return [
        plane for file in files for plane in jax.profiler.ProfileData.from_file(str(file)).planes
    ]


def device_events(folder: Path) -> list[Event]:
    """The events on the device, by their start."""
    planes = _planes(folder)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    events = []
    for plane in gpus or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # summaries of the same events, by step and by module
            for event in line.events:
                name = event.name
                own = bool(gpus) or "hlo_op" in dict(event.stats)
                if own and name.split(".")[0] not in _CONTAINERS:
                    events.append(Event(name, event.start_ns, event.duration_ns))
    return sorted(events, key=lambda event: event.start)


def graph_launches(folder: Path) -> int:
    """How often the host launched a CUDA graph."""
    return sum(
        event.name.startswith(_GRAPH_LAUNCHES)
        for plane in _planes(folder)
        for line in plane.lines
        for event in line.events
    )


def kind(name: str) -> str:
    """A kernel's name without the number that differs from layer to layer."""
    return re.sub(r"([._]\d+)+(?=$|[<(\[])", "", name)


def summarise(events: Sequence[Event], steps: int, layers: int) -> dict[str, Any]:
    """JSON-ready account of `steps` steps of a model of `layers` layers.

    events: a step's; busy_us: microseconds of a step in which one runs; gap_us: those between two
    in which none runs. kernels, by kind, the longest first: launches and microseconds of a step,
    and of a layer as that over `layers` (a kernel that runs once a step is spread over them).
    """
    busy = 0.0
    gaps: list[float] = []
    end = min((event.start for event in events), default=0.0)
    for event in events:
        if event.start > end:
            gaps.append(event.start - end)
        stop = event.start + event.duration
        busy += max(0.0, stop - max(event.start, end))
        end = max(end, stop)
    launches: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        launches[kind(event.name)] += 1
        spent[kind(event.name)] += event.duration
    rows = [
        {
            "kernel": name,
            "launches": launches[name] / steps,
            "launches_a_layer": launches[name] / steps / layers,
            "us": spent[name] / 1e3 / steps,
            "us_a_layer": spent[name] / 1e3 / steps / layers,
        }
        for name in sorted(spent, key=lambda name: -spent[name])
    ]
    return {
        "steps": steps,
        "layers": layers,
        "events": len(events) / steps,
        "busy_us": busy / 1e3 / steps,
        "gap_us": sum(gaps) / 1e3 / steps,
        "longest_gap_us": max(gaps, default=0.0) / 1e3,
        "kernels": rows,
    }


def table(profile: dict[str, Any], rows: int = 12) -> str:
    """A summary's `rows` longest kernels as a Markdown table."""
    heads = ["kernel", "launches a layer", "µs a layer", "µs a step"]
    cells = [
        [
            f"`{row['kernel'][:60]}`",
            f"{row['launches_a_layer']:.2f}",
            f"{row['us_a_layer']:.2f}",
            f"{row['us']:.1f}",
        ]
        for row in profile["kernels"][:rows]
    ]
    return "\n".join(markdown_table(heads, cells))
