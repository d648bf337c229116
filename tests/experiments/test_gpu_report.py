"""The GPU report, rehearsed on a CPU: real cells, cells that crash and hang, its table, its tar."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import gpu_cells, gpu_peers, gpu_report, gpu_table
from experiments.flags import parse
from experiments.gpu_report import Cell
from flora_jax.analysis import kernel_profile
from flora_jax.analysis.kernel_profile import Event
from flora_jax.errors import run_command

FLAGS = ["gpu_report", "--device", "cpu", "--preset", "tiny", "--minutes", "30"]
OF_A_LATENCY_CELL = {
    "device",
    "preset",
    "method",
    "rank",
    "batch_size",
    "prompt_length",
    "tpot_ms",
    "base_tpot_ms",
    "ttft_ms",
    "base_ttft_ms",
    "bytes",
    "versions",
    "command",
}


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """On a machine in other use."""
    patient = dataclasses.replace(gpu_report.CPU, patience=5.0)
    monkeypatch.setattr(gpu_report, "CPU", patient)


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")}


def test_a_report_and_its_resumption(tmp_path, capsys):
    """Two real cells; the same command again, and a start from the tars, repeat neither."""
    out, names = tmp_path / "a", ("device", "latency-tiny-ffba-b1-p8")
    command = [*FLAGS, "--cells", ",".join(names)]
    gpu_report.main([*command, "--out", str(out)])
    assert set(times(out / "cpu")) == {f"{name}.json" for name in names}
    cell = json.loads((out / "cpu/latency-tiny-ffba-b1-p8.json").read_text())
    assert cell.keys() >= OF_A_LATENCY_CELL
    lists = [cell[key] for key in ("tpot_ms", "base_tpot_ms", "ttft_ms", "base_ttft_ms")]
    assert all(len(one) == gpu_report.CPU.rounds and min(one) > 0 for one in lists)
    # ffba at rank 8 on the tiny preset: 15,360 parameters in float32 beside the base's bytes.
    base = cell["read_bytes"] - 4 * 15_360
    assert cell["bytes"] == pytest.approx(cell["read_bytes"] / base)
    assert json.loads((out / "cpu/device.json").read_text())["copy_gb_per_s"] > 0
    shown = capsys.readouterr().out
    assert "## tiny, batch 1, prompt 8" in shown and "| ffba | 8 | 1.080 |" in shown
    with tarfile.open(out / "report.tar") as tar:
        packed = set(tar.getnames())
    assert {"report.json", "cpu/device.json", "logs/cpu/device.log"} <= packed
    with tarfile.open(out / "cache-1.tar") as tar:
        assert any(name.startswith("cache/jax/jit_") for name in tar.getnames())

    before = times(out / "cpu")
    gpu_report.main([*command, "--out", str(out)])
    assert times(out / "cpu") == before
    other = tmp_path / "b"
    tars = [*map(str, out.glob("*.tar"))]
    gpu_report.main([*command, "--out", str(other), "--resume", *tars])
    assert {name: (other / "cpu" / name).read_bytes() for name in before} == {
        name: (out / "cpu" / name).read_bytes() for name in before
    }
    assert sorted(os.listdir(other / "cache/jax")) == sorted(os.listdir(out / "cache/jax"))


def test_what_was_compiled_is_packed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "_PART", 25)
    sizes = {"a": 10, "b": 10, "c": 10, "d": 40, "e": 10}
    (tmp_path / "cache/jax").mkdir(parents=True)
    for name, size in sizes.items():
        (tmp_path / "cache/jax" / name).write_bytes(bytes(size))
    held = []
    for file in gpu_report.pack_cache(tmp_path):
        with tarfile.open(file) as tar:
            held.append("".join(name.removeprefix("cache/jax/") for name in tar.getnames()))
    assert held == ["ab", "c", "d", "e"]


MODULES = {
    "fine": "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('{}')",
    "crash": "import os; print('about to', flush=True); os.abort()",
    "bad": "import sys; sys.exit('error: no such luck')",
    # With a process of its own, which has to end with it; deaf to being asked.
    "hang": "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(600)",
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What becomes of cells by module, and what was run in which order."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(gpu_report, "_GRACE", 0.2)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(names, seconds=60.0, before=(), limit=2):
        asked = [Cell(name, (name.split("-")[0],), limit) for name in names]
        results = tmp_path / "results"
        results.mkdir(exist_ok=True)
        deadline = time.monotonic() + seconds
        found = gpu_report.run_cells(
            asked, results, tmp_path / "logs", deadline, environment, dict.fromkeys(before, "")
        )
        return {cell.name: said for cell, said in found}

    return run


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_cell_that_crashes_or_hangs_stops_no_other(run, tmp_path):
    said = run(["crash", "fine-1", "hang", "bad", "fine-2"])
    assert said["fine-1"] == said["fine-2"] == "done"
    assert said["crash"] == f"ended with {-signal.SIGABRT}: about to"
    assert said["hang"] == "stopped after 2 s"
    assert said["bad"] == "ended with 1: error: no such luck"
    assert not alive(int((tmp_path / "logs/hang.log").read_text()))
    # Next time what is done is not run again, and what failed comes last.
    before = times(tmp_path / "results")
    said = run(["crash", "fine-1", "fine-3"], before=["crash"])
    assert list(said) == ["fine-1", "fine-3", "crash"]
    assert times(tmp_path / "results").items() >= before.items()


def test_a_kernel_that_fails_does_not_hold_up_the_rest(run):
    said = run(["bad-base_in_kernels", "fine-ffba_in_kernels", "fine-1", "fine-2"])
    assert list(said) == ["bad-base_in_kernels", "fine-1", "fine-2", "fine-ffba_in_kernels"]


def test_it_ends_in_time(run, monkeypatch):
    """A cell that the deadline cuts short did not fail; nothing is begun with too little time."""
    monkeypatch.setattr(gpu_report, "_LEAST", 1.0)
    start = time.monotonic()
    said = run(["hang", "fine"], seconds=2.0, limit=600)
    assert said == {"hang": "out of time", "fine": "not begun"}
    assert time.monotonic() - start < 60  # rather than 600


def test_a_signal_ends_it_whole(tmp_path):
    """SIGTERM while a cell runs: the cell is gone, the table and the tar are there."""
    command = [
        sys.executable,
        "-m",
        "experiments.gpu_report",
        *FLAGS[1:],
        "--cells",
        "latency-tiny-lora-*",
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "out/logs/cpu/latency-tiny-lora-b1-p8.log"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped by SIGTERM; the same command goes on" in err
    assert "- latency-tiny-lora-b1-p8: not begun" in out
    assert (tmp_path / "out/report.tar").exists()


@pytest.mark.parametrize("method", gpu_report.GPU.torch)
def test_models_in_torch(method):
    """PEFT's, and ours in the code of their exports."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    model, _ = gpu_peers.build(method, "tiny", 8, "float32")
    with torch.inference_mode():
        logits = model(torch.zeros((1, 4), dtype=torch.long)).logits
    assert logits.shape[:2] == (1, 4) and torch.isfinite(logits).all()


