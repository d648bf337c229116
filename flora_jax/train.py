"""Fine-tunes a Llama: `python -m flora_jax.train --config configs/ffba_1b.py --workdir DIR
[--config.FIELD=VALUE]…`.

The same command on the same workdir resumes. The workdir gets config.json, metrics.jsonl,
tensorboard/, checkpoints/, adapter/ (the best step's) and eval.json; `--profile N` adds JAX's
profile of N steps, profile/. Exit codes: 0 done, 2 bad input, 1 anything else.
"""

from __future__ import annotations

import re
import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from flora_jax.config import check_config, fields
from flora_jax.config_files import read_config
from flora_jax.errors import UserError, near_misses, require, run_command
from flora_jax.files import keep_programs
from flora_jax.finetune import run
from flora_jax.training.measure import Trace

_LONGEST = 100  # characters of a flag


def parse(argv: list[str]) -> tuple[ml_collections.ConfigDict, str, int]:
    """The configuration, the workdir and the steps to profile of a command line. Raises UserError
    for what is wrong."""
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
        print(__doc__, "--config FILE", "--config.FIELD=VALUE", known.get_help(), sep="\n")
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


def _check_profile(profiled: int, steps: int) -> None:
    needed = profiled + Trace.WARM_UP
    require(
        not profiled or steps >= needed,
        f"--profile={profiled} needs config.train.steps={steps} to be at least {needed}: the first "
        f"{Trace.WARM_UP} steps are left out of it",
    )


def main(argv: list[str]) -> None:
    """The command."""
    config, workdir, profile = parse(argv)
    check_config(config)
    _check_profile(profile, config.train.steps)
    keep_programs()
    run(config, workdir, profile)


if __name__ == "__main__":
    run_command(main)
