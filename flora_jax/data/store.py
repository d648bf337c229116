"""Encoded examples in a file: written one by one, read through a map of the file into memory.

The file holds, in this order:

    check sum    32 bytes: sha256 of everything behind it
    tokens       of all examples, each token with its loss mask
    known        an `.npz`: the examples' lengths, and what else the writer knows of them
    place        8 bytes: where `known` begins
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flora_jax.data.encode import Encoded

_SUM = 32  # bytes of the check sum
_PLACE = 8  # bytes of the number at the end
_TOKEN = np.dtype([("token", "<i4"), ("loss", "?")])


class Store(Sequence[Encoded]):
    """Encoded examples, each a view of one array. A slice is a Store, too; its step is ignored."""

    def __init__(self, tokens: np.ndarray, bounds: np.ndarray):
        """tokens: `_TOKEN` [N]. bounds: int64 [examples + 1], where each begins, and the end."""
        self._tokens = tokens
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, i: int | slice) -> Encoded | Store:
        if isinstance(i, slice):
            start, stop, _ = slice(i.start, i.stop).indices(len(self))
            return Store(self._tokens, self._bounds[start : max(start, stop) + 1])
        i = range(len(self))[i]  # Counts from the end if negative, and raises IndexError.
        found = self._tokens[self._bounds[i] : self._bounds[i + 1]]
        return Encoded(found["token"], found["loss"])


class StoreWriter:
    """Writes a file for `open_store`. It is complete once `finish` has returned."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._file.write(bytes(_SUM))
        self._lengths = array.array("q")
        self._digest = hashlib.sha256()

    def add(self, example: Encoded) -> None:
        """Appends an example."""
        found = np.empty(len(example.tokens), _TOKEN)
        found["token"] = example.tokens
        found["loss"] = example.loss
        self._file.write(found)
        self._lengths.append(len(found))
        self._digest.update(example.tokens.tobytes() + example.loss.tobytes() + b"|")

    def take_digest(self) -> str:
        """sha256 (hex) of the tokens and loss masks added since the last call."""
        digest = self._digest.hexdigest()
        self._digest = hashlib.sha256()
        return digest

    def finish(self, **known: np.ndarray) -> None:
        """Completes the file. known: arrays that `open_store` returns by name."""
        place = self._file.tell()
        stored = io.BytesIO()
        np.savez(stored, lengths=np.array(self._lengths), **known)
        self._file.write(stored.getbuffer())
        self._file.write(place.to_bytes(_PLACE, "little"))
        self._file.seek(_SUM)
        digest = hashlib.file_digest(self._file, "sha256").digest()
        self._file.seek(0)
        self._file.write(digest)


@contextlib.contextmanager
def new_store(path: Path) -> Iterator[StoreWriter]:
    """A writer of a new file. Raises FileExistsError if there is one."""
    with path.open("xb+") as file:
        yield StoreWriter(file)


def open_store(path: Path) -> tuple[Store, dict[str, np.ndarray]] | None:
    """A file's examples, and the arrays given to `finish`; None if it is missing or damaged.

    The file may be moved or removed while its examples are in use.
    """
    try:
        with path.open("rb") as file:
            claimed = file.read(_SUM)
            if hashlib.file_digest(file, "sha256").digest() != claimed:
                return None
            end = file.seek(-_PLACE, io.SEEK_END)
            place = int.from_bytes(file.read(_PLACE), "little")
            file.seek(place)
            with np.load(io.BytesIO(file.read(end - place)), allow_pickle=False) as arrays:
                known = dict(arrays)
            tokens = np.memmap(file, _TOKEN, "r", _SUM, (place - _SUM) // _TOKEN.itemsize)
    except OSError:
        return None
    bounds = np.concatenate([[0], np.cumsum(known.pop("lengths"))])
    # Views of a plain array are made in half the time of a memmap's.
    return Store(tokens.view(np.ndarray), bounds), known
