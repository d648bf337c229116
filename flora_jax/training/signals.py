"""What a run does when it is told to end: it notes the signal, and stops once it has saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from flora_jax.errors import hangups


@contextlib.contextmanager
def noted_signals(alone: bool = True) -> Iterator[list[int]]:
    """A list that SIGTERM, SIGINT and SIGHUP are noted in, instead of ending a step in its middle.

    With other processes beside this one (not `alone`) nothing is noted: JAX has all of them stop
    after a SIGTERM to one, and a SIGHUP is passed on so.
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
