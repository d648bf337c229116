"""The tables and the figure of experiments/accuracy.py, from all results in OUT/SUITE."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import paired_bootstrap, spread, stored, with_error, write_csv
from experiments.suites import ARMS, PROFILES
from experiments.sweep import Result, best_loss
from flora_jax.analysis.results import about_runs, header, interval, table
from flora_jax.data import CONTAMINATED
from flora_jax.files import read_json

Row = dict[str, Any]
ByArm = dict[str, list[Result]]


def metrics(scores: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task that the tables show."""
    shown = ("accuracy", "rouge1", "rouge2", "rougeL", "rougeLsum", "reference_loss")
    return {name: scores[name] for name in shown if name in scores}


def rows(by_arm: ByArm) -> list[Row]:
    """One row for each method, task and metric."""
    found = []
    for arm, own in by_arm.items():
        minutes = float(np.mean([run["minutes"] for run in own]))
        for task in own[0]["evaluation"]["tasks"]:
            scores = [run["evaluation"]["tasks"][task] for run in own]
            for name in metrics(scores[0]):
                values = [one[name] for one in scores]
                error = scores[0].get("stderr" if name == "accuracy" else f"{name}_stderr")
                found.append(
                    {
                        "method": arm,
                        "task": task,
                        "metric": name,
                        "mean": float(np.mean(values)),
                        **spread(values, error),
                        "seeds": len(values),
                        "minutes": minutes,
                    }
                )
    return found


def pairs(by_arm: ByArm) -> list[Row]:
    """One row for every two methods, task and metric: their difference, with the 95 % interval of a
    paired bootstrap over items.

    Metrics are accuracy (rougeL for texts) and the reference loss, where runs have them by item.
    """
    found = []
    for task, scores in next(iter(by_arm.values()))[0]["evaluation"]["tasks"].items():
        score = "accuracy" if "accuracy" in scores else "rougeL"
        for metric, column in ((score, "items"), ("reference_loss", "reference_losses")):
            found += _pairs_of(by_arm, task, metric, column)
    return found


def _pairs_of(by_arm: ByArm, task: str, metric: str, column: str) -> list[Row]:
    """The pairs of one task and metric, whose values by item are in `column`."""
    items = {}
    sizes = {}
    for arm, runs in by_arm.items():
        own = [run["evaluation"]["tasks"][task] for run in runs]
        if all(column in one for one in own):
            items[arm] = np.mean([one[column] for one in own], axis=0)
            if metric == "reference_loss":
                sizes[arm] = np.array(own[0]["reference_tokens"])
    found = []
    for beside, arm in itertools.permutations(items, 2):
        difference, low, high = paired_bootstrap(items[arm], items[beside], sizes.get(arm))
        place = {"method": arm, "beside": beside, "task": task, "metric": metric}
        found.append({**place, "difference": difference, "low": low, "high": high})
    return found


def write_tables(args: argparse.Namespace) -> str:
    """Writes the tables and the figure of all results in OUT/SUITE; returns the Markdown."""
    runs = [read_json(path) for path in sorted((args.out / args.suite).glob("*.json"))]
    with stored(args.out / args.suite):
        return _write_tables(args, runs)


def _write_tables(args: argparse.Namespace, runs: list[Result]) -> str:
    by_arm = {arm: own for arm in ARMS if (own := [run for run in runs if run["arm"] == arm])}
    means = rows(by_arm)
    differ = pairs(by_arm)
    beside = [row for row in differ if row["beside"] == "lora"]
    write_csv(args.out / f"{args.suite}.csv", means)
    write_csv(args.out / f"{args.suite}_pairs.csv", differ)
    lines = [
        header(f"Suite {args.suite}", about_runs(runs, args)),
        _how(runs[0], means),
        *_means(by_arm, means),
        *_contamination(runs),
        "",
        *_beside_lora(beside),
    ]
    text = "\n".join(lines) + "\n"
    (args.out / f"{args.suite}.md").write_text(text)
    plot(by_arm, beside, args.out / f"{args.suite}.png")
    return text


def _how(run: Result, means: list[Row]) -> str:
    """What was trained and tested, and what the columns mean."""
    asked = run["asked"]
    profile = PROFILES[asked.get("profile", "cpu")]
    units = {row["stderr_over"] for row in means}
    over = " or, of one seed, ".join(f"over {unit}" for unit in ("seeds", "items") if unit in units)
    return (
        f"{asked['model']}, {profile.dtype}, {asked['steps']} steps; first {asked['limit']} test "
        f"items a task, protocol {run['evaluation']['protocol']}; means over seeds (± standard "
        f"error {over}; the reference loss has none over items); minutes of training and scoring "
        "in the call that ended a run.\n"
    )


