"""What every method learns from real questions: 60 steps of ARC-Easy + openbookqa on SmolLM2-135M.

    python -m experiments.real_text --data_dir DIR --out experiments/results/real_text

Each method trains at its own rate. Answers are label words ("the correct answer is answer2"). The
table has the validation loss before and after, and the share of test questions whose right label
sentence is the likeliest. A run that OUT.json holds is not run again, so the same command resumes;
it is in OUT.md whatever `--methods` asks for. pf_lora and parallel are lora and fpa under other
names.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments.flags import Flags, parse
from experiments.report import beside, check_data, stored
from experiments.sweep import Arm, Result, best_loss, check_names, outcomes
from flora_jax.adapters import METHODS
from flora_jax.analysis.results import about_runs, header, line, table
from flora_jax.config import get_config
from flora_jax.data import get_task, label_request, load_examples
from flora_jax.errors import UserError, check_writable, run_command, split_names
from flora_jax.evaluation.loglik import choice_loglik
from flora_jax.files import read_json, write_json
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.train import run

MODEL = "smollm2-135m-instruct"
TASKS = ("ARC-Easy", "openbookqa")
# As near to the 5.53 M parameters of ffba at rank 32 as the ranks allow.
RANKS = {
    "fft": 1,
    "lora": 18,
    "ffa": 32,
    "fpa": 80,
    "ffba": 32,
    "ffba_qg_add": 32,
    "ffba_qd_add": 32,
    "zflora": 30,
}

FLAGS: Flags = {
    "--data_dir": dict(required=True),
    "--workdir": dict(type=Path, default=Path("runs/real_text")),
    "--methods": dict(default=",".join(RANKS)),
    "--steps": dict(type=int, default=60),
    "--limit": dict(type=int, default=50),
    "--out": dict(type=Path, required=True, help="OUT.json and OUT.md are written"),
}


def configuration(method: str, data_dir: str, steps: int) -> Any:
    """The configuration of one method's run."""
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
    """Share of each task's first `limit` test questions whose right label sentence is the
    likeliest."""
    model = load_adapted(MODEL, adapter and str(adapter), "float32")
    accuracy = {}
    for name in TASKS:
        examples = load_examples(get_task(name), "test", data_dir)[:limit]
        requests = []
        for example in examples:
            prompt, targets = label_request(example)
            requests.append([(prompt, " " + target) for target in targets])
        scores = choice_loglik(model, requests, batch_size=16)
        right = [int(np.argmax(s)) == e.gold for s, e in zip(scores, examples, strict=True)]
        accuracy[name] = sum(right) / len(right)
    return accuracy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Arm):
    """A method, which is its name. found: its result in OUT.json."""

    found: Result | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a stored result must share to be this run's."""
        return {
            "steps": self.args.steps,
            "limit": self.args.limit,
            "rank": RANKS[self.name],
            "learning_rate": METHODS[self.name].learning_rate,
        }

    def find(self) -> Result | None:
        if self.found is None:
            return None
        out = self.args.out
        before = self.found["settings"]
        if before != self.settings:
            raise UserError(
                f"{out}.json has {self.name} with {before}, not {self.settings}; name another --out"
            )
        check_data(self.found["data"]["sha256"], self.args.data_dir, out)
        return self.found

    def make(self, workdir: Path) -> Result:
        args = self.args
        summary = run(configuration(self.name, args.data_dir, args.steps), workdir)
        return {
            "method": self.name,
            "settings": self.settings,
            "validation_losses": summary["validation_losses"],
            "accuracy": label_accuracy(workdir / "adapter", args.data_dir, args.limit),
            "data": summary["data"],
        }


def markdown(args: argparse.Namespace, base: dict[str, float], found: dict[str, Result]) -> str:
    """The table, one line for the base and for each method."""
    results = [found[method] for method in RANKS if method in found]
    data = results[0]["data"]
    title = f"ARC-Easy + openbookqa, label words, {args.steps} steps"
    heads = ["method", "rank", "rate", "validation loss before", "after", *TASKS]
    lines = [
        header(title, about_runs(results, args)),
        f"{MODEL}, float32, batch of 2 packed rows of 256 tokens, one seed; "
        f"{data['train']['kept']:,} training examples, validation loss over "
        f"{data['validation']['kept']} held-out ones (answer tokens alone), accuracy of the label "
        f"sentence by log-likelihood on the first {args.limit} test questions of each task.\n",
        *table(heads),
        line(["base", "", "", "", "", *(f"{base[name]:.2f}" for name in TASKS)], blank=" "),
        *(line(_cells(one)) for one in results),
    ]
    return "\n".join(lines) + "\n"


def _cells(result: Result) -> list[str]:
    return [
        result["method"],
        "" if result["method"] == "fft" else str(result["settings"]["rank"]),
        f"{result['settings']['learning_rate']:g}",
        f"{result['validation_losses']['0']:.3f}",
        f"{best_loss(result):.3f}",
        *(f"{result['accuracy'][name]:.2f}" for name in TASKS),
    ]


def read_before(path: Path) -> dict[str, Result]:
    """The results of earlier calls, by method."""
    if not path.exists():
        return {}
    with stored(path):
        return {result["method"]: dict(result) for result in read_json(path)["results"]}


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.real_text", __doc__, FLAGS)
    if not split_names(args.methods) or args.limit < 1:
        raise UserError(
            f"--methods {args.methods!r} must name some, and --limit {args.limit} must be positive"
        )
    path = beside(args.out, ".json")
    check_writable(path, "--out")
    asked = check_names("--methods", args.methods, RANKS)
    found = read_before(path)
    base = label_accuracy(None, args.data_dir, args.limit)
    runs = (
        Run(name=method, path=None, args=args, found=found.get(method))
        for method in dict.fromkeys([*found, *asked])
    )
    for one, result in outcomes(runs):
        found[one.name] = result
        write_json(path, {"schema_version": 1, "base": base, "results": list(found.values())})
    text = markdown(args, base, found)
    print(text)
    beside(args.out, ".md").write_text(text)


if __name__ == "__main__":
    run_command(main)
