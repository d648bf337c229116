"""Stopping and going on: killed, told to stop, or finished, a run ends as if nothing had happened;
and a workdir is never mixed with another run."""

import errno
import json
import random
import shutil
import signal
import time

import jax
import pytest
from support import numbers
from tensorboardX.proto.event_pb2 import Event
from tqdm import tqdm

from flora_jax.commands import noted_signals
from flora_jax.config import fields, get_config
from flora_jax.errors import Stopped, UserError
from flora_jax.train import run
from flora_jax.training import loop
from flora_jax.training.workdir import Metrics, check_workdir, held

STEPS = 24


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Packing, dropout and accumulation on; saved more seldom than logged, and validated at other
    steps."""
    return [
        "--config",
        "configs/tiny.py",
        "--config.data.generator.train=60",
        "--config.data.generator.validation=10",
        "--config.data.generator.test=6",
        "--config.data.validation_size=8",
        "--config.data.max_length=256",
        "--config.train.batch_size=4",
        "--config.train.accumulation=2",
        "--config.adapter.dropout=0.1",
        f"--config.train.steps={STEPS}",
        "--config.train.log_every=1",
        "--config.train.eval_every=4",
        "--config.train.save_every=6",
        "--config.train.keep=1",
    ]


@pytest.fixture(scope="module")
def uninterrupted(command, flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    done = command(*flags, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def wait_for(process, workdir, step):
    """Returns once the running process has logged this step."""
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"ended before step {step}: {process.communicate()[1]}")


def test_a_killed_run_goes_on_bit_equal(command, flags, uninterrupted, tmp_path):
    """Killed before its first checkpoint and again later, at steps drawn from a seed, the second
    time in a line."""
    draw, workdir = random.Random(0), tmp_path / "w"
    for step in (draw.randint(1, 3), draw.randint(8, STEPS - 4)):
        process = command.start(*flags, "--workdir", workdir)
        wait_for(process, workdir, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (workdir / "adapter").exists()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 23, "loss": 3.')
    done = command(*flags, "--workdir", workdir)
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr
    assert numbers(workdir) == numbers(uninterrupted)


def test_a_run_told_to_stop_saves_and_goes_on_bit_equal(command, flags, uninterrupted, tmp_path):
    workdir = tmp_path / "w"
    process = command.start(*flags, "--workdir", workdir)
    wait_for(process, workdir, 9)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert time.monotonic() - told < 30 and process.returncode == 1
    last = error.splitlines()[-1]
    stopped = int(last.split("stopped by a signal after step ")[1].split(",")[0])
    assert (
        "Traceback" not in error
        and 9 <= stopped < STEPS
        and (workdir / f"checkpoints/{stopped}").is_dir()
    )
    done = command(*flags, "--workdir", workdir)
    assert done.returncode == 0 and f"resuming after step {stopped}" in done.stderr, done.stderr
    assert numbers(workdir) == numbers(uninterrupted)


def test_a_finished_run_started_again_changes_nothing(command, flags, uninterrupted, tree_hash):
    before = tree_hash(uninterrupted)
    done = command(*flags, "--workdir", uninterrupted)
    assert done.returncode == 0, done.stderr
    assert tree_hash(uninterrupted) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small, quick_compile, hf_directory):
    """A run on a checkpoint directory and a file of records: `(folder, its configuration's
    fields)`."""
    folder = tmp_path_factory.mktemp("finished")
    records = folder / "mine.jsonl"
    records.write_text(
        "".join(
            json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) + "\n" for i in range(9)
        )
    )
    values = {
        "model.weights": str(hf_directory(folder / "model")),
        "data.tasks": str(records),
        "train.steps": 2,
    }
    run(small(**values), folder / "w")
    return folder, values


def test_two_runs_in_one_directory(finished, small):
    folder, values = finished
    with held(folder / "w"), pytest.raises(UserError, match="w is in use: another process"):
        run(small(**values), folder / "w")
    assert run(small(**values), folder / "w")["step"] == 2


def test_a_run_that_another_overtook(small, quick_compile, monkeypatch, tmp_path, tree_hash):
    """Both found the directory empty; while one waits for its weights the other trains there, to
    its end."""
    prepare, before = loop.prepare, {}

    def slow(config, workdir):
        prepared = prepare(config, workdir)
        monkeypatch.setattr(loop, "prepare", prepare)
        run(small(**{"train.steps": 2}), workdir)
        before.update(tree_hash(workdir))
        return prepared

    monkeypatch.setattr(loop, "prepare", slow)
    with pytest.raises(UserError, match=r"holds a run with config.train.seed=0, not 1"):
        run(small(**{"train.steps": 2, "train.seed": 1}), tmp_path / "w")
    assert tree_hash(tmp_path / "w") == before
    config, result = (
        json.loads((tmp_path / "w" / name).read_text()) for name in ("config.json", "eval.json")
    )
    assert config["config"]["train"]["seed"] == result["seed"] == 0


def test_a_kill_before_anything_was_written(small, tmp_path):
    """What is left of a config.json that was being written does not keep the same command from
    starting."""
    (tmp_path / "config.json.tmp").write_text('{"schema')
    (tmp_path / ".lock").touch()
    check_workdir(tmp_path, small())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        check_workdir(tmp_path, small())


def test_a_second_ctrl_c_ends_at_once():
    """Not the first one after a SIGTERM, which asked for a save; schedulers may send that more than
    once."""
    # where tests run in the background it is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with noted_signals() as noted:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert noted == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_closed_terminal_ends_a_run_as_a_termination_does():
    """Unless it is told not to: `nohup` has SIGHUP ignored. With other processes beside, all of
    them are to stop."""
    given = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]
    told = []
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
        with noted_signals() as noted:
            signal.raise_signal(signal.SIGHUP)
        assert noted == [signal.SIGHUP] and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        with noted_signals(alone=False) as noted:
            signal.raise_signal(signal.SIGHUP)
        assert noted == [] and told == [signal.SIGTERM]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with noted_signals() as noted:
            signal.raise_signal(signal.SIGHUP)
        assert noted == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGTERM), given, strict=True):
            signal.signal(number, handler)


def test_a_run_outlives_who_reads_what_it_says(small, quick_compile, capfd, monkeypatch, tmp_path):
    """A terminal that is closed gives an input/output error at every line; the checkpoint is
    written all the same."""
    write = Metrics.write

    def close(self, step, values):
        write(self, step, values)
        if step == 1:
            monkeypatch.setattr(tqdm, "write", lostly)
            signal.raise_signal(signal.SIGHUP)

    def lostly(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr(Metrics, "write", close)
    monkeypatch.setattr("flora_jax.training.report.silence", lambda _: None)
    with pytest.raises(Stopped, match="after step 2, which is saved"):
        run(small(), tmp_path / "w")
    signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "w/checkpoints/2").is_dir()


def test_scores_stay_until_there_are_new_ones(small, quick_compile, tmp_path, monkeypatch):
    config = small(
        **{
            "train.steps": 2,
            "eval.tasks": "chain_sum",
            "eval.protocol": "llm_adapters",
            "eval.limit": 2,
        }
    )
    scores = run(config, tmp_path / "w")["evaluation"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("flora_jax.finetune.evaluate_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "w")
    assert json.loads((tmp_path / "w/eval.json").read_text())["evaluation"] == json.loads(
        json.dumps(scores)
    )


def test_a_damaged_checkpoint_names_itself_and_the_one_before(small, quick_compile, tmp_path):
    config = small(**{"train.steps": 4, "train.save_every": 2})
    run(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/4/meta")
    with pytest.raises(
        UserError, match=r"checkpoint 4 of .*move .*checkpoints/4 elsewhere, .* goes on from step 2"
    ):
        run(config, tmp_path)
    (tmp_path / "checkpoints/4").rename(tmp_path / "elsewhere")
    assert run(config, tmp_path)["validation_losses"].keys() == {"0", "2", "4"}


def test_a_best_checkpoint_that_is_gone_is_named(small, quick_compile, monkeypatch, tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(loop, "validation_loss", lambda _: next(losses))
    config = small(**{"train.steps": 4, "train.eval_every": 2, "train.save_every": 2})
    assert run(config, tmp_path)["step"] == 2
    shutil.rmtree(tmp_path / "checkpoints/2/state")
    with pytest.raises(
        UserError, match=r"checkpoint 2 of .*, the best on validation, cannot be read .*--step 4"
    ):
        run(config, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter.rank", 4),
        ("adapter.method", "ffba"),
        ("train.seed", 1),
        ("optim.learning_rate", 2e-2),
        ("train.steps", 3),
        ("data.limit", 5),
        ("eval.tasks", "chain_sum"),
        ("model.weights", "random"),
    ],
)
def test_another_configuration_is_refused(finished, small, tree_hash, field, value):
    folder, values = finished
    before, config = tree_hash(folder), small(**values)
    with pytest.raises(UserError, match=f"holds a run with config.{field}=") as error:
        run(small(**{**values, field: value}), folder / "w")
    assert repr(fields(config)[field]) in str(error.value) and repr(value) in str(error.value)
    assert tree_hash(folder) == before


def test_another_base_and_other_records_are_refused(finished, small, tree_hash, hf_directory):
    folder, values = finished
    records, weights = folder / "mine.jsonl", folder / "model/model.safetensors"
    for file, change, words in (
        (
            records,
            lambda: records.write_text(records.read_text().replace("it is 3", "it is 4")),
            "mine.jsonl/train",
        ),
        (
            weights,
            lambda: hf_directory(folder / "model", seed=1),
            "trained on a base with fingerprint",
        ),
    ):
        original = file.read_bytes()
        change()
        before = tree_hash(folder)
        with pytest.raises(UserError, match=words) as error:
            run(small(**values), folder / "w")
        assert "\n" not in str(error.value) and tree_hash(folder) == before
        file.write_bytes(original)
    run(small(**values), folder / "w")


def test_refusals_exit_with_2_and_one_line(command, flags, uninterrupted, tree_hash):
    before = tree_hash(uninterrupted)
    done = command(*flags, "--config.adapter.rank=8", "--workdir", uninterrupted)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "config.adapter.rank=16, not 8" in done.stderr
    assert done.stderr.count("\n") == 1 and tree_hash(uninterrupted) == before


def test_what_a_resumed_run_may_change(finished, small, tree_hash, tmp_path):
    """Where prepared data lies, how often it logs and saves: nothing that enters its numbers."""
    folder, values = finished
    before = tree_hash(folder / "w")
    free = {
        "data.cache_dir": str(tmp_path),
        "train.log_every": 7,
        "train.save_every": 5,
        "train.keep": 9,
        "eval.limit": 3,
        "eval.batch_size": 2,
        "eval.max_length": 99,
        "eval.protocol": "lm_eval",
        "eval.max_new_tokens": 9,
        "mesh.data": 1,
        "model.remat": "none",
    }
    run(small(**{**values, **free}), folder / "w")
    assert tree_hash(folder / "w") == before


def test_resumed_in_the_middle_with_other_free_fields(small, quick_compile, monkeypatch, tmp_path):
    """Told to stop after step 5 and gone on with other intervals: the losses and the adapter are
    bit-equal."""
    values = {"train.steps": 10, "adapter.dropout": 0.1, "train.eval_every": 4}
    run(small(**values), tmp_path / "whole")
    write = Metrics.write

    def stop(self, step, line):
        write(self, step, line)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "write", stop)
        with pytest.raises(Stopped, match="after step 4"):
            run(small(**values), tmp_path / "w")
    free = {
        "train.save_every": 3,
        "train.log_every": 2,
        "train.keep": 1,
        "eval.limit": 3,
        "eval.protocol": "lm_eval",
        "eval.batch_size": 2,
        "eval.max_length": 99,
        "data.cache_dir": str(tmp_path / "cache"),
    }
    run(small(**values, **free), tmp_path / "w")
    (whole, *results), (parts, *again) = numbers(tmp_path / "whole"), numbers(tmp_path / "w")
    unlogged = [5, 7, 9]
    assert [line["step"] for line in parts if "loss" in line] == [1, 2, 3, 4, 6, 8, 10]
    assert parts == [line for line in whole if line["step"] not in unlogged] and again == results
    steps = {int(path.name) for path in (tmp_path / "w/checkpoints").iterdir()}
    assert 10 in steps and len(steps) <= 2  # the last, and the best if it is another


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 5, "lo')
    Metrics(tmp_path, get_config(), 3).close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:4])
    metrics = Metrics(tmp_path, get_config(), 0)
    metrics.write(0, {"loss": 2.0})
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "loss": 2.0}
    # TensorBoard forgets from step 1 on
    assert scalars(tmp_path)[-1] == [(1, []), (0, [("loss", 2.0)])]


def scalars(workdir):
    """`(step, [(name, value), …])` of each event after a file's first, by file: a record is its
    length in 8 bytes, 4 of a checksum, the event, and 4 of another."""
    found = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        data, events = file.read_bytes(), []
        while data:
            end = 12 + int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12:end])
            events.append(
                (event.step, [(value.tag, value.simple_value) for value in event.summary.value])
            )
            data = data[end + 4 :]
        found.append(events[1:])
    return found


def test_the_best_checkpoint_outlives_a_resume(finished, small, monkeypatch, tmp_path):
    """Best at step 2, stopped, and twice more saved: its adapter is still the one that comes
    out."""
    from flora_jax.interop.adapter_files import load_adapter
    from flora_jax.models.config import LlamaConfig
    from flora_jax.training import loop

    validation = {0: 9.0, 2: 1.0, 4: 2.0, 6: 2.0, 8: 3.0}
    monkeypatch.setattr(loop, "validation_loss", lambda run: validation[int(run.state.step)])
    config = small(**{"train.steps": 8, "train.keep": 1})
    run(config, tmp_path / "whole")
    write = Metrics.write

    def stop(self, step, values):
        write(self, step, values)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "write", stop)
        with pytest.raises(Stopped):
            run(config, tmp_path / "w")
    assert {p.name for p in (tmp_path / "w/checkpoints").iterdir()} > {"2"}
    summary = run(config, tmp_path / "w")
    assert summary["step"] == 2
    assert {p.name for p in (tmp_path / "w/checkpoints").iterdir()} == {"2", "8"}
    tiny = LlamaConfig.preset("tiny")
    _, a = load_adapter(tmp_path / "w/adapter", tiny)
    _, b = load_adapter(tmp_path / "whole/adapter", tiny)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))
    shutil.rmtree(tmp_path / "w/adapter")  # it can be had again
    run(config, tmp_path / "w")
    assert (tmp_path / "w/adapter/adapter_config.json").exists()
