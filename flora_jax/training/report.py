"""The output of a run: a table of parameters and memory, then a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from tqdm import tqdm

from flora_jax.adapters import Quantized, paths
from flora_jax.config import learning_rate
from flora_jax.errors import silence
from flora_jax.training.run import Run


@contextlib.contextmanager
def _outlived() -> Iterator[None]:
    """Keeps a run going when nobody reads its output any more: a closed terminal, `| head`."""
    try:
        yield
    except OSError:
        silence(sys.stderr)


def say(message: str) -> None:
    """Prints a line on stderr without breaking a progress bar."""
    with _outlived():
        tqdm.write(message, file=sys.stderr)


def _count(tree: Any) -> tuple[int, int, int]:
    """Parameters, bytes in all, and bytes on this process's first device."""
    whole = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    leaves = jax.tree.leaves(tree)
    device = jax.local_devices()[0]
    held = sum(
        s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == device
    )
    return sum(math.prod(leaf.shape) for leaf in whole), sum(leaf.nbytes for leaf in leaves), held


def parameter_table(run: Run) -> str:
    """A table of the frozen base, the trainable leaves by product, and the optimizer state; below
    it the share that trains."""
    rows = [("frozen base", *_count(run.frozen))]
    for collection, tree in run.state.trainable.items():
        groups: dict[str, list[Any]] = {}
        for path, leaf in paths(tree).items():
            if path.startswith("layers/"):
                path = "/".join(path.split("/")[:3])  # one row a product
            groups.setdefault(path, []).append(leaf)
        if collection == "adapter":
            rows += [
                (f"adapter {name.removeprefix('layers/')}", *_count(leaves))
                for name, leaves in groups.items()
            ]
        else:
            rows.append(("trained base", *_count(tree)))
    trainable = _count(run.state.trainable)
    total = rows[0][1] + trainable[0]
    rows += [("all that trains", *trainable), ("optimizer state", *_count(run.state.optimizer))]
    lines = [
        f"{'':24}{'parameters':>14}{'MB':>11}{'MB/device':>11}",
        *(
            f"{name:24}{n:>14,}{size / 1e6:>11.1f}{held / 1e6:>11.1f}"
            for name, n, size, held in rows
        ),
        f"trainable: {trainable[0]:,} of {total:,} ({100 * trainable[0] / total:.3f} %)",
    ]
    return "\n".join(lines)


def print_start(run: Run, start: int) -> None:
    """Prints the table, the counts of the data, and the step that the run resumes after."""
    config = run.config
    data = run.inputs.account
    mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    say(
        f"{config.adapter.method}, rank {config.adapter.rank}, scale {run.adapter_config.scale:g}, "
        f"learning rate {learning_rate(config):g}; mesh {mesh}"
    )
    say(parameter_table(run))
    for part in ("train", "validation"):
        counts = data[part]
        say(
            f"{part}: {counts['kept']:,} examples, {counts['loss_tokens']:,} tokens in the loss; "
            f"{counts['too_long']:,} longer than data.max_length={config.data.max_length} left out"
        )
    if data["dropped_as_in_test"]:
        say(
            f"{data['dropped_as_in_test']:,} training records dropped: they are in a validation or "
            "test set"
        )
    if start:
        say(f"resuming after step {start}")


class Progress:
    """A tqdm bar on a terminal, plain log lines elsewhere, both with rate and time left.

    Only the first process prints. name: of a run among several at once, which print only lines that
    begin with it.
    """

    def __init__(self, start: int, steps: int, name: str = ""):
        self._prefix = ""
        if name:
            self._prefix = f"{name}: "
        self._start = start
        self._steps = steps
        self._main = jax.process_index() == 0
        self._terminal = sys.stderr.isatty() and not name
        self._clock = time.perf_counter()
        self._bar = tqdm(
            initial=start,
            total=steps,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not (self._main and self._terminal),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        with _outlived():
            self._bar.close()

    def say(self, message: str) -> None:
        """Prints a line."""
        if self._main:
            say(self._prefix + message)

    def log(self, step: int, line: dict[str, float]) -> None:
        """Prints the logged values beside the bar, or as a line."""
        rate = f"{line['tokens_per_second']:.0f}"
        if self._terminal:
            with _outlived():
                self._bar.set_postfix({"loss": f"{line['loss']:.4f}", "tokens/s": rate})
        else:
            left = (time.perf_counter() - self._clock) / (step - self._start) * (self._steps - step)
            self.say(
                f"step {step}/{self._steps}: loss {line['loss']:.4f}, {rate} tokens/s, "
                f"learning rate {line['learning_rate']:.2e}, {tqdm.format_interval(left)} left"
            )

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        with _outlived():
            self._bar.update(step - self._bar.n)
