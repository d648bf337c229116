"""Training on several devices computes what one device computes, and each holds what it should."""

import itertools
import json
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from support import ROOT

from flora_jax.adapters import BLOCKS, PROJECTIONS, AdapterConfig, abstract_adapter
from flora_jax.adapters import METHODS as ROWS
from flora_jax.adapters.leaves import adapter_leaves
from flora_jax.errors import UserError
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import leaf_shapes
from flora_jax.models.llama import abstract_base
from flora_jax.train import run
from flora_jax.training.rules import decide, paths
from flora_jax.training.sharding import AXES, make_mesh, sharding_rules, shardings

TINY = LlamaConfig.preset("tiny")
METHODS = ("lora", "ffba", "fft")
SETTINGS = {
    "train.batch_size": 8,
    "train.steps": 10,
    "train.eval_every": 0,
    "train.save_every": 5,
    "optim.learning_rate": 3e-3,
}
MESHES = ("8x1x1", "1x8x1", "2x2x2", "1x1x2")  # data, fsdp, tensor
# Each compiles for seconds, so not every method on every mesh by default.
FAST = ("ffba-2x2x2", "lora-1x8x1", "fft-2x2x2")
SLOW = tuple(
    f"{method}-{mesh}" for mesh in MESHES for method in METHODS if f"{method}-{mesh}" not in FAST
)
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def devices(count):
    """XLA's flags for this many CPU devices. Its concurrent scheduler starts independent
    collectives in another order on each device, and with fewer cores than devices they can wait for
    each other for ever."""
    return (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count} "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    )


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def processes(names):
    """The runs by the number of devices they need."""
    return {count: [name for name in names if math.prod(sizes(name)) == count] for count in (2, 8)}


def sizes(name):
    return [int(size) for size in name.split("-")[1].split("x")]


@pytest.fixture(scope="module")
def script(environment):
    """Runs tests/training/sharded_runs.py on this many devices."""

    def run_it(count, *arguments):
        command = [
            sys.executable,
            str(ROOT / "tests/training/sharded_runs.py"),
            *map(str, arguments),
        ]
        variables = {**environment, "XLA_FLAGS": devices(count)}
        return subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)

    return run_it


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small, quick_compile):
    """Ten steps of each method on one device."""
    folder = tmp_path_factory.mktemp("meshes")
    for method in METHODS:
        config = small(method, **SETTINGS)
        (folder / f"{method}.json").write_text(json.dumps(config.to_dict()))
        run(config, folder / method)
    return folder


@pytest.fixture(scope="module")
def ran(folder, script):
    """`ran(name)` makes sure of a run: the first asked for brings all of its kind, in one process a
    device count."""

    def ensure(name):
        if not (folder / name).exists():
            names = processes(FAST if name in FAST else SLOW)[math.prod(sizes(name))]
            process = script(math.prod(sizes(name)), "meshes", folder, ",".join(names))
            error = process.communicate(timeout=400)[1]
            assert process.returncode == 0, error
        return folder / name

    return ensure


@pytest.mark.parametrize("name", NAMES)
def test_every_mesh_computes_the_same(folder, ran, name):
    alone = losses(folder / name.split("-")[0])
    assert len(alone) == 10 and alone[-1] < alone[0]
    np.testing.assert_allclose(losses(ran(name)), alone, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_device_holds(ran, name):
    """Kernels and embedding whole over fsdp times tensor, norms whole everywhere, adapters over
    fsdp alone."""
    _, fsdp, tensor = sizes(name)
    held = json.loads((ran(name) / "held.json").read_text())
    leaves = held["frozen"] | held["trainable"]
    assert {path for path in leaves if path.startswith("params")} == {
        f"params/{path}" for path in leaf_shapes(TINY)
    }
    assert {path.startswith("params") for path in held["trainable"]} == {name.startswith("fft")}
    for path, (here, whole) in leaves.items():
        cuts = (
            fsdp
            if path.startswith("adapter")
            else 1
            if path.endswith("norm/scale")
            else fsdp * tensor
        )
        assert here == whole / cuts, path
    # AdamW's two moments lie as what they are of.
    trained = np.array(list(held["trainable"].values())).sum(0)
    assert held["moments"] == (2 * trained).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ffba", "lora"])
def test_a_quantised_base_on_a_mesh(folder, script, small, method):
    name = f"{method}_int8"
    config = small(method, **SETTINGS, **{"model.quantization": "int8"})
    (folder / f"{name}.json").write_text(json.dumps(config.to_dict()))
    run(config, folder / name)
    error = (process := script(8, "meshes", folder, f"{name}-2x2x2")).communicate(timeout=400)[1]
    assert process.returncode == 0, error
    alone = losses(folder / name)
    assert alone[-1] < alone[0] and alone != losses(folder / method)
    np.testing.assert_allclose(losses(folder / f"{name}-2x2x2"), alone, rtol=1e-4)
    held = json.loads((folder / f"{name}-2x2x2/held.json").read_text())["frozen"]
    here, whole = (sum(sizes) for sizes in zip(*held.values(), strict=True))
    assert here < 0.3 * whole


@pytest.fixture(scope="module")
def others(folder, ran, script, hf_directory):
    hf_directory(folder / "model")
    ran("lora-1x8x1")
    process = script(8, "others", folder)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    return folder


def test_a_run_goes_on_on_another_mesh(others):
    resumed = losses(others / "lora-resumed")
    assert resumed[:5] == losses(others / "lora-1x8x1")[:5]
    np.testing.assert_allclose(resumed, losses(others / "lora"), rtol=1e-4)


def test_weights_are_read_straight_into_shards(others):
    result = json.loads((others / "loaded.json").read_text())
    assert result["differ"] == []
    for path, (devices, here, whole) in result["devices"].items():
        assert devices == 8 and here == (whole if path.endswith("norm/scale") else whole / 8), path


def test_quantised_kernels_lie_as_the_kernels_would(others):
    """Codes over fsdp and tensor, scales along the columns that they are of."""
    result = json.loads((others / "quantised.json").read_text())
    assert len(result) == 4 * len(PROJECTIONS)
    for name, (same, share) in result.items():
        path, part = name.split()
        whole = {"codes": 1 / 8, "scale": 1 / 4 if "/o/" in path or "/down/" in path else 1 / 2}
        assert same and share == whole.get(part, 1), name


def test_attention_gathers_nothing(others):
    """Rows over data and fsdp and heads over tensor: each device computes its own."""
    assert json.loads((others / "attention.json").read_text()) == 0


@pytest.mark.parametrize(
    ("count", "fields", "words"),
    [
        (1, {"mesh.data": 2}, "does not fit 1 device"),
        (8, {"mesh.fsdp": 3}, "data,fsdp,tensor=-1,3,1 does not fit 8 device"),
        (8, {"mesh.data": -1, "mesh.fsdp": -1}, "only one axis may be -1"),
        (8, {"train.batch_size": 4}, "train.batch_size=4 in 1 micro-batch(es) of 4 rows"),
        (
            8,
            {"train.batch_size": 16, "train.accumulation": 4},
            "train.batch_size=16 in 4 micro-batch(es) of 4 rows",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(small, count, fields, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_mesh(small(**fields), [object()] * count)


@pytest.mark.parametrize(
    ("sizes", "processes"),
    [((2, 1, 4), 4), ((1, 2, 4), 4), ((2, 2, 2), 8), ((8, 1, 1), 3), ((1, 1, 8), 2)],
)
def test_each_process_feeds_rows_of_its_own(small, monkeypatch, sizes, processes):
    """Data times fsdp is a multiple of the processes, or refused: a tensor axis would cross
    them."""
    config = small(
        **{f"mesh.{axis}": size for axis, size in zip(AXES, sizes, strict=True)},
        **{"train.batch_size": 16},
    )
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    words = f"data x fsdp = {sizes[0] * sizes[1]} must be a multiple of {processes} processes"
    with pytest.raises(UserError, match=words):
        make_mesh(config, [object()] * 8)
    monkeypatch.setattr(jax, "process_count", lambda: sizes[0] * sizes[1])
    assert tuple(make_mesh(config, jax.devices() * 8).shape.values()) == sizes


def test_rules_fit_whatever_adapter_is_accepted():
    """Every method with every choice of targets and of add_to that AdapterConfig takes: each leaf
    of the model has a rule, and each rule a leaf."""
    base = [f"params/{path}" for path in leaf_shapes(TINY)]
    accepted = set()
    choices = [c for n in range(8) for c in itertools.combinations(PROJECTIONS, n)]
    for method, targets in itertools.product(ROWS, choices):
        within = ROWS[method].reads == "input"  # other methods add to every target or to none
        for add_to in [None, *(c for c in choices if within and set(c) <= set(targets))]:
            try:
                adapter = AdapterConfig(method, 8, targets=targets, add_to=add_to)
            except UserError:
                continue
            names = [
                f"adapter/layers/{block}/{product}/{leaf}"
                for block, products in BLOCKS.items()
                for product in products
                for leaf in adapter_leaves(adapter, product, TINY.widths)
            ]
            assert decide(sharding_rules(TINY, adapter), base + names, "sharding rules").keys() == {
                *base,
                *names,
            }
            accepted.add((method, targets, add_to))
    assert {
        ("lora", ("q",), None),
        ("ffba", ("q", "k", "v"), None),
        ("ffba", PROJECTIONS, ()),
        ("ffba_qd_add", ("q", "o"), ()),
    } <= accepted
    # The names are those of the tree.
    adapter = AdapterConfig("ffba", 8, targets="q,k,v")
    assert set(paths(abstract_adapter(TINY, adapter))) == {"layers/attention/qkv/A"}


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_an_axis_that_does_not_divide_is_refused(axis):
    sizes = [5 if name == axis else 1 for name in AXES]
    with pytest.raises(
        UserError, match=rf"config\.mesh\.{axis}=5 does not divide axis \d \(\d+\) of params/"
    ):
        shardings(
            {"params": abstract_base(TINY)},
            AbstractMesh(tuple(sizes), AXES),
            TINY,
            AdapterConfig("fft", 1),
        )


def test_the_command_refuses_a_mesh_with_one_line(command, tmp_path):
    done = command(
        "--config",
        "configs/tiny.py",
        "--workdir",
        tmp_path / "w",
        "--config.mesh.tensor=5",
        XLA_FLAGS=devices(5),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "config.mesh.tensor=5 does not divide" in done.stderr and not (tmp_path / "w").exists()


def test_answers_that_a_tensor_axis_cannot_generate_are_refused_first(command, tmp_path):
    # Among choices, too, which a tensor axis can score.
    fields = {
        "mesh.tensor": 2,
        "eval.tasks": "boolq,chain_sum",
        "eval.protocol": "lm_eval",
        "data.prompt_style": "plain",
        "data.cache_dir": tmp_path / "data",
    }
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    done = command(
        "--config", "configs/tiny.py", "--workdir", tmp_path / "w", *flags, XLA_FLAGS=devices(2)
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "config.mesh.tensor=2: answers are generated without tensor parallelism" in done.stderr
    assert not list(tmp_path.iterdir())
