"""Conversations in columns: Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flora_jax.data.records import CONVERSATION, Record
from flora_jax.errors import UserError, disk_fault, require
from flora_jax.files import check_file

_BATCH = 512  # rows that are read at once


def parquet_records(path: Path) -> Iterator[tuple[str, Record]]:
    """`(place, record)` of each row of a Parquet file, of the columns that are read.

    Raises UserError for a file that is none, or has no such columns.
    """
    import pyarrow as pa  # importing it takes a third of a second
    import pyarrow.parquet as pq

    check_file(path)
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = _read_of(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(_BATCH, columns=columns):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield f"{path}: record {number} (from 0)", _without_nulls(row)
                    number += 1
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError) or disk_fault(error):
            raise
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be read as Parquet ({why})") from None


def _read_of(columns: Sequence[str], where: str) -> list[str]:
    """Those of a table's columns that are read. Raises UserError where they hold nothing to say."""
    require(
        "messages" in columns or {"prompt", "completion"} <= set(columns),
        f"{where}: there must be a column 'messages', or 'prompt' and 'completion'; there are "
        f"{', '.join(map(repr, columns)) or 'none'}",
    )
    return [name for name in columns if name in CONVERSATION]


def _without_nulls(value: Any) -> Any:
    """A value without the fields that are null: a table has each row's fields in all rows."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value
