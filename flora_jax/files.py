"""Files for all rooms: JSON and directories, written whole or not at all, and the cache folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flora_jax.errors import UserError, WriteError, disk_fault, expand_path, require

_LARGEST = 2**28  # bytes of a JSON file: Llama 3's tokenizer.json has 17 MB
# Linux's second names for the files and directories that a process has open.
_OPEN = "/proc/self/fd"


def cache_root(given: str | os.PathLike | None = None) -> Path:
    """The folder of downloads and prepared data: `given`, `$FLORA_CACHE` or ~/.cache/flora_jax.

    Raises UserError if none of these can be named.
    """
    if path := given or os.environ.get("FLORA_CACHE"):
        return Path(expand_path(path))
    if not os.path.isabs(home := os.path.expanduser("~")):
        raise UserError(
            "FLORA_CACHE is unset, and there is no home directory; "
            "set it to a folder for downloads and prepared data"
        )
    return Path(home, ".cache", "flora_jax")


def make_cache(given: str | os.PathLike | None = None) -> Path:
    """`cache_root`, made if absent. Raises UserError if it cannot be made."""
    root = cache_root(given)
    with filling_cache(root):
        root.mkdir(parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def filling_cache(directory: Path) -> Iterator[None]:
    """Raises UserError if the block cannot write to `directory`, a part of the cache."""
    try:
        yield
    except Exception as error:  # array_record has classes of its own
        reason = disk_fault(error) or getattr(error, "strerror", None)
        if reason is None:
            raise
        raise UserError(
            f"cache directory {directory} cannot be written ({reason}); "
            "make room, or set FLORA_CACHE to one that can"
        ) from error


def plain_path(directory: Path, where: str) -> Path:
    """An existing directory, under a name that orbax and TFDS do not misread.

    They use etils.epath, which looks for files with `glob` on whole paths, so that `[` and `*` in
    any parent are patterns, and which takes `/gs/…` for object storage. Linux has a second name for
    every open directory, which replaces all but the plainest paths. Elsewhere a path that misleads
    epath is a UserError (`check_plain`); where: the flag that it comes from.
    """
    path = directory.absolute()
    if re.fullmatch(r"[\w./-]*", str(path), re.ASCII) and not _misleads(path):
        return path
    check_plain(path, where)
    if not os.path.isdir(_OPEN):
        return path
    there = os.stat(path)
    return Path(_second_name(str(path), there.st_dev, there.st_ino))


def check_plain(path: Path, where: str) -> None:
    """Raises UserError if `plain_path` could not name the directory, which need not exist."""
    require(
        not _misleads(path.absolute()) or os.path.isdir(_OPEN),
        f"{where}={str(path)!r} is a pattern or an address to orbax and TFDS; "
        "use a path without '*', '?' and '[' that does not begin with /gs, /s3, /az or /hf",
    )


def _misleads(path: Path) -> bool:
    return (
        path.parts[1:2] in [("gs",), ("s3",), ("az",), ("hf",)]
        or re.search(r"[*?\[]", str(path)) is not None
    )


@functools.cache
def _second_name(path: str, device: int, inode: int) -> str:
    """Linux's second name of a directory, which stays open as long as the process, since its
    writers keep the name."""
    return f"{_OPEN}/{os.open(path, os.O_RDONLY | os.O_DIRECTORY)}"


def keep_programs() -> None:
    """Makes JAX keep compiled programs in the cache folder, where a second start reads them.

    JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) comes first. Without a folder that can be
    written, nothing is kept.
    """
    import jax  # takes a second, which a mere reader of files need not wait

    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = plain_path(make_cache(cache_root() / "programs"), "FLORA_CACHE")
    except UserError as error:
        print(f"warning: what is compiled is not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def check_file(path: Path, hint: str = "") -> None:
    """Raises UserError unless `path` leads to a file; reading a device or a pipe may never end.

    hint: added to the message for an absent file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{hint}") from None
    except (OSError, ValueError) as error:  # links in a circle; a zero byte in its name
        raise UserError(f"{path}: cannot be read ({error})") from None
    require(not stat.S_ISDIR(mode), f"{path}: is a directory, not a file")
    require(stat.S_ISREG(mode), f"{path}: is a device or a pipe, not a file")


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError if there is none; hint: as in `check_file`."""
    check_file(path, hint)
    size = path.stat().st_size
    require(size <= _LARGEST, f"{path}: {size:,} bytes are no JSON file of these programs")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path}: cannot be read (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    require(
        isinstance(value, dict), f"{path}: expected a JSON object, found {type(value).__name__}"
    )
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; the file appears complete or not at all, and its folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if len(os.fsencode(name)) >= 250:  # with .tmp it must not be over 255 bytes
        name = name[:50]
    temporary = path.with_name(name + ".tmp")
    try:
        temporary.write_text(_json(value), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_result(path: Path, value: Any, where: str) -> None:
    """`write_json` of a result that took hours.

    If `path` cannot be written, the result is printed and kept in a temporary file. Raises
    WriteError, which names that file; where: the name of `path` in the message.
    """
    try:
        write_json(path, value)
    except OSError as error:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                print(_json(value), file=stream, flush=True)
                break
        message = f"{where} cannot be written ({error.strerror}); what it was to hold is printed"
        if kept := _keep(_json(value)):
            message += f" and kept in {kept}"
        raise WriteError(message) from None


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _keep(text: str) -> str | None:
    """Writes the text to a file elsewhere and returns its name; None if no disk takes it."""
    for folder in (None, os.curdir, os.path.expanduser("~")):
        try:
            file, name = tempfile.mkstemp(".json", "flora_jax-", folder)
        except OSError:
            continue
        try:
            with open(file, "w", encoding="utf-8") as opened:
                opened.write(text)
            return name
        except OSError:
            os.unlink(name)
    return None


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A scratch directory that becomes `directory` when the block ends; an error leaves none.

    Parents are made. A directory that stands there is replaced, and stays if that fails. A process
    killed outright leaves a hidden directory with "unfinished" in its name.
    """
    directory = directory.absolute()
    missing = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=f".{directory.name[:50]}.unfinished-"
        ) as scratch:
            new = Path(scratch) / "new"
            old = Path(scratch) / "old"
            new.mkdir()
            yield new
            try:
                if directory.exists():
                    os.rename(directory, old)
                os.rename(new, directory)
            except BaseException:  # even an interrupt between the two
                if old.exists() and not directory.exists():
                    os.rename(old, directory)
                raise
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # another process has put something there
                parent.rmdir()
        raise
