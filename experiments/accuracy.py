"""The paper's suites: trains every method at equal parameters on real data, and scores it.

    python -m experiments.accuracy --suite dialogue --data_dir DIR \
        --out experiments/results/accuracy

There is a run for each method and seed. It writes a JSON file in OUT/SUITE when it ends, with its
configuration, data hashes, loss curve, scores and time, and is not run again. The same command
resumes a killed run from its checkpoint. The results are in

    OUT/SUITE.md, .csv      means over seeds, with standard errors over seeds (with one seed: over
                            the test items), and minutes (of a resumed run: of its last call)
    OUT/SUITE_pairs.csv     differences of every two methods, with intervals from a paired bootstrap
                            over the items; those to lora are in OUT/SUITE.md, too
    OUT/SUITE.png           validation losses, and differences to lora

All methods have about as many parameters as ffba at `--rank`. pf_lora and parallel are lora and fpa
under other names and are not run.

Checkpoints are in `--workdir`: by default runs/accuracy, and for another OUT
runs/accuracy/FULL/PATH/OF/OUT, so another OUT trains anew. A run that its workdir holds finished is
only scored.

`--rate_steps N` chooses each method's learning rate, once for all suites: it tries a grid of rates
for N steps each and writes their validation losses to OUT/rates/METHOD.json. Every later run of the
method takes the best. Without that file it takes the method's own rate.

`--profile gpu` fills a GPU: bfloat16, four times the suite's rows, more validations, and nothing is
computed twice for the backward pass. A table holds runs of one profile.

`--replicas K` trains up to K runs of a method (seeds, or rates) together over one base
(flora_jax/training/replicas.py). The results are those of lone runs up to rounding, but minutes
then count the scoring alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.accuracy_tables import metrics, write_tables
from experiments.flags import Flags, parse
from experiments.report import check_data, differences
from experiments.suites import ARMS, PROFILES, SUITES, Suite
from experiments.sweep import (
    SCHEMA_VERSION,
    Arm,
    Result,
    check_names,
    item_losses,
    last_loss,
    outcomes,
    read_result,
    read_seeds,
    say_found,
    train,
    train_together,
    workdir_of,
)
from flora_jax.adapters import METHODS, AdapterConfig
from flora_jax.analysis.results import about_run
from flora_jax.analysis.variants import rank_for, trained_parameters
from flora_jax.config import get_config
from flora_jax.data import get_task, load_examples
from flora_jax.errors import UserError, check_writable, near_misses, run_command
from flora_jax.evaluation.run import evaluate_tasks
from flora_jax.evaluation.task_data import Settings, load_task_data
from flora_jax.files import read_json, write_json
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.models.loading import load_config

OUT = Path("experiments/results/accuracy")
# Settings that the first results do not record.
_FIRST = {"allow_contaminated": False, "profile": "cpu"}

FLAGS: Flags = {
    "--suite": dict(required=True, help=", ".join(SUITES)),
    "--data_dir": dict(required=True),
    "--out": dict(type=Path, default=OUT),
    "--workdir": dict(
        type=Path, help="default runs/accuracy, for another OUT runs/accuracy/FULL/PATH/OF/OUT"
    ),
    "--model": dict(default="smollm2-135m-instruct", help="what load_pretrained takes"),
    "--profile": dict(default="cpu", help=", ".join(PROFILES)),
    "--methods": dict(default=",".join(ARMS), help="comma-separated, run in this order"),
    "--seeds": dict(default="0", help="comma-separated"),
    "--rank": dict(type=int, default=32, help="of ffba; others at equal parameters"),
    "--steps": dict(type=int, help="default the suite's"),
    "--rate_steps": dict(type=int, default=0, help="for each rate tried; 0: none is tried"),
    "--replicas": dict(type=int, default=1, help="runs of a method trained together"),
    "--validation_size": dict(type=int, default=60),
    "--limit": dict(type=int, default=200, help="test items a task"),
    "--allow_contaminated": dict(
        action="store_true", help="train on data that holds over 1 %% of a test, and record it"
    ),
}


def configuration(
    suite: Suite, method: str, rank: int, rate: float, seed: int, args: argparse.Namespace
) -> Any:
    """The configuration of one run."""
    profile = PROFILES[args.profile]
    config = get_config("smollm2-135m", method)
    config.model.weights = args.model
    config.model.dtype = config.model.param_dtype = profile.dtype
    config.model.remat = profile.remat
    config.adapter.rank = rank
    config.data.tasks = ",".join(suite.train)
    config.data.dir = args.data_dir
    config.data.max_length = suite.max_length
    config.data.validation_size = args.validation_size
    config.data.allow_contaminated = args.allow_contaminated
    config.train.seed = seed
    config.train.steps = args.steps or suite.steps
    config.train.batch_size = suite.batch_size * profile.rows
    evaluate_every = max(1, config.train.steps // profile.evaluations)
    config.train.eval_every = config.train.save_every = evaluate_every
    config.train.log_every = max(1, config.train.steps // 8)
    config.optim.learning_rate = rate
    config.eval.tasks = ",".join(suite.tests)  # their records are dropped from the training data
    config.eval.protocol = suite.protocol
    config.eval.limit = args.limit
    config.eval.batch_size = profile.eval_batch
    config.eval.max_length = suite.max_length + 256
    return config


# ------------------------------------------------------------------------------------- rates


def choose_rate(
    suite: Suite, method: str, rank: int, args: argparse.Namespace
) -> tuple[float, dict[str, float]]:
    """The method's rate, and the validation loss of each rate tried for it.

    Rates are tried only with `--rate_steps`, and only until one is on record: a grid over two
    decades around the method's own rate, extended while the best is at its edge. A rate whose loss
    is not finite has lost. Where none was tried, the rate is the method's own.
    """
    own = METHODS[method].learning_rate
    path = args.out / "rates" / f"{method}.json"
    record = _rates_on_record(path, rank, args)
    losses = {
        float(rate): math.inf if loss is None else loss
        for rate, loss in record.get("validation_losses", {}).items()
    }
    grid = [float(f"{own * 10 ** (i / 2):.2g}") for i in range(-2, 3)]
    while args.rate_steps and not record.get("chosen"):
        trials = {}
        for rate in (rate for rate in grid if rate not in losses):
            config = configuration(suite, method, rank, rate, 0, args)
            config.eval.limit = 1
            config.train.steps = config.train.eval_every = config.train.save_every = args.rate_steps
            trials[rate] = (config, args.workdir / args.suite / f"rate-{method}-{rate:g}")
        replicas = 1 if method == "fft" else args.replicas
        diverged = train_together([*trials.values()], replicas)
        for i, (rate, trial) in enumerate(trials.items()):
            losses[rate] = math.inf if i in diverged else last_loss(*trial)
            record["validation_losses"] = _by_rate({r: losses[r] for r in sorted(losses)})
            write_json(path, record)
        best = min(losses, key=losses.__getitem__)
        if min(losses) < best < max(losses):
            record |= {"chosen": best, "provenance": about_run(args)}
            write_json(path, record)
        beyond = 10**0.5 if best == max(losses) else 10**-0.5
        grid = [float(f"{best * beyond:.2g}")]
    return (record["chosen"], losses) if record.get("chosen") else (own, {})


def _rates_on_record(path: Path, rank: int, args: argparse.Namespace) -> Result:
    """The search in `path`, or a new one. Raises UserError for one of another model, and for an
    unfinished one with other settings."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": args.model,
        "profile": args.profile,
        "suite": args.suite,
        "rank": rank,
        "steps": args.rate_steps,
    }
    if not path.exists():
        return record
    found = {"profile": _FIRST["profile"], **read_json(path)}
    for flag in ("model", "profile"):
        if found.get(flag) != record[flag]:
            raise UserError(
                f"{path} has the rate for --{flag} {found.get(flag)}, not {record[flag]}; name "
                "another --out"
            )
    other = [field for field in ("suite", "rank", "steps") if found.get(field) != record[field]]
    if args.rate_steps and not found.get("chosen") and other:
        raise UserError(
            f"{path} holds an unfinished search at {other[0]}={found.get(other[0])!r}, not "
            f"{record[other[0]]!r}; let it end, or delete it"
        )
    return found


