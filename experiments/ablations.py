"""What each part of FFBA does: the groups of configs/ablations.py, run and set side by side, resumable.

    python -m experiments.ablations --groups add_set --data_dir DIR --out experiments/results/ablations

Each run leaves OUT/NAME-seedN.json as it ends and is not run again; two names of one configuration are one run. At the
end OUT.md, OUT.csv and OUT.png, of all runs that OUT holds: minutes (of a run that was resumed: of the last call),
validation loss and the loss of the reference answers on the first `--limit` test items, means over seeds with standard
errors (over seeds; with one seed over those items), and the difference to FFBA (QG-Add) by a paired bootstrap over the
items.

Checkpoints are in `--workdir`, by default runs/ablations, and for another OUT runs/ablations/FULL/PATH/OF/OUT, so that
another OUT trains anew. A run that a workdir holds finished is not trained again: its adapter is scored.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.accuracy import (
    SCHEMA_VERSION,
    item_losses,
    read_result,
    read_seeds,
    train,
    workdir_of,
)
from experiments.report import (
    about_run,
    about_runs,
    beside,
    check_data,
    differences,
    header,
    paired_bootstrap,
    spread,
    standard_error,
    with_error,
    write_csv,
)
from flora_jax.analysis.variants import trained_parameters
from flora_jax.config import adapter_config, learning_rate, names, read_config
from flora_jax.errors import CommandParser, UserError, check_writable, near_misses, run_command
from flora_jax.evaluation.task_data import Settings, load_task_data
from flora_jax.files import write_json
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.models.loading import load_config

CONFIGS = Path(__file__).parents[1] / "configs/ablations.py"
OUT = Path("experiments/results/ablations")
REFERENCE = "add_qg"


def configuration(name: str, seed: int, args: argparse.Namespace) -> Any:
    """The run of one name."""
    config = read_config(f"{CONFIGS}:{name}").unlock()
    config.model.weights = args.model
    config.data.dir = args.data_dir
    config.data.tasks = args.task
    config.data.max_length = args.max_length
    config.data.allow_contaminated = args.allow_contaminated
    config.eval.tasks = args.task  # whose records are dropped from what is trained on
    config.eval.limit = 1
    config.train.seed = seed
    config.train.steps = args.steps
    config.train.eval_every = config.train.save_every = max(1, args.steps // 2)
    config.train.log_every = max(1, args.steps // 4)
    return config


def one(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and scores one run, or reads what an earlier call has left."""
    path = args.out / f"{name}-seed{seed}.json"
    setup = configuration(name, seed, args)
    # By what it sets: two names of one run share their result, and a changed table makes its old results void.
    asked = {
        **setup.to_dict(),
        "data": {**setup.data.to_dict(), "dir": "DIR"},
        "test_items": args.limit,
    }
    if path.exists() and (differ := differences(read_result(path)["asked"], asked)):
        raise UserError(f"{path} was run with {differ}; name another --out")
    for other in [path, *sorted(args.out.glob("*.json"))]:
        if other.exists() and not differences((result := read_result(other))["asked"], asked):
            tested = {f"{args.task}/test": result["data_hash"]} if "data_hash" in result else {}
            check_data(result["data"]["sha256"] | tested, args.data_dir, other)
            print(
                f"{other} is there and is not run again; another --out runs it anew",
                file=sys.stderr,
            )
            if other != path:
                write_json(path, {**result, "name": name, "same_run_as": result["name"]})
            return {**result, "name": name}
    start, workdir = time.perf_counter(), args.workdir / f"{name}-seed{seed}"
    tasks = load_task_data(
        [args.task], args.data_dir, Settings(protocol="llm_adapters"), limit=args.limit
    )
    account, _ = train(setup, workdir)
    model, adapter = load_adapted(args.model, str(workdir / "adapter")), adapter_config(setup)
    [losses] = item_losses(model, tasks).values()
    result = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "asked": asked,
        "learning_rate": learning_rate(setup),
        "parameters": trained_parameters(load_config(args.model), adapter),
        "scale": adapter.scale,
        "trains_beside": setup.train.trainable,
        **{k: v for k, v in account.items() if k != "config"},
        "data_hash": tasks[0].data_hash,
        "reference_losses": [loss / size for loss, size in losses],
        "minutes": (time.perf_counter() - start) / 60,
        "provenance": about_run(args),
    }
    write_json(path, result)
    jax.clear_caches()
    return result


