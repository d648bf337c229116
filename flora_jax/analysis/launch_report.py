"""The launches command's result as Markdown."""

from __future__ import annotations

from typing import Any

from flora_jax.analysis.results import NONE, table, versions

Row = dict[str, Any]

ATTENTION = {"kernel": "one Pallas kernel and the sum over its parts", "xla": "as XLA writes it"}
_HEADS = (
    *("", "method", "launches", "GEMMs", "products", "chain", "MB moved", "copies"),
    *("temporary MB", "graphs", "model ms"),
)


def place(row: Row) -> str:
    """What a row is planned for."""
    return f"{row['target']}, {row['mode']}, batch {row['batch']}"


def shown(value: float) -> str:
    """A count, or a share of one."""
    return f"{value:.1f}".removesuffix(".0")


def markdown(result: dict[str, Any]) -> str:
    """Launches (GEMMs) a layer of every method by target, mode and batch, then every row."""
    rows = result["rows"]
    about = result["provenance"]
    settings = result["settings"]
    lines = [
        f"# Launch plan of one decode step: {settings['preset']}\n",
        f"`{about['command']}`  ",
        f"{versions(about)}; {about['date']}\n",
        "Compiled for the device, not run on it: no autotuning (triton and cublas bracket it). "
        f"Attention: {ATTENTION[settings['attention']]}. {settings['dtype']}, rank "
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
    """The table of a layer's share, a line a method."""
    shares = {(row["label"], place(row)): row["layer"] for row in rows}
    places = list(dict.fromkeys(map(place, rows)))
    labels = dict.fromkeys(row["label"] for row in rows)
    cells = [[label, *(_share(shares.get((label, one))) for one in places)] for label in labels]
    return table(["", *places], cells, blank=" ")


def _share(layer: dict[str, float] | None) -> str:
    return f"{shown(layer['launches'])} ({shown(layer['gemms'])})" if layer else NONE


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