def _by_rate(losses: dict[float, float]) -> dict[str, float | None]:
    """Losses for JSON: null where one is not finite."""
    return {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()}


# -------------------------------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Arm):
    """An arm at a seed. method: None for the base; rates: validation losses of the rates tried."""

    suite: Suite
    arm: str
    method: str | None
    seed: int
    rank: int
    rate: float
    rates: dict[float, float]

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that a stored result must share to be this run's."""
        asked = _asked(self.suite, self.args)
        return {**asked, "learning_rate": self.rate} if self.method else asked

    def setup(self) -> Any:
        """The configuration."""
        return configuration(self.suite, self.method, self.rank, self.rate, self.seed, self.args)

    def find(self) -> Result | None:
        if not self.path.exists():
            return None
        result = read_result(self.path)
        result["asked"] = {**_FIRST, **result["asked"]}
        if differ := differences(result["asked"], self.asked):
            raise UserError(f"{self.path} was asked for {differ}; name another --out")
        if self.method and (differ := differences(result["config"], self.setup().to_dict())):
            raise UserError(f"{self.path} was run with {differ}; name another --out")
        tasks = result["evaluation"]["tasks"].items()
        hashes = {f"{name}/test": task["data_hash"] for name, task in tasks}
        hashes |= result.get("data", {}).get("sha256", {})
        check_data(hashes, self.args.data_dir, self.path)
        say_found(self.path)
        return result

    def make(self, workdir: Path) -> Result:
        result = {
            "schema_version": SCHEMA_VERSION,
            "suite": self.args.suite,
            "arm": self.arm,
            "method": self.method,
            "asked": self.asked,
        }
        if self.method is None:
            return result | {"evaluation": score(self.suite, None, None, self.args)}
        account, scored = train(self.setup(), workdir)
        parameters = None
        if self.method != "fft":
            own = AdapterConfig(self.method, self.rank)
            parameters = trained_parameters(load_config(self.args.model), own)
        return {
            **result,
            "rank": self.rank,
            "learning_rate": self.rate,
            "rates_tried": _by_rate(self.rates),
            "parameters": parameters,
            **account,
            "evaluation": score(self.suite, workdir / "adapter", scored, self.args),
        }