@pytest.mark.parametrize("scale", [gpu_report.GPU, gpu_report.CPU])
def test_every_cell_is_a_command(scale, tmp_path):
    """Names are told apart, flags are known, and what is asked for comes in the order of its
    worth."""
    own = {module.__name__ for module in (gpu_cells, gpu_peers)}
    known = {"cell": {}, **gpu_cells.FLAGS}
    found = gpu_report.cells(scale, tmp_path)
    names = [cell.name for cell in found]
    assert len(set(names)) == len(names)
    for cell in found:
        module, *flags = cell.command
        if module in own:
            args = parse(["x", *flags, "--out", "x.json"], "x", "", known)
            assert args.cell in {**gpu_cells.CELLS, **gpu_peers.CELLS}
    first = scale.presets[0]
    order = [
        "device",
        "tests",
        f"latency-{first}-base-b1-p{scale.prompt_length}",
        f"profile-{first}-ffba",
        f"torch_latency-{first}-peft-b1-p{scale.prompt_length}",
        f"train-{first}-lora",
        f"plan-{first}",
        f"bank-{first}-1",
        f"switching-{first}",
        f"quantized-{first}",
    ]
    assert [name for name in names if name in order] == order


def test_the_table_in_closed_form(tmp_path):
    """Both readings of the claim, beside the LoRA of the same setting."""
    common = {
        "preset": "p",
        "batch_size": 1,
        "prompt_length": 8,
        "ttft_ms": [2.0],
        "base_ttft_ms": [1.0],
    }
    rows = {"base": (1.0, None), "lora": (1.5, 15), "ffba": (1.1, 32)}
    rows["ffba_in_kernels"] = (0.75, 32)  # which is no method's gain over XLA's LoRA
    for method, (ratio, rank) in rows.items():
        own = {
            "tpot_ms": [ratio, 2 * ratio],
            "base_tpot_ms": [1.0, 2.0],
            "bytes": 1.01,
            "read_bytes": 3e6,
        }
        cell = {**common, **own, "method": method, "rank": rank}
        (tmp_path / f"latency-p-{method}-b1-p8.json").write_text(json.dumps(cell))
    (tmp_path / "latency-p-base_again-b1-p8.json").write_text(
        json.dumps({**common, **own, "method": "base", "rank": None})
    )
    text = gpu_table.table(tmp_path, {"tests": "stopped after 9 s", "latency-ffba": "done"})
    assert "| base_again | – |" in text
    assert "| ffba | 32 | 1.010 | 1.650 | 1.100 [1.100, 1.100] | 2.000 | 27 % | 80 % | – |" in text
    assert "| 1.125 | 0.750 [0.750, 0.750] | 2.000 | – | – | – |" in text
    assert "| base | – | 1.010 | 1.500 | 1.000 [1.000, 1.000] | 2.000 | – | – | – |" in text
    assert text.endswith("## Not measured\n\n- tests: stopped after 9 s\n")


