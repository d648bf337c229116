"""The paper's suites: every method trained at equal parameters on real data and scored, over seeds, resumable.

    python -m experiments.accuracy --suite dialogue --data_dir DIR --out experiments/results/accuracy

Runs are methods x seeds; each leaves one JSON in OUT/SUITE as it ends, with its configuration, data hashes, loss curve,
scores and time. A run whose JSON is there is not run again, one that was killed goes on from its checkpoint. At the end
OUT/SUITE.md and .csv: means over seeds with standard errors (over seeds; with one seed over the test items), minutes
(of a run that was resumed: of the last call), and every method beside lora by a paired bootstrap over the test items
(every two methods: OUT/SUITE_pairs.csv); OUT/SUITE.png draws them. pf_lora and parallel are lora and fpa under other
names and are not run. All have the parameters of ffba at `--rank` as nearly as their ranks allow, zflora at the ranks
on either side.

Checkpoints are in `--workdir`, by default runs/accuracy, and for another OUT runs/accuracy/FULL/PATH/OF/OUT, so that
another OUT trains anew. A run that a workdir holds finished is not trained again: its adapter is scored.

A method's rate is chosen once, by `--rate_steps N` in whichever suite comes first: OUT/rates/METHOD.json has the
validation losses of the grid, and every later run of the method takes its best. Without that file: the method's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.report import (
    about_run,
    about_runs,
    check_data,
    differences,
    header,
    paired_bootstrap,
    spread,
    with_error,
    write_csv,
)
from flora_jax.adapters import AdapterConfig
from flora_jax.analysis.variants import rank_for, trained_parameters
from flora_jax.config import LEARNING_RATES, get_config, names
from flora_jax.data import CONTAMINATED, get_task, load_examples
from flora_jax.errors import CommandParser, UserError, check_writable, near_misses, run_command
from flora_jax.evaluation.loglik import choice_loglik, encode_pair
from flora_jax.evaluation.run import evaluate_tasks
from flora_jax.evaluation.task_data import Settings, TaskData, load_task_data
from flora_jax.files import read_json, write_json
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.models.loading import load_config
from flora_jax.train import run

SCHEMA_VERSION = 1
OUT = Path("experiments/results/accuracy")
# What is compared, in the order of running: the method, and the side of the budget that its rank is on.
ARMS = {
    "base": (None, "nearest"),
    "lora": ("lora", "nearest"),
    "ffba_qg_add": ("ffba_qg_add", "nearest"),
    "zflora_above": ("zflora", "above"),
    "fft": ("fft", "nearest"),
    "ffba": ("ffba", "nearest"),
    "fpa": ("fpa", "nearest"),
    "ffa": ("ffa", "nearest"),
    "zflora_below": ("zflora", "below"),
}
_EVAL_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is trained on and tested on, how answers are read, and how long a row and a run are."""

    train: tuple[str, ...]
    tests: tuple[str, ...]
    protocol: str
    max_length: int
    steps: int
    batch_size: int


SUITES = {
    "commonsense": Suite(
        ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq"),
        ("ARC-Easy", "openbookqa", "boolq", "piqa", "social_i_qa", "hellaswag"),
        "llm_adapters",
        256,
        200,
        4,
    ),
    "math": Suite(
        ("gsm8k", "mawps"),
        ("AddSub", "MultiArith", "SingleEq", "gsm8k", "AQuA"),
        "llm_adapters",
        384,
        150,
        4,
    ),
    "dialogue": Suite(("dailydialogpp",), ("dailydialogpp",), "llm_adapters", 256, 150, 4),
    "summary": Suite(("dialogsum",), ("dialogsum",), "llm_adapters", 512, 120, 2),
}


