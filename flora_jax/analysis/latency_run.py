"""The latency command: checks its flags, makes and times the models, writes the files."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from flora_jax.adapters import AdapterConfig, quantize_base, served_bytes
from flora_jax.analysis import comparison, timing
from flora_jax.analysis.comparison import Measurement, Size
from flora_jax.analysis.results import NONE, cell, provenance, spread, table, versions
from flora_jax.analysis.timing import Setting
from flora_jax.analysis.variants import check_served
from flora_jax.device import check_jax
from flora_jax.errors import check_writable, positive_integers, require, require_known, split_names
from flora_jax.files import keep_programs, read_json, write_result
from flora_jax.inference.decoding import bucket
from flora_jax.inference.generator import check_fits
from flora_jax.models.config import DTYPES, LlamaConfig
from flora_jax.models.llama import abstract_base, init_base
from flora_jax.models.loading import load_config, load_pretrained

if TYPE_CHECKING:
    from flora_jax.analysis.peer import Peer

SCHEMA_VERSION = 1
RESULT = "latency.json"
Row = dict[str, Any]
Sizes = dict[str, Size]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The request: an architecture, the adapter of each variant, and the settings.

    arguments: the flags as the result records them.
    """

    config: LlamaConfig
    adapters: Mapping[str, AdapterConfig | None]
    settings: list[Setting]
    arguments: dict[str, Any]


