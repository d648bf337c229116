"""Settings of the machine that would change or stop a computation: 64 bits, absent devices, no home directory."""

import json
import os
import pwd
import subprocess
import sys

import jax
import pytest

from flora_jax.device import check_device
from flora_jax.errors import UserError
from flora_jax.evaluation.run import evaluate_tasks
from flora_jax.files import cache_root, keep_programs
from flora_jax.inference.generator import Generator
from flora_jax.interop import exports
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.models.adapted import Adapted
from flora_jax.models.config import LlamaConfig
from flora_jax.train import run


def test_64_bits_are_refused_by_what_computes(small, tmp_path):
    """A float64 in a schedule or a sample is another adapter and another text."""
    config = LlamaConfig.preset("tiny")
    with jax.enable_x64(True):
        for work in (
            lambda: run(small(), tmp_path / "w"),
            lambda: load_adapted("nowhere", None),
            lambda: Generator(config, {}, max_length=16, batch_size=1),
            lambda: evaluate_tasks([], Adapted(config=config, base={})),
            lambda: exports.load_pair("nowhere", tmp_path / "a", "peft", None),
        ):
            with pytest.raises(UserError, match=r"JAX_ENABLE_X64.* is on"):
                work()
    assert not (tmp_path / "w").exists()


_CHECKS = "from flora_jax.errors import run_command\nfrom flora_jax.device import check_jax\n"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JAX_PLATFORMS": "cpu,rubbish"}, "JAX_PLATFORMS=cpu,rubbish"),
        ({"JAX_ENABLE_X64": "1"}, "JAX_ENABLE_X64"),
    ],
)
def test_a_variable_is_named_in_one_line(variables, words):
    code = _CHECKS + "run_command(lambda _: check_jax())"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr


def test_cuda_without_its_plugin(monkeypatch):
    """JAX then only asserts that there is some device."""

    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match=r"JAX_PLATFORMS=.*no plugin for it is installed.*cpu"):
        check_device()


def test_no_home_directory(monkeypatch, tmp_path, capsys):
    """As in a container that is run under a user number of its own: only what needs the cache says so."""

    def absent(number):
        raise KeyError(number)

    for name in ("HOME", "FLORA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", absent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^FLORA_CACHE is unset, and there is no home directory"
    ) as error:
        cache_root()
    assert "\n" not in str(error.value)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", before)
    assert (
        (err := capsys.readouterr().err).startswith("warning: ")
        and err.count("\n") == 1
        and "FLORA_CACHE" in err
    )
    assert not list(tmp_path.iterdir())
    code = "from flora_jax.evaluation.rouge import rouge\nimport json\nprint(json.dumps(rouge(['a b'], [['a b']])))"
    code = f"import pwd\n\ndef absent(number):\n    raise KeyError(number)\n\npwd.getpwuid = absent\n{code}"
    environment = {key: value for key, value in os.environ.items() if key != "NLTK_DATA"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["rougeL"] == 1.0, done.stderr