def test_a_profile_in_closed_form():
    """Two steps of two layers, nanoseconds: kernels of one kind together, overlaps counted once."""
    events = []
    for step in (0, 10_000):
        for layer in (0, 4_000):
            at = step + layer
            events += [
                Event(f"gemm_fusion.{layer}", at, 2_000),
                Event(f"add_{layer}", at + 1_500, 1_000),
            ]
        events.append(Event("argmax", step + 8_000, 1_000))
    found = kernel_profile.summarise(events, steps=2, layers=2)
    assert (found["events"], found["busy_us"]) == (5, pytest.approx(2 * 2.5 + 1))
    # 1.5 µs after each layer, 1 µs from one step to the next.
    assert found["gap_us"] == pytest.approx((4 * 1.5 + 1) / 2)
    gemm, add, argmax = found["kernels"]
    assert [row["kernel"] for row in found["kernels"]] == ["gemm_fusion", "add", "argmax"]
    assert (gemm["launches_a_layer"], gemm["us_a_layer"], gemm["us"]) == (1, 2, 4)
    assert (add["launches"], add["us"]) == (2, 2) and argmax["launches_a_layer"] == 0.5


def test_a_real_profile(tmp_path):
    """A product in a loop of three is three events, whatever XLA calls it, and the loop none."""
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y @ y, x))
    x = jnp.ones((64, 64))
    step(x).block_until_ready()
    with kernel_profile.traced(tmp_path):
        step(x).block_until_ready()
    names = [kernel_profile.kind(one.name) for one in kernel_profile.device_events(tmp_path)]
    assert 3 in Counter(names).values()
    assert not any(name.startswith("while") for name in names)
    assert kernel_profile.graph_launches(tmp_path) == 0


def test_bad_input(tmp_path, capsys):
    def line(words, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command(gpu_report.main, [*FLAGS, *map(str, flags)])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
        for word in words:
            assert word in err, (word, err)

    out = ("--out", tmp_path / "out")
    line(["--out"])
    line(["--minutes 0.0"], *out, "--minutes", 0)
    line(["preset 'tniy'", "'tiny'"], *out, "--preset", "tniy")
    line(["--rank 0"], *out, "--rank", 0)
    line(["--device gpu", "--device cpu rehearses"], *out, "--device", "gpu")
    line(["--cells nothing", "latency-tiny-lora-b1-p8"], *out, "--cells", "nothing")
    (tmp_path / "x.tar").write_text("no tar")
    line(
        ["--resume", "x.tar", "cannot be unpacked"],
        "--out",
        tmp_path / "c",
        "--resume",
        tmp_path / "x.tar",
    )
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        tar.add(tmp_path / "x.tar", arcname="x")
    line(["holds no report.json"], "--out", tmp_path / "d", "--resume", tmp_path / "y.tar")
    assert not list((tmp_path / "d").iterdir())  # so that the right file can follow
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    line(["not empty", "report.json"], "--out", tmp_path / "full")
    (tmp_path / "full/report.json").write_text(json.dumps({"arguments": {"rank": 7}}))
    line(["holds a report of", "'rank': 7", "'rank': 8"], "--out", tmp_path / "full")
