"""The one error for bad input, and how a command reports it.

Whatever a user can mend (a misspelt field, a missing file, a rank that does not divide) is raised
as `UserError` with one line that names the field or file, the value, and what would do. Commands
print that line on stderr and exit with 2. A disk's refusal is one line as well (exit code 1).
Anything else is a defect of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

# The errors of a disk that is full, over its quota, read-only, limited, broken, gone, or not ours.
_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.EACCES,
)
_LONGEST = 1500  # characters of a message
_BROKEN_PIPE = 128 + 13  # a shell's exit code of an end by SIGPIPE

# The remedy where logits are not finite.
NOT_FINITE = "check the weights and the adapter, or compute in float32, whose range is the largest"


class UserError(ValueError):
    """Bad input: one line that says what is wrong, with which value, and what would do.

    Line ends become spaces, and a message that is too long loses its middle.
    """

    def __init__(self, message: str):
        line = " ".join(message.splitlines())
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
        super().__init__(line)


def require(right: object, message: str) -> None:
    """Raises UserError with the message unless `right` is true."""
    if not right:
        raise UserError(message)


@contextlib.contextmanager
def told_of(where: str) -> Iterator[None]:
    """Makes the UserErrors of a block begin with `where`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def in_a_line(error: BaseException, most: int = 200) -> str:
    """An error's message in one line of at most so many characters."""
    line = " ".join(str(error).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def near_misses(name: str, known: Iterable[str]) -> str:
    """A clause for a misspelt name: the closest known names, or else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"known: {', '.join(known)}"


def require_known(name: Any, known: Iterable[str], what: str) -> None:
    """Raises UserError, with near misses, unless `name` is one of `known`.

    what: the field and its value, for the message. Names are compared, not hashed: a user's value
    may be anything.
    """
    known = list(known)
    if name not in known:
        raise UserError(f"{what} is unknown; {near_misses(str(name), known)}")


def check_text(text: str, where: str) -> None:
    """Raises UserError for half a character, which no tokenizer takes.

    It is a lone surrogate in JSON (`\\ud83d`), or a byte that is no UTF-8 on a command line. where:
    the text's place, for the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half a character (a lone surrogate, or bytes that are no UTF-8)"
        ) from None


class Stopped(Exception):
    """A signal ended the run early, after its checkpoint was written."""


class WriteError(Exception):
    """A disk refused what was to be written: one line, with what is safe and what would do."""


def disk_fault(error: BaseException | None) -> str | None:
    """The system's words if `error`, or one behind it, comes from a disk; None for any other.

    They are searched in its text: writers in C++ or Rust (tensorstore, array_record, safetensors)
    have error classes of their own, and repeat the system's words.
    """
    while error is not None:
        if (words := _disk_words(error)) is not None:
            return words
        error = _behind(error)
    return None


def _behind(error: BaseException) -> BaseException | None:
    """The error that led to this one, as a traceback shows it."""
    if error.__suppress_context__:
        return error.__cause__
    return error.__context__


def _disk_words(error: BaseException) -> str | None:
    """`disk_fault` of this error alone: one behind it may be a defect of ours."""
    return next((words for words in map(os.strerror, _DISK) if words in str(error)), None)


@contextlib.contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Raises WriteError, with the remedy, if a disk refuses the block's files (`what`)."""
    try:
        yield
    except (UserError, WriteError):
        raise
    except Exception as error:  # tensorstore, array_record and safetensors have their own
        if (reason := disk_fault(error)) is None:
            raise
        raise WriteError(f"{what} cannot be written ({reason}); {remedy}") from error


def expand_path(text: str | os.PathLike) -> str:
    """A path with its leading `~` or `~user` spelt out; a shell leaves it so in `--out=~/x`.

    Raises UserError for a home directory that does not exist, and for an address such as
    `gs://bucket/x`, which would become a folder.
    """
    text = os.fspath(text)
    require(
        not re.match(r"\w+://", text),
        f"{text!r} is an address, not a path; mount what it stands for, or copy it",
    )
    path = os.path.expanduser(text)
    require(
        not path.startswith("~"),
        f"{text!r}: there is no such home directory; spell the path out (or ./~… for such a name)",
    )
    return path


def path_flag(text: str) -> str:
    """`expand_path` as the `type` of a command's flag."""
    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors.

    Flags of `type=Path` expand a leading `~`; `type=path_flag` does so for a path that stays text.
    """

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.register("type", Path, lambda text: Path(path_flag(text)))

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's own message."""
        raise UserError(f"{message}; {self.prog} --help lists all flags")


def split_names(text: str) -> list[str]:
    """`"a, b"` as `["a", "b"]`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def positive_integers(flag: str, text: str) -> list[int]:
    """The integers of a comma-separated flag, each once. Raises UserError unless all are
    positive."""
    items = [item.strip() for item in text.split(",")]
    for item in items:
        require(
            item.isdecimal() and int(item) >= 1,
            f"{flag} {item!r} must be a positive integer, or several with commas between",
        )
    return list(dict.fromkeys(map(int, items)))


def check_writable(path: Path, flag: str) -> None:
    """Raises UserError unless `path` can be made: its nearest parent is a directory that we may
    write to."""
    # os.path, since Path.exists raises below a directory that we may not read.
    parent = next(p for p in path.absolute().parents if os.path.exists(p))
    require(
        os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK),
        f"{flag}={path} cannot be written: {parent} is no directory that may be written to",
    )


def silence(stream: TextIO) -> None:
    """Sends whatever is still printed to a stream without a reader nowhere, so that it raises no
    more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command's `main` and exits.

    The exit code is 0 when done, 2 for bad input (one line on stderr), 141 where its output is no
    longer read (`| head`), as of a program that SIGPIPE ends, and 1 for anything else. argv: by
    default sys.argv.
    """
    if argv is None:
        argv = sys.argv
    try:
        with _interrupts_kept():
            code = _run(main, argv)
    except BrokenPipeError:
        code = _BROKEN_PIPE
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the shell
        try:
            stream.flush()
        except BrokenPipeError:
            silence(stream)
            code = _BROKEN_PIPE
        except OSError as error:
            silence(stream)
            code = code or _fail(f"error: what is printed cannot be written ({error.strerror})", 1)
    # Runs first of all exit handlers: a Ctrl-C while JAX clears up must print no traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Repeats a Ctrl-C that came where Python prints an exception and drops it: in a destructor, or
    in a callback of the garbage collector, which JAX has."""
    hook = sys.unraisablehook

    def again(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            hook(unraisable)
            return
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _run(main: Callable[[list[str]], None], argv: list[str]) -> int | str | None:
    try:
        main(argv)
    except SystemExit as end:  # of --help
        return end.code
    except UserError as error:
        return _fail(f"error: {error}", 2)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except (Stopped, FloatingPointError) as end:  # their messages explain the end of the run
        return _fail(str(end), 1)
    except WriteError as error:
        return _fail(f"error: {error}", 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _fail(f"error: {error.strerror}: {error.filename}", 2)
        if (reason := _disk_words(error)) is None:
            raise
        where = getattr(error, "filename", None) or str(error)
        return _fail(f"error: {reason}: {where}", 1)
    return 0


def _fail(line: str, code: int) -> int:
    """Prints the reason on stderr in one line, unless the terminal is closed, and returns
    `code`."""
    with contextlib.suppress(OSError):
        print(" ".join(line.split()), file=sys.stderr, flush=True)
    return code
