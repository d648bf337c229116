"""Conversations from tables: Parquet files, and data sets of the Hugging Face Hub."""

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
from flora_jax.errors import UserError, disk_fault, expand_path, in_a_line, require
from flora_jax.files import check_file

if TYPE_CHECKING:
    import datasets

_BATCH = 512  # rows read at once


def parquet_records(path: Path) -> Iterator[tuple[str, Record]]:
    """`(place, record)` of each row of a Parquet file: only the columns of `CONVERSATION`.

    Raises UserError for a file that is not Parquet, or has no conversations.
    """
    import pyarrow as pa  # importing it takes a third of a second
    import pyarrow.parquet as pq

    check_file(path)
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = _known_columns(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(_BATCH, columns=columns):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield f"{path}: record {number} (from 0)", _without_nulls(row)
                    number += 1
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError) or disk_fault(error):
            raise
        raise UserError(f"{path}: cannot be read as Parquet ({in_a_line(error)})") from None


# Cached: asked again, the Hub may have other data, and without a network each time is a wait.
@functools.cache
def hub_splits(name: str) -> Mapping[str, datasets.Dataset]:
    """The splits of a data set of the Hub, downloaded to the cache of `datasets`.

    name: `hub:ORG/NAME` or `hub:ORG/NAME:CONFIG`; a folder in a data set's layout may replace
    ORG/NAME. Without a network the data set is read from the cache. Raises UserError without
    `datasets`, and for a data set that it cannot load.
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
    """`(place, record)` of each row of a split, as `parquet_records` has them. Raises UserError."""
    with _hub_faults(name):
        for number, row in enumerate(_hub_split(name, split)):
            yield f"{name}, split {split}: record {number} (from 0)", _without_nulls(row)


@functools.cache
def hub_hash(name: str, split: str) -> str:
    """sha256 (hex) of the rows of a split, as `hub_records` reads them. Raises UserError."""
    digest = hashlib.sha256()
    with _hub_faults(name):
        # Of values: Arrow's bytes are arbitrary under nulls. `_BATCH` is part of the digest.
        for table in _hub_split(name, split).with_format("arrow").iter(_BATCH):
            digest.update(repr(table.to_pylist()).encode())
    return digest.hexdigest()


def _hub_split(name: str, split: str) -> datasets.Dataset:
    """A split, with the columns of `CONVERSATION`. Raises UserError."""
    splits = hub_splits(name)
    require(
        split in splits,
        f"{name}: there is no split {split!r}; the data set has {', '.join(splits)}",
    )
    columns = _known_columns(splits[split].column_names, f"{name}, split {split}")
    return splits[split].select_columns(columns)


@contextlib.contextmanager
def _hub_faults(name: str) -> Iterator[None]:
    """Raises UserError for any error of `datasets`."""
    try:
        yield
    # It has no class for a wrong name, no network, a missing login and files that are no data.
    except Exception as error:
        if isinstance(error, UserError) or disk_fault(error):
            raise
        raise UserError(
            f"task {name!r} cannot be read ({type(error).__name__}: {in_a_line(error, 300)})"
        ) from None


def _known_columns(columns: Sequence[str], where: str) -> list[str]:
    """The columns that are in `CONVERSATION`. Raises UserError if they make no conversation."""
    require(
        "messages" in columns or {"prompt", "completion"} <= set(columns),
        f"{where}: there must be a column 'messages', or 'prompt' and 'completion'; there are "
        f"{', '.join(map(repr, columns)) or 'none'}",
    )
    return [name for name in columns if name in CONVERSATION]


def _without_nulls(value: Any) -> Any:
    """A value without its null fields: in a table every row has the fields of all rows."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value
