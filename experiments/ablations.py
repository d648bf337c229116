"""What each part of FFBA does: trains the groups of configs/ablations.py and compares them.

    python -m experiments.ablations --groups add_set --data_dir DIR \
        --out experiments/results/ablations

Each run writes OUT/NAME-seedN.json when it ends and is not run again. Two names of the same
configuration share one run. OUT.md, OUT.csv and OUT.png then show all runs in OUT: minutes (of a
resumed run: of its last call), validation loss, and the loss of the reference answers on the first
`--limit` test items. These are means over seeds, with standard errors over seeds (with one seed:
over the items). Differences to FFBA (QG-Add) have intervals from a paired bootstrap over the items.

Checkpoints are in `--workdir`: by default runs/ablations, and for another OUT
runs/ablations/FULL/PATH/OF/OUT, so another OUT trains anew. A run that its workdir holds finished
is only scored.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.flags import Flags, parse
from experiments.report import (
    beside,
    check_data,
    differences,
    paired_bootstrap,
    spread,
    standard_error,
    with_error,
    write_csv,
)
from experiments.sweep import (
    SCHEMA_VERSION,
    Arm,
    Result,
    best_loss,
    check_names,
    item_losses,
    outcomes,
    placeless,
    read_result,
    read_seeds,
    say_found,
    train,
    workdir_of,
)
from flora_jax.analysis.results import about_runs, header, interval, table
from flora_jax.analysis.variants import trained_parameters
from flora_jax.config import adapter_config, learning_rate
from flora_jax.config_files import read_config
from flora_jax.errors import UserError, check_writable, run_command
from flora_jax.evaluation.task_data import Settings, load_task_data
from flora_jax.files import write_json
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.models.loading import load_config

CONFIGS = Path(__file__).parents[1] / "configs/ablations.py"
OUT = Path("experiments/results/ablations")
REFERENCE = "add_qg"

Row = dict[str, Any]
Groups = dict[str, dict[str, list[Result]]]  # group -> name -> runs

FLAGS: Flags = {
    "--groups": dict(help="of configs/ablations.py, comma-separated, in this order; default all"),
    "--data_dir": dict(required=True),
    "--out": dict(type=Path, default=OUT),
    "--workdir": dict(
        type=Path, help="default runs/ablations, for another OUT runs/ablations/FULL/PATH/OF/OUT"
    ),
    "--model": dict(default="smollm2-135m-instruct", help="what load_pretrained takes"),
    "--task": dict(default="dailydialogpp"),
    "--max_length": dict(type=int, default=256),
    "--seeds": dict(default="0", help="comma-separated"),
    "--steps": dict(type=int, default=80),
    "--limit": dict(type=int, default=200, help="test items"),
    "--allow_contaminated": dict(
        action="store_true", help="train on data that holds over 1 %% of the test"
    ),
}


def configuration(name: str, seed: int, args: argparse.Namespace) -> Any:
    """The configuration of one run."""
    config = read_config(f"{CONFIGS}:{name}").unlock()
    config.model.weights = args.model
    config.data.dir = args.data_dir
    config.data.tasks = args.task
    config.data.max_length = args.max_length
    config.data.allow_contaminated = args.allow_contaminated
    config.eval.tasks = args.task  # its records are dropped from the training data
    config.eval.limit = 1
    config.train.seed = seed
    config.train.steps = args.steps
    config.train.eval_every = config.train.save_every = max(1, args.steps // 2)
    config.train.log_every = max(1, args.steps // 4)
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Arm):
    """A name of configs/ablations.py at a seed."""

    ablation: str
    seed: int

    def setup(self) -> Any:
        """The configuration."""
        return configuration(self.ablation, self.seed, self.args)

    @property
    def asked(self) -> dict[str, Any]:
        """What the run computes, whatever its name. Names that agree in it share a result; a stored
        result that differs is refused."""
        return {**placeless(self.setup()), "test_items": self.args.limit}

    def find(self) -> Result | None:
        asked = self.asked
        if self.path.exists() and (differ := differences(read_result(self.path)["asked"], asked)):
            raise UserError(f"{self.path} was run with {differ}; name another --out")
        for other in [self.path, *sorted(self.args.out.glob("*.json"))]:
            if other.exists() and not differences((result := read_result(other))["asked"], asked):
                return self._shared(other, result)
        return None

    def _shared(self, other: Path, result: Result) -> Result:
        """The result in `other`, of the same run, under this run's name."""
        hashes = dict(result["data"]["sha256"])
        if "data_hash" in result:
            hashes[f"{self.args.task}/test"] = result["data_hash"]
        check_data(hashes, self.args.data_dir, other)
        say_found(other)
        own = {**result, "name": self.ablation}
        if other != self.path:
            write_json(self.path, {**own, "same_run_as": result["name"]})
        return own

    def make(self, workdir: Path) -> Result:
        args = self.args
        setup = self.setup()
        tasks = load_tasks(args)
        account, _ = train(setup, workdir)
        model = load_adapted(args.model, str(workdir / "adapter"))
        adapter = adapter_config(setup)
        [losses] = item_losses(model, tasks).values()
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.ablation,
            "asked": self.asked,
            "learning_rate": learning_rate(setup),
            "parameters": trained_parameters(load_config(args.model), adapter),
            "scale": adapter.scale,
            "trains_beside": setup.train.trainable,
            **{k: v for k, v in account.items() if k != "config"},
            "data_hash": tasks[0].data_hash,
            "reference_losses": [loss / size for loss, size in losses],
        }


