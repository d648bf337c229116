"""Where the values of a step go beside metrics.jsonl: TensorBoard's events, Weights & Biases, or
nowhere.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from flora_jax.errors import UserError, in_a_line, require
from flora_jax.files import plain_path

Values = dict[str, float]  # by name


class Logger(Protocol):
    """Made of a workdir, the configuration and the step after which the run goes on."""

    def write(self, step: int, values: Values) -> None:
        """The values of a step."""

    def close(self) -> None:
        """No more will come."""


class TensorBoard:
    """`tensorboard/` in the workdir, of which a run that resumes is told to forget what follows."""

    def __init__(self, workdir: Path, config: dict[str, Any], resume_step: int):
        # Imported here: it imports torch where that is installed, which takes seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The bare writer: with tensorboardX's thread before it, a disk that is full stops the run
        # without a word.
        self._board = EventsWriter(str(plain_path(folder, "--workdir") / "events"))
        self._board.write_event(
            Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        )

    def write(self, step: int, values: Values) -> None:
        """Flushed, so that a kill loses nothing that was logged."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._board.write_event(
                Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            )
        self._board.flush()

    def close(self) -> None:
        """Closes the file, each event of which was flushed or has raised."""
        with contextlib.suppress(OSError):
            self._board.close()


class WandB:
    """A run of Weights & Biases, the same one when it resumes.

    Project, entity, name and mode are wandb's own environment variables (WANDB_PROJECT,
    WANDB_MODE=offline, …). Raises UserError where wandb lets no run begin.
    """

    def __init__(self, workdir: Path, config: dict[str, Any], resume_step: int):
        import wandb

        try:
            self._run = wandb.init(
                dir=workdir,
                id=_run_id(workdir),
                resume="allow",
                config=config,
                name=os.environ.get("WANDB_NAME", workdir.name),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"config.train.logger='wandb': {in_a_line(error, 1000)}; see `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None
        # wandb's own steps may not go back, as ours do when a run resumes.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Values) -> None:
        """Sent in the background."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


def _run_id(workdir: Path) -> str:
    """The id under which the workdir's run is known."""
    path = workdir / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()


class Nowhere:
    """metrics.jsonl alone."""

    def __init__(self, workdir: Path, config: dict[str, Any], resume_step: int):
        del workdir, config, resume_step

    def write(self, step: int, values: Values) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


LOGGERS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "none": Nowhere,
}


def check_logger(name: str) -> None:
    """Raises UserError where the logger's package is not installed."""
    require(
        name != "wandb" or importlib.util.find_spec("wandb") is not None,
        "config.train.logger='wandb' needs wandb, which is not installed; "
        "`pip install 'flora_jax[wandb]'`, or use tensorboard or none",
    )
