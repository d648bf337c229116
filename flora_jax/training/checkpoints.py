"""Checkpoints of everything that trains, never of the frozen base.

A checkpoint holds `state` (step, trainable leaves, optimizer, key), `data` (the grain iterator, one
file a process) and `meta` (adapter configuration, base fingerprint, validation losses). It can be
restored on another mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import grain
import grain.checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from flora_jax.adapters import AdapterConfig
from flora_jax.errors import UserError, disk_fault, require, writing
from flora_jax.files import check_file, plain_path
from flora_jax.training.step import TrainState

FORMAT_VERSION = 1
_ONE = threading.RLock()


class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps one step.

    orbax's own BestN forgets the losses of earlier steps when a run is resumed.
    """

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one run: the `keep` latest, and the best on validation.

    Raises UserError if the directory holds anything but files: orbax would wait on a pipe for ever.
    """

    def __init__(self, directory: Path, keep: int):
        for place, _, names in os.walk(directory):
            for name in names:
                check_file(Path(place, name))
        self._best = _Best()
        self._manager = ocp.CheckpointManager(
            plain_path(directory.parent, "--workdir") / directory.name,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(keep), self._best]
                ),
                # Adapters are small: a checkpoint is on disk before the next step starts.
                enable_async_checkpointing=False,
            ),
        )

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes agreed to stop at this step, since one of them got a signal."""
        return self._manager.reached_preemption(step)

    def save(
        self, state: TrainState, data: grain.DatasetIterator, meta: dict[str, Any], best: int | None
    ) -> None:
        """Writes a checkpoint at `state.step`, unless there is one.

        best: the step whose checkpoint is kept beside the latest. Raises WriteError if the disk
        refuses it; earlier checkpoints stay as they are.
        """
        step = int(state.step)
        self._best.step = best
        if step in self._manager.all_steps():
            return
        rest = "from the beginning"
        if (there := self.latest) is not None:
            rest = f"after step {there}, which is saved"
        with (
            writing(
                f"the checkpoint of step {step}", f"make room, and the same command goes on {rest}"
            ),
            _quiet(),
        ):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_raw(state)),
                    data=grain.checkpoint.CheckpointSave(data),
                    meta=ocp.args.JsonSave({"format_version": FORMAT_VERSION, **meta}),
                ),
                force=True,
            )

    def meta(self, step: int) -> dict[str, Any]:
        """The meta of `save` at `step`."""
        return dict(
            self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        )

    def restore(
        self, step: int, like: TrainState, data: grain.DatasetIterator | None = None
    ) -> TrainState:
        """The state at `step`, with the shapes, dtypes and shardings of `like`.

        data: the iterator, which is set to its position at that step.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            _raw(like),
        )
        items = {"state": ocp.args.StandardRestore(abstract)}
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)
        state = self._manager.restore(step, args=ocp.args.Composite(**items)).state
        _check_values(state)
        return TrainState(**{**state, "key": jax.random.wrap_key_data(state["key"])})

    def trained(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Only the trainable leaves at `step`: numpy arrays of the shapes and dtypes of `like`."""
        checkpointer = ocp.PyTreeCheckpointer()
        item = {"trainable": like}
        arguments = jax.tree.map(
            lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), item
        )
        found = checkpointer.restore(
            self._manager.directory / str(step) / "state",
            args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
        )
        _check_values(found)
        return found["trainable"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()


def _check_values(tree: Any) -> None:
    """Raises ValueError, with the leaf's path, for a value that is not finite.

    Each process looks at its own shards.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [leaf]
        if isinstance(leaf, jax.Array):
            parts = [shard.data for shard in leaf.addressable_shards]
        for part in parts:
            if jnp.issubdtype(part.dtype, jnp.floating) and not np.isfinite(part).all():
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(f"{name} holds a value that is not finite")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Reports an error of orbax's threads once, by raising it.

    The other threads and tasks end later, some of them after the block, each with a traceback: in
    absl's log, in asyncio's, or as an error that nobody can catch. After a failure all of these are
    silenced. Only one block runs at a time, since the settings belong to all threads.
    """
    with _ONE:
        verbosity = absl.logging.get_verbosity()
        hook = sys.unraisablehook

        def but_late_ends(unraisable: Any) -> None:
            if str(unraisable.exc_value) != "Event loop is closed":
                hook(unraisable)

        absl.logging.set_verbosity(absl.logging.FATAL)
        sys.unraisablehook = but_late_ends
        try:
            yield
        except Exception:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise
        absl.logging.set_verbosity(verbosity)
        sys.unraisablehook = hook


@contextlib.contextmanager
def readable(where: str, remedy: str) -> Iterator[None]:
    """Raises UserError, with a remedy, if the block finds a checkpoint missing or damaged."""
    try:
        with _quiet():
            yield
    # None of these is damage.
    except (UserError, PermissionError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    # orbax and tensorstore have no narrower class for damaged files.
    except Exception as error:
        if disk_fault(error):
            raise
        raise UserError(
            f"{where} cannot be read ({' '.join(str(error).split())[:120]}); {remedy}"
        ) from error


def check_meta(
    meta: Mapping[str, Any], adapter: AdapterConfig, base: str, data: Mapping[str, str], where: str
) -> None:
    """Raises UserError unless a checkpoint was written with this adapter, base and data.

    meta: the checkpoint's; base: a fingerprint; data: name -> sha256 of training and validation
    records; where: the name of the checkpoint in errors.
    """
    require(
        meta["format_version"] == FORMAT_VERSION,
        f"{where}: format_version={meta['format_version']} cannot be read; {FORMAT_VERSION} can",
    )
    # The first checkpoints lack this field.
    written = {"zero_init": adapter.row.zero, **meta["adapter"]}
    for field, value in adapter_meta(adapter).items():
        require(
            written.get(field) == value,
            f"{where}: it was written with adapter.{field}={written.get(field)!r}, "
            f"not {value!r}; use the same adapter, or another --workdir",
        )
    require(
        meta["base_fingerprint"] == base,
        f"{where}: it was trained on a base with fingerprint {meta['base_fingerprint']}, but "
        f"config.model.weights has {base}; use the same weights, or another --workdir",
    )
    for name, digest in data.items():
        require(
            meta["data"].get(name) == digest,
            f"{where}: the records of {name} have changed since (sha256 "
            f"{meta['data'].get(name)}, now {digest}); use the same data, or another --workdir",
        )


def adapter_meta(adapter: AdapterConfig) -> dict[str, Any]:
    """The adapter configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(adapter)))


def _raw(state: TrainState) -> dict[str, Any]:
    """The state as a plain tree, with the key as its numbers."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {**fields, "key": jax.random.key_data(fields["key"])}
