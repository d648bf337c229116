"""Writes the tables of docs/*.md that show stored results.

    python tools/tables.py

What a table shows stands in a comment before it:

    <!-- table
    rows | method | lora | ffba_qg_add as FFBA (QG-Add)
    accuracy/math.md | rank | value of * accuracy | mean of * accuracy as mean
    accuracy/math.md # Paired bootstrap | AQuA accuracy as AQuA less lora's
    -->

A line names a file under experiments/results and columns of a table in it: of the first one, or of
the first under the line that begins with what stands behind ` # `; in JSON, of the list of records
under that key. Without columns all are shown. Files are joined by their first column. `rows` has
the head of the first column and the rows that are shown; without it those of the first file are.
`as` says what a row or column is called here. A line that begins with `|` goes on with the last.

    TPOT ms, ratio      a head that its table has twice: behind the last before it that it has once
    * accuracy          each column whose head fits, called what the * stands for
    value of NAME       without the error, interval or bracket behind the number
    mean of * accuracy  the mean over the columns that fit
    NAME is CELL        no column: other rows are left out
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flora_jax.analysis.results import NONE, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results"
_MARKED = re.compile(r"(<!-- table\n((?s:.*?))\n-->\n\n)(?:(?:\|.*\n)+\n*)?")
Row = dict[str, str]  # cells by head
Cells = list[str]


class Column(NamedTuple):
    """A head, and cells by the first cell of their row."""

    head: str
    cells: dict[str, str]


def with_tables(page: str) -> str:
    """The page with the tables that its comments ask for.

    Raises ValueError where one asks for what is not stored.
    """
    text, count = _MARKED.subn(lambda found: f"{found[1]}{asked(found[2])}\n\n", page)
    if count != page.count("<!-- table"):
        raise ValueError("an empty line has to stand between each <!-- table … --> and its table")
    return text


def asked(comment: str) -> str:
    """The table that a comment asks for."""
    lines = [cells(line) for line in comment.replace("\n|", " |").splitlines()]
    wanted: list[str] = []
    if lines[0][0] == "rows":
        wanted = lines.pop(0)[1:]
    files = [list(columns(*line)) for line in lines]
    first = files[0][0]
    corner, *names = wanted or [first.head, *first.cells]
    shown = [column for _, *others in files for column in others]
    rows = []
    for name, _, called in (name.partition(" as ") for name in names):
        if not any(name in column.cells for column in shown):
            raise ValueError(f"{lines[0][0]} has no row {name!r}, but {', '.join(first.cells)}")
        rows.append([called or name, *(column.cells.get(name, "") for column in shown)])
    return "\n".join(table([corner, *(column.head for column in shown)], rows))


def columns(source: str, *names: str) -> Iterator[Column]:
    """A stored table's first column, and behind it those that are asked for."""
    rows = stored(source)
    first, *heads = rows[0]
    for head, _, only in (name.partition(" is ") for name in names if " is " in name):
        rows = [row for row in rows if row[head] == only]
    keys = [row[first] for row in rows]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{source} has several rows of one name: say which by NAME is CELL")
    yield Column(first, dict(zip(keys, keys, strict=True)))
    for name in [name for name in names if " is " not in name] or ["*"]:
        found = list(fitting(name, rows, heads))
        if not found:
            raise ValueError(f"{source} has no column {name!r}, but {', '.join(heads)}")
        for head, own in found:
            yield Column(head, dict(zip(keys, own, strict=True)))


def fitting(name: str, rows: Sequence[Row], heads: Sequence[str]) -> Iterator[tuple[str, Cells]]:
    """Heads and cells of what a name asks for."""
    full, _, called = name.partition(" as ")
    pattern = full.removeprefix("value of ").removeprefix("mean of ")
    fits = re.compile(re.escape(pattern).replace(r"\*", "(.+)"))
    found = {head: fit for head in heads if (fit := fits.fullmatch(head))}
    if full.startswith("mean of ") and found:
        means = [statistics.mean(float(bare(row[head])) for head in found) for row in rows]
        yield called or full, [f"{mean:.3f}" for mean in means]
        return
    for head, fit in found.items():
        own = [row[head] for row in rows]
        if full.startswith("value of "):
            own = list(map(bare, own))
        yield called or "".join(fit.groups()) or head, own


def bare(text: str) -> str:
    """A number without what stands behind it."""
    return re.split(r" [±[(]", text)[0]


def stored(source: str) -> list[Row]:
    """The rows of a stored table, of `FILE` or `FILE # PLACE`."""
    file, _, place = source.partition(" # ")
    text = (RESULTS / file).read_text(encoding="utf-8")
    if file.endswith(".json"):
        return [{head: number(one[head]) for head in one} for one in json.loads(text)[place]]
    start = re.search(rf"^[# ]*{re.escape(place)}", text, re.MULTILINE)
    found = start and re.search(r"(?:^\|.*\n?)+", text[start.start() :], re.MULTILINE)
    if not found:
        raise ValueError(f"{source}: no such table")
    heads, _, *rows = map(cells, found[0].splitlines())
    names = list(full_heads(heads))
    return [dict(zip(names, row, strict=True)) for row in rows]


def cells(line: str) -> list[str]:
    """What stands between the bars of a line."""
    return [part.strip() for part in line.removeprefix("|").removesuffix("|").split("|")]


def full_heads(heads: Sequence[str]) -> Iterator[str]:
    """Heads of which none stands twice."""
    count = Counter(heads)
    before = ""
    for head in heads:
        if count[head] > 1:
            yield f"{before}, {head}"
        else:
            before = head
            yield head


def number(value: Any) -> str:
    """A value of JSON."""
    if value is None:
        return NONE
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """The command."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        try:
            text = with_tables(page)
        except (KeyError, OSError, ValueError) as error:
            sys.exit(f"{path.name}: {error}")
        if text != page:
            path.write_text(text, encoding="utf-8")
            print(path.name, file=sys.stderr)


if __name__ == "__main__":
    main()
