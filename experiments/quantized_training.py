"""Training over quantised bases: DailyDialog++ replies on SmolLM2-135M, the same steps over floats,
int8, fp8 and nf4.

    python -m experiments.quantized_training --data_dir DIR --out OUT

A run that OUT.json holds is not run again. Speed is measured apart, in one process: all take a step
each in every round, and ratios are to the method's float base in the same round.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import optax

from experiments.flags import Flags, parse
from experiments.report import beside, stored
from experiments.stepping import make_batch, stepper, time_steps
from experiments.suites import SUITES
from experiments.sweep import Arm, Result, check_names, outcomes, train
from flora_jax.adapters import METHODS, AdapterConfig, init_adapter
from flora_jax.analysis.results import about_process, about_runs, header, spread, table
from flora_jax.analysis.timing import paired_ratio
from flora_jax.config import get_config
from flora_jax.errors import UserError, check_writable, run_command
from flora_jax.files import read_json, write_json
from flora_jax.models.config import QUANTIZATIONS
from flora_jax.models.llama import Llama
from flora_jax.models.loading import load_pretrained

# Equal budgets of about 5.5 M parameters.
RANKS = {"lora": 18, "ffba": 32}

FLAGS: Flags = {
    "--data_dir": dict(required=True),
    "--workdir": dict(type=Path, default=Path("runs/quantized_training")),
    "--model": dict(default="smollm2-135m-instruct", help="what load_pretrained takes"),
    "--methods": dict(default=",".join(RANKS)),
    "--quantizations": dict(default=",".join(QUANTIZATIONS)),
    "--steps": dict(type=int, default=40),
    "--rounds": dict(type=int, default=8, help="of the speed; 0 leaves it as it was"),
    "--out": dict(type=Path, required=True, help="OUT.json and OUT.md are written"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Arm):
    """A method over a quantised base. found: its result in OUT.json."""

    method: str
    quantization: str
    found: Result | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a stored result must share to be this run's."""
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
        return {"settings": self.settings, **trained}


def measure_speed(runs: list[Run], rounds: int) -> dict[str, Any]:
    """By run: a step's time over that of its method's float base, round by round."""
    suite = SUITES["dialogue"]
    steps = {}
    for run in runs:
        config, base = load_pretrained(run.args.model, quantization=run.quantization)
        adapter_config = AdapterConfig(run.method, RANKS[run.method])
        trainable = {"adapter": init_adapter(jax.random.key(0), config, adapter_config)}
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
        remat = get_config("smollm2-135m", run.method).model.remat
        model = Llama(config, adapter_config, remat=remat)
        step = stepper(model, optimizer, trainable, {"params": base}, seed=1)
        batch = make_batch(suite.batch_size, suite.max_length, config.vocab_size, answers=0.1)
        steps[run.name] = functools.partial(step, batch)
    seconds = time_steps(steps, rounds)
    floats = {run.name: f"{run.method}-none" for run in runs}
    return {
        name: paired_ratio(own, seconds[floats[name]])
        for name, own in seconds.items()
        if floats[name] in seconds
    }


def markdown(args: argparse.Namespace, found: dict[str, Result], speed: dict[str, Any]) -> str:
    """The table, one line for each run."""
    rows = []
    for name, one in found.items():
        last = one["validation_losses"][str(args.steps)]
        beside_floats = found.get(f"{one['settings']['method']}-none")
        change = ""
        if beside_floats is not None:
            change = f"{last - beside_floats['validation_losses'][str(args.steps)]:+.4f}"
        start = one["validation_losses"]["0"]
        ratio = spread(speed["ratios"][name]) if name in speed.get("ratios", {}) else ""
        rows.append([name, f"{start:.4f}", f"{last:.4f}", change, ratio])
    lines = [
        header(
            f"Replies over quantised bases, {args.steps} steps", about_runs([*found.values()], args)
        ),
        f"{args.model}, DailyDialog++, batch of 4 packed rows of 256 tokens, one seed, float32 "
        "beside what is quantised; validation loss of 60 records; a step's seconds over the float "
        "base's in the same round, median [quartiles].\n",
        *table(["run", "loss before", "after", "beside floats", "step over floats"], rows),
    ]
    return "\n".join(lines) + "\n"


def read_before(path: Path) -> tuple[dict[str, Result], dict[str, Any]]:
    """The results of earlier calls by name, and their speeds."""
    if not path.exists():
        return {}, {}
    before = read_json(path)
    with stored(path):
        results = {name: dict(one) for name, one in before["results"].items()}
        return results, dict(before["speed"])


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.quantized_training", __doc__, FLAGS)
    path = beside(args.out, ".json")
    check_writable(path, "--out")
    methods = check_names("--methods", args.methods, RANKS)
    quantizations = check_names("--quantizations", args.quantizations, QUANTIZATIONS)
    found, speed = read_before(path)
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

    def write() -> str:
        write_json(path, {"schema_version": 1, "results": found, "speed": speed})
        text = markdown(args, found, speed)
        beside(args.out, ".md").write_text(text)
        return text

    for one, result in outcomes(runs):
        found[one.name] = result
        write()
    if args.rounds:
        speed["ratios"] = speed.get("ratios", {}) | measure_speed(runs, args.rounds)
        speed["provenance"] = about_process("qwix", data_dir=args.data_dir)
    print(write())


if __name__ == "__main__":
    run_command(main)