def run(args: Namespace, argv: list[str]) -> str:
    """Times the variants that the flags name, writes the files to --out and returns the tables.

    argv: the flags as given, for the record. Raises UserError as `check` does.
    """
    check_jax()
    asked = check(args)
    packages: tuple[str, ...] = ()
    if args.peer:
        from flora_jax.analysis.peer import PACKAGES, check_peer

        check_peer()
        packages = PACKAGES
    keep_programs()
    base = abstract_base(asked.config, args.dtype, args.quantization)
    sizes = comparison.sizes(asked.config, base, asked.adapters)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance("flora_jax.latency", argv, packages),
        "arguments": asked.arguments,
        "bandwidth": timing.read_bandwidth(),
        "left_out": {},
        "rows": [],
    }
    device = result["provenance"]["device"]
    _say(f"{device} reads {result['bandwidth']['gb_per_s']:.1f} GB/s")
    for name, adapter in asked.adapters.items():
        if adapter is not None:
            _say(f"{name}: rank {adapter.rank}, {sizes[name].parameters:,} parameters")
    _measure(args, asked, sizes, result)
    return (args.out / "latency.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------- the flags


def check(args: Namespace) -> Asked:
    """The request of the flags. Raises UserError before anything is compiled."""
    _check_numbers(args)
    require_known(args.dtype, DTYPES, f"--dtype {args.dtype!r}")
    methods = list(dict.fromkeys(split_names(args.methods)))
    require(methods, "--methods is empty; give names, comma-separated")
    check_served(methods, args.quantization)
    settings = [
        Setting(length, batch, args.new_tokens)
        for batch in positive_integers("--batch_sizes", args.batch_sizes)
        for length in positive_integers("--prompt_lengths", args.prompt_lengths)
    ]
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    _check_out(args.out, arguments)
    config = _architecture(args)
    _check_settings(args, config, settings)
    adapters = comparison.adapter_configs(methods, config, args.rank, args.equal_parameters)
    return Asked(config=config, adapters=adapters, settings=settings, arguments=arguments)


def _check_numbers(args: Namespace) -> None:
    for flag, least in (("rank", 1), ("rounds", 1), ("new_tokens", 2)):
        value = getattr(args, flag)
        require(value >= least, f"--{flag} {value} must be an integer of at least {least}")
    require(
        args.prefill_rounds is None or 1 <= args.prefill_rounds <= args.rounds,
        f"--prefill_rounds {args.prefill_rounds} must be from 1 to --rounds {args.rounds}",
    )
    require(
        not args.peer or args.quantization == "none",
        f"--quantization {args.quantization} does not go with --peer {args.peer}, whose base is "
        "floats; leave one out",
    )
    if args.turn_tokens is None:
        return
    require(
        1 <= args.turn_tokens < args.new_tokens,
        f"--turn_tokens {args.turn_tokens} must be from 1 to {args.new_tokens - 1}, one less "
        "than --new_tokens",
    )
    require(
        not args.peer,
        f"--turn_tokens {args.turn_tokens} does not go with --peer {args.peer}, which "
        "generates without a pause; leave one out",
    )


def _check_out(out: Path, arguments: dict[str, Any]) -> None:
    """Refuses a directory that holds anything but a result of the same command."""
    check_writable(out / RESULT, "--out")
    if not out.exists() or not any(out.iterdir()):
        return
    require(
        (out / RESULT).exists(),
        f"--out {out} is not empty and has no {RESULT}; name a new or empty directory",
    )
    before = read_json(out / RESULT).get("arguments")
    # Results older than these flags lack them.
    require(
        isinstance(before, dict)
        and {"turn_tokens": None, "quantization": "none"} | before == arguments,
        f"--out {out} holds the result of another command; name a new or empty directory",
    )


def _architecture(args: Namespace) -> LlamaConfig:
    """The architecture of --model, or of --preset for random weights."""
    require(
        args.model != "random" or args.preset,
        "--model random needs --preset, the architecture to fill with random weights",
    )
    preset = None
    if args.preset:
        preset = LlamaConfig.preset(args.preset)
    if args.model == "random":
        return preset
    config = load_config(args.model)
    require(
        not preset or _shape(preset) == _shape(config),
        f"--preset {args.preset} is another architecture than that of --model {args.model}; "
        "leave it out, it is for --model random",
    )
    return config


def _shape(config: LlamaConfig) -> tuple[Any, ...]:
    """The fields that two models of one architecture share."""
    return (
        config.widths,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.vocab_size,
        config.tie_word_embeddings,
    )


def _check_settings(args: Namespace, config: LlamaConfig, settings: list[Setting]) -> None:
    """Refuses settings that are too long for the model or too large for the device."""
    longest = max(setting.prompt_length for setting in settings)
    require(
        longest + args.new_tokens <= config.max_position_embeddings,
        f"--prompt_lengths {longest} with --new_tokens {args.new_tokens} are more than the "
        f"model's max_position_embeddings={config.max_position_embeddings}; lower one",
    )
    weights = served_bytes(abstract_base(config, args.dtype, args.quantization))
    for setting in settings:
        slots = bucket(setting.prompt_length) + args.new_tokens
        check_fits(config, setting.batch_size, slots, weights, args.dtype)


# ------------------------------------------------------------------------------ the measuring


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _measure(args: Namespace, asked: Asked, sizes: Sizes, result: dict[str, Any]) -> None:
    """Fills the result's rows, and writes it to --out after each method."""
    cells = len(asked.adapters) * len(asked.settings)
    turns = cells * args.rounds * comparison.turns(args.new_tokens, args.turn_tokens)
    start = time.perf_counter()
    quiet = not sys.stderr.isatty()
    measurements: list[Measurement] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=turns, unit="turn", dynamic_ncols=True, disable=quiet) as bar,
    ):
        base = comparison.on_disk(_weights(args, asked.config), Path(folder))
        peer = None
        if args.peer:
            peer, size = _peer(args, asked.config, base, sizes)
            sizes = sizes | {"peft": size, "peft_compiled": size}
        rounds = comparison.compare(
            asked.config,
            base,
            asked.adapters,
            asked.settings,
            args.rounds,
            args.prefill_rounds or args.rounds,
            peer,
            args.turn_tokens,
            bar.update,
        )
        for one in rounds:
            measurements.append(one)
            if peer and peer.not_compiled:
                result["left_out"]["peft_compiled"] = peer.not_compiled
            bandwidth = result["bandwidth"]["gb_per_s"]
            result["rows"] = comparison.table(measurements, sizes, bandwidth)
            row = comparison.table([one], sizes, bandwidth)[0]
            left = (time.perf_counter() - start) * (cells / len(measurements) - 1)
            _say(f"{_summary(row)}; {tqdm.format_interval(left)} left")
            if one.setting == asked.settings[-1]:
                _write(result, args.out)


def _weights(args: Namespace, config: LlamaConfig) -> dict[str, Any]:
    """The base in the split layout."""
    if args.model == "random":
        base = init_base(jax.random.key(0), config, args.dtype)
        return quantize_base(base, args.quantization)
    return load_pretrained(args.model, args.dtype, quantization=args.quantization)[1]