def rows(group: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A group's table: a row a name, over its seeds."""
    table = []
    for name, runs in found.items():
        test = [float(np.mean(run["reference_losses"])) for run in runs]
        row = {
            "group": group,
            "name": name,
            "parameters": runs[0]["parameters"],
            "rate": runs[0]["learning_rate"],
            "seeds": len(runs),
            "minutes": float(np.mean([run["minutes"] for run in runs])),
            "validation_loss": float(
                np.mean(
                    [min(v for k, v in r["validation_losses"].items() if k != "0") for r in runs]
                )
            ),
            "test_loss": float(np.mean(test)),
            **spread(test, standard_error(runs[0]["reference_losses"])),
        }
        table.append(row)
    return table


def write_tables(
    groups: dict[str, dict[str, list[dict[str, Any]]]], args: argparse.Namespace
) -> str:
    """OUT.md, OUT.csv and OUT.png; the Markdown."""
    reference = next((found[REFERENCE] for found in groups.values() if REFERENCE in found), None)

    def items(runs):
        return np.mean([run["reference_losses"] for run in runs], axis=0)

    made = [run for found in groups.values() for runs in found.values() for run in runs]
    tables = {group: rows(group, found) for group, found in groups.items()}
    every = [row for table in tables.values() for row in table]
    lines = [
        header("Ablations", about_runs(made, args)),
        f"{args.model}, float32, {args.task}, {args.steps} steps of 4 packed rows of {args.max_length} tokens; "
        f"test loss: of the reference answer of the first {args.limit} test items, nats a token, mean over items "
        f"(± standard error over {every[0]['stderr_over']}); "
        "minutes of training and scoring in the call that ended a run; "
        f"difference to {REFERENCE} [95 % interval, paired bootstrap over items]; rates are the method's own "
        "unless the name's configuration says another.\n",
    ]
    for group, table in tables.items():
        lines += [
            f"## {group}\n",
            "| run | parameters | rate | seeds | minutes | validation loss | test loss | difference |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in table:
            runs = groups[group][row["name"]]
            also = (
                " + " + runs[0]["trains_beside"].replace("params/.*/", "")
                if runs[0]["trains_beside"]
                else ""
            )
            difference = ""
            if reference is not None and row["name"] != REFERENCE:
                row["difference"], row["low"], row["high"] = paired_bootstrap(
                    items(runs), items(reference)
                )
                difference = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            cells = [
                row["name"],
                f"{row['parameters']:,}{also}",
                f"{row['rate']:g}",
                str(row["seeds"]),
                f"{row['minutes']:.1f}",
                f"{row['validation_loss']:.3f}",
                with_error(row["test_loss"], row["stderr"]),
                difference,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    write_csv(beside(args.out, ".csv"), every)
    text = "\n".join(lines)
    beside(args.out, ".md").write_text(text)
    plot(every, beside(args.out, ".png"))
    return text


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Each run's difference in test loss to the reference, with its interval, a panel a group."""
    from matplotlib.figure import Figure

    groups = {row["group"]: [r for r in table if r["group"] == row["group"]] for row in table}
    figure = Figure(
        figsize=(6, 0.6 + sum(0.35 + 0.24 * len(own) for own in groups.values())),
        layout="constrained",
    )
    panels = figure.subplots(
        len(groups),
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [len(own) for own in groups.values()]},
    )[:, 0]
    for panel, (group, own) in zip(panels, groups.items(), strict=True):
        for place, row in enumerate(own):
            middle = row.get("difference", 0.0)
            error = [[middle - row.get("low", 0.0)], [row.get("high", 0.0) - middle]]
            panel.errorbar(middle, place, xerr=error, fmt="o", ms=4, color="C0", capsize=2)
        panel.set_yticks(range(len(own)), [row["name"] for row in own], fontsize=8)
        panel.invert_yaxis()
        panel.axvline(0, color="0.5", lw=0.8)
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
        panel.set_title(group, fontsize=9, loc="left")
    figure.supxlabel(
        f"test loss less that of {REFERENCE}, nats a token (left is better)", fontsize=9
    )
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    """The command."""
    known = runpy.run_path(str(CONFIGS))["GROUPS"]
    parser = CommandParser(
        prog="python -m experiments.ablations", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--groups", default=",".join(known), help="comma-separated, run in this order"
    )
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--workdir",
        type=Path,
        help="default runs/ablations, for another OUT runs/ablations/FULL/PATH/OF/OUT",
    )
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="what load_pretrained takes"
    )
    parser.add_argument("--task", default="dailydialogpp")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--limit", type=int, default=200, help="test items")
    parser.add_argument(
        "--allow_contaminated",
        action="store_true",
        help="train where over 1 %% of the test is known",
    )
    args = parser.parse_args(argv[1:])
    args.workdir = args.workdir or workdir_of(args.out, OUT)
    for group in names(args.groups):
        if group not in known:
            raise UserError(f"--groups: {group!r} is unknown; {near_misses(group, known)}")
    if not names(args.groups):
        raise UserError(f"--groups {args.groups!r} names none; known: {', '.join(known)}")
    seeds = read_seeds(args.seeds)
    check_writable(beside(args.out, ".md"), "--out")
    check_writable(args.out / "add_qg-seed0.json", "--out")
    # before the first run
    load_task_data([args.task], args.data_dir, Settings(protocol="llm_adapters"), limit=args.limit)
    every = [name for group in known.values() for name in group]
    asked = [
        (name, seed) for group in names(args.groups) for name in known[group] for seed in seeds
    ]
    # What OUT holds is read before anything is trained, and stands in the tables whatever is asked for.
    ends = [path.stem.rpartition("-seed") for path in sorted(args.out.glob("*-seed*.json"))]
    recorded = [(name, int(seed)) for name, _, seed in ends if name in every and seed.isdecimal()]
    found = {run: one(*run, args) for run in recorded}
    # The reference first: every table is beside it.
    for run in sorted(
        (run for run in asked if run not in found), key=lambda run: run[0] != REFERENCE
    ):
        found[run] = one(*run, args)
        print(f"{run[0]}, seed {run[1]}: {rows('', {run[0]: [found[run]]})[0]}", file=sys.stderr)
    tables = {
        group: {name: [found[run] for run in sorted(found) if run[0] == name] for name in own}
        for group, own in known.items()
    }
    shown = {
        group: {name: runs for name, runs in table.items() if runs}
        for group, table in tables.items()
    }
    print(write_tables({group: table for group, table in shown.items() if table}, args))


if __name__ == "__main__":
    run_command(main)
