"""The latency command's result as Markdown and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flora_jax.analysis.markdown import NONE, cell, spread, table
from flora_jax.analysis.provenance import versions

Row = dict[str, Any]

_NO_CLAIM = {"less_than_lora": None, "overhead_removed": None}


def markdown(result: dict[str, Any]) -> str:
    """The tables of a `latency.json`: for each setting the times, then what each method saves of
    LoRA's."""
    about = result["provenance"]
    lines = [
        "# Time to first token (TTFT) and per output token (TPOT)\n",
        f"`{about['command']}`  ",
        f"{about['device']}; {versions(about)}; {about['date']}; load average at the start "
        f"{about['load_average']:.2f}\n",
        _how(result["arguments"], result["bandwidth"]) + "\n",
    ]
    lines += [
        f"{name}: not timed, torch could not compile it ({why}).\n"
        for name, why in result["left_out"].items()
    ]
    for rows in by_setting(result["rows"]):
        lines.append(f"## {_title(rows[0])}\n")
        lines += _times(rows)
        if any(row["beside"] for row in rows):
            lines += ["", *_savings(rows)]
        lines.append("")
    return "\n".join(lines)


def _how(arguments: dict[str, Any], memory: dict[str, Any]) -> str:
    """How the times were taken, and what the columns mean."""
    weights = " at random" if arguments["model"] == "random" else ""
    ranks = "all at the rank of"
    if arguments["equal_parameters"]:
        ranks = "each method at the rank nearest to"
    turn = f", {arguments['turn_tokens']} at a turn" if arguments.get("turn_tokens") else ""
    readers = f"{memory['threads']} threads" if memory["threads"] else "the device"
    return (
        f"{arguments['preset'] or arguments['model']}{weights}, {arguments['dtype']}; {ranks} ffba "
        f"at rank {arguments['rank']}; {arguments['rounds']} rounds, "
        f"{arguments['new_tokens']} new tokens{turn}. Medians [quartiles]; ratios are to the base "
        "with four merged products a layer, run in the same round (the row `base` is that base "
        "beside itself: the noise). bytes: weights that a decode step reads, over the base's. "
        f"bandwidth: those bytes over TPOT, as a share of {memory['gb_per_s']:.1f} GB/s, the best "
        f"of {len(memory['runs_gb_per_s'])} reads of {memory['bytes'] / 1e9:.1f} GB by {readers}. "
        "compile: of the decode loop, (c) from the persistent cache."
    )


def by_setting(rows: list[Row]) -> list[list[Row]]:
    """The rows of each prompt length and batch size, in the order of their first."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["prompt_length"], row["batch_size"]), []).append(row)
    return list(groups.values())


def _title(row: Row) -> str:
    return f"prompt {row['prompt_length']}, batch {row['batch_size']}"


def _times(rows: list[Row]) -> list[str]:
    heads = [
        "",
        "rank",
        "parameters",
        "TTFT ms",
        "ratio",
        "TPOT ms",
        "ratio",
        "bytes",
        "tokens/s",
        "bandwidth",
        "compile s",
    ]
    cells = [
        [
            row["method"],
            str(row["rank"] or NONE),
            cell(row["parameters"] or None, ","),
            spread(row["ttft"], ".1f", 1e3),
            spread(row["ttft_ratio"]),
            spread(row["tpot"], ".2f", 1e3),
            spread(row["tpot_ratio"]),
            f"{row['bytes_ratio']:.3f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['bandwidth_share']:.0%}",
            cell(row["compile_seconds"], ".1f") + " (c)" * bool(row["compile_cached"]),
        ]
        for row in rows
    ]
    return table(heads, cells)


def _savings(rows: list[Row]) -> list[str]:
    """Two columns a baseline, one for each reading of the paper's claim, and one a peer."""
    names = [row["method"] for row in rows]
    baselines, peers = (
        [name for name in names if any(name in row[field] for row in rows)]
        for field in ("beside", "tpot_over_peer")
    )
    heads = ["TPOT"]
    for name in baselines:
        heads += [f"less than {name}", f"of {name}'s overhead removed"]
    heads += [f"over {name}, same rounds" for name in peers]
    return table(
        heads,
        [
            _saved(row, baselines, peers)
            for row in rows
            if row["beside"] and row["compile_seconds"] is not None
        ],
    )


def _saved(row: Row, baselines: list[str], peers: list[str]) -> list[str]:
    cells = [row["method"]]
    for name in baselines:
        claim = row["beside"].get(name, {}).get("tpot", _NO_CLAIM)
        cells += [cell(value, ".1%") for value in claim.values()]
    return cells + [spread(row["tpot_over_peer"][name]) for name in peers]


def plot(result: dict[str, Any], path: Path) -> None:
    """The ratios to the merged base, a panel a setting, to `path` (its suffix tells the format)."""
    from matplotlib.figure import Figure

    groups = by_setting(result["rows"])
    lengths = list(dict.fromkeys(rows[0]["prompt_length"] for rows in groups))
    batches = list(dict.fromkeys(rows[0]["batch_size"] for rows in groups))
    names = list(dict.fromkeys(row["method"] for row in result["rows"]))
    # A Figure of its own: no global state, and no window system.
    figure = Figure(
        figsize=(1.2 + 3.4 * len(lengths), 0.9 + (0.5 + 0.24 * len(names)) * len(batches)),
        layout="constrained",
    )
    panels = figure.subplots(len(batches), len(lengths), sharex=True, sharey=True, squeeze=False)
    for rows in groups:
        place = batches.index(rows[0]["batch_size"]), lengths.index(rows[0]["prompt_length"])
        _draw(panels[place], rows, names)
    panels[0][0].invert_yaxis()
    figure.supxlabel("ratio to the merged base, median and quartiles", fontsize=9)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=200)


def _draw(panel: Any, rows: list[Row], names: list[str]) -> None:
    """A setting's panel, a line a name."""
    places = [names.index(row["method"]) for row in rows]
    panel.axvline(1, color="0.6", linewidth=0.8)
    for what, shift, style in (
        ("tpot", -0.14, {"color": "C0"}),
        ("ttft", 0.14, {"color": "C1", "markerfacecolor": "white"}),
    ):
        ratios = [row[f"{what}_ratio"] for row in rows]
        reach = [[abs(r["median"] - r["quartiles"][side]) for r in ratios] for side in (0, 1)]
        panel.errorbar(
            [r["median"] for r in ratios],
            [p + shift for p in places],
            xerr=reach,
            fmt="o",
            markersize=4,
            elinewidth=1,
            label=what.upper(),
            **style,
        )
    bytes_read = [row["bytes_ratio"] for row in rows]
    panel.plot(bytes_read, places, "|", color="black", markersize=11, label="bytes")
    panel.set_title(_title(rows[0]), fontsize=9)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(axis="x", color="0.92")
    panel.set_axisbelow(True)
