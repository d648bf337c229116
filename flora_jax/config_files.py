"""Files of configurations: `--config` names one, or one of those that come with the package.

Such a file is Python, and is run.
"""

from __future__ import annotations

import inspect
import os
import re
import runpy
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flora_jax.errors import UserError, near_misses, require


def read_config(path: str | Path) -> ConfigDict:
    """What a configuration file's `get_config()` returns, for `FILE:NAME` its `get_config(NAME)`.

    A bare name (`ffba_1b`) is one of those that come with the package. Raises UserError for a file
    that cannot be read or run.
    """
    where = f"--config={path}"
    file, arguments = _file_and_name(os.path.expanduser(path))
    if re.fullmatch(r"\w+", file) and not Path(file).exists():
        own = own_configs()
        require(file in own, f"{where}: {near_misses(file, own)}, or give a file")
        file = str(own[file])
    require(
        Path(file).is_file(),
        f"{where}: there is no such file; configs/ has one for each method and model, and a bare "
        "name such as ffba_1b is one of them",
    )
    try:
        made = _run_file(file, arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # whatever the file raises is the file's own
        reason = str(error).strip() or "no message"
        raise UserError(
            f"{where}{_line_of(file, error)}: {type(error).__name__}: {reason}"
        ) from None
    require(
        isinstance(made, ConfigDict),
        f"{where}: get_config() must return the configuration of flora_jax.config.get_config, "
        "changed",
    )
    return made.lock()


def own_configs() -> dict[str, Path]:
    """The files of configs/, by name: in a wheel they lie in the package, in a checkout beside
    it."""
    package = Path(__file__).parent
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def _file_and_name(path: str) -> tuple[str, list[str]]:
    """`FILE:NAME` as `(FILE, [NAME])`; a file whose name has a colon is one all the same."""
    file, colon, name = path.rpartition(":")
    if colon and not Path(path).is_file():
        return file, [name]
    return path, []


def _run_file(file: str, arguments: list[str]) -> Any:
    make = runpy.run_path(file).get("get_config")
    if make is None:
        return None
    if arguments and not inspect.signature(make).parameters:
        raise UserError(
            f"{file} is one configuration and takes no name; leave {':' + arguments[0]!r} out"
        )
    return make(*arguments)


def _line_of(file: str, error: Exception) -> str:
    """Where in the file an error came up, for a message."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""
