"""The sweep of experiments/accuracy.py on the tiny model: what it leaves, that it goes on, that it
repeats itself."""

import argparse
import csv
import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import ablations, accuracy, report
from experiments import sweep as engine
from experiments.report import beside, differences
from flora_jax import finetune
from flora_jax.adapters import METHODS, AdapterConfig
from flora_jax.analysis.results import about_process, about_runs
from flora_jax.analysis.variants import rank_for, trained_parameters
from flora_jax.config import check_config, get_config
from flora_jax.errors import UserError
from flora_jax.files import write_json
from flora_jax.models.config import LlamaConfig
from flora_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compile")

SUITE = accuracy.Suite(("gsm8k", "samsum"), ("AddSub", "samsum"), "llm_adapters", 128, 3, 2)


@pytest.fixture
def sweep(tmp_path, hf_directory, caches, monkeypatch):
    """`sweep("base,lora", out="a")` runs the command on a tiny suite; returns the JSON of each run
    by name."""
    monkeypatch.setitem(accuracy.SUITES, "tiny", SUITE)
    monkeypatch.setenv("FLORA_CACHE", str(caches / "data"))
    monkeypatch.chdir(tmp_path)  # where runs/ is
    model, data = hf_directory(tmp_path / "model"), tmp_path / "data"
    for task, split, first in (("gsm8k", "train", 0), ("AddSub", "test", 500)):
        (data / task).mkdir(parents=True)
        records = [
            {"instruction": f"What is {i} + 1?", "output": "", "answer": str(i + 1)}
            for i in range(first, first + 30)
        ]
        (data / task / f"{split}.json").write_text(json.dumps(records))
    (data / "samsum").mkdir()
    for split, first in (("train", 0), ("test", 500)):
        lines = [
            json.dumps({"dialogue": f"A: I am {i}.", "summary": f"A is {i}."})
            for i in range(first, first + 30)
        ]
        (data / "samsum" / f"{split}.jsonl").write_text("\n".join(lines))

    def run(methods, out="a", *flags):
        accuracy.main(
            [
                "accuracy",
                "--suite",
                "tiny",
                "--data_dir",
                str(data),
                "--model",
                str(model),
                "--rank",
                "8",
                "--methods",
                methods,
                "--limit",
                "4",
                "--validation_size",
                "4",
                "--out",
                out,
                *flags,
            ]
        )
        return {p.stem: json.loads(p.read_text()) for p in (tmp_path / out / "tiny").glob("*.json")}

    return run


def numbers(run):
    """What must not depend on when and how often it ran."""
    scores = {
        task: {k: v for k, v in s.items() if k != "seconds"}
        for task, s in run["evaluation"]["tasks"].items()
    }
    return [
        run.get(k)
        for k in ("rank", "parameters", "learning_rate", "validation_losses", "loss_curve", "data")
    ], scores


@pytest.mark.slow
@pytest.mark.parametrize("rates", [[], ["--rate_steps", "1"]])
def test_replicas_are_what_runs_are_alone(sweep, monkeypatch, rates):
    together = []
    given = engine.train_replicas

    def train_replicas(configs, workdirs):
        together.append([workdir.name for workdir in workdirs])
        return given(configs, workdirs)

    monkeypatch.setattr(engine, "train_replicas", train_replicas)
    alone = sweep("ffba", "a", "--seeds", "0,1,2", *rates)
    assert not together
    found = sweep("ffba", "b", "--seeds", "0,1,2", "--replicas", "2", *rates)
    assert together[-1] == ["ffba-seed0", "ffba-seed1"]
    assert len(together) == (3 if rates else 1)  # of five rates two and two
    assert found.keys() == alone.keys()
    for name, run in found.items():
        for part in ("validation_losses", "loss_curve", "rates_tried"):
            assert run[part] == pytest.approx(alone[name][part], rel=1e-4), (name, part)


