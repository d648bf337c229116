"""Training over quantised bases: DailyDialog++ replies on SmolLM2-135M, the same steps over floats,
int8, fp8 and nf4.

    python -m experiments.quantized_training --data_dir DIR --out OUT

Seconds a step are of the run itself; runs come one after another, so only a quiet machine's tell
anything. A run that OUT.json holds is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from experiments.flags import Flags, parse
from experiments.report import beside
from experiments.suites import SUITES
from experiments.sweep import Arm, Result, check_names, outcomes, train
from flora_jax.adapters import METHODS
from flora_jax.analysis.results import about_runs, header, table
from flora_jax.config import get_config
from flora_jax.errors import UserError, check_writable, run_command
from flora_jax.files import read_json, write_json
from flora_jax.models.config import QUANTIZATIONS

# Equal budgets of about 5.5 M parameters.
RANKS = {"lora": 18, "ffba": 32}

FLAGS: Flags = {
    "--data_dir": dict(required=True),
    "--workdir": dict(type=Path, default=Path("runs/quantized_training")),
    "--model": dict(default="smollm2-135m-instruct", help="what load_pretrained takes"),
    "--methods": dict(default=",".join(RANKS)),
    "--quantizations": dict(default=",".join(QUANTIZATIONS)),
    "--steps": dict(type=int, default=40),
    "--out": dict(type=Path, required=True, help="OUT.json and OUT.md are written"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Arm):
    """A method over a base. found: its result in OUT.json."""

    method: str
    quantization: str
    found: Result | None

    @property
    def settings(self) -> dict[str, Any]:
        """What must be alike for a result to be this run's."""
        return {
            "method": self.method,
            "quantization": self.quantization,
            "model": self.args.model,
            "steps": self.args.steps,
            "rank": RANKS[self.method],
            "learning_rate": METHODS[self.method].learning_rate,
        }

    def find(self) -> Result | None:
        if self.found is not None and self.found["settings"] != self.settings:
            raise UserError(
                f"{self.args.out}.json has {self.name} with {self.found['settings']}, not "
                f"{self.settings}; name another --out"
            )
        return self.found

    def make(self, workdir: Path) -> Result:
        suite = SUITES["dialogue"]
        config = get_config("smollm2-135m", self.method)
        config.model.weights = self.args.model
        config.model.quantization = self.quantization
        config.adapter.rank = RANKS[self.method]
        config.data.tasks = ",".join(suite.train)
        config.data.dir = self.args.data_dir
        config.data.max_length = suite.max_length
        config.data.validation_size = 60
        config.train.steps = self.args.steps
        config.train.batch_size = suite.batch_size
        config.train.eval_every = config.train.save_every = max(1, self.args.steps // 2)
        config.train.log_every = max(1, self.args.steps // 8)
        trained, _ = train(config, workdir)
        lines = (json.loads(one) for one in (workdir / "metrics.jsonl").read_text().splitlines())
        speeds = [one["tokens_per_second"] for one in lines if "tokens_per_second" in one]
        # the first has compiling in it
        speed = statistics.median(speeds[1:])
        return {"settings": self.settings, "tokens_per_second": speed, **trained}


def markdown(args: argparse.Namespace, found: dict[str, Result]) -> str:
    """The table, a line a run."""
    rows = []
    for name, one in found.items():
        last = one["validation_losses"][str(args.steps)]
        beside_floats = found.get(f"{one['settings']['method']}-none")
        change = ""
        if beside_floats is not None:
            change = f"{last - beside_floats['validation_losses'][str(args.steps)]:+.4f}"
        start = one["validation_losses"]["0"]
        speed = f"{one['tokens_per_second']:.0f}"
        rows.append([name, f"{start:.4f}", f"{last:.4f}", change, speed])
    lines = [
        header(
            f"Replies over quantised bases, {args.steps} steps", about_runs([*found.values()], args)
        ),
        f"{args.model}, DailyDialog++, batch of 4 packed rows of 256 tokens, one seed, float32 "
        "beside what is quantised; validation loss of 60 records.\n",
        *table(["run", "loss before", "after", "beside floats", "tokens/s"], rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.quantized_training", __doc__, FLAGS)
    path = beside(args.out, ".json")
    check_writable(path, "--out")
    methods = check_names("--methods", args.methods, RANKS)
    quantizations = check_names("--quantizations", args.quantizations, QUANTIZATIONS)
    found: dict[str, Result] = read_json(path)["results"] if path.exists() else {}
    runs = [
        Run(
            name=f"{method}-{quantization}",
            path=None,
            args=args,
            method=method,
            quantization=quantization,
            found=found.get(f"{method}-{quantization}"),
        )
        for method in methods
        for quantization in quantizations
    ]
    for one, result in outcomes(runs):
        found[one.name] = result
        write_json(path, {"schema_version": 1, "results": found})
        text = markdown(args, found)
        beside(args.out, ".md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_command(main)