def load_tasks(args: argparse.Namespace) -> Any:
    """The test items."""
    return load_task_data(
        [args.task], args.data_dir, Settings(protocol="llm_adapters"), limit=args.limit
    )


def arms(wanted: Sequence[tuple[str, int]], args: argparse.Namespace) -> Iterator[Run]:
    """The runs of names and seeds."""
    for ablation, seed in wanted:
        name = f"{ablation}-seed{seed}"
        path = args.out / f"{name}.json"
        yield Run(name=name, path=path, args=args, ablation=ablation, seed=seed)


def rows(group: str, found: dict[str, list[Result]]) -> list[Row]:
    """A group's table: one row for each name, over its seeds."""
    table = []
    for name, runs in found.items():
        test = [float(np.mean(run["reference_losses"])) for run in runs]
        table.append(
            {
                "group": group,
                "name": name,
                "parameters": runs[0]["parameters"],
                "rate": runs[0]["learning_rate"],
                "seeds": len(runs),
                "minutes": float(np.mean([run["minutes"] for run in runs])),
                "validation_loss": float(np.mean([best_loss(run) for run in runs])),
                "test_loss": float(np.mean(test)),
                **spread(test, standard_error(runs[0]["reference_losses"])),
            }
        )
    return table


def write_tables(groups: Groups, args: argparse.Namespace) -> str:
    """Writes OUT.md, OUT.csv and OUT.png; returns the Markdown."""
    made = [run for found in groups.values() for runs in found.values() for run in runs]
    tables = {group: rows(group, found) for group, found in groups.items()}
    every = [row for own in tables.values() for row in own]
    _compare(groups, every)
    lines = [
        header("Ablations", about_runs(made, args)),
        f"{args.model}, float32, {args.task}, {args.steps} steps of 4 packed rows of "
        f"{args.max_length} tokens; test loss: of the reference answer of the first {args.limit} "
        "test items, nats a token, mean over items (± standard error over "
        f"{every[0]['stderr_over']}); minutes of training and scoring in the call that ended a "
        f"run; difference to {REFERENCE} [95 % interval, paired bootstrap over items]; rates are "
        "the method's own unless the name's configuration says another.\n",
    ]
    heads = ["run", "parameters", "rate", "seeds", "minutes", "validation loss", "test loss"]
    heads.append("difference")
    for group, own in tables.items():
        cells = [_cells(row, groups[group][row["name"]][0]) for row in own]
        lines += [f"## {group}\n", *table(heads, cells), ""]
    write_csv(beside(args.out, ".csv"), every)
    text = "\n".join(lines)
    beside(args.out, ".md").write_text(text)
    plot(every, beside(args.out, ".png"))
    return text


