"""A run's directory: config.json, metrics.jsonl, a logger; never two runs in one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import ml_collections
from filelock import FileLock, Timeout

from flora_jax.config import fields, get_config
from flora_jax.errors import UserError, check_text, require
from flora_jax.files import check_file, check_plain, write_json
from flora_jax.training.loggers import LOGGERS

SCHEMA_VERSION = 1
LOCK = ".lock"
# Fields that a resumed run may change: they do not enter its numbers, or by rounding alone.
# (eval.tasks does: training records that are also in those tests are dropped. distributed.processes
# does: each process reads its share of the data.)
FREE_FIELDS = (
    "mesh.",
    "model.remat",
    "distributed.auto",
    "distributed.coordinator",
    "distributed.process_id",
    "eval.protocol",
    "eval.published_faults",
    "eval.limit",
    "eval.batch_size",
    "eval.max_length",
    "eval.max_new_tokens",
    "data.cache_dir",
    "train.keep",
    "train.save_every",
    "train.log_every",
    "train.logger",
)


def check_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the directory cannot be written or holds anything but this very run."""
    check_text(str(workdir), "--workdir")
    check_plain(workdir, "--workdir")
    # os.path, since Path.exists raises below a directory that may not be read.
    parent = next(p for p in (workdir, *workdir.absolute().parents) if os.path.exists(p))
    require(
        os.path.isdir(parent), f"--workdir={workdir} cannot be made: {parent} is not a directory"
    )
    require(
        os.access(parent, os.W_OK | os.X_OK),
        f"--workdir={workdir} cannot be written: no permission in {parent}",
    )
    path = workdir / "config.json"
    if not path.exists():
        # What a kill before config.json was written leaves is no other's.
        left = ("config.json.tmp", LOCK)
        require(
            not (workdir.exists() and any(entry.name not in left for entry in workdir.iterdir())),
            f"--workdir={workdir} is not empty and holds no run (no config.json); name another",
        )
        return
    try:
        check_file(path)
        there = fields(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(
            f"{path} is not the configuration of a run; name another --workdir"
        ) from None
    here = fields(json.loads(json.dumps(config.to_dict())))
    there = {**fields(get_config()), **there}  # a field that is newer than the run has its default
    for field in sorted(there.keys() | here.keys()):
        require(
            there.get(field) == here.get(field) or field.startswith(FREE_FIELDS),
            f"--workdir={workdir} holds a run with config.{field}={there.get(field)!r}, "
            f"not {here.get(field)!r}; resume with the same configuration, or name another "
            "--workdir",
        )


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keeps other processes out of the run, until this one is through or dies.

    Raises UserError where one is at it.
    """
    lock = FileLock(workdir / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"--workdir={workdir} is in use: another process is training there; wait for it to "
            "end, or name another"
        ) from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def begun(workdir: Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """The directory with its config.json, held. Raises UserError as `check_workdir` does."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from None
    with held(workdir):
        # while this run read its weights another may have begun there, or ended
        check_workdir(workdir, config)
        if not (workdir / "config.json").exists():
            write_json(
                workdir / "config.json",
                {"schema_version": SCHEMA_VERSION, "config": config.to_dict()},
            )
        yield


class Metrics:
    """`metrics.jsonl` (an object a line), cut back to where the run resumes, and its logger."""

    def __init__(self, workdir: Path, config: ml_collections.ConfigDict, resume_step: int):
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written when the run was killed
                break
            # a run that starts over validates step 0 again
            if record["step"] > resume_step or resume_step == 0:
                break
            kept.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file = path.open("a")
        self._logger = LOGGERS[config.train.logger](workdir, config.to_dict(), resume_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line and flushes it, so that a kill loses nothing that was logged."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._logger.write(step, values)

    def close(self) -> None:
        """Closes both. Each line of the file was flushed, or has raised when it was written."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._logger.close()
