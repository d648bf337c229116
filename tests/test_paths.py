"""Every path that a file system takes works with every command, and `~` is the home directory in
all of them."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from flora_jax import evaluate, export, files, generate, train
from flora_jax.config import get_config
from flora_jax.config_files import read_config
from flora_jax.errors import UserError, expand_path, run_command
from flora_jax.training.workdir import Metrics, check_workdir

pytestmark = pytest.mark.usefixtures("quick_compile")

# Patterns of glob, of str.format and of shells, separators of other programs, and what no one
# expects in a name.
NASTY = "-a[b]*?{c,d} %s=#é\n:;'\"\\$(x)&~."
# As of the fixture `small`, so that its compiled programs serve here, too.
CONFIG = """
from flora_jax.config import get_config as base


def get_config():
    config = base("tiny", "lora")
    config.adapter.rank = 8
    config.data.max_length = 128
    config.data.validation_size = 2
    config.train.steps = config.train.batch_size = 4
    config.train.eval_every = config.train.save_every = 2
    config.train.log_every = 1
    config.optim.learning_rate = 1e-2
    return config
"""
BOOLQ = {
    "instruction": "Is it so?\n\nAnswer format: true/false",
    "input": "",
    "output": "",
    "answer": "true",
}
TRAIN = (
    "--config=~/config.py",
    "--workdir=~/run",
    "--config.model.weights=~/base",
    "--config.data.dir=~/data",
    "--config.data.tasks=~/mine.jsonl,jsonl",
    "--config.data.cache_dir=~/cache",
)


def records(words):
    return "".join(
        json.dumps({"prompt": f"{words} {i}", "completion": f"it is {i}"}) + "\n" for i in range(8)
    )


def command(module, *flags):
    with pytest.raises(SystemExit) as ended:
        run_command(module.main, [module.__name__, *map(str, flags)])
    return ended.value.code


@pytest.fixture
def home_at(hf_directory, monkeypatch):
    """`home_at(path)` makes a home directory with a model, a configuration and records."""

    def make(home):
        hf_directory(home / "base")
        (home / "data/boolq").mkdir(parents=True)
        (home / "data/boolq/test.json").write_text(json.dumps([BOOLQ]))
        (home / "config.py").write_text(CONFIG)
        (home / "mine.jsonl").write_text(records("say"))
        for split in ("train", "validation", "test"):
            (home / f"data/{split}.jsonl").write_text(records(split))
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("FLORA_CACHE", "~/cache")
        return home

    return make


def test_every_command_below_a_home_with_every_sign(home_at, tmp_path, monkeypatch, capsys):
    """Stopped and resumed there, a run ends as below a plain home; and all else reads and writes
    there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plain = home_at(tmp_path / "plain")
    assert command(train, *TRAIN) == 0, capsys.readouterr().err
    home, write = home_at(tmp_path / NASTY / "home"), Metrics.write

    def stop(self, step, values):
        write(self, step, values)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "write", stop)
        assert command(train, *TRAIN) == 1
    capsys.readouterr()
    assert command(train, *TRAIN) == 0, capsys.readouterr().err
    assert "resuming after step 2" in capsys.readouterr().err
    file = "run/adapter/adapter_model.safetensors"
    assert (home / file).read_bytes() == (plain / file).read_bytes()

    asked = ("--model=~/base", "--adapter=~/run/adapter")
    scored = ("--tasks=boolq", "--data_dir=~/data", "--batch_size=1", "--out=~/new/scores.json")
    exported = ("--workdir=~/run", "--format=peft")
    for module, flags in (
        (evaluate, (*asked, *scored)),
        (generate, (*asked, "--prompt=say 1", "--max_new_tokens=2", "--max_length=16")),
        (export, (*exported, "--out=~/peft")),
        (export, (*exported, "--out=~/step", "--step=4")),
        (
            export,
            ("--model=~/base", "--adapter=~/run/adapter", "--format=merged", "--out=~/merged"),
        ),
    ):
        assert command(module, *flags) == 0, capsys.readouterr().err
    for made in ("new/scores.json", "peft/adapter_model.safetensors", "merged/model.safetensors"):
        assert (home / made).is_file()
    trained, last = (
        load_file(home / part / "adapter_model.safetensors") for part in ("peft", "step")
    )
    assert trained.keys() == last.keys()
    assert not list((tmp_path / "here").iterdir())  # no folder of the name ~


def test_where_no_second_name_can_be_had(tmp_path, monkeypatch):
    """Without Linux's names of open directories such paths are refused before anything is written,
    others are not."""
    monkeypatch.setattr(files, "_OPEN", str(tmp_path / "absent"))
    config = get_config("tiny")
    for path in (
        tmp_path / "sweep[lr=0.3]/run",
        Path("/gs/runs/1"),
        tmp_path / "a*",
        tmp_path / "a?",
    ):
        with pytest.raises(UserError, match=r"--workdir=.* is a pattern or an address"):
            check_workdir(path, config)
        assert not path.exists()
    for path in (tmp_path / "sweep-lr_0.3/run", tmp_path / "My Drive/ü,lr=0.3@x"):
        check_workdir(path, config)
        path.mkdir(parents=True)
        assert files.plain_path(path, "--workdir") == path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gs://bucket/run", "is an address"),
        ("s3://bucket/run", "is an address"),
        ("~nobody_here/x", "no such home"),
    ],
)
def test_what_is_no_path_is_refused(tmp_path, monkeypatch, capsys, path, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        expand_path(path)
    flags = {
        train: ("--config", Path(__file__).parent.parent / "configs/tiny.py", f"--workdir={path}"),
        evaluate: ("--model=tiny", "--tasks=piqa", f"--out={path}"),
        export: ("--workdir=x", "--format=peft", f"--out={path}"),
        generate: ("--prompt=x", f"--model={path}"),
    }
    for module, given in flags.items():
        assert command(module, *given) == 2
        assert words in (err := capsys.readouterr().err) and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_a_bare_name_is_a_configuration_of_the_package():
    """In a checkout those of configs/; a wheel carries them."""
    assert read_config("ffba_1b").to_dict() == read_config("configs/ffba_1b.py").to_dict()
    assert read_config("ablations:add_q").adapter.add_to == "q"
    with pytest.raises(UserError, match=r"--config=fba_1b: .*ffba_1b.*, or give a file"):
        read_config("fba_1b")