@pytest.mark.slow
def test_a_sweep_goes_on_and_repeats_itself(sweep, tmp_path, monkeypatch, capsys):
    """Killed at ffba's first checkpoint and again between its two tests."""
    given, given_save, given_scores = engine.run, Checkpoints.save, finetune.evaluate_tasks
    started, saved, kills = [], [], ["training", "scoring"]

    def run(config, workdir):
        started.append(workdir.name)
        return given(config, workdir)

    def save(self, state, *rest):
        given_save(self, state, *rest)
        saved.append((started[-1], int(state.step)))
        if saved[-1] == ("ffba-seed0", 1) and "training" in kills:
            kills.remove("training")
            raise KeyboardInterrupt

    def scores(tasks, *rest, **settings):
        if started[-1] == "ffba-seed0" and "scoring" in kills:
            kills.remove("scoring")
            given_scores(tasks[:1], *rest, **settings)
            raise KeyboardInterrupt
        return given_scores(tasks, *rest, **settings)

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(finetune, "evaluate_tasks", scores)
    for methods in ("base,lora,ffba", "ffba"):
        with pytest.raises(KeyboardInterrupt):
            sweep(methods)
    assert not kills and not (tmp_path / "a/tiny/ffba-seed0.json").exists()
    found = sweep("base,lora,ffba", "a", "--seeds", "0,1")
    # Nothing that was finished, and no step that was saved.
    assert started == [
        "lora-seed0",
        "ffba-seed0",
        "ffba-seed0",
        "ffba-seed0",
        "lora-seed1",
        "ffba-seed1",
    ]
    assert [step for name, step in saved if name == "ffba-seed0"] == [1, 2, 3]
    assert found.keys() == {"base", "lora-seed0", "lora-seed1", "ffba-seed0", "ffba-seed1"}
    again = sweep("ffba", "b")
    assert [step for _, step in saved[-3:]] == [1, 2, 3]  # another OUT trains anew
    assert (
        numbers(again["ffba-seed0"]) == numbers(found["ffba-seed0"]) != numbers(found["ffba-seed1"])
    )

    lora, ffba = found["lora-seed0"], found["ffba-seed0"]
    assert (
        abs(lora["parameters"] / ffba["parameters"] - 1) < 0.1
        and lora["learning_rate"] == METHODS["lora"].learning_rate
    )
    assert len(ffba["loss_curve"]) >= 1 and ffba["data"]["share_of_test_in_train"] == {
        "AddSub": 0.0,
        "samsum": 0.0,
    }
    assert ffba["config"]["adapter"]["rank"] == 8 and ffba["provenance"]["versions"]["jax"]
    tasks = ffba["evaluation"]["tasks"]
    assert (
        tasks["AddSub"]["n"] == 4 == len(tasks["AddSub"]["items"])
        and 0 <= tasks["AddSub"]["accuracy"] <= 1
    )
    assert (
        0 <= tasks["samsum"]["rougeL"] <= tasks["samsum"]["rougeL_max"] <= 1
        and tasks["samsum"]["reference_loss"] > 0
    )
    assert str(tmp_path) not in json.dumps(ffba["config"]["data"])
    assert "I am 5" not in json.dumps(found)  # none of the data's own text

    table = (tmp_path / "a/tiny.md").read_text()
    assert table in capsys.readouterr().out
    assert re.search(r"^\| ffba \| 8 \| [\d,]+ \| 0.0003 \| 2 \| \d+\.\d \|", table, re.M)
    assert "samsum rougeLsum" in table and "difference to lora" in table
    assert "± standard error over seeds or, of one seed, over items" in table  # base has one
    assert (tmp_path / "a/tiny.png").stat().st_size > 10_000
    rows = {
        (r["method"], r["task"], r["metric"]): r
        for r in csv.DictReader((tmp_path / "a/tiny.csv").open())
    }
    losses = [
        found[f"ffba-seed{s}"]["evaluation"]["tasks"]["samsum"]["reference_loss"] for s in (0, 1)
    ]
    row = rows["ffba", "samsum", "reference_loss"]
    assert float(row["mean"]) == pytest.approx(np.mean(losses)) and row["seeds"] == "2"
    assert (
        float(row["stderr"]) == pytest.approx(abs(losses[0] - losses[1]) / 2)
        and row["stderr_over"] == "seeds"
    )
    minutes = [found[f"ffba-seed{s}"]["minutes"] for s in (0, 1)]
    assert float(row["minutes"]) == pytest.approx(np.mean(minutes))
    # A sum over tokens, as the score is: the difference of two methods' is that of their scores.
    differ = {
        tuple(r.values())[:4]: r for r in csv.DictReader((tmp_path / "a/tiny_pairs.csv").open())
    }
    assert len(differ) == 3 * 2 * 2 * 2  # three methods beside two others, two tasks, two metrics
    other = rows["lora", "samsum", "reference_loss"]
    found = {
        k: float(v)
        for k, v in differ["ffba", "lora", "samsum", "reference_loss"].items()
        if k[0] in "dlh"
    }
    assert found["difference"] == pytest.approx(float(row["mean"]) - float(other["mean"]), abs=1e-9)
    assert found["low"] <= found["difference"] <= found["high"] and found["low"] < found["high"]
    for flags, words in (
        (("--validation_size", "2"), r"of the same table, has validation_size=4 \(now 2\)"),
        (("--profile", "gpu"), r"of the same table, has profile='cpu' \(now 'gpu'\)"),
        (("--steps", "2"), r"of the same table, has steps=3 \(now 2\)"),
        (("--limit", "3"), r"of the same table, has limit=4 \(now 3\)"),
    ):
        with pytest.raises(UserError, match=words):
            sweep("ffba", "a", *flags)
    result = tmp_path / "a/tiny/ffba-seed0.json"
    kept = result.read_text()
    changed = json.loads(kept)
    changed["config"]["train"]["batch_size"] = 3
    result.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"was run with train.batch_size=3 \(now 2\)"):
        sweep("ffba")
    result.write_text(kept)
    records = tmp_path / "data/AddSub/test.json"
    kept = records.read_text()
    records.write_text(json.dumps(json.loads(kept)[1:]))
    with pytest.raises(UserError, match="other records of AddSub/test"):
        sweep("ffba")
    records.write_text(kept)
    rates = {"model": str(tmp_path / "model"), "chosen": 5e-4, "validation_losses": {"5e-4": 1.0}}
    write_json(tmp_path / "a/rates/ffba.json", rates)
    with pytest.raises(UserError, match=r"learning_rate=0.0003 \(now 0.0005\)"):
        sweep("ffba")


