"""Files that several rooms read or write: JSON objects and directories, whole or not at all, and the cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flora_jax.errors import UserError


def cache_root(given: str | os.PathLike | None = None) -> Path:
    """The folder for downloaded weights and prepared data: `given`, or `$FLORA_CACHE`, or `~/.cache/flora_jax`."""
    return Path(given or os.environ.get("FLORA_CACHE") or "~/.cache/flora_jax").expanduser()


def keep_programs() -> None:
    """Has JAX keep what it compiles under the cache folder, so that a command's second start reads it there. JAX's own
    setting (`JAX_COMPILATION_CACHE_DIR`) comes first."""
    import jax  # takes a second, which what reads files alone need not wait for

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "programs"))


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The JSON object in `path`; UserError if there is none, with `hint` behind the line for an absent file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, not a file") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; the file appears complete or not at all, and its folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A scratch directory that becomes `directory` when the block ends; after an error nothing of it is left.

    Its parents are made; a directory that stands there is replaced, and stays if that fails. A process killed outright
    leaves a hidden directory with "unfinished" in its name.
    """
    directory = directory.absolute()
    missing = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.unfinished-") as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            yield new
            try:
                if directory.exists():
                    os.rename(directory, old)
                os.rename(new, directory)
            except BaseException:  # an interrupt between the two as well
                if old.exists() and not directory.exists():
                    os.rename(old, directory)
                raise
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise
