"""Two processes of one run compute the same, started by hand, by Slurm's variables or by mpirun."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from support import ROOT, computed_lines

from flora_jax.config import check_config
from flora_jax.config_files import read_command, read_config
from flora_jax.data import train_iterator
from flora_jax.errors import UserError
from flora_jax.files import write_json
from flora_jax.models.tokenizer import load_tokenizer
from flora_jax.training.inputs import load_inputs
from flora_jax.training.workdir import check_workdir

STEPS = 120  # for some seconds: word of a signal takes one or two to go round
# Started by any of these, JAX would join it.
CLUSTERS = ("SLURM_", "OMPI_", "PMIX_", "KUBERNETES_", "JAX_COORDINATOR")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def launch(environment, caches):
    """`launch(by, workdir, **fields)` starts two processes of the training command. It returns what
    was started: the two, or mpirun alone.

    by: hand, slurm or mpirun; fields: of both, and `last` flags of the second alone.
    """
    clean = {name: value for name, value in environment.items() if not name.startswith(CLUSTERS)}

    def popen(command, **variables):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env={**clean, **variables}, **pipes
        )

    def start(by, workdir, devices=1, last=(), **changed):
        fields = {
            "adapter.rank": 8,
            "data.generator.train": 60,
            "data.generator.validation": 10,
            "data.generator.test": 6,
            "data.cache_dir": caches / "data",
            "data.max_length": 128,
            "data.validation_size": 8,
            "train.steps": STEPS,
            "train.batch_size": 8,
            "train.log_every": 1,
            "train.eval_every": 40,
            "train.save_every": 40,
            "optim.warmup_steps": 3,
            "mesh.fsdp": 2,
            **changed,
        }
        flags = [
            "--config",
            "configs/tiny.py",
            "--workdir",
            workdir,
            *(f"--config.{field}={value}" for field, value in fields.items()),
        ]
        train = [sys.executable, "-m", "flora_jax.train", *flags]
        # XLA's concurrent scheduler: see `devices` of test_sharding.
        options = (
            clean.get("XLA_FLAGS", ""),
            f"--xla_force_host_platform_device_count={devices}",
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        )
        xla = {"XLA_FLAGS": " ".join(options)}
        port = free_port()
        if by == "hand":
            places = [
                f"--config.distributed.coordinator=127.0.0.1:{port}",
                "--config.distributed.processes=2",
            ]
            return [
                popen([*train, *places, f"--config.distributed.process_id={i}"], **xla)
                for i in range(2)
            ]
        train.append("--config.distributed.auto")
        if by == "slurm":
            job = {
                "SLURM_JOB_ID": "4321",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "JAX_COORDINATOR_PORT": str(port),
            }
            return [
                popen([*train, *own], SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **job, **xla)
                for i, own in enumerate([(), last])
            ]
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        # Each notes its process id, since mpirun passes no SIGTERM on that leaves time to save.
        noted = [
            "sh",
            "-c",
            'echo $$ > "$0.$OMPI_COMM_WORLD_RANK"; exec "$@"',
            f"{workdir}.pid",
            *train,
        ]
        return [
            popen(
                ["mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", *noted], **root, **xla
            )
        ]

    return start


def end(running):
    errors = [process.communicate(timeout=300)[1] for process in running]
    return [process.returncode for process in running], errors


@pytest.fixture(scope="module")
def by_hand(launch, tmp_path_factory):
    """A whole run of two processes that were told of each other."""
    workdir = tmp_path_factory.mktemp("by") / "hand"
    codes, errors = end(launch("hand", workdir))
    assert codes == [0, 0], errors
    return workdir


def first_tokens(config, shards):
    """Counted tokens of the first batch of all shards, read as each process reads its own."""
    encoded = load_inputs(config, load_tokenizer("random")).train
    settings = {
        "batch_size": config.train.batch_size // shards,
        "max_length": config.data.max_length,
        "seed": config.train.seed,
        "packing": config.data.packing,
        "shard_count": shards,
    }
    batches = [next(train_iterator(encoded, shard_index=i, **settings)) for i in range(shards)]
    assert not np.array_equal(batches[0]["tokens"], batches[1]["tokens"])
    return sum(batch["loss_weights"].sum() for batch in batches)


def test_two_processes_read_rows_of_their_own(by_hand, small):
    counts = [
        line["tokens_in_loss"] for line in computed_lines(by_hand) if "tokens_in_loss" in line
    ]
    config = small("ffba_qg_add", **{"train.batch_size": 8})
    assert len(counts) == STEPS and counts[0] == first_tokens(config, 2)


def test_two_processes_of_two_devices_compute_the_same(by_hand, launch, tmp_path):
    """Rows over the processes, weights over the devices of each; the warm-up is enough."""
    fields = {"mesh.data": 2, "train.steps": 3, "train.eval_every": 0}
    codes, errors = end(launch("hand", tmp_path / "w", devices=2, **fields))
    assert codes == [0, 0], errors
    wanted = [line["loss"] for line in computed_lines(by_hand) if "loss" in line]
    np.testing.assert_allclose(
        [line["loss"] for line in computed_lines(tmp_path / "w")], wanted[:3], rtol=1e-4
    )


def open_mpi_4():
    if shutil.which("mpirun") is None:
        return False
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    return "(Open MPI) 4." in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "by",
    [
        "slurm",
        pytest.param(
            "mpirun",
            marks=pytest.mark.skipif(
                not open_mpi_4(), reason="there is no mpirun of Open MPI 4 (Debian 12: openmpi-bin)"
            ),
        ),
    ],
)
def test_a_cluster_stops_and_goes_on(by_hand, launch, tmp_path, by):
    """One of two processes told to stop, both save one step. The same commands end bit-equal to the
    run by hand."""
    workdir = tmp_path / "w"
    running = launch(by, workdir)
    while not (workdir / "config.json").exists():  # all is checked, and compiling begins
        assert running[0].poll() is None, end(running)
        time.sleep(0.01)
    process = int((tmp_path / "w.pid.1").read_text()) if by == "mpirun" else running[1].pid
    os.kill(process, signal.SIGTERM)
    codes, errors = end(running)
    said = re.findall(r"stopped by a signal after step (\d+)", "".join(errors))
    assert set(codes) == {1} and len(said) == 2 and said[0] == said[1], errors
    assert "Traceback" not in "".join(errors), errors
    step = int(said[0])
    assert step < STEPS and (workdir / f"checkpoints/{step}").is_dir()
    assert json.loads((workdir / "config.json").read_text())["config"]["distributed"] == {
        "auto": True,
        "coordinator": None,
        "processes": 2,
        "process_id": 0,
    }
    codes, errors = end(launch(by, workdir))
    assert set(codes) == {0} and f"resuming after step {step}" in "".join(errors), errors
    assert computed_lines(workdir) == computed_lines(by_hand)
    adapters = [
        (path / "adapter/adapter_model.safetensors").read_bytes() for path in (workdir, by_hand)
    ]
    assert adapters[0] == adapters[1]


def test_a_process_that_is_refused_keeps_none_waiting(launch, tmp_path):
    """Its own disk is full, say. The others end with it, and say so."""
    (tmp_path / "file").write_text("x")
    own = [f"--config.data.cache_dir={tmp_path / 'file/cache'}"]
    codes, errors = end(launch("slurm", tmp_path / "w", last=own))
    assert codes == [2, 2], errors
    assert "error: stopped, since process 1 of 2 was refused; its own line says why\n" in errors[0]
    assert "cannot be written" in errors[1] and not (tmp_path / "w").exists()


def test_no_cluster_is_refused_with_one_line(environment, tmp_path):
    clean = {name: value for name, value in environment.items() if not name.startswith(CLUSTERS)}
    flags = [
        "--config",
        "configs/tiny.py",
        "--workdir",
        str(tmp_path / "w"),
        "--config.distributed.auto",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "flora_jax.train", *flags],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "config.distributed.auto=True: JAX finds no cluster to join" in done.stderr
    assert "srun, mpirun or as an indexed Kubernetes job" in done.stderr and not list(
        tmp_path.iterdir()
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train.batch_size": 3}, r"batch_size=3 must be a multiple of distributed\.processes=2"),
        ({"eval.tasks": "chain_sum"}, r"eval\.tasks='chain_sum' needs one process, not 2"),
        ({"distributed.processes": 3}, r"distributed\.processes=3 is set beside distributed\.auto"),
    ],
)
def test_checks_count_the_processes_that_were_detected(small, monkeypatch, fields, words):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = small(**{"distributed.auto": True, "distributed.processes": 2})
    check_config(config)
    with pytest.raises(UserError, match=words):
        check_config(small(**{"distributed.auto": True, "distributed.processes": 2, **fields}))


def test_a_resumed_run_may_be_started_another_way(small, tmp_path):
    """The number of processes belongs to the run, how they find each other does not."""
    found = small(**{"distributed.auto": True, "distributed.processes": 2})
    write_json(tmp_path / "config.json", {"config": found.to_dict()})
    told = {
        "distributed.processes": 2,
        "distributed.coordinator": "a:1",
        "distributed.process_id": 1,
    }
    check_workdir(tmp_path, small(**told))
    with pytest.raises(UserError, match=r"config\.distributed\.processes=2, not 1"):
        check_workdir(tmp_path, small())


def test_the_batch_script_is_a_command_that_trains():
    """Its command line parses, so its fields exist, and its configuration passes the checks."""
    text = (ROOT / "docs/train.sbatch").read_text().replace("\\\n", " ")
    [line] = [line for line in text.splitlines() if "flora_jax.train" in line]
    assert line.startswith("srun ")
    words = line.split("flora_jax.train", 1)[1].replace('"', "").split()
    config, workdir, _ = read_command(["train", *words])
    assert config.distributed.auto and workdir
    config.data.dir = None  # the reader's own
    check_config(config)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, flags=re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # JAX gives each task one GPU
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert config.train.batch_size % tasks == 0
    assert read_config(ROOT / "configs/ffba_1b.py").train.batch_size % tasks == 0