def _peer(
    args: Namespace, config: LlamaConfig, base: dict[str, Any], sizes: Sizes
) -> tuple[Peer, Size]:
    """PEFT's LoRA on the same base, and its size."""
    from flora_jax.analysis.peer import Peer

    rank = comparison.rank_beside_ffba("lora", config, args.rank, args.equal_parameters)
    peer = Peer(config, base, rank)
    read = sizes[comparison.REFERENCE].read_bytes + peer.parameters * jnp.dtype(args.dtype).itemsize
    return peer, Size(rank, peer.parameters, read)


def _summary(row: dict[str, Any]) -> str:
    """A row as a line."""
    return (
        f"{row['method']}, prompt {row['prompt_length']}, batch {row['batch_size']}: TTFT "
        f"{1e3 * row['ttft']['median']:.1f} ms, TPOT {1e3 * row['tpot']['median']:.2f} ms, "
        f"{row['tpot_ratio']['median']:.3f} of the base's"
    )


def _write(result: dict[str, Any], out: Path) -> None:
    write_result(out / RESULT, result, f"--out {out}")
    (out / "latency.md").write_text(markdown(result), encoding="utf-8")
    for suffix in ("png", "pdf"):
        plot(result, out / f"latency.{suffix}")


# ------------------------------------------------------------------------------ the files


_NO_CLAIM = {"less_than_lora": None, "overhead_removed": None}


def markdown(result: dict[str, Any]) -> str:
    """The tables of a `latency.json`: for each setting the times, then each method's savings over
    LoRA."""
    about = result["provenance"]
    lines = [
        "# Time to first token (TTFT) and per output token (TPOT)\n",
        f"`{about['command']}`  ",
        f"{about['device']}; {versions(about)}; {about['date']}; load average at the start "
        f"{about['load_average']:.2f}\n",
        _how(result["arguments"], result["bandwidth"]) + "\n",
        *(
            f"{name}: not timed, torch could not compile it ({why}).\n"
            for name, why in result["left_out"].items()
        ),
    ]
    for rows in by_setting(result["rows"]):
        lines.append(f"## {_title(rows[0])}\n")
        lines += _times(rows)
        if any(row["beside"] for row in rows):
            lines += ["", *_savings(rows)]
        lines.append("")
    return "\n".join(lines)


def _how(arguments: dict[str, Any], memory: dict[str, Any]) -> str:
    """How the times were taken, and the meaning of the columns."""
    model = arguments["preset"] or arguments["model"]
    if arguments["model"] == "random":
        model += " at random"
    dtype = arguments["dtype"]
    quantization = arguments.get("quantization", "none")
    if quantization != "none":
        dtype += f", kernels in {quantization}"
    ranks = "all at the rank of"
    if arguments["equal_parameters"]:
        ranks = "each method at the rank nearest to"
    tokens = f"{arguments['new_tokens']} new tokens"
    if arguments.get("turn_tokens"):
        tokens += f", {arguments['turn_tokens']} at a turn"
    readers = "the device"
    if memory["threads"]:
        readers = f"{memory['threads']} threads"
    return (
        f"{model}, {dtype}; {ranks} ffba at rank {arguments['rank']}; {arguments['rounds']} "
        f"rounds, {tokens}. Medians [quartiles]; ratios are to the base "
        "with four merged products a layer, run in the same round (the row `base` is that base "
        "beside itself: the noise). bytes: weights that a decode step reads, over the base's. "
        f"bandwidth: those bytes over TPOT, as a share of {memory['gb_per_s']:.1f} GB/s, the best "
        f"of {len(memory['runs_gb_per_s'])} reads of {memory['bytes'] / 1e9:.1f} GB by {readers}. "
        "compile: of the decode loop, (c) from the persistent cache."
    )


def by_setting(rows: list[Row]) -> list[list[Row]]:
    """The rows grouped by prompt length and batch size, in the order of their first ones."""
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
    """A table with two columns for each baseline, one a reading of the paper's claim, and one
    column for each peer."""
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
    """Draws the ratios to the merged base to `path`, a panel for each setting; the suffix sets the
    format."""
    from matplotlib.figure import Figure

    groups = by_setting(result["rows"])
    lengths = list(dict.fromkeys(rows[0]["prompt_length"] for rows in groups))
    batches = list(dict.fromkeys(rows[0]["batch_size"] for rows in groups))
    names = list(dict.fromkeys(row["method"] for row in result["rows"]))
    # Without pyplot there is no global state and no window system.
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
    """Draws the panel of a setting, a line for each name."""
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