@pytest.mark.slow
def test_profiles(sweep, tmp_path):
    """What fills a GPU, rehearsed: bfloat16, more rows and validations; tables say which dtype."""
    on_cpu = sweep("lora", "a")["lora-seed0"]["config"]
    found = sweep("lora", "b", "--profile", "gpu", "--seeds", "0,1", "--replicas", "2")
    assert found.keys() == {"lora-seed0", "lora-seed1"}
    config = found["lora-seed0"]["config"]
    assert config["train"]["batch_size"] == 4 * on_cpu["train"]["batch_size"]
    assert config["model"]["dtype"] == config["model"]["param_dtype"] == "bfloat16"
    assert on_cpu["model"]["dtype"] == "float32"
    assert found["lora-seed0"]["validation_losses"].keys() == {"0", "1", "2", "3"}
    assert "bfloat16, 3 steps" in (tmp_path / "b/tiny.md").read_text()
    assert "float32, 3 steps" in (tmp_path / "a/tiny.md").read_text()


def test_tables_of_one_seed(tmp_path, monkeypatch):
    """Without any training: errors over items as the results have them, and what tells two methods
    apart."""
    monkeypatch.setattr("sys.argv", ["accuracy"])
    items = {"base": [0, 0, 1, 1], "lora": [0, 1, 1, 1]}
    for place, (arm, own) in enumerate(items.items()):
        chosen = {"accuracy": np.mean(own), "stderr": 0.25, "reference_loss": 1.5, "items": own}
        written = {"rougeL": 0.5, "rougeL_stderr": 0.125, "items": [0.25, 0.75]}
        write_json(
            tmp_path / "tiny" / f"{arm}.json",
            {
                "arm": arm,
                "asked": {"model": "m", "steps": 3, "limit": 4},
                "minutes": 2.5 + place,
                "evaluation": {
                    "protocol": "llm_adapters",
                    "tasks": {"AddSub": chosen, "samsum": written},
                },
                "provenance": {"device": "a machine", "date": "2026-11-20"},
            },
        )
    table = accuracy.write_tables(argparse.Namespace(out=tmp_path, suite="tiny", data_dir="DIR"))
    assert (
        "means over seeds (± standard error over items; the reference loss has none over items)"
        in table
    )
    assert "| base |  |  |  | 1 | 2.5 |  | 0.500 ± 0.250 | 1.500 | 0.500 ± 0.125 |" in table
    rows = list(csv.DictReader((tmp_path / "tiny.csv").open()))
    errors = [(row["metric"], row["stderr"], row["stderr_over"]) for row in rows[:3]]
    assert errors == [
        ("accuracy", "0.25", "items"),
        ("reference_loss", "", "items"),
        ("rougeL", "0.125", "items"),
    ]
    # Of the reference loss, which these results do not have by item, there is none.
    differ = list(csv.DictReader((tmp_path / "tiny_pairs.csv").open()))
    assert [tuple(row.values())[:4] for row in differ] == [
        (*two, *task)
        for task in (("AddSub", "accuracy"), ("samsum", "rougeL"))
        for two in (("lora", "base"), ("base", "lora"))
    ]
    beside = [
        [float(row[name]) for name in ("difference", "low", "high")]
        for row in differ
        if row["beside"] == "lora"
    ]
    mean, low, high = beside[0]
    assert (mean, low, high) == report.paired_bootstrap(
        *map(np.array, items.values())
    ) and low < mean < high
    assert beside[1] == [0, 0, 0]
    assert f"| base | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | +0.000 [+0.000, +0.000] |" in table