def runs(suite: Suite, arms: Sequence[str], seeds: Sequence[int], args: Any) -> Iterator[Run]:
    """Yields the runs in their order. Just before a method's first run its rate is chosen and its
    replicas are trained."""
    for seed in seeds:
        for arm in arms:
            first = seed == seeds[0]
            about = {"args": args, "suite": suite, "arm": arm, "seed": seed}
            if arm == "base":
                if first:
                    yield _run(arm, **about, method=None, rank=0, rate=0.0, rates={})
                continue
            rank = _rank(arm, args)
            rate, rates = choose_rate(suite, arm, rank, args)
            chosen = {"method": arm, "rank": rank, "rate": rate, "rates": rates}
            run = _run(f"{arm}-seed{seed}", **about, **chosen)
            if arm != "fft" and first:
                _train_seeds(run, seeds)
            yield run


def _run(name: str, args: argparse.Namespace, **about: Any) -> Run:
    path = args.out / args.suite / f"{name}.json"
    return Run(name=f"{args.suite}/{name}", path=path, args=args, **about)


def _train_seeds(first: Run, seeds: Sequence[int]) -> None:
    """Trains together the seeds of an arm that have no result yet."""
    folder = first.args.workdir / first.args.suite
    left = []
    for seed in seeds:
        run = dataclasses.replace(first, seed=seed)
        if not first.path.with_name(f"{first.arm}-seed{seed}.json").exists():
            left.append((run.setup(), folder / f"{first.arm}-seed{seed}"))
    for error in train_together(left, first.args.replicas).values():
        raise error