def _means(by_arm: ByArm, means: list[Row]) -> list[str]:
    """The table of scores, one line for each method."""
    columns = _columns(means)
    cells = {(row["method"], row["task"], row["metric"]): row for row in means}
    heads = ["method", "rank", "parameters", "rate", "seeds", "minutes", "validation loss"]
    heads += [" ".join(column) for column in columns]
    lines = []
    for arm, own in by_arm.items():
        scores = [cells[arm, *column] for column in columns]
        lines.append(
            [
                *_about_arm(arm, own[0]),
                str(len(own)),
                f"{scores[0]['minutes']:.1f}",
                _validation(own),
                *(with_error(one["mean"], one["stderr"]) for one in scores),
            ]
        )
    return table(heads, lines)


def _about_arm(arm: str, run: Result) -> list[str]:
    """The arm, its rank, parameters and rate."""
    rate = f"{run['learning_rate']:g}" if "rank" in run else ""
    if run.get("parameters"):
        return [arm, str(run["rank"]), f"{run['parameters']:,}", rate]
    return [arm, "", "all" if arm == "fft" else "", rate]


def _validation(runs: list[Result]) -> str:
    losses = [best_loss(run) for run in runs if "step" in run]
    return f"{np.mean(losses):.3f}" if losses else ""


def _columns(found: list[Row]) -> list[tuple[str, str]]:
    """The tasks and metrics of the rows."""
    return list(dict.fromkeys((row["task"], row["metric"]) for row in found))


def _contamination(runs: list[Result]) -> list[str]:
    """Says which tests the training data held much of."""
    overlaps = {
        task: share
        for run in runs
        if "data" in run
        for task, share in run["data"]["share_of_test_in_train"].items()
        if share > CONTAMINATED
    }
    if not overlaps:
        return []
    shares = ", ".join(f"{100 * share:.0f} % of {task}" for task, share in overlaps.items())
    return [
        "",
        f"Contaminated: the training data held {shares} (word for word; those records were "
        "dropped).",
    ]


def _beside_lora(beside: list[Row]) -> list[str]:
    columns = _columns(beside)
    if not columns:
        return []
    cells = {
        (row["method"], row["task"], row["metric"]): interval(
            row["difference"], row["low"], row["high"], "+.3f"
        )
        for row in beside
    }
    arms = dict.fromkeys(row["method"] for row in beside)
    return [
        "Paired bootstrap over test items (means over seeds): difference to lora [95 % interval]; "
        "it says nothing of the spread over seeds.",
        "",
        *table(
            ["method", *(" ".join(column) for column in columns)],
            ([arm, *(cells.get((arm, *column), "") for column in columns)] for arm in arms),
        ),
    ]


# -------------------------------------------------------------------------------- the figure


def plot(by_arm: ByArm, beside: list[Row], path: Path) -> None:
    """Draws the validation losses, one line for each seed (left), and each task's score less lora's
    with its interval (right)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {arm: f"C{place}" for place, arm in enumerate(ARMS)}
    for arm, runs in by_arm.items():
        _draw_losses(left, arm, runs, colors[arm])
    left.set(xlabel="step", ylabel="validation loss, nats a token")
    tasks = list(next(iter(by_arm.values()))[0]["evaluation"]["tasks"])
    _draw_differences(right, beside, tasks, colors)
    for panel in (left, right):
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _draw_losses(panel: Any, arm: str, runs: list[Result], color: str) -> None:
    for number, run in enumerate(runs):
        if "step" not in run:
            continue
        steps = [int(step) for step in run["validation_losses"]]
        losses = list(run["validation_losses"].values())
        label = None if number else arm
        panel.plot(steps, losses, marker="o", ms=3, color=color, label=label)


def _draw_differences(
    panel: Any, beside: list[Row], tasks: list[str], colors: dict[str, str]
) -> None:
    others = list(dict.fromkeys(row["method"] for row in beside))
    for row in (row for row in beside if row["metric"] != "reference_loss"):
        line = tasks.index(row["task"])
        middle = row["difference"]
        panel.errorbar(
            middle,
            line + 0.8 * ((others.index(row["method"]) + 0.5) / len(others) - 0.5),
            xerr=[[middle - row["low"]], [row["high"] - middle]],
            fmt="o",
            ms=3,
            color=colors[row["method"]],
            label=None if line else row["method"],
        )
    panel.set_yticks(range(len(tasks)), tasks)
    panel.invert_yaxis()
    panel.axvline(0, color="0.5", lw=0.8)
    panel.set_xlabel("score less lora's, 95 % of a paired bootstrap")