def test_every_out_has_its_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)

    def of(out):
        return engine.workdir_of(Path(out), ablations.OUT)

    usual = "experiments/results/ablations"
    for out in (usual, f"./{usual}/", tmp_path / usual, f"link/{usual}"):
        assert of(out) == Path("runs/ablations")
    assert of("b/a-c") == of(tmp_path / "b/../b/a-c") == Path(f"runs/ablations{tmp_path}/b/a-c")
    others = ("a", "b/a", "b-a", "../a", f"{usual}2", "results/ablations")
    assert len({of(out) for out in (usual, *others)}) == 7


def test_rates_are_chosen_on_validation_and_the_grid_grows(tmp_path, monkeypatch):
    """Losses of a parabola in log rate: one whose best lies inside the grid, one whose best lies
    beyond its edge."""
    fields = {"suite": "dialogue", "profile": "cpu", "model": "m", "steps": None, "data_dir": "d"}
    fields["allow_contaminated"] = False
    monkeypatch.setattr(accuracy, "about_run", lambda args: {})
    for best, tried in ((3e-4, 5), (3e-2, 8), (1e-4, 5)):
        asked = []

        def run(config, workdir, best=best, asked=asked):
            asked.append(config.optim.learning_rate)
            if config.optim.learning_rate > 20 * best:
                raise FloatingPointError("the loss is nan at step 3")
            return {"validation_losses": {"5": np.log(config.optim.learning_rate / best) ** 2}}

        monkeypatch.setattr(engine, "run", run)
        args = argparse.Namespace(
            rate_steps=5,
            replicas=1,
            validation_size=4,
            limit=2,
            workdir=tmp_path,
            out=tmp_path / f"{best}",
            **fields,
        )
        choose = functools.partial(accuracy.choose_rate, accuracy.SUITES["dialogue"], "ffba", 32)
        rate, losses = choose(args)
        assert rate == pytest.approx(best, rel=0.1) and len(asked) == len(losses) == tried
        assert min(losses) < rate < max(losses) and max(losses) / min(losses) > 90
        args.rate_steps = 0
        assert choose(args) == (rate, losses) and len(asked) == tried  # none is tried twice
        begun = {
            "model": "m",
            "suite": "math",
            "rank": 32,
            "steps": 5,
            "validation_losses": {"1e-3": 1.0},
        }
        args.rate_steps, args.out = 5, tmp_path / f"begun {best}"
        write_json(args.out / "rates/ffba.json", begun)
        with pytest.raises(UserError, match="unfinished search at suite='math', not 'dialogue'"):
            choose(args)
        args.rate_steps = 0
        assert choose(args) == (METHODS["ffba"].learning_rate, {})
        args.model = "n"
        with pytest.raises(UserError, match="has the rate for --model m, not n"):
            choose(args)
        args.model, args.out = "m", tmp_path / "elsewhere"
        assert choose(args) == (METHODS["ffba"].learning_rate, {})


