"""Several processes of one run: they find each other, agree, and none waits for one that failed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from flora_jax.device import check_device, fast_dtype
from flora_jax.errors import UserError

T = TypeVar("T")


def join(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Starts `jax.distributed` as `config.distributed` says, unless it runs already.

    Returns the configuration with the actual number of processes. With `auto`, JAX reads that
    number, the coordinator and this process's id from Slurm, Open MPI or Kubernetes. Raises
    UserError if JAX detects no cluster. (JAX itself ends a process if the others do not come in
    time.)
    """
    distributed = config.distributed
    if not distributed.auto and distributed.processes == 1:
        return config
    if not jax.distributed.is_initialized():
        try:
            if distributed.auto:
                jax.distributed.initialize()
            else:
                jax.distributed.initialize(
                    distributed.coordinator, distributed.processes, distributed.process_id
                )
        except Exception as error:  # from JAX, or from its clients of Kubernetes and MPI
            raise UserError(_explain(distributed, error)) from error
    if distributed.auto:
        config = copy.deepcopy(config)
        config.distributed.processes = jax.process_count()
    return config


def settle(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration with the dtype that `auto` stands for: the one this device is faster in;
    of several processes bfloat16 only where all are. Call it after `join`. Raises UserError where
    JAX is told to use devices that are not there."""
    chosen = [name for name in ("dtype", "param_dtype") if config.model[name] == "auto"]
    if not chosen:
        return config
    check_device()
    dtype = fast_dtype()
    if jax.distributed.is_initialized():
        halves = multihost_utils.process_allgather(np.asarray(dtype == "bfloat16"))
        dtype = "bfloat16" if halves.all() else "float32"
    config = copy.deepcopy(config)
    for name in chosen:
        config.model[name] = dtype
    return config


def _explain(distributed: ml_collections.ConfigDict, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if not distributed.auto:
        return f"config.distributed.coordinator={distributed.coordinator!r}: {reason}"
    return (
        f"config.distributed.auto=True: JAX finds no cluster to join ({reason}); start each "
        "process with srun, mpirun or as an indexed Kubernetes job (docs/clusters.md), or set "
        "config.distributed.coordinator, processes and process_id"
    )


def together(work: Callable[[], T]) -> T:
    """Returns `work()`. If it raises in one process, this raises in all of them.

    Every process must call it, and waits in it for the others. Without it they would wait minutes
    for the failed process in their next collective.
    """
    if not jax.distributed.is_initialized():
        return work()
    failed = None
    try:
        result = work()
    except Exception as error:
        failed = error
    states = np.ravel(multihost_utils.process_allgather(np.asarray(failed is not None)))
    if failed is not None:
        raise failed
    if states.any():
        others = ", ".join(str(process) for process in np.flatnonzero(states))
        raise UserError(
            f"stopped, since process {others} of {len(states)} was refused; its own line says why"
        )
    return result
