"""What the tests of the training command share: one cache of prepared data, one of compiled
programs, small runs."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import PLANS, ROOT

from flora_jax.config import get_config
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import init_base
from flora_jax.models.tokenizer import load_tokenizer

# Without a device (as JAX looks for one, or through WSL) its plugin does not start, and then plans
# for no GPU either.
if (
    PLANS
    and not jax.config.jax_platforms
    and not any(Path("/dev", name).exists() for name in ("nvidia0", "dxg"))
):
    jax.config.update("jax_platforms", "cpu")
# XLA's older emitters compile in half the time what these tests run. Later jaxlibs have them no
# more.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    )
# Quick to compile, and kept: the runs of these tests are many and short, and most are one program.
_COMPILE = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="session")
def prompts():
    """Of unequal lengths, token ids of the tiny preset."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in (3, 21, 9, 16, 1)]


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """A folder that holds `data` and `programs`."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def quick_compile(caches):
    """Compiles without most optimizations and keeps the programs, as long as one module runs."""
    changed = {**_COMPILE, "jax_compilation_cache_dir": str(caches / "programs")}
    before = {name: jax.config.values[name] for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.clear_caches()


@pytest.fixture(scope="session")
def small(caches):
    """`small(method, **{"train.steps": 8})`: the configuration of configs/tiny.py, shrunk, with
    fields set."""

    def make(method="ffba_qg_add", **fields):
        config = get_config("tiny", method)
        values = {
            "model.weights": "random",
            "adapter.rank": 8,
            "data.tasks": "chain_sum",
            "data.max_length": 128,
            "data.generator.train": 60,
            "data.generator.validation": 10,
            "data.generator.test": 6,
            "data.cache_dir": str(caches / "data"),
            "data.validation_size": 8,
            "train.steps": 4,
            "train.batch_size": 4,
            "train.log_every": 1,
            "train.eval_every": 2,
            "train.save_every": 2,
            "optim.learning_rate": 1e-2,
            **fields,
        }
        for name, value in values.items():
            *section, field = name.split(".")
            part = config
            for key in section:
                part = part[key]
            with part.ignore_type() if value is None else part.unlocked():
                part[field] = value
        return config.lock()

    return make


@pytest.fixture(scope="session")
def hf_directory():
    """`hf_directory(path, seed=0)` writes a checkpoint directory of the tiny preset and returns its
    path."""
    config = LlamaConfig.preset("tiny")

    def make(path, seed=0):
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config.to_hf()))
        save_file(
            dict(to_hf_tensors(config, init_base(jax.random.key(seed), config))),
            path / "model.safetensors",
        )
        load_tokenizer("tiny").save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def tree_hash():
    """`tree_hash(path)`: every file below with a digest of its contents."""
    return lambda path: {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="session")
def folder_at():
    """`folder_at("FLORA_DATA", "data")`: the folder that the variable names, or else
    ../shared/data; skips without."""

    def find(variable, name):
        folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / name)
        if not folder.is_dir():
            pytest.skip(f"{variable} is unset and ../shared/{name} is absent")
        return folder

    return find


@pytest.fixture(scope="session")
def environment(caches):
    """The environment of a subprocess that runs the command."""
    settings = {name.upper(): str(value) for name, value in _COMPILE.items()}
    return {
        **os.environ,
        **settings,
        "JAX_COMPILATION_CACHE_DIR": str(caches / "programs"),
        "FLORA_CACHE": str(caches / "data"),
        "JAX_PLATFORMS": "cpu",
    }


@pytest.fixture(scope="session")
def command(environment):
    """`command(*flags)` runs `python -m flora_jax.train` to its end; `start(*flags)` only starts
    it."""

    def start(*flags, **variables):
        return subprocess.Popen(
            [sys.executable, "-m", "flora_jax.train", *map(str, flags)],
            cwd=ROOT,
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(*flags, **variables):
        process = start(*flags, **variables)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(flags, process.returncode, out, err)

    run.start = start
    return run
