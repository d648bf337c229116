"""The one error for bad input, and how a command reports it.

Whatever a user can mend (a misspelt field, a missing file, a rank that does not divide) is raised as
`UserError` with one line that names the field or file, the value, and what would do. Commands print that
line on stderr and exit with 2; anything else is a defect of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input: its message is one line that says what is wrong, with which value, and what would do."""


def near_misses(name: str, known: Iterable[str]) -> str:
    """A clause that helps after a misspelt name: the closest known names, or else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"known: {', '.join(known)}"


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command's `main` and exits: 0 done, 2 bad input (one line on stderr), 1 anything else."""
    try:
        main(sys.argv if argv is None else argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
