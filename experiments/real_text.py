"""Every method on real questions: 60 steps of ARC-Easy + openbookqa on SmolLM2-135M, at the method's own rate.

    python -m experiments.real_text --data_dir DIR --out experiments/results/real_text

Answers are label words ("the correct answer is answer2"). For each method: the validation loss before and after, and
the share of test questions whose right label sentence is the likeliest of its four. A run that OUT.json holds is not
run again, so that an interrupted sweep goes on where it stopped, and stands in OUT.md whatever `--methods` asks for.
pf_lora and parallel are lora and fpa under other names.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.report import about_run, about_runs, beside, check_data, header
from flora_jax.config import LEARNING_RATES, get_config, names
from flora_jax.data import get_task, label_request, load_examples
from flora_jax.errors import CommandParser, UserError, check_writable, near_misses, run_command
from flora_jax.evaluation.loglik import choice_loglik
from flora_jax.files import read_json, write_json
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.train import run

MODEL = "smollm2-135m-instruct"
TASKS = ("ARC-Easy", "openbookqa")
# As near to ffba's 5.53 M parameters at rank 32 as each method's rank can be (zflora's must divide 576).
RANKS = {
    "fft": 1,
    "lora": 18,
    "ffa": 32,
    "fpa": 80,
    "ffba": 32,
    "ffba_qg_add": 32,
    "ffba_qd_add": 32,
    "zflora": 32,
}


def configuration(method: str, data_dir: str, steps: int) -> Any:
    """The run of one method."""
    config = get_config("smollm2-135m", method)
    config.model.weights = MODEL
    config.adapter.rank = RANKS[method]
    config.data.tasks = ",".join(TASKS)
    config.data.dir = data_dir
    config.data.max_length = 256
    config.data.validation_size = 60
    config.train.steps = steps
    config.train.batch_size = 2
    config.train.eval_every = config.train.save_every = max(1, steps // 2)
    return config


def label_accuracy(adapter: Path | None, data_dir: str, limit: int) -> dict[str, float]:
    """Share of each task's first `limit` test questions whose right label sentence is the likeliest."""
    model = load_adapted(MODEL, adapter and str(adapter), "float32")
    accuracy = {}
    for name in TASKS:
        examples = load_examples(get_task(name), "test", data_dir)[:limit]
        requests = []
        for example in examples:
            prompt, targets = label_request(example)
            requests.append([(prompt, " " + target) for target in targets])
        scores = choice_loglik(
            model,
            requests,
            batch_size=16,
        )
        right = [int(np.argmax(s)) == e.gold for s, e in zip(scores, examples, strict=True)]
        accuracy[name] = sum(right) / len(right)
    return accuracy


def one(method: str, found: dict[str, Any] | None, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and scores one method, or gives back what an earlier call has found."""
    settings = {"steps": args.steps, "limit": args.limit, "rank": RANKS[method]}
    settings["learning_rate"] = LEARNING_RATES[method]
    if found:
        if found["settings"] != settings:
            raise UserError(
                f"{args.out}.json has {method} with {found['settings']}, not {settings}; name another --out"
            )
        check_data(found["data"]["sha256"], args.data_dir, args.out)
        return found
    start, workdir = time.perf_counter(), args.workdir / method
    summary = run(configuration(method, args.data_dir, args.steps), workdir)
    result = {
        "method": method,
        "settings": settings,
        "validation_losses": summary["validation_losses"],
        "accuracy": label_accuracy(workdir / "adapter", args.data_dir, args.limit),
        "data": summary["data"],
        "minutes": (time.perf_counter() - start) / 60,
        "provenance": about_run(args),
    }
    jax.clear_caches()
    return result


def main(argv: list[str]) -> None:
    """The command."""
    parser = CommandParser(
        prog="python -m experiments.real_text", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--workdir", type=Path, default=Path("runs/real_text"))
    parser.add_argument("--methods", default=",".join(RANKS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md are written")
    args = parser.parse_args(argv[1:])
    if not names(args.methods) or args.limit < 1:
        raise UserError(
            f"--methods {args.methods!r} must name some, and --limit {args.limit} must be positive"
        )
    check_writable(beside(args.out, ".json"), "--out")
    for method in names(args.methods):
        if method not in RANKS:
            raise UserError(f"--methods: {method!r} is unknown; {near_misses(method, RANKS)}")
    path = beside(args.out, ".json")
    found = (
        {result["method"]: result for result in read_json(path)["results"]} if path.exists() else {}
    )
    base = label_accuracy(None, args.data_dir, args.limit)
    for method in [*found, *names(args.methods)]:
        found[method] = one(method, found.get(method), args)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema_version": 1, "base": base, "results": list(found.values())})

    results = [found[method] for method in RANKS if method in found]
    data = results[0]["data"]
    lines = [
        header(
            f"ARC-Easy + openbookqa, label words, {args.steps} steps", about_runs(results, args)
        ),
        f"{MODEL}, float32, batch of 2 packed rows of 256 tokens, one seed; {data['train']['kept']:,} training "
        f"examples, validation loss over {data['validation']['kept']} held-out ones (answer tokens alone), accuracy of "
        f"the label sentence by log-likelihood on the first {args.limit} test questions of each task.\n",
        "| method | rank | rate | validation loss before | after | " + " | ".join(TASKS) + " |",
        "|---|---|---|---|---|---|---|",
        "| base | | | | | " + " | ".join(f"{base[name]:.2f}" for name in TASKS) + " |",
    ]
    for r in results:
        losses, settings = list(r["validation_losses"].values()), r["settings"]
        cells = [
            r["method"],
            "" if r["method"] == "fft" else str(settings["rank"]),
            f"{settings['learning_rate']:g}",
        ]
        cells += [f"{losses[0]:.3f}", f"{min(losses[1:]):.3f}"]
        cells += [f"{r['accuracy'][name]:.2f}" for name in TASKS]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    beside(args.out, ".md").write_text(text)


if __name__ == "__main__":
    run_command(main)
