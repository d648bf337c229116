"""Arrays kept in the cache folder, so that what was prepared once is there at the next start.

A file is named by all that its contents depend on. It appears whole or not at all, and one that is
damaged is as good as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import flora_jax

_SUM = 32  # bytes of the check sum that a file begins with


def code_digest(*names: str) -> str:
    """sha256 of the package's Python files `names` (a folder: all in it).

    What other code makes is made anew.
    """
    digest = hashlib.sha256()
    root = Path(flora_jax.__file__).parent
    for name in names:
        for path in sorted((root / name).glob("*.py")) if (root / name).is_dir() else [root / name]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_kept(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays by name; None where they are not kept, or the file is damaged."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(stored[_SUM:]).digest() != stored[:_SUM]:
        return None
    with np.load(io.BytesIO(stored[_SUM:]), allow_pickle=False) as arrays:
        return dict(arrays)


def keep(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps the arrays if the folder can be written; else the next start prepares them again."""
    stored = io.BytesIO()
    np.savez(stored, **arrays)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="preparing-") as scratch:
            new = Path(scratch) / path.name
            new.write_bytes(hashlib.sha256(stored.getbuffer()).digest() + stored.getbuffer())
            os.replace(new, path)