def test_a_rate_belongs_to_its_profile(tmp_path):
    """A search from before profiles is a CPU's."""
    path = tmp_path / "ffba.json"
    write_json(path, {"model": "m", "suite": "dialogue", "rank": 32, "steps": 5, "chosen": 1e-3})
    args = argparse.Namespace(model="m", suite="dialogue", rate_steps=5, profile="cpu")
    assert accuracy._rates_on_record(path, 32, args)["chosen"] == 1e-3
    args.profile = "gpu"
    with pytest.raises(UserError, match="has the rate for --profile cpu, not gpu"):
        accuracy._rates_on_record(path, 32, args)


def test_arms_have_the_budget_as_nearly_as_their_ranks_allow():
    config = LlamaConfig.preset("smollm2-135m")
    budget = trained_parameters(config, AdapterConfig("ffba", 32))
    ranks = {
        arm: rank_for(arm, config, budget) for arm in accuracy.ARMS if arm not in ("base", "fft")
    }
    assert ranks == {
        "lora": 18,
        "ffba_qg_add": 32,
        "ffba": 32,
        "fpa": 80,
        "ffa": 32,
        "zflora": 30,
    }
    counts = {arm: trained_parameters(config, AdapterConfig(arm, r)) for arm, r in ranks.items()}
    assert all(abs(counts[arm] / budget - 1) < 0.02 for arm in counts if arm != "ffa")
    for method, parameters in (("fft", budget), ("lora", 0)):
        with pytest.raises(UserError, match="fft has no adapter"):
            rank_for(method, config, parameters)


def test_a_table_names_the_devices_of_its_runs(monkeypatch):
    monkeypatch.setattr("sys.argv", ["accuracy"])
    made = [
        {"provenance": {"device": device, "date": f"2026-11-2{day}"}}
        for device, day in zip("abab", "3142", strict=True)
    ]
    about = about_runs(made, argparse.Namespace(data_dir="DIR"))
    assert (about["device"], about["date"]) == ("a and b", "2026-11-24") and about["versions"][
        "jax"
    ]


def test_a_new_method_needs_a_rate(monkeypatch):
    row = dataclasses.replace(METHODS["ffba_qg_add"], learning_rate=None)
    monkeypatch.setitem(METHODS, "ffba_v_add", row)
    config = get_config("tiny", "ffba_v_add")
    with pytest.raises(
        UserError, match=r"optim.learning_rate is unset, and ffba_v_add has none of its own"
    ):
        check_config(config)
    config.optim.learning_rate = 1e-3
    check_config(config)


