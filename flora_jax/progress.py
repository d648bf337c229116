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
    items: Iterable[Item], total: int, what: str, unit: str, silent: bool = False
) -> Iterator[Item]:
    """The items, of which there are `total`, with a bar or lines on stderr that begin with
    `what`."""
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
                rate = done / (now - start)
                left = tqdm.format_interval((total - done) / rate)
                tqdm.write(
                    f"{what}: {done:,} of {total:,} {unit}s, {rate:,.0f} a second, {left} left",
                    file=sys.stderr,
                )
