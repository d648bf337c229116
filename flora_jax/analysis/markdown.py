"""What the tables of results are written with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "–"  # of a cell that has no value


def line(cells: Iterable[str], blank: str = "  ") -> str:
    """A line of a Markdown table; `blank`: what stands between the bars of an empty cell."""
    return "|" + "|".join(f" {cell} " if cell else blank for cell in cells) + "|"


def table(heads: Sequence[str], rows: Iterable[Iterable[str]] = (), blank: str = "  ") -> list[str]:
    """The lines of a Markdown table; `blank` as in `line`, of its heads alone."""
    return [line(heads, blank), "|---" * len(heads) + "|", *map(line, rows)]


def cell(value: float | None, form: str) -> str:
    """A number as the format `form` has it; None has none."""
    return NONE if value is None else f"{value:{form}}"


def interval(middle: float, low: float, high: float, form: str) -> str:
    """`middle [low, high]`, each number as the format `form` has it."""
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def spread(value: Mapping[str, Any], form: str = ".3f", scale: float = 1) -> str:
    """Median [quartiles] of a `timing.summary`, times `scale`."""
    low, high = value["quartiles"]
    return interval(scale * value["median"], scale * low, scale * high, form)


def percent(value: float | None) -> str:
    """A share in whole percent; None is a cell without a value."""
    return NONE if value is None else f"{100 * value:.0f} %"