def test_paired_bootstrap():
    ones, half = np.ones(50), np.tile([0.0, 1.0], 25)
    assert report.paired_bootstrap(ones, ones) == (0, 0, 0)
    mean, low, high = report.paired_bootstrap(ones, half)
    assert mean == 0.5
    # A binomial's normal approximation.
    assert (low, high) == pytest.approx(
        (0.5 - 1.96 * 0.5 / 50**0.5, 0.5 + 1.96 * 0.5 / 50**0.5), abs=0.02
    )
    # Sums over sums of sizes: as with each item drawn, and both sides added up, in turn.
    rng = np.random.default_rng(1)
    ours, theirs, sizes = rng.normal(5, 1, 20), rng.normal(4, 1, 20), rng.integers(1, 9, 20)
    drawn = np.random.default_rng(0).integers(0, 20, (10_000, 20))
    scores = [ours[d].sum() / sizes[d].sum() - theirs[d].sum() / sizes[d].sum() for d in drawn]
    mean, low, high = report.paired_bootstrap(ours, theirs, sizes)
    assert mean == pytest.approx((ours.sum() - theirs.sum()) / sizes.sum())
    assert (low, high) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))


def test_what_is_refused(tmp_path):
    common = ["accuracy", "--data_dir", str(tmp_path), "--out", str(tmp_path / "out")]

    def run(*flags):
        return accuracy.main([*common, *flags])

    for flags, words in (
        (["--suite", "dialog"], "'dialogue'"),
        (["--suite", "dialogue", "--methods", "lora,pf_lora"], "'pf_lora' is unknown here"),
        (["--suite", "dialogue", "--profile", "tpu"], "--profile 'tpu' is unknown; .*cpu"),
        (["--suite", "dialogue", "--seeds", "0,x"], "--seeds"),
        (["--suite", "dialogue", "--methods", ","], "--methods ',' names none"),
        (["--suite", "dialogue"], "dailydialogpp"),
    ):
        with pytest.raises(UserError, match=words):
            run(*flags)


def test_differences_of_configurations():
    """A field that is younger than the record had its default then; those that change no number do
    not count."""
    asked = get_config("smollm2-135m", "ffba").to_dict()
    record = get_config("smollm2-135m", "ffba").to_dict()
    (
        record["model"].pop("remat"),
        record["data"].update(dir="elsewhere"),
        record["adapter"].pop("dropout"),
    )
    assert differences(record, asked) == ""
    asked["adapter"]["dropout"] = 0.5
    assert differences(record, asked) == "adapter.dropout=0.0 (now 0.5)"
    asked["adapter"]["dropout"], asked["test_items"] = 0.0, 3
    assert differences(record, asked) == "test_items='absent' (now 3)"


def test_the_datas_place_is_not_recorded(monkeypatch):
    for flags in (["--data_dir", "/home/me/my data"], ["--data_dir=/home/me/my data"]):
        monkeypatch.setattr("sys.argv", ["accuracy", "--suite", "math", *flags])
        command = about_process(data_dir="/home/me/my data")["command"]
        assert "DIR" in command and "/home/me" not in command and "--data_dir" in command
    # Nor is any other place on this machine.
    monkeypatch.setattr(
        "sys.argv", ["x", "--model", "/home/me/tuned", "--out=/home/a b", "--rates", "1/2"]
    )
    assert about_process()["command"].endswith("--model tuned '--out=a b' --rates 1/2")


def test_results_lie_under_the_whole_name():
    assert beside(Path("o/bank_llama3.2-1b"), ".md") == Path("o/bank_llama3.2-1b.md")
    assert beside(Path("o/bank.json"), ".md") == Path("o/bank.md")
    with pytest.raises(UserError, match=r"--out \. must end in a name"):
        beside(Path("."), ".md")
