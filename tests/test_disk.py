"""A disk that takes no more: one line, what was there before is whole, and the same command goes on
when there is room.

The limit on the size of a file stands for the disk: a write beyond it fails in the system, whoever
does it.
"""

import contextlib
import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support import numbers

from flora_jax import export, finetune
from flora_jax.data.sources import open_records
from flora_jax.data.tasks import get_task
from flora_jax.errors import UserError, WriteError, disk_fault, run_command
from flora_jax.files import write_result
from flora_jax.train import run
from flora_jax.training.workdir import Metrics

pytestmark = pytest.mark.usefixtures("quick_compile")


def limit(size):
    """No file grows beyond `size` bytes; None lifts that."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@contextlib.contextmanager
def full(size):
    limit(size)
    try:
        yield
    finally:
        limit(None)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory, quick_compile):
    """A run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("disk") / "whole"
    run(small("lora", **{"train.save_every": 1}), workdir)
    return workdir


def test_a_checkpoint_that_finds_no_room(small, whole, monkeypatch, tmp_path):
    """The one before is named and whole, and the run that goes on from it ends as if nothing had
    happened."""
    write, workdir = Metrics.write, tmp_path / "w"

    def fill(self, step, values):
        write(self, step, values)
        if step == 3:
            limit(20_000)

    with monkeypatch.context() as patched, pytest.raises(WriteError) as error:
        patched.setattr(Metrics, "write", fill)
        try:
            run(small("lora", **{"train.save_every": 1}), workdir)
        finally:
            limit(None)
    assert str(error.value) == (
        "the checkpoint of step 3 cannot be written (File too large); make room, and the same "
        "command goes on after step 2, which is saved"
    )
    run(small("lora", **{"train.save_every": 1}), workdir)
    assert numbers(workdir) == numbers(whole)


def test_a_log_and_an_adapter_that_find_no_room(small, whole, monkeypatch, tmp_path):
    write, workdir, config = Metrics.write, tmp_path / "w", small("lora", **{"train.save_every": 1})

    def fill(self, step, values):
        if step == 2:
            limit(100)
        write(self, step, values)

    with (
        monkeypatch.context() as patched,
        pytest.raises(WriteError, match=r"--workdir=.*File too large.*"),
    ):
        patched.setattr(Metrics, "write", fill)
        try:
            run(config, workdir)
        finally:
            limit(None)
    save = finetune.save_adapter

    def filled(*given, **named):
        with full(20_000):
            save(*given, **named)

    with (
        monkeypatch.context() as patched,
        pytest.raises(WriteError, match="adapter cannot be written"),
    ):
        patched.setattr(finetune, "save_adapter", filled)
        run(config, workdir)
    assert not (workdir / "adapter").exists()
    run(config, workdir)
    assert numbers(workdir) == numbers(whole)


@pytest.mark.parametrize("form", ["merged", "peft", "transformers"])
def test_an_export_that_finds_no_room(whole, tmp_path, capsys, form):
    flags = [
        "export",
        "--workdir",
        str(whole),
        "--format",
        form,
        "--out",
        str(tmp_path / "new/out"),
    ]
    with full(20_000), pytest.raises(SystemExit) as ended:
        run_command(export.main, flags)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "", err
    assert (
        err
        == f"error: --out {tmp_path}/new/out cannot be written: File too large; nothing is left "
        f"of it\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_result_that_finds_no_room_is_printed_and_kept(tmp_path, monkeypatch, capsys):
    write_text = Path.write_text

    def refuse(self, *given, **named):
        if self.parent == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write_text(self, *given, **named)

    monkeypatch.setattr(Path, "write_text", refuse)
    result = {"tasks": {"a": {"accuracy": 0.5, "texts": ["é"]}}}
    with pytest.raises(WriteError) as error:
        write_result(tmp_path / "scores.json", result, "--out scores.json")
    assert str(error.value).startswith(
        "--out scores.json cannot be written (No space left on device); "
    )
    kept = Path(str(error.value).rpartition(" ")[2])
    assert (
        json.loads(kept.read_text(encoding="utf-8"))
        == json.loads(capsys.readouterr().out)
        == result
    )
    kept.unlink()
    assert not list(tmp_path.iterdir())


def test_a_cache_that_finds_no_room(tmp_path):
    """It is named, nothing is left in it, and with room it is filled."""
    task = get_task("chain_sum", {"train": 200})
    with (
        full(1_000),
        pytest.raises(UserError, match=r"cache directory .*File too large.*FLORA_CACHE") as error,
    ):
        open_records(task, "train", None, tmp_path / "cache")
    assert "\n" not in str(error.value) and not [
        p for p in (tmp_path / "cache").rglob("*") if p.is_file()
    ]
    assert len(open_records(task, "train", None, tmp_path / "cache")) == 200


def test_what_each_writer_says_of_a_disk():
    """The words of tensorstore, safetensors and array_record, and an error behind another."""
    for words in (
        'RESOURCE_EXHAUSTED: Error writing "/w/d/1" [OS error 28: ENOSPC No space left on device]',
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "UNKNOWN: Disk quota exceeded; writing /cache/x.array_record",
    ):
        assert disk_fault(ValueError(words)) in words
    error = RuntimeError("the merge of a checkpoint")
    error.__cause__ = OSError(errno.EROFS, "Read-only file system")
    assert disk_fault(error) == "Read-only file system"
    assert disk_fault(ValueError("shape (3,) does not fit")) is None


def test_a_defect_behind_a_disk_fault_keeps_its_traceback():
    def main(argv):
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "x")
        except PermissionError:
            raise KeyError("a defect")  # noqa: B904 - what Python does by itself

    with pytest.raises(KeyError):
        run_command(main, [])


_PRINTS = """
import sys
from flora_jax.errors import run_command

def main(argv):
    for line in range(int(argv[1])):
        print(line, flush=len(argv) > 2)

run_command(main, sys.argv)
"""


@pytest.mark.parametrize("flags", [("100000",), ("100000", "flush"), ("1",)])
def test_a_reader_that_leaves(flags):
    """No traceback, and the exit code of a program that SIGPIPE ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PRINTS, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.communicate()[1] == b"" and process.returncode == 141
    with open("/dev/full", "w") as file:
        done = subprocess.run(
            [sys.executable, "-c", _PRINTS, *flags], stdout=file, stderr=subprocess.PIPE, text=True
        )
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "No space left on device" in done.stderr
    )


_INTERRUPTED = """
import gc, os, signal, time
from flora_jax.errors import run_command

def collected(phase, info):
    if not done:
        done.append(phase)
        os.kill(os.getpid(), signal.SIGINT)

def main(argv):
    gc.collect()
    time.sleep(30)

done = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
gc.callbacks.append(collected)
run_command(main, [])
"""


def test_a_ctrl_c_in_the_garbage_collector_is_not_lost():
    """Python prints what its callbacks raise, and goes on; JAX has one."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "interrupted\n")
