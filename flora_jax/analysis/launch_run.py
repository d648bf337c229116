"""The launches command: checks its flags, plans every step, writes the files."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flora_jax.adapters import AdapterConfig, gpu_layout
from flora_jax.analysis import compilers
from flora_jax.analysis.launch_plan import (
    MODES,
    check_bank,
    modelled_ms,
    plan_model,
    smallest_kernel,
)
from flora_jax.analysis.results import NONE, provenance, table, versions
from flora_jax.analysis.targets import TARGETS
from flora_jax.analysis.variants import check_served, get_variant
from flora_jax.device import check_jax
from flora_jax.errors import check_writable, positive_integers, require, require_known
from flora_jax.files import write_result
from flora_jax.models.config import DECODE_ROWS, LlamaConfig

RESULT = "launches.json"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A variant to plan; label: its name in the tables; dot_merger: whether XLA may merge its
    products."""

    label: str
    name: str
    adapter_config: AdapterConfig | None
    dot_merger: bool = True


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row to plan: a method on a target, with `adapters` of them in the bank."""

    target: str
    mode: str
    batch: int
    adapters: int
    method: Method


def run(args: Namespace, argv: list[str]) -> str:
    """Plans the steps that the flags name, writes the files to --out and returns the tables.

    argv: the flags as given, for the record. Raises UserError as `check` does, and without a
    compiler.
    """
    check_jax()
    config = LlamaConfig.preset(args.preset)
    cells = list(check(args, config))
    if args.out:
        check_writable(Path(args.out) / RESULT, "--out")
    compilers.require_compiler()
    about = provenance("flora_jax.launches", argv, compilers.installed())
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    rows = []
    for cell in tqdm(cells, desc="plan", disable=not sys.stderr.isatty()):
        rows.append(_row(cell, config, args))
        tqdm.write(_summary(rows[-1]), file=sys.stderr)
    result = {
        "schema_version": 1,
        "provenance": about,
        "settings": settings | {"num_hidden_layers": config.num_hidden_layers},
        "smallest_kernel": smallest_kernel(config, args.dtype, args.quantization),
        "rows": rows,
    }
    text = markdown(result)
    if args.out:
        write_result(Path(args.out) / RESULT, result, f"--out {args.out}")
        (Path(args.out) / "launches.md").write_text(text, encoding="utf-8")
    return text


def check(args: Namespace, config: LlamaConfig) -> Iterator[Cell]:
    """The cells that the flags name. Raises UserError before anything is compiled."""
    targets = _names("--targets", args.targets, TARGETS)
    modes = _names("--modes", args.modes, MODES)
    batches = positive_integers("--batch_sizes", args.batch_sizes)
    banks = positive_integers("--adapters", args.adapters)
    if args.row_multiple is None:
        args.row_multiple = gpu_layout(args.quantization != "none").row_multiple
    for flag in ("cache_length", "row_multiple"):
        positive_integers(f"--{flag}", str(getattr(args, flag)))
    require(args.launch_us >= 0, f"--launch_us {args.launch_us} must be zero or more microseconds")
    if args.decode_kernels == "layer":
        most = max(batches)
        require(
            most <= DECODE_ROWS,
            f"--decode_kernels layer takes up to {DECODE_ROWS} rows, not {most}",
        )
        lacking = [name for name in targets if not TARGETS[name].has_float8]
        require(
            args.quantization != "fp8" or not lacking,
            "--decode_kernels layer reads fp8 on a GPU from Ada on, not on "
            f"{' and '.join(lacking)}; take int8",
        )
    held = _held(_methods(args, config, banks), banks)
    return (
        Cell(target, mode, batch, adapters, method)
        for target in targets
        for mode in modes
        for batch in batches
        for adapters, method in held
    )


def _held(methods: list[Method], banks: list[int]) -> list[tuple[int, Method]]:
    """Each method with each number of adapters; the bare base, which holds no bank, once."""
    held = []
    for adapters in banks:
        for method in methods:
            if method.adapter_config is not None:
                held.append((adapters, method))
            elif adapters == banks[0]:
                held.append((1, method))
    return held


def _names(flag: str, text: str, known: Mapping[str, Any]) -> list[str]:
    items = list(dict.fromkeys(item.strip() for item in text.split(",")))
    for item in items:
        require_known(item, known, f"{flag} {item!r}")
    return items


def _methods(args: Namespace, config: LlamaConfig, banks: list[int]) -> list[Method]:
    """The methods to plan; an unmerged adapter's twice, with XLA's dot merger and without."""
    methods = []
    names = list(dict.fromkeys(item.strip() for item in args.methods.split(",")))
    check_served(names, args.quantization)
    for name in names:
        variant = get_variant(name)
        adapter_config = None
        if variant.method is not None:
            adapter_config = AdapterConfig(variant.method, args.rank)
            adapter_config.check(config.widths)
        for adapters in banks:
            check_bank(name, adapters)
        require(
            args.decode_kernels != "layer" or variant.kind != "unmerged",
            f"--decode_kernels layer is for fused arrays, and {name} has its products apart",
        )
        methods.append(Method(name, name, adapter_config))
        if adapter_config is not None and variant.kind == "unmerged":
            methods.append(Method(f"{name}, dot merger off", name, adapter_config, False))
    return methods


def _row(cell: Cell, config: LlamaConfig, args: Namespace) -> Row:
    method = cell.method
    planned = plan_model(
        method.name,
        config,
        method.adapter_config,
        target=cell.target,
        mode=cell.mode,
        batch=cell.batch,
        adapters=cell.adapters,
        dot_merger=method.dot_merger,
        dtype=args.dtype,
        quantization=args.quantization,
        cache_length=args.cache_length,
        row_multiple=args.row_multiple,
        decode_kernels=args.decode_kernels,
    )
    step = planned["step"]
    bandwidth = TARGETS[cell.target].bandwidth
    label = method.label
    if cell.adapters > 1:
        label += f", bank of {cell.adapters}"
    return {
        "target": cell.target,
        "mode": cell.mode,
        "batch": cell.batch,
        "adapters": cell.adapters,
        "label": label,
        "method": method.name,
        "dot_merger": method.dot_merger,
        **planned,
        "model_ms": modelled_ms(step["moved"], step["chain"], bandwidth, args.launch_us),
    }


def _summary(row: Row) -> str:
    """A row as a line."""
    counts = [shown(row["layer"][key]) for key in ("launches", "gemms", "weight_copies")]
    line = "{} launches ({} GEMMs) a layer, {} weight copies".format(*counts)
    return f"{place(row):24} {row['label']:28} {line}"


# ----------------------------------------------------------------------------------- as Markdown

KERNELS = {
    "none": "all as XLA writes it",
    "attention": "attention is one Pallas kernel and the sum over its parts",
    "layer": "all of a layer and the logits are Pallas kernels, but for the sum of several rows' "
    "attention",
}
_HEADS = (
    *("", "method", "launches", "GEMMs", "products", "chain", "MB moved", "copies"),
    *("temporary MB", "graphs", "model ms"),
)


def place(row: Row) -> str:
    """The target, mode and batch of a row."""
    return f"{row['target']}, {row['mode']}, batch {row['batch']}"


def shown(value: float) -> str:
    """A count, or a share of one."""
    return f"{value:.1f}".removesuffix(".0")


def markdown(result: dict[str, Any]) -> str:
    """Launches (GEMMs) a layer of every method, by target, mode and batch, and then every row."""
    rows = result["rows"]
    about = result["provenance"]
    settings = result["settings"]
    lines = [
        f"# Launch plan of one decode step: {settings['preset']}\n",
        f"`{about['command']}`  ",
        f"{versions(about)}; {about['date']}\n",
        "Compiled for the device, not run on it: no autotuning (triton and cublas bracket it). "
        f"Kernels: {KERNELS[settings['decode_kernels']]}. {settings['dtype']}, quantization "
        f"{settings.get('quantization', 'none')}, rank "
        f"{settings['rank']}, {settings['cache_length']} cache slots, rows filled up to multiples "
        f"of {settings['row_multiple']}. One layer's share is (4 layers − 2 layers) / 2; a step of "
        f"all {settings['num_hidden_layers']} layers is extrapolated from it.\n",
        "## Launches a layer (GEMMs a layer)\n",
        *_layers(rows),
        "\n## A step\n",
        "Products: launches that read a matrix of weights. Chain: launches on the longest "
        "dependent path. Copies: copies, pads, concatenates, transposes and products spelt out, of "
        f"at least {result['smallest_kernel'] / 1e6:.1f} MB, the smallest base kernel, made of "
        "weights / cache / activations. Model: no measurement, but bytes over the device's "
        f"bandwidth and {settings['launch_us']:g} µs for every launch of the chain.\n",
        *table(_HEADS, map(_step, rows), blank=" "),
    ]
    return "\n".join(lines) + "\n"


def _layers(rows: list[Row]) -> list[str]:
    """The table of a layer's share, a line for each method."""
    shares = {(row["label"], place(row)): row["layer"] for row in rows}
    places = list(dict.fromkeys(map(place, rows)))
    labels = dict.fromkeys(row["label"] for row in rows)
    cells = [[label, *(_share(shares.get((label, one))) for one in places)] for label in labels]
    return table(["", *places], cells, blank=" ")


def _share(layer: dict[str, float] | None) -> str:
    if layer is None:
        return NONE
    return f"{shown(layer['launches'])} ({shown(layer['gemms'])})"


def _step(row: Row) -> list[str]:
    step = row["step"]
    return [
        place(row),
        row["label"],
        *(shown(step[key]) for key in ("launches", "gemms", "products", "chain")),
        f"{step['moved'] / 1e6:.0f}",
        " / ".join(shown(step[f"{kind}_copies"]) for kind in ("weight", "cache", "activation")),
        f"{row['temporary'] / 1e6:.0f}",
        str(row["graphs"]),
        f"{row['model_ms']:.3f}",
    ]
