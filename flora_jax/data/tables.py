"""Conversations in columns: Parquet files, and data sets of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_jax.data.records import CONVERSATION, Record
from flora_jax.data.tasks import HUB
from flora_jax.errors import UserError, disk_fault, expand_path, require
from flora_jax.files import check_file

if TYPE_CHECKING:
    import datasets

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


# Asked of it again, the Hub may have other data, and without a network there is a wait each time.
@functools.cache
def hub_splits(name: str) -> Mapping[str, datasets.Dataset]:
    """The splits of a data set of the Hub, `hub:ORG/NAME` or `hub:ORG/NAME:CONFIG`, on disk.

    A folder in a data set's layout stands in place of ORG/NAME as well. Downloads it; without a
    network it is what `datasets` keeps. Raises UserError.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"task {name!r} is read with datasets, which is not installed; pip install -e '.[hub]'"
        ) from None
    place, _, config = name.removeprefix(HUB).partition(":")
    require(place, f"task {name!r} names no data set; {HUB}ORG/NAME does")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _hub_faults(name):
        return datasets.load_dataset(expand_path(place), config or None)


def hub_records(name: str, split: str) -> Iterator[tuple[str, Record]]:
    """`(place, record)` of each row of a split, of the columns that are read. Raises UserError."""
    with _hub_faults(name):
        for number, row in enumerate(_hub_split(name, split)):
            yield f"{name}, split {split}: record {number} (from 0)", _without_nulls(row)


@functools.cache
def hub_hash(name: str, split: str) -> str:
    """sha256 (hex) of the rows of a split, of the columns that are read. Raises UserError."""
    digest = hashlib.sha256()
    with _hub_faults(name):
        # Values, not Arrow's bytes, which differ beneath nulls; always as many rows at once.
        for table in _hub_split(name, split).with_format("arrow").iter(_BATCH):
            digest.update(repr(table.to_pylist()).encode())
    return digest.hexdigest()


def _hub_split(name: str, split: str) -> datasets.Dataset:
    splits = hub_splits(name)
    require(
        split in splits,
        f"{name}: there is no split {split!r}; the data set has {', '.join(splits)}",
    )
    columns = _read_of(splits[split].column_names, f"{name}, split {split}")
    return splits[split].select_columns(columns)


@contextlib.contextmanager
def _hub_faults(name: str) -> Iterator[None]:
    """Raises UserError for whatever `datasets` raises of a name, the network, a login or files that
    are no data: it has no one class for them."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or disk_fault(error):
            raise
        why = " ".join(str(error).split())[:300]
        raise UserError(f"task {name!r} cannot be read ({type(error).__name__}: {why})") from None


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
