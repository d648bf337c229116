"""What steps cost: their rate, the share of the device's arithmetic that they use, memory, a trace.

FLOPs are those that a step cannot do without (the model's, not the hardware's: what is computed
again to save memory is not counted). A weight that is frozen costs 4 a token and weight, in the
product and in the gradient that goes on; one that trains costs 6.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flora_jax.adapters import Quantized, Tree, paths
from flora_jax.errors import require
from flora_jax.models.config import LlamaConfig

_WARM_UP = 3  # steps that are not profiled
# Values of a log line that differ from run to run.
MEASURED = ("tokens_per_second", "mfu", "peak_memory_gb")
# Dense bfloat16 products with float32 sums, FLOP/s, by what JAX calls the device: its makers' data
# sheets. Whole names: an L40 is no L4.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """FLOP/s that the device can do in a compute dtype; None where that is not known: other
    devices, a part of one (MIG), and float32, whose products may be of several kinds."""
    return PEAK_FLOPS.get(device.device_kind) if dtype == "bfloat16" else None


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of a training step: for each position, each target that counts, and each pair of a token and
    one that it sees."""

    position: float
    target: float
    pair: float

    @classmethod
    def of(cls, frozen: Tree, trainable: Tree, config: LlamaConfig) -> Flops:
        """Of a model whose leaves are split in two. The embedding is a product only as the
        unembedding of a tied model."""
        position = 4 * _weights(frozen) + 6 * _weights(trainable)
        # scores and sums, forward once and backward twice, 2 a multiplication
        pair = 3 * 2 * 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        trained = paths(trainable.get("params", {}))
        top = "embed_tokens/embedding" if config.tie_word_embeddings else "lm_head/kernel"
        each = 6 if top in trained else 4
        return cls(position, each * config.hidden_size * config.vocab_size, pair)

    def of_batch(self, batch: dict[str, np.ndarray]) -> float:
        """Of a batch (data/pipeline.py), padding left out."""
        segments = batch["segment_ids"]
        rows = np.arange(len(segments))[:, None] * (int(segments.max(initial=0)) + 1)
        lengths = np.bincount((segments + rows)[segments > 0])
        pairs = (lengths * (lengths + 1) // 2).sum()
        targets = np.count_nonzero(batch["loss_weights"])
        return float(self.position * lengths.sum() + self.target * targets + self.pair * pairs)


def _weights(tree: Tree) -> int:
    """Of the layers' matrices in a tree of collections, those of all layers stacked."""
    leaves = jax.tree.leaves(
        {name: part.get("layers", {}) for name, part in tree.items()},
        is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )
    return sum(math.prod(leaf.shape) for leaf in leaves if len(leaf.shape) == 3)


def peak_memory() -> float:
    """The most memory that one of this process's devices had in use, GB; of a CPU, the process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
    if peaks:
        return max(peaks) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Clock:
    """The rate of the steps alone: it runs inside `with clock`, and pauses outside.

    peak: FLOP/s of all devices together, where it is known.
    """

    def __init__(self, peak: float | None = None):
        self._peak = peak
        self._tokens = 0
        self._flops = 0.0
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._begun

    def count(self, tokens: int, flops: float = 0.0) -> None:
        """So many more."""
        self._tokens += tokens
        self._flops += flops

    def lap(self) -> dict[str, float]:
        """`tokens_per_second` since the last lap and, where the peak is known, `mfu`, the share of
        it that was used."""
        found = {"tokens_per_second": self._tokens / self._seconds}
        if self._peak:
            found["mfu"] = self._flops / self._seconds / self._peak
        self._tokens = 0
        self._flops = 0.0
        self._seconds = 0.0
        return found


def check_profile(profiled: int, start: int, steps: int) -> None:
    """Raises UserError if a run of `steps`, at step `start`, has too few left to profile."""
    needed = start + _WARM_UP + profiled
    since = f"of those after {start} " if start else ""
    require(
        not profiled or steps >= needed,
        f"--profile={profiled} needs config.train.steps={steps} to be at least {needed}: the first "
        f"{_WARM_UP} steps {since}are left out of it",
    )


class Trace:
    """JAX's profile of some steps, in a folder that xprof and Perfetto open (perfetto_trace.json.gz
    under it). It begins after the first three steps, which compile."""

    def __init__(self, folder: Path, start: int, steps: int):
        self.folder = folder
        first = start + _WARM_UP + 1
        self._steps = range(first, first + steps)
        self._running = False

    def before(self, step: int) -> None:
        """Begins at its first step."""
        if self._steps and step == self._steps[0]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # of Python's frames it would hold a million
            jax.profiler.start_trace(
                self.folder, create_perfetto_trace=True, profiler_options=options
            )
            self._running = True

    def after(self, step: int, state: Any) -> bool:
        """Ends at its last step, when that is done on the device; whether it did."""
        if not (self._running and step == self._steps[-1]):
            return False
        jax.block_until_ready(state)
        self.close()
        return True

    def close(self) -> None:
        """Ends where it was left running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