def _compare(groups: Groups, table: list[Row]) -> None:
    """Adds to each row its difference to the reference, if that was run."""
    runs = {name: runs for found in groups.values() for name, runs in found.items()}
    if REFERENCE not in runs:
        return
    items = {
        name: np.mean([run["reference_losses"] for run in own], axis=0)
        for name, own in runs.items()
    }
    for row in table:
        if row["name"] != REFERENCE:
            found = paired_bootstrap(items[row["name"]], items[REFERENCE])
            row["difference"], row["low"], row["high"] = found


def _cells(row: Row, run: Result) -> list[str]:
    also = ""
    if run["trains_beside"]:
        also = " + " + run["trains_beside"].replace("params/.*/", "")
    difference = ""
    if "difference" in row:
        difference = interval(row["difference"], row["low"], row["high"], "+.3f")
    return [
        row["name"],
        f"{row['parameters']:,}{also}",
        f"{row['rate']:g}",
        str(row["seeds"]),
        f"{row['minutes']:.1f}",
        f"{row['validation_loss']:.3f}",
        with_error(row["test_loss"], row["stderr"]),
        difference,
    ]


def plot(table: list[Row], path: Path) -> None:
    """Draws each name's difference in test loss to the reference, one panel for each group."""
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


def recorded(known: Sequence[str], args: argparse.Namespace) -> list[tuple[str, int]]:
    """The names and seeds of the results in OUT."""
    ends = [path.stem.rpartition("-seed") for path in sorted(args.out.glob("*-seed*.json"))]
    return [(name, int(seed)) for name, _, seed in ends if name in known and seed.isdecimal()]


def main(argv: list[str]) -> None:
    """The command."""
    known = runpy.run_path(str(CONFIGS))["GROUPS"]
    args = parse(argv, "python -m experiments.ablations", __doc__, FLAGS)
    args.workdir = args.workdir or workdir_of(args.out, OUT)
    if args.groups is None:
        args.groups = ",".join(known)
    groups = check_names("--groups", args.groups, known)
    seeds = read_seeds(args.seeds)
    check_writable(beside(args.out, ".md"), "--out")
    check_writable(args.out / f"{REFERENCE}-seed0.json", "--out")
    load_tasks(args)  # so that an error in them comes first
    # Old results are checked before anything is trained, and are in the tables, asked for or not.
    there = recorded([name for group in known.values() for name in group], args)
    found = {(run.ablation, run.seed): result for run, result in outcomes(arms(there, args))}
    asked = [(name, seed) for group in groups for name in known[group] for seed in seeds]
    missing = [run for run in asked if run not in found]
    missing.sort(key=lambda run: run[0] != REFERENCE)  # every table needs it
    for run, result in outcomes(arms(missing, args)):
        found[run.ablation, run.seed] = result
        row = rows("", {run.ablation: [result]})[0]
        print(f"{run.ablation}, seed {run.seed}: {row}", file=sys.stderr)
    print(write_tables(_grouped(known, found), args))


def _grouped(known: dict[str, Any], found: dict[tuple[str, int], Result]) -> Groups:
    """The results by group and name, in the order of the groups and of the seeds."""
    by_name: dict[str, list[Result]] = {}
    for name, seed in sorted(found):
        by_name.setdefault(name, []).append(found[name, seed])
    groups = {
        group: {name: by_name[name] for name in own if name in by_name}
        for group, own in known.items()
    }
    return {group: own for group, own in groups.items() if own}


if __name__ == "__main__":
    run_command(main)
