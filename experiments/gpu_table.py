"""The table of experiments/gpu_report.py, from the JSON of each cell."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.gpu_cells import IN_KERNELS
from experiments.report import stored
from flora_jax.analysis.results import NONE, percent, spread, versions
from flora_jax.analysis.results import table as table_of
from flora_jax.analysis.timing import claims, paired_ratio
from flora_jax.files import read_json

_HEADS = (
    "",
    "rank",
    "bytes",
    "TPOT ms",
    "over the base",
    "TTFT",
    "less than LoRA",
    "of LoRA's overhead",
    "of the bandwidth",
)


def table(results: Path, said: Mapping[str, str]) -> str:
    """The report as Markdown: times beside the merged base, both readings of the paper's claim, the
    other cells in a line each, and what was not measured. said: what became of each cell."""
    found = {file.stem: read_json(file) for file in sorted(results.glob("*.json"))}
    with stored(results):
        return _table(results, found, said)


def _table(results: Path, found: Mapping[str, Any], said: Mapping[str, str]) -> str:
    rates = found.get("device", {})
    lines = [f"# GPU report: {results.name}\n"]
    if rates:
        lines.append(
            f"{rates['device']}; driver {rates['driver'].get('driver_version', NONE)}; "
            f"{versions(rates)}; {rates['date']}  \ncopies {rates['copy_gb_per_s']:.0f} GB/s (read "
            f"and written), multiplies {rates['bf16_tflop_per_s']:.0f} TFLOP/s in bfloat16\n"
        )
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for name, one in found.items():
        if name.startswith("latency-"):
            preset, batch, prompt = (one[key] for key in ("preset", "batch_size", "prompt_length"))
            # A cell that is measured again has a name of its own.
            label = name.removeprefix(f"latency-{preset}-").removesuffix(f"-b{batch}-p{prompt}")
            places.setdefault((preset, batch, prompt), []).append({**one, "label": label})
    for (preset, batch, prompt), here in places.items():
        title = f"## {preset}, batch {batch}, prompt {prompt}\n"
        lines += [title, *_times(here, rates.get("copy_gb_per_s")), ""]
    lines += _other_lines(found)
    missing = {name: what for name, what in said.items() if what != "done"}
    if missing:
        lines += ["\n## Not measured\n", *(f"- {name}: {what}" for name, what in missing.items())]
    return "\n".join(lines) + "\n"


def _times(here: list[dict[str, Any]], gb_per_s: float | None) -> list[str]:
    """The table of one setting, the fastest first."""
    rows = []
    ratios = [paired_ratio(one["tpot_ms"], one["base_tpot_ms"]) for one in here]
    loras = [
        ratio["median"] for one, ratio in zip(here, ratios, strict=True) if one["method"] == "lora"
    ]
    for one, ratio in sorted(zip(here, ratios, strict=True), key=lambda pair: pair[1]["median"]):
        tpot = statistics.median(one["tpot_ms"])
        ttft = paired_ratio(one["ttft_ms"], one["base_ttft_ms"])["median"]
        # Above batch 1 the cache, which is not counted, is much of what is read.
        alone = gb_per_s and one["batch_size"] == 1
        # What our kernels gain is not the method's.
        compared = loras and one["rank"] and not one["method"].endswith(IN_KERNELS)
        beside = claims(ratio["median"], loras[0]) if compared else {}
        rows.append(
            [
                one["label"],
                str(one["rank"] or NONE),
                f"{one['bytes']:.3f}",
                f"{tpot:.3f}",
                spread(ratio),
                f"{ttft:.3f}",
                percent(beside.get("less_than_lora")),
                percent(beside.get("overhead_removed")),
                percent(one["read_bytes"] / tpot / 1e6 / gb_per_s if alone else None),
            ]
        )
    return table_of(_HEADS, rows, blank=" ")


def _other_lines(found: Mapping[str, Any]) -> list[str]:
    """A line for each cell that is no row of the tables."""
    lines = ["## Other cells\n"]
    for name, one in found.items():
        say = next((say for start, say in _SAID.items() if name.startswith(start)), None)
        if say is not None:
            lines.append(f"- {name}: {say(one)}")
    return lines


def _of_torch(one: dict[str, Any]) -> str:
    counted = one["graph_launches_a_step"]
    graphs = f"{NONE if counted is None else format(counted, '.1f')} graphs a token"
    compiled = (
        f"{statistics.median(one['tpot_ms']):.3f} ms a token ({one['compiled_by']}, {graphs})"
    )
    return f"{compiled}, eager {statistics.median(one['eager_tpot_ms']):.3f}"


def _of_profile(one: dict[str, Any]) -> str:
    step = f"{one['events']:.0f} launches a step, busy {one['busy_us']:.0f} µs"
    graphs = f"{one['graph_launches_a_step']:.1f} CUDA graphs a step"
    return f"{step}, gaps {one['gap_us']:.0f} µs, {graphs}"


def _of_training(one: dict[str, Any]) -> str:
    peak = NONE if one["peak_gb"] is None else f"{one['peak_gb']:.1f} GB"
    said = f"{one['tokens_per_second']:.0f} tokens/s, peak {peak}"
    share = one.get("share_of_product_rate")
    return said if share is None else f"{said}, {percent(share)} of the product rate"


def _of_tests(one: dict[str, Any]) -> str:
    counts = f"{one['passed']} passed, {one['failed']} failed, {one['skipped']} skipped"
    return f"{counts} in {one['seconds']:.0f} s"


def _of_plan(one: dict[str, Any]) -> str:
    if not one["rows"]:
        return one["left_out"]
    counts = (f"{row['method']} {row['mode']} {row['launches_a_layer']:.1f}" for row in one["rows"])
    return f"launches a layer: {'; '.join(counts)}"


def _of_table(one: dict[str, Any]) -> str:
    return "its table is beside its JSON"


# What is said of a cell, by the start of its name.
_SAID = {
    "torch_latency": _of_torch,
    "profile": _of_profile,
    "train": _of_training,
    "torch_train": _of_training,
    "tests": _of_tests,
    "plan": _of_plan,
    "bank": _of_table,
    "switching": _of_table,
    "quantized": _of_table,
}
