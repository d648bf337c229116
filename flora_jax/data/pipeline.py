"""Batches of encoded examples: for training endless and exactly resumable, else a plain loop.

A batch is a dict of numpy arrays `[B, T]`, T always `max_length`:

    tokens         int32    a row holds one example of n - 1 positions, or with packing several
    targets        int32    the token after each, shifted within its example, before any packing
    loss_weights   float32  1 where the target counts in the loss, else 0
    segment_ids    int32    1, 2, … by example within the row, 0 on padding
    positions      int32    from 0 in every example

For example [5, 6, 7] (7 counting) beside [8, 9] (9 counting) at T = 4: tokens 5 6 8 0, targets
6 7 9 0, weights 0 1 1 0, segments 1 1 2 0, positions 0 1 0 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from flora_jax.data.encode import Encoded
from flora_jax.errors import require

Batch = dict[str, np.ndarray]

# Rows that grain packs at a time; it emits all of them once an example fits into none. More rows
# leave less padding.
_PACKING_BINS = 64

_ARRAYS = ("tokens", "targets", "loss_weights")  # of an example; a row adds the other two


def train_iterator(
    encoded: Sequence[Encoded],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    packing: bool,
    parts: Sequence[tuple[int, float]] | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches: an epoch has each example once, in one shard, in a new order from `seed`.

    batch_size: the rows of this process. packing: several examples a row, else one. parts:
    `(n, weight)` of the first n examples, of the n after them, …; each part is then drawn by its
    share of the weights and begins again, in a new order, whenever it ends, and there are no epochs
    of the whole. Batches run across the ends of epochs; packed rows do not, so an epoch's last rows
    may hold padding. `get_state()` is JSON-able; `set_state` of it, on a new iterator over the same
    examples, goes on with the very same batches. Raises UserError for arguments that give no batch.
    """
    for field, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        require(value >= least, f"train.{field}={value} must be at least {least}")
    require(
        0 <= shard_index < shard_count,
        f"shard_index={shard_index} must be in 0 … shard_count-1={shard_count - 1}",
    )
    require(
        len(encoded) >= shard_count,
        f"{len(encoded)} examples cannot feed {shard_count} processes; each needs at least one",
    )
    _check_lengths(encoded, max_length)

    def epoch(number: int) -> grain.IterDataset:
        order = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        shard = slice(shard_index, None, shard_count)
        if parts is None:
            rows = grain.MapDataset.source(encoded).map(_row).shuffle(seed=order)[shard]
        else:
            rows = _mixed(encoded, parts, order, shard)
        # The examples are mapped into memory: threads would only add latency.
        rows = rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if packing:
            return _packed(rows, max_length, order)
        return rows.map(lambda row: _pad(row, max_length))

    return iter(_Epochs(epoch).batch(batch_size))


def _mixed(
    encoded: Sequence[Encoded], parts: Sequence[tuple[int, float]], seed: int, shard: slice
) -> grain.MapDataset:
    """The parts, each shuffled and repeated without end, drawn by weight.

    Each part is cut into shards, not the mix: its pattern is fixed, so a shard might get one part
    only.
    """
    drawn = []
    start = 0
    for i, (size, _) in enumerate(parts):
        rows = grain.MapDataset.source(encoded[start : start + size]).map(_row)
        drawn.append(rows.shuffle(seed=(seed + i) % 2**32).repeat()[shard])
        start += size
    return grain.MapDataset.mix(drawn, [weight for _, weight in parts])


def eval_batches(
    encoded: Sequence[Encoded], *, batch_size: int, max_length: int
) -> Iterator[Batch]:
    """Batches of every example once, in order, one a row.

    The last batch is filled with empty rows (segment 0, no weight). Raises UserError for a batch
    size below 1 and for an example that is too long.
    """
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    _check_lengths(encoded, max_length)
    empty = _row(Encoded(np.zeros(1, np.int32), np.zeros(1, bool)))
    for start in range(0, len(encoded), batch_size):
        rows = [_row(example) for example in encoded[start : start + batch_size]]
        rows += [empty] * (batch_size - len(rows))
        padded = [_pad(row, max_length) for row in rows]
        yield {name: np.stack([row[name] for row in padded]) for name in padded[0]}


def _row(example: Encoded) -> Batch:
    """The `_ARRAYS` of one example, each `[n - 1]`."""
    return {
        "tokens": example.tokens[:-1].astype(np.int32),
        "targets": example.tokens[1:].astype(np.int32),
        "loss_weights": example.loss[1:].astype(np.float32),
    }


def _pad(row: Batch, max_length: int) -> Batch:
    """One example as a row of its own, `[T]`."""
    n = len(row["tokens"])
    row = {**row, "segment_ids": np.ones(n, np.int32), "positions": np.arange(n, dtype=np.int32)}
    return {name: np.pad(array, (0, max_length - n)) for name, array in row.items()}


def _packed(rows: grain.IterDataset, max_length: int, seed: int) -> grain.IterDataset:
    """Rows of several examples, `[T]`."""
    packed = grain.experimental.FirstFitPackIterDataset(
        rows,
        length_struct=dict.fromkeys(_ARRAYS, max_length),
        num_packing_bins=_PACKING_BINS,
        seed=seed,
    )
    return packed.map(_unpack_names)


def _unpack_names(packed: dict[str, Any]) -> Batch:
    """grain numbers segments and positions for each array; here they are the same for all."""
    return {
        **{name: packed[name] for name in _ARRAYS},
        "segment_ids": packed["tokens_segment_ids"],
        "positions": packed["tokens_positions"],
    }


def _check_lengths(encoded: Sequence[Encoded], max_length: int) -> None:
    longest = max((len(example.tokens) - 1 for example in encoded), default=0)
    require(
        longest <= max_length,
        f"data.max_length={max_length} is shorter than an example of {longest} positions",
    )


class _Epochs(grain.IterDataset):
    """One dataset after the other, each made from its epoch's number.

    grain's own `repeat` would repeat the first epoch after packing, and before it would let rows
    mix the end of an epoch with the next.
    """

    def __init__(self, epoch: Callable[[int], grain.IterDataset]):
        super().__init__()
        self._epoch = epoch

    def __iter__(self) -> grain.DatasetIterator:
        return _EpochsIterator(self._epoch)


class _EpochsIterator(grain.DatasetIterator):
    def __init__(self, epoch: Callable[[int], grain.IterDataset]):
        super().__init__()
        self._make = epoch
        self._start(0)

    def _start(self, number: int) -> None:
        self._number = number
        self._rows = iter(self._make(number))

    def __next__(self) -> Batch:
        while True:
            try:
                return next(self._rows)
            except StopIteration:
                self._start(self._number + 1)

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._number, "rows": self._rows.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._start(state["epoch"])
        self._rows.set_state(state["rows"])