def configuration(
    suite: Suite, method: str, rank: int, rate: float, seed: int, args: argparse.Namespace
) -> Any:
    """The configuration of one run."""
    config = get_config("smollm2-135m" if args.preset is None else args.preset, method)
    config.model.weights = args.model
    config.adapter.rank = rank
    config.data.tasks = ",".join(suite.train)
    config.data.dir = args.data_dir
    config.data.max_length = suite.max_length
    config.data.validation_size = args.validation_size
    config.data.allow_contaminated = args.allow_contaminated
    config.train.seed = seed
    config.train.steps = args.steps or suite.steps
    config.train.batch_size = suite.batch_size
    config.train.eval_every = config.train.save_every = max(1, config.train.steps // 3)
    config.train.log_every = max(1, config.train.steps // 8)
    config.optim.learning_rate = rate
    config.eval.tasks = ",".join(suite.tests)  # whose records are dropped from what is trained on
    config.eval.protocol = suite.protocol
    config.eval.limit = args.limit
    config.eval.batch_size = _EVAL_BATCH
    config.eval.max_length = suite.max_length + 256
    return config


def choose_rate(
    suite: Suite, method: str, rank: int, args: argparse.Namespace
) -> tuple[float, dict[str, float]]:
    """The method's rate, and the validation loss of each rate that was tried for it (none: the method's own rate).

    Rates are tried with `--rate_steps` steps where that is given and none of the method's is on record yet: a grid over
    two decades around its own; a winner at the edge extends it, one at which the loss is no number has lost."""
    own, losses = LEARNING_RATES[method], {}
    path = args.out / "rates" / f"{method}.json"
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": args.model,
        "suite": args.suite,
        "rank": rank,
        "steps": args.rate_steps,
    }
    if path.exists():
        found = read_json(path)
        if (model := found.get("model")) != args.model:
            raise UserError(
                f"{path} has the rate for --model {model}, not {args.model}; name another --out"
            )
        other = [field for field in ("suite", "rank", "steps") if found.get(field) != record[field]]
        if args.rate_steps and not found.get("chosen") and other:
            raise UserError(
                f"{path} holds an unfinished search at {other[0]}={found.get(other[0])!r}, not "
                f"{record[other[0]]!r}; let it end, or delete it"
            )
        record = found
        losses = {
            float(rate): math.inf if loss is None else loss
            for rate, loss in record["validation_losses"].items()
        }
    grid = [float(f"{own * 10 ** (i / 2):.2g}") for i in range(-2, 3)]
    while args.rate_steps and not record.get("chosen"):
        for rate in (rate for rate in grid if rate not in losses):
            config = configuration(suite, method, rank, rate, 0, args)
            config.eval.limit = 1
            config.train.steps = config.train.eval_every = config.train.save_every = args.rate_steps
            try:
                summary = run(config, args.workdir / args.suite / f"rate-{method}-{rate:g}")
                losses[rate] = summary["validation_losses"][str(args.rate_steps)]
            except FloatingPointError:  # the loss was no number at some step
                losses[rate] = math.inf
            record["validation_losses"] = {f"{r:g}": _finite(losses[r]) for r in sorted(losses)}
            write_json(path, record)
            jax.clear_caches()
        best = min(losses, key=losses.__getitem__)
        if min(losses) < best < max(losses):
            record |= {"chosen": best, "provenance": about_run(args)}
            write_json(path, record)
        grid = [float(f"{best * (10**0.5 if best == max(losses) else 10**-0.5):.2g}")]
    return (record["chosen"], losses) if record.get("chosen") else (own, {})


def _finite(loss: float) -> float | None:
    """A loss as JSON has it: null where it was no number."""
    return loss if math.isfinite(loss) else None


def train(setup: Any, workdir: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Runs a configuration, or what is left of it; what a result says of the training, and the scores it asked for."""
    summary = run(setup, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": setup.train.seed,
        "step": summary["step"],
        "validation_losses": summary["validation_losses"],
        "data": summary["data"],
        "loss_curve": {str(line["step"]): line["loss"] for line in lines if "loss" in line},
        "config": {**setup.to_dict(), "data": {**setup.data.to_dict(), "dir": "DIR"}},
    }, summary.get("evaluation")


def item_losses(model: Any, tasks: Sequence[TaskData]) -> dict[str, list[tuple[float, int]]]:
    """By task and item: the loss of the reference answer after its prompt, in nats, and its tokens."""
    losses = {}
    for task in tasks:
        pairs = [(e.messages[0].content, " " + e.messages[-1].content) for e in task.examples]
        sizes = [len(encode_pair(model.tokenizer, *pair)[1]) for pair in pairs]
        found = choice_loglik(model, [[pair] for pair in pairs])
        losses[task.task.name] = [
            (-float(one), size) for [one], size in zip(found, sizes, strict=True)
        ]
    return losses


def score(
    suite: Suite, adapter: Path | None, result: dict[str, Any] | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Scores of the test sets' first `--limit` items (`result`, where the run has made them), and the loss of the
    reference answers."""
    settings = Settings(
        protocol=suite.protocol, batch_size=_EVAL_BATCH, max_length=suite.max_length + 256
    )
    tasks = load_task_data(suite.tests, args.data_dir, settings, limit=args.limit)
    model = load_adapted(args.model, adapter and str(adapter))
    result = result or evaluate_tasks(tasks, model, settings)
    for name, losses in item_losses(model, tasks).items():
        nats, sizes = zip(*losses, strict=True)
        result["tasks"][name] |= {
            "reference_loss": sum(nats) / sum(sizes),
            "reference_losses": nats,
            "reference_tokens": sizes,
        }
        # the data's own, and long ones, stay out of what is published
        for words in ("prompt", "texts"):
            result["tasks"][name].pop(words, None)
    return result


def one(suite: Suite, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and scores one run, or reads what an earlier call has left."""
    method, side = ARMS[arm]
    path = args.out / args.suite / (f"{arm}-seed{seed}.json" if method else f"{arm}.json")
    asked = {
        "model": args.model,
        "rank": args.rank,
        "steps": args.steps or suite.steps,
        "limit": args.limit,
        "validation_size": args.validation_size,
        "allow_contaminated": args.allow_contaminated,
    }
    config = load_config(args.model)
    if method:
        budget = trained_parameters(config, AdapterConfig("ffba", args.rank))
        rank = 1 if method == "fft" else rank_for(method, config, budget, side)
        rate, tried = choose_rate(suite, method, rank, args)
        asked["learning_rate"] = rate
        run_of = suite, method, rank, rate, seed
    if path.exists():
        result = read_result(path)
        # the first results had no such field
        result["asked"] = {"allow_contaminated": False, **result["asked"]}
        if result["asked"] != asked:
            differ = ", ".join(
                f"{k}={result['asked'].get(k)!r} (now {v!r})"
                for k, v in asked.items()
                if result["asked"].get(k) != v
            )
            raise UserError(f"{path} was asked for {differ}; name another --out")
        if method and (
            differ := differences(result["config"], configuration(*run_of, args).to_dict())
        ):
            raise UserError(f"{path} was run with {differ}; name another --out")
        found = {
            f"{name}/test": task["data_hash"]
            for name, task in result["evaluation"]["tasks"].items()
        }
        check_data(found | result.get("data", {}).get("sha256", {}), args.data_dir, path)
        print(f"{path} is there and is not run again; another --out runs it anew", file=sys.stderr)
        return result
    start, adapter, scored = time.perf_counter(), None, None
    result = {
        "schema_version": SCHEMA_VERSION,
        "suite": args.suite,
        "arm": arm,
        "method": method,
        "asked": asked,
    }
    if method:
        workdir = args.workdir / args.suite / f"{arm}-seed{seed}"
        account, scored = train(configuration(*run_of, args), workdir)
        adapter = workdir / "adapter"
        result |= {
            "rank": rank,
            "learning_rate": rate,
            "rates_tried": {f"{r:g}": _finite(v) for r, v in tried.items()},
            "parameters": None
            if method == "fft"
            else trained_parameters(config, AdapterConfig(method, rank)),
            **account,
        }
    result["evaluation"] = score(suite, adapter, scored, args)
    result |= {"minutes": (time.perf_counter() - start) / 60, "provenance": about_run(args)}
    write_json(path, result)
    jax.clear_caches()
    return result


def check_comparable(args: argparse.Namespace) -> None:
    """Raises UserError if OUT/SUITE holds results that cannot stand in one table with what is asked for."""
    asked = {
        "model": args.model,
        "rank": args.rank,
        "steps": args.steps or SUITES[args.suite].steps,
        "limit": args.limit,
        "validation_size": args.validation_size,
        "allow_contaminated": args.allow_contaminated,
    }
    for path in sorted((args.out / args.suite).glob("*.json")):
        if differ := differences(
            {"allow_contaminated": False, **read_result(path)["asked"]}, asked
        ):
            raise UserError(f"{path}, of the same table, has {differ}; name another --out")


def metrics(scores: dict[str, Any]) -> dict[str, float]:
    """What the tables show of a task."""
    shown = ("accuracy", "rouge1", "rouge2", "rougeL", "rougeLsum", "reference_loss")
    return {name: scores[name] for name in shown if name in scores}


def rows(by_arm: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The table: a row a method, task and metric."""
    table = []
    for arm, own in by_arm.items():
        for task in own[0]["evaluation"]["tasks"]:
            found = [one_run["evaluation"]["tasks"][task] for one_run in own]
            for name in metrics(found[0]):
                values = [scores[name] for scores in found]
                over_items = found[0].get("stderr" if name == "accuracy" else f"{name}_stderr")
                table.append(
                    {
                        "method": arm,
                        "task": task,
                        "metric": name,
                        "mean": float(np.mean(values)),
                        **spread(values, over_items),
                        "seeds": len(values),
                        "minutes": float(np.mean([one_run["minutes"] for one_run in own])),
                    }
                )
    return table


def pairs(by_arm: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What tells methods apart: a row for every two of them, task and metric that their runs have by item (accuracy, or
    rougeL of texts, and the reference loss), with the 95 % interval of a paired bootstrap over items."""
    table = []
    for task, scores in next(iter(by_arm.values()))[0]["evaluation"]["tasks"].items():
        shown = {
            "accuracy" if "accuracy" in scores else "rougeL": "items",
            "reference_loss": "reference_losses",
        }
        for metric, column in shown.items():
            of = {
                arm: [run["evaluation"]["tasks"][task] for run in own]
                for arm, own in by_arm.items()
            }
            of = {arm: own for arm, own in of.items() if all(column in one_run for one_run in own)}
            items = {
                arm: np.mean([one_run[column] for one_run in own], axis=0)
                for arm, own in of.items()
            }
            for beside, arm in itertools.permutations(of, 2):
                sizes = (
                    np.array(of[arm][0]["reference_tokens"]) if metric == "reference_loss" else None
                )
                found = paired_bootstrap(items[arm], items[beside], sizes)
                table.append(
                    {
                        "method": arm,
                        "beside": beside,
                        "task": task,
                        "metric": metric,
                        **dict(zip(("difference", "low", "high"), found, strict=True)),
                    }
                )
    return table


def write_tables(args: argparse.Namespace) -> str:
    """OUT/SUITE.md and .csv from every run's JSON that is there; the Markdown."""
    runs = [read_json(path) for path in sorted((args.out / args.suite).glob("*.json"))]
    by_arm = {
        arm: [r for r in runs if r["arm"] == arm]
        for arm in ARMS
        if any(r["arm"] == arm for r in runs)
    }
    table, differ = rows(by_arm), pairs(by_arm)
    write_csv(args.out / f"{args.suite}.csv", table)
    write_csv(args.out / f"{args.suite}_pairs.csv", differ)
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in table))
    cell = {(row["method"], row["task"], row["metric"]): row for row in table}
    limit, units = runs[0]["asked"]["limit"], {row["stderr_over"] for row in table}
    over = " or, of one seed, ".join(f"over {unit}" for unit in ("seeds", "items") if unit in units)
    lines = [
        header(f"Suite {args.suite}", about_runs(runs, args)),
        f"{runs[0]['asked']['model']}, float32, {runs[0]['asked']['steps']} steps; first {limit} test items a "
        f"task, protocol {runs[0]['evaluation']['protocol']}; means over seeds (± standard error {over}; the "
        "reference loss has none over items); minutes of training and scoring in the call that ended a run.\n",
        "| method | rank | parameters | rate | seeds | minutes | validation loss | "
        + " | ".join(f"{task} {name}" for task, name in columns)
        + " |",
        "|---" * (7 + len(columns)) + "|",
    ]
    for arm, own in by_arm.items():
        first = own[0]
        best = [
            min(v for k, v in r["validation_losses"].items() if k != "0")
            for r in own
            if "step" in r
        ]
        count = (
            f"{first['parameters']:,}" if first.get("parameters") else "all" if arm == "fft" else ""
        )
        cells = [
            arm,
            str(first["rank"]) if first.get("parameters") else "",
            count,
            f"{first['learning_rate']:g}" if "rank" in first else "",
            str(len(own)),
            f"{cell[(arm, *columns[0])]['minutes']:.1f}",
            f"{np.mean(best):.3f}" if best else "",
        ]
        cells += [
            with_error(cell[(arm, *column)]["mean"], cell[(arm, *column)]["stderr"])
            for column in columns
        ]
        lines.append(f"| {' | '.join(cells)} |")
    accounts = [one_run["data"]["share_of_test_in_train"] for one_run in runs if "data" in one_run]
    overlaps = {
        task: share for found in accounts for task, share in found.items() if share > CONTAMINATED
    }
    if overlaps:
        shares = ", ".join(f"{100 * share:.0f} % of {task}" for task, share in overlaps.items())
        lines += [
            "",
            f"Contaminated: the training data held {shares} (word for word; those records were dropped).",
        ]
    beside = [row for row in differ if row["beside"] == "lora"]
    lines += ["", *_beside_lora(beside)]
    text = "\n".join(lines) + "\n"
    (args.out / f"{args.suite}.md").write_text(text)
    plot(by_arm, beside, args.out / f"{args.suite}.png")
    return text


def plot(by_arm: dict[str, list[dict[str, Any]]], beside: list[dict[str, Any]], path: Path) -> None:
    """Left the validation losses by step, a line a seed; right each task's score less lora's, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {arm: f"C{place}" for place, arm in enumerate(ARMS)}
    for arm, runs in by_arm.items():
        for number, one_run in enumerate(runs):
            if "step" in one_run:
                losses = {int(step): loss for step, loss in one_run["validation_losses"].items()}
                label = None if number else arm
                left.plot(
                    list(losses),
                    list(losses.values()),
                    marker="o",
                    ms=3,
                    color=colors[arm],
                    label=label,
                )
    left.set(xlabel="step", ylabel="validation loss, nats a token")
    tasks = list(next(iter(by_arm.values()))[0]["evaluation"]["tasks"])
    others = list(dict.fromkeys(row["method"] for row in beside))
    for row in (row for row in beside if row["metric"] != "reference_loss"):
        arm, line, middle = row["method"], tasks.index(row["task"]), row["difference"]
        height = line + 0.8 * ((others.index(arm) + 0.5) / len(others) - 0.5)
        right.errorbar(
            middle,
            height,
            xerr=[[middle - row["low"]], [row["high"] - middle]],
            fmt="o",
            ms=3,
            color=colors[arm],
            label=None if line else arm,
        )
    right.set_yticks(range(len(tasks)), tasks)
    right.invert_yaxis()
    right.axvline(0, color="0.5", lw=0.8)
    right.set_xlabel("score less lora's, 95 % of a paired bootstrap")
    for panel in (left, right):
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _beside_lora(beside: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in beside))
    if not columns:
        return []
    lines = [
        "Paired bootstrap over test items (means over seeds): difference to lora [95 % interval]; it says nothing "
        "of the spread over seeds.",
        "",
        "| method | " + " | ".join(f"{task} {name}" for task, name in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    cell = {
        (
            row["method"],
            row["task"],
            row["metric"],
        ): f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        for row in beside
    }
    for arm in dict.fromkeys(row["method"] for row in beside):
        lines.append(
            f"| {' | '.join([arm, *(cell.get((arm, *column), '') for column in columns)])} |"
        )
    return lines


def workdir_of(out: Path, usual: Path) -> Path:
    """Where runs train that are to end in `out`: runs/NAME for the usual place, below it OUT's full path for another,
    so that no other OUT finds them finished."""
    name, place = Path("runs", usual.name), out.resolve()
    return name if place == usual.resolve() else name.joinpath(*place.parts[1:])


def read_seeds(value: str) -> list[int]:
    """`"0,1"` as numbers. Raises UserError."""
    seeds = [int(seed) if seed.isdecimal() else -1 for seed in names(value)]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(
            f"--seeds {value!r} must be integers, 0 or more, each once, with commas between"
        )
    return seeds


def read_result(path: Path) -> dict[str, Any]:
    """What a run has left. Raises UserError for another file."""
    result = read_json(path)
    if not isinstance(result.get("asked"), dict):
        raise UserError(f"{path} is not the result of a run; move it away, or name another --out")
    return result


def main(argv: list[str]) -> None:
    """The command."""
    parser = CommandParser(
        prog="python -m experiments.accuracy", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--suite", required=True, help=", ".join(SUITES))
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--workdir",
        type=Path,
        help="default runs/accuracy, for another OUT runs/accuracy/FULL/PATH/OF/OUT",
    )
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="what load_pretrained takes"
    )
    parser.add_argument("--preset", help="whose settings a run starts from; default SmolLM2-135M's")
    parser.add_argument(
        "--methods", default=",".join(ARMS), help="comma-separated, run in this order"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument(
        "--rank", type=int, default=32, help="ffba's: all have about its number of parameters"
    )
    parser.add_argument("--steps", type=int, help="default the suite's")
    parser.add_argument(
        "--rate_steps", type=int, default=0, help="steps of each trial of a rate; 0: none is tried"
    )
    parser.add_argument("--validation_size", type=int, default=60)
    parser.add_argument("--limit", type=int, default=200, help="test items a task")
    parser.add_argument(
        "--allow_contaminated",
        action="store_true",
        help="train on data that holds over 1 %% of a test, and record it",
    )
    args = parser.parse_args(argv[1:])
    args.workdir = args.workdir or workdir_of(args.out, OUT)
    if args.suite not in SUITES:
        raise UserError(f"--suite {args.suite!r} is unknown; {near_misses(args.suite, SUITES)}")
    for method in names(args.methods):
        if method not in ARMS:
            raise UserError(f"--methods: {method!r} is unknown here; {near_misses(method, ARMS)}")
    if not names(args.methods):
        raise UserError(f"--methods {args.methods!r} names none; known: {', '.join(ARMS)}")
    for flag in ("steps", "limit", "validation_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value} must be a positive integer")
    seeds = read_seeds(args.seeds)
    suite = SUITES[args.suite]
    check_writable(args.out / args.suite / "base.json", "--out")
    check_comparable(args)
    for task in suite.tests:  # before the first run
        load_examples(get_task(task), "test", args.data_dir)
    for seed in seeds:
        for method in names(args.methods):
            if method == "base" and seed != seeds[0]:
                continue
            result = one(suite, method, seed, args)
            found = {
                task: metrics(scores) for task, scores in result["evaluation"]["tasks"].items()
            }
            print(
                f"{method}, seed {seed}, {result['minutes']:.1f} minutes: {found}", file=sys.stderr
            )
            write_tables(args)
    print(write_tables(args))


if __name__ == "__main__":
    run_command(main)
