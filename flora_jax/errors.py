"""The one error for bad input, and how a command reports it.

Whatever a user can mend (a misspelt field, a missing file, a rank that does not divide) is raised as
`UserError` with one line that names the field or file, the value, and what would do. Commands print that
line on stderr and exit with 2; anything else is a defect of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

# What may help where a score or a token would come of numbers that are not finite.
NOT_FINITE = "check the weights and the adapter, or compute in float32, whose range is the largest"


class UserError(ValueError):
    """Bad input: its message is one line that says what is wrong, with which value, and what would do."""


def near_misses(name: str, known: Iterable[str]) -> str:
    """A clause that helps after a misspelt name: the closest known names, or else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"known: {', '.join(known)}"


def check_text(text: str, where: str) -> None:
    """Raises UserError for half a character, which no tokenizer takes: a lone surrogate in JSON (`\\ud83d`), a byte
    that is no UTF-8 in a command."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate, or bytes that are no UTF-8)") from None


class Stopped(Exception):
    """A signal ended the run early, after its checkpoint was written."""


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are UserErrors: one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's own message."""
        raise UserError(f"{message}; {self.prog} --help lists all flags")


def positive_integers(flag: str, text: str) -> list[int]:
    """The integers of a comma-separated flag, each once. Raises UserError unless all are positive."""
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not item.isdecimal() or int(item) < 1:
            raise UserError(f"{flag} {item!r} must be a positive integer, or several with commas between")
    return list(dict.fromkeys(map(int, items)))


def check_writable(path: Path, flag: str) -> None:
    """Raises UserError unless `path` can be made or written: its nearest existing parent is a directory and ours."""
    # os.path, since Path.exists raises below a directory that may not be read.
    parent = next(p for p in path.absolute().parents if os.path.exists(p))
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag}={path} cannot be written: {parent} is no directory that may be written to")


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command's `main` and exits: 0 done, 2 bad input (one line on stderr), 1 anything else."""
    try:
        main(sys.argv if argv is None else argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)
    except (Stopped, FloatingPointError) as end:  # ends of a run that its message explains
        print(end, file=sys.stderr)
        sys.exit(1)
