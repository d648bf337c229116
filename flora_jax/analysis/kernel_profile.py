"""Where a decode step's time goes on the device, kernel by kernel, from JAX's own profiler.

    with traced(folder):
        run()
    summarise(device_events(folder), steps=8, layers=16)

On a GPU an event is a kernel or a copy on one of its streams; on a CPU, where this serves to
rehearse, an operation of the compiled program. XLA leaves CUDA graphs out while it is profiled
unless a program was compiled with `GRAPHS_TOO`; with graphs the host's trace has their launches.
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
# Of these a CPU's trace has the operations inside as well.
_CONTAINERS = ("while", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Event:
    """What one launch did: its kernel's name, when it began and how long it took, nanoseconds."""

    name: str
    start: float
    duration: float


@contextlib.contextmanager
def traced(folder: Path) -> Iterator[None]:
    """Profiles what runs inside into `folder`, without Python's own calls."""
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
    """What ran on the device, in order of its start."""
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
    """A kernel's name without the number that tells it from its like in other layers."""
    return re.sub(r"([._]\d+)+(?=$|[<(\[])", "", name)


def summarise(events: Sequence[Event], steps: int, layers: int) -> dict[str, Any]:
    """JSON-ready account of `steps` steps of a model of `layers` layers.

    events, busy_us and gap_us are a step's: how many ran, the time in which one did, and the time
    between two in which none did. kernels, by kind, the longest first: launches and microseconds,
    of a step and, divided by the layers, of a layer (what runs once a step is spread over them)."""
    busy = 0.0
    gaps: list[float] = []
    end: float | None = None
    for event in events:
        if end is not None and event.start > end:
            gaps.append(event.start - end)
        begin = event.start if end is None else max(event.start, end)
        busy += max(0.0, event.start + event.duration - begin)
        end = max(end or 0.0, event.start + event.duration)
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
    """The Markdown of a summary: its longest kernels."""
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