def _rank(method: str, args: argparse.Namespace) -> int:
    """The rank at which a method has about the parameters of ffba at `--rank`; 1 for fft."""
    if method == "fft":
        return 1
    config = load_config(args.model)
    return rank_for(method, config, trained_parameters(config, AdapterConfig("ffba", args.rank)))


def score(
    suite: Suite, adapter: Path | None, scored: dict[str, Any] | None, args: argparse.Namespace
) -> dict[str, Any]:
    """The scores of the first `--limit` items of each test set, and the loss of their reference
    answers. scored: the former, if the run has made them."""
    profile = PROFILES[args.profile]
    settings = Settings(
        protocol=suite.protocol, batch_size=profile.eval_batch, max_length=suite.max_length + 256
    )
    tasks = load_task_data(suite.tests, args.data_dir, settings, limit=args.limit)
    model = load_adapted(args.model, adapter and str(adapter), profile.dtype)
    result = scored or evaluate_tasks(tasks, model, settings)
    for name, losses in item_losses(model, tasks).items():
        nats, sizes = zip(*losses, strict=True)
        result["tasks"][name] |= {
            "reference_loss": sum(nats) / sum(sizes),
            "reference_losses": nats,
            "reference_tokens": sizes,
        }
        # Long texts, and the data's own, are not published.
        for words in ("prompt", "texts"):
            result["tasks"][name].pop(words, None)
    return result


def _asked(suite: Suite, args: argparse.Namespace) -> dict[str, Any]:
    """The settings that all results of one table share."""
    return {
        "model": args.model,
        "profile": args.profile,
        "rank": args.rank,
        "steps": args.steps or suite.steps,
        "limit": args.limit,
        "validation_size": args.validation_size,
        "allow_contaminated": args.allow_contaminated,
    }


def check_comparable(args: argparse.Namespace) -> None:
    """Raises UserError if OUT/SUITE, which becomes one table, holds results of other settings."""
    asked = _asked(SUITES[args.suite], args)
    for path in sorted((args.out / args.suite).glob("*.json")):
        if differ := differences({**_FIRST, **read_result(path)["asked"]}, asked):
            raise UserError(f"{path}, of the same table, has {differ}; name another --out")


def check(args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """The arms and the seeds. Raises UserError for bad flags and unreadable test sets."""
    if args.suite not in SUITES:
        raise UserError(f"--suite {args.suite!r} is unknown; {near_misses(args.suite, SUITES)}")
    if args.profile not in PROFILES:
        raise UserError(
            f"--profile {args.profile!r} is unknown; {near_misses(args.profile, PROFILES)}"
        )
    arms = check_names("--methods", args.methods, ARMS, "unknown here")
    for flag in ("steps", "limit", "validation_size", "replicas"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value} must be a positive integer")
    seeds = read_seeds(args.seeds)
    check_writable(args.out / args.suite / "base.json", "--out")
    check_comparable(args)
    for task in SUITES[args.suite].tests:
        load_examples(get_task(task), "test", args.data_dir)
    return arms, seeds


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.accuracy", __doc__, FLAGS)
    args.workdir = args.workdir or workdir_of(args.out, OUT)
    arms, seeds = check(args)
    for run, result in outcomes(runs(SUITES[args.suite], arms, seeds, args)):
        found = {task: metrics(scores) for task, scores in result["evaluation"]["tasks"].items()}
        line = f"{run.arm}, seed {run.seed}, {result['minutes']:.1f} minutes: {found}"
        print(line, file=sys.stderr)
        write_tables(args)
    print(write_tables(args))


if __name__ == "__main__":
    run_command(main)
