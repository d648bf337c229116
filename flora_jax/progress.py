"""How work that takes a while is shown: a bar on a terminal, plain lines elsewhere, both with rate
and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
_EVERY = 2.0  # seconds between lines; what takes less says nothing


def progress(
    items: Iterable[Item], total: int | None, what: str, unit: str, silent: bool = False
) -> Iterator[Item]:
    """The items, with a bar or lines on stderr that begin with `what`. total: how many there are;
    None where nobody knows."""
    terminal = sys.stderr.isatty()
    start = said = time.monotonic()
    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        delay=0.5,
        file=sys.stderr,
        disable=silent or not terminal,
    ) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.update()
            now = time.monotonic()
            if not silent and not terminal and now - said > _EVERY:
                said = now
                tqdm.write(f"{what}: {_line(done, total, unit, now - start)}", file=sys.stderr)


def _line(done: int, total: int | None, unit: str, seconds: float) -> str:
    rate = done / seconds
    if total is None:
        return f"{done:,} {unit}s, {rate:,.0f} a second"
    left = tqdm.format_interval((total - done) / rate)
    return f"{done:,} of {total:,} {unit}s, {rate:,.0f} a second, {left} left"
