"""Settings of the machine that would change or stop a computation: 64 bits, absent devices, no home
directory; and what a device is fast in."""

import json
import os
import pwd
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from flora_jax import device
from flora_jax.config import check_config, get_config
from flora_jax.device import check_device, fast_dtype
from flora_jax.errors import UserError
from flora_jax.evaluation.run import evaluate_tasks
from flora_jax.files import cache_root, keep_programs
from flora_jax.inference.generator import Generator
from flora_jax.interop import exports
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.models.adapted import Adapted
from flora_jax.models.config import LlamaConfig
from flora_jax.train import run
from flora_jax.training import cluster
from flora_jax.training.cluster import settle
from flora_jax.training.workdir import check_workdir


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
    config = get_config("tiny", "ffba")
    config.model.dtype = "auto"
    with pytest.raises(UserError, match="no plugin for it is installed"):
        settle(config)


def test_no_home_directory(monkeypatch, tmp_path, capsys):
    """As in a container that is run under a user number of its own: only what needs the cache says
    so."""

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
    code = (
        "from flora_jax.evaluation.rouge import rouge\nimport json\n"
        "print(json.dumps(rouge(['a b'], [['a b']])))"
    )
    code = (
        f"import pwd\n\ndef absent(number):\n    raise KeyError(number)\n\n"
        f"pwd.getpwuid = absent\n{code}"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NLTK_DATA"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["rougeL"] == 1.0, done.stderr


@pytest.mark.parametrize(
    "backend, capability, flags, dtype",
    [
        ("cpu", None, "fpu avx2 avx512f avx512_bf16 amx_tile", "bfloat16"),
        ("cpu", None, "fpu avx2 avx512f avx512_vnni", "float32"),
        ("cpu", None, None, "float32"),  # no Linux
        ("gpu", "9.0", "fpu avx2", "bfloat16"),
        ("gpu", "8.0", "fpu avx2", "bfloat16"),
        ("gpu", "7.5", "fpu avx512_bf16", "float32"),
        ("gpu", "gfx90a", "fpu", "float32"),
    ],
)
def test_what_a_device_is_fast_in(backend, capability, flags, dtype, monkeypatch, tmp_path):
    table = tmp_path / "cpuinfo"
    if flags:
        table.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    known = {} if capability is None else {"compute_capability": capability}
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**known)])
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(device, "_CPU", table)
    assert fast_dtype() == dtype


def test_a_run_is_settled(monkeypatch, tmp_path):
    """What `auto` stood for is what config.json has, and no run goes on in another dtype."""
    config = get_config("tiny", "ffba")
    config.model.dtype = config.model.param_dtype = "auto"
    check_config(config)
    monkeypatch.setattr("flora_jax.training.cluster.fast_dtype", lambda: "bfloat16")
    settled = settle(config)
    assert settled.model.dtype == settled.model.param_dtype == "bfloat16"
    assert config.model.dtype == "auto"
    assert settle(settled) is settled
    (tmp_path / "config.json").write_text(json.dumps({"config": settled.to_dict()}))
    check_workdir(tmp_path, settle(config))
    monkeypatch.setattr("flora_jax.training.cluster.fast_dtype", lambda: "float32")
    with pytest.raises(UserError, match=r"config\.model\.(param_)?dtype='bfloat16'"):
        check_workdir(tmp_path, settle(config))


@pytest.mark.parametrize("halves, dtype", [([True, True], "bfloat16"), ([True, False], "float32")])
def test_processes_settle_on_one_dtype(halves, dtype, monkeypatch):
    """Or each would compile a program of its own, and wait for the others in another's."""
    config = get_config("tiny", "ffba")
    config.model.dtype = "auto"
    monkeypatch.setattr(cluster, "fast_dtype", lambda: "bfloat16")
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    gather = "flora_jax.training.cluster.multihost_utils.process_allgather"
    monkeypatch.setattr(gather, lambda mine: np.asarray(halves))
    assert settle(config).model.dtype == dtype
