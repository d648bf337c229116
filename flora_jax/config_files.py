"""Files of configurations, and the command line that names one and sets its fields.

Such a file is Python, and is run.
"""

from __future__ import annotations

import inspect
import os
import re
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from flora_jax.config import fields
from flora_jax.errors import UserError, near_misses, require

_LONGEST = 100  # characters of a flag


def read_command(argv: list[str], about: str = "") -> tuple[ConfigDict, str, int]:
    """The configuration, the workdir and the steps to profile of a command line of training; about:
    what --help shows first. Raises UserError for what is wrong."""
    # Twice: what --config.FIELD may name is known once --config is read.
    first = flags.FlagValues()
    known = flags.FlagValues()
    path = flags.DEFINE_string("config", None, "A file of configs/.", flag_values=first)
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run; made if absent, resumed if it holds this run.",
        flag_values=known,
    )
    profile = flags.DEFINE_integer(
        "profile",
        0,
        "Steps of which to write JAX's profile, after the first three.",
        lower_bound=0,
        flag_values=known,
    )
    flags.DEFINE_bool(
        "help", False, "Show this text.", short_name="h", flag_values=known, allow_overwrite=False
    )
    config = None
    _check_lengths(argv)
    try:
        for values in (first, known):
            # flags may stand after an argument that is none, which is then named below
            values.set_gnu_getopt()
        rest = first(argv, known_only=True)
        if path.value is not None:
            config = read_config(path.value)
            _check_names(rest, list(fields(config)))
            config_flags.DEFINE_config_dict("config", config, flag_values=known, sys_argv=rest)
        rest = known(rest)
    except flags.Error as error:
        raise UserError(f"{error}; fields are listed in flora_jax/config.py") from None
    if known.help:
        print(about, "--config FILE", "--config.FIELD=VALUE", known.get_help(), sep="\n")
        sys.exit(0)
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; fields are set as --config.FIELD=VALUE")
    for flag in (path, workdir):
        require(flag.value is not None, f"--{flag.name} is missing")
    return config, workdir.value, profile.value


def _check_lengths(argv: list[str]) -> None:
    """Raises UserError for a flag longer than any: absl would look for near misses, and recurse."""
    for argument in argv[1:]:
        name = argument.partition("=")[0]
        require(
            not name.startswith("-") or len(name) <= _LONGEST,
            f"{name!r} is no flag; fields are listed in flora_jax/config.py",
        )


def _check_names(argv: list[str], known: list[str]) -> None:
    for argument in argv[1:]:
        found = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if found and found[1] not in known:
            raise UserError(f"config.{found[1]} is no field; {near_misses(found[1], known)}")


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
