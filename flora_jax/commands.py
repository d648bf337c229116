"""Parts of several commands: flags, checks of their values, an orderly end when a signal comes."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from flora_jax.errors import (
    CommandParser,
    Stopped,
    check_writable,
    path_flag,
    require,
)
from flora_jax.files import write_result
from flora_jax.models.config import DTYPES, QUANTIZATIONS, SERVED

Flags = Mapping[str, Mapping[str, Any]]

# Flags by name, as `add_argument` takes them.
MODEL = {
    "model": dict(required=True, help="HF directory, hub id, .gguf file or preset name"),
    "adapter": dict(type=path_flag, help="adapter directory"),
    "template_arguments": dict(
        default="", help="of the chat template, NAME=VALUE,… such as enable_thinking=false"
    ),
}
DTYPE = {"dtype": dict(choices=DTYPES, default="float32")}
QUANTIZATION = {
    "quantization": dict(
        choices=QUANTIZATIONS,
        default="none",
        help="what the base's kernels are kept in; nf4 generates as int8",
    )
}
SERVED_QUANTIZATION = {
    "quantization": dict(choices=SERVED, default="none", help="what the base is served in")
}
RESULT = {"out": dict(type=path_flag, help="result file, JSON")}


def read_flags(module: str, about: str, flags: Flags, argv: list[str]) -> argparse.Namespace:
    """The flags of a command line; about: the command's docstring, whose first paragraph --help
    shows. Raises UserError for flags that are unknown or malformed."""
    parser = CommandParser(prog=module, description=" ".join(about.split("\n\n")[0].split()))
    for name, settings in flags.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args(argv[1:])


def asked_model(args: argparse.Namespace) -> tuple[str, str | None, str, str, str]:
    """What the flags of MODEL, DTYPE and QUANTIZATION say, as `load_adapted` takes it."""
    return args.model, args.adapter, args.dtype, args.quantization, args.template_arguments


def about_model(args: argparse.Namespace, fingerprint: str) -> dict[str, Any]:
    """What a result file says of the model that was asked for and found."""
    names = ("model", "adapter", "quantization", "template_arguments")
    return {"base_fingerprint": fingerprint, **{name: getattr(args, name) for name in names}}


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError for a given flag that is not positive."""
    for name in names:
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name} {value} must be a positive integer")


def check_template(args: argparse.Namespace, chats: bool, flag: str) -> None:
    """Raises UserError for arguments of a chat template that is not used.

    chats: whether it is used; flag: the one that uses it.
    """
    require(
        chats or not args.template_arguments,
        f"--template_arguments {args.template_arguments} has no effect without {flag}",
    )


def check_result(path: str | None) -> None:
    """Raises UserError if no result file can be written at `path`; None: no file is wanted."""
    require(not (path and Path(path).is_dir()), f"--out {path} is a directory; name a file")
    if path:
        check_writable(Path(path), "--out")


def write_out(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Writes the result file, if one is wanted."""
    if args.out:
        write_result(Path(args.out), result, f"--out {args.out}")


def hangups() -> tuple[int, ...]:
    """The signal of a closing terminal; none where it is ignored (`nohup`) or not known."""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN:
        return ()
    return (hangup,)


@contextlib.contextmanager
def stopped_by_signals(message: str) -> Iterator[None]:
    """Makes SIGTERM and a closed terminal end the block as an interrupt does, so that unfinished
    files are cleared away. Raises Stopped with `message` after it."""
    before = {number: signal.signal(number, _stop_once) for number in (signal.SIGTERM, *hangups())}
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(message) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_once(number: int, frame: Any) -> NoReturn:
    """Interrupts the block. A closing terminal signals twice, and the second signal must not stop
    the clearing away."""
    for again in (signal.SIGTERM, *hangups()):
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def noted_signals(alone: bool = True) -> Iterator[list[int]]:
    """A list in which SIGTERM, SIGINT and SIGHUP are noted, instead of ending a step in its middle.

    With other processes beside this one (not `alone`) nothing is noted: after a SIGTERM to one of
    them JAX stops all, and a SIGHUP is passed on as a SIGTERM.
    """
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        # A second Ctrl-C, perhaps in a long compilation, ends it at once.
        if number == signal.SIGINT and signal.SIGINT in noted:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        noted.append(number)

    if alone:
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT, *hangups()), note)
    else:
        handlers = dict.fromkeys(hangups(), _pass_on)
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not the main thread, as in some notebooks: signals stay as they are
        before = {}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(*_: Any) -> None:
    signal.raise_signal(signal.SIGTERM)
