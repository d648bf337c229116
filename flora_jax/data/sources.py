"""Where records come from: files, the TFDS catalogue, the Hugging Face Hub or a generator.

A split is read and checked once, a record at a time, and written with TFDS (`builders`) as
array_record under the cache directory. From there each record is read when it is asked for. The
cache key is the content of the source, so changed data is prepared anew and unchanged data is found
again whatever its path.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from absl import logging

from flora_jax.data.catalogue import CATALOGUE
from flora_jax.data.generated import draw, generated_key
from flora_jax.data.records import CONVERT, Record, raw_records
from flora_jax.data.tables import hub_hash, hub_records, hub_splits, parquet_records
from flora_jax.data.tasks import OWN_FILES, Example, Task
from flora_jax.errors import UserError, disk_fault, expand_path, near_misses, require, told_of
from flora_jax.files import cache_root, filling_cache, plain_path
from flora_jax.progress import progress

SPLITS = ("train", "validation", "test")
# part of every cache key: raise it when the features of a record or a reader's output change
_FORMAT = "3"
_CHUNK = 512  # records that are written at once
_BLOCK = 2**20  # bytes that are read at once
_SET = "set data.dir (evaluate: --data_dir) to"

if TYPE_CHECKING:  # importing it takes a second
    import tensorflow_datasets as tfds

Item = TypeVar("Item")


def load_examples(
    task: Task, split: str, data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> list[Example]:
    """`open_examples`, all of them at once."""
    return list(open_examples(task, split, data_dir, cache_dir))


def load_records(
    task: Task, split: str, data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> list[Record]:
    """`open_records`, all of them at once."""
    return list(open_records(task, split, data_dir, cache_dir))


def open_examples(
    task: Task, split: str, data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> Sequence[Example]:
    """`open_records`, each parsed when it is asked for. A UserError names file, record and field of
    what cannot be."""
    records = open_records(task, split, data_dir, cache_dir)

    def example(i: int) -> Example:
        record = records[i]
        try:
            return task.parse(record)
        except UserError as error:
            where = _describe(task, split, data_dir)
            raise UserError(f"{where}: record {i} (from 0): {error}") from None

    return _Made(len(records), example)


def open_records(
    task: Task, split: str, data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> Sequence[Record]:
    """The records of one split ('train', 'validation' or 'test'), in the order of its source.

    Each is read from disk when it is asked for, by its place and not by a slice. Records are dicts
    of str: `instruction, input, output, answer` of a 'records' task, `text` and `references` (a
    list) of a 'texts' one, `question, answer` of a generated one, of a 'jsonl' one `tools` and
    `messages` (a list of `role, content, trained, more`, as `Turn` has them). `data_dir` is a
    folder of files, or `tfds` or `tfds:DIR` for the TFDS catalogue in TFDS's own folder or in DIR;
    generated tasks and those of the Hub need none. Prepared data is cached in `cache_dir`, by
    default `$FLORA_CACHE` or else `~/.cache/flora_jax`. Raises UserError for a missing, empty or
    malformed source, naming file and record.
    """
    directory = cache_root(cache_dir) / "tfds" / _cache_key(task, split, data_dir)
    if not directory.exists():
        _prepare(task, split, _read(task, split, data_dir), directory)
    import tensorflow_datasets as tfds

    with _undamaged(directory):
        place = plain_path(directory, "FLORA_CACHE")
        source = tfds.builder_from_directory(place).as_data_source(split)

    def record(i: int) -> Record:
        with _undamaged(directory):
            return _unpacked(task, source[i])

    return _Made(len(source), record)


def data_hash(task: Task, split: str, data_dir: str | Path | None) -> str:
    """sha256 (hex) of what a split is read from.

    That is a file, the catalogue's files (with data set, version and split), the rows of a data set
    of the Hub, or everything that determines a generated split.
    """
    if task.is_hub:
        _check_split(task, split)
        return hub_hash(task.name, split)
    if task.source == "generated":
        _check_split(task, split)
        return hashlib.sha256(generated_key(task, split).encode()).hexdigest()
    if _in_catalogue(task, data_dir):
        builder, official = _catalogue_split(task, split, data_dir)
        digest = hashlib.sha256(f"{builder.info.full_name}\n{official}\n".encode())
        for path in sorted(builder.info.splits[official].filepaths):
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        return digest.hexdigest()
    with _path(task, split, data_dir).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_split(task: Task, split: str, data_dir: str | Path | None) -> bool:
    """Whether `load_records` would find the split (of the catalogue: with its data set at hand)."""
    if task.is_hub:
        return split in hub_splits(task.name)
    if _in_catalogue(task, data_dir):
        _check_split(task, split)
        return task.name in CATALOGUE and split in CATALOGUE[task.name].splits
    if task.source == "generated":
        return True
    candidates = _candidates(task, split, data_dir)
    if not any(path.is_file() for path in candidates):
        return False
    # Some tasks are tested on the file of the official validation split, then no other split's.
    shared = task.files.get("test") in [path.name for path in candidates]
    return split == "test" or split in task.files or not shared


# ----------------------------------------------------------------------------------------- locating


def _check_split(task: Task, split: str) -> None:
    if split not in SPLITS:
        hint = " (a sample is never a test set)" if split == "sample" else ""
        raise UserError(
            f"split {split!r} of task {task.name!r} is unknown{hint}; {near_misses(split, SPLITS)}"
        )


def _in_catalogue(task: Task, data_dir: str | Path | None) -> bool:
    """Whether the TFDS catalogue is read: `data_dir` names it, and the task needs a `data_dir`."""
    named = str(data_dir).partition(":")[0] == "tfds"
    return named and task.source != "generated" and not (task.is_file or task.is_hub)


def _catalogue_split(
    task: Task, split: str, data_dir: str | Path
) -> tuple[tfds.core.DatasetBuilder, str]:
    """A prepared TFDS builder, and its own name of a split of ours."""
    _check_split(task, split)
    known = CATALOGUE.get(task.name)
    require(
        known is not None,
        f"data.dir={data_dir}: task {task.name!r} is not in the TFDS catalogue, which has "
        f"{', '.join(CATALOGUE)}; {_SET} the folder that holds its files",
    )
    require(
        split in known.splits,
        f"split {split!r} of task {task.name!r} is not in the TFDS catalogue; TFDS "
        f"{known.name} gives {', '.join(known.splits)}",
    )
    folder = expand_path(str(data_dir).partition(":")[2])
    require(
        not folder or Path(folder).is_dir(),
        f"data.dir={data_dir}: {folder} is not a directory; "
        "make it, or name one with prepared data",
    )
    from flora_jax.data.builders import catalogue_builder, own_folder

    folder = Path(folder) if folder else own_folder()
    place = plain_path(folder, "data.dir") if folder.is_dir() else folder
    try:
        with _quiet():
            builder = catalogue_builder(known.name, str(place))
    except UserError as error:
        raise UserError(str(error).replace(str(place), str(folder))) from None
    official = known.splits[split]
    require(
        official in builder.info.splits,
        f"TFDS {builder.info.full_name} was prepared without its split {official!r}; "
        f"there are {', '.join(builder.info.splits) or 'none'}",
    )
    return builder, official


def _candidates(task: Task, split: str, data_dir: str | Path | None) -> list[Path]:
    """The files that could hold a split, the first that exists is it."""
    _check_split(task, split)
    if task.is_file:
        # The file itself, for the one split that is asked of it. It cannot validate what was
        # trained on it.
        if split == "validation":
            return []
        require(
            Path(task.name).stem != "sample" or split != "test",
            f"{task.name}: a sample is never a test set; name a file of your own test records",
        )
        beside = [Path(expand_path(data_dir)) / task.name] if data_dir else []
        return [Path(expand_path(task.name)), *beside]
    if data_dir is None:
        other = ""
        if task.name in CATALOGUE:
            other = f", or to tfds for {CATALOGUE[task.name].name} of the TFDS catalogue"
        raise UserError(
            f"task {task.name!r} is read from files; {_SET} the folder that holds them{other}"
        )
    folder = Path(expanded := expand_path(data_dir))
    require(folder.is_dir(), f"data.dir={expanded!r} is not a directory (nor tfds, nor tfds:DIR)")
    if task.source == "jsonl":
        return [folder / f"{split}{suffix}" for suffix in OWN_FILES]
    names = [f"{split}.json", f"{split}.jsonl"]
    if split in task.files:
        # A listed file comes first, one that splits share behind the split's own.
        names.insert(len(names) if split in task.spans else 0, task.files[split])
    return [folder / task.name / name for name in names]


def _path(task: Task, split: str, data_dir: str | Path | None) -> Path:
    candidates = _candidates(task, split, data_dir)
    for path in candidates:
        if path.is_file():
            return path
    require(
        candidates,
        f"{task.name}: one file has no validation split; use task 'jsonl' and a folder with one",
    )
    folder = candidates[0].parent
    files = folder.iterdir() if folder.is_dir() else ()
    there = sorted(p.name for p in files if p.suffix in (".json", *OWN_FILES))
    sampled = any(name.startswith("sample.") for name in there)
    never = " (a sample is never a test set)" if sampled else ""
    hints = [_WHERE.get(task.name) or _WHERE.get(task.source)]
    if task.name in CATALOGUE:
        hints.append(f"or {_SET} tfds to read the TFDS catalogue's")
    get = "".join(f"; {hint}" for hint in hints if hint)
    raise UserError(
        f"{candidates[0]} is missing: split {split!r} of task {task.name!r}; "
        f"{folder.name or folder}/ has {', '.join(there) or 'no data files'}{never}{get}"
    )


def _span(task: Task, split: str, data_dir: str | Path | None) -> tuple[int, int] | None:
    """The part of its file that a split is, None for all of it: where training has a file of its
    own, nothing is shared."""
    shared = split in task.spans and _path(task, "train", data_dir).name == task.files["train"]
    return task.spans[split] if shared else None


# Where the files of a task, or of a source, are to be had.
_WHERE = {
    "hellaswag": "hellaswag_val.jsonl of rowanz/hellaswag is the split that is tested on",
    "dialogsum": (
        "DialogSum_Data of cylnlp/dialogsum has the files, dialogsum.dev.jsonl is validation.jsonl"
    ),
    "dailydialogpp": "dataset/ of iitmnlp/DailyDialog-plusplus has the files",
    "multiwoz": (
        "ConvLab's data/multiwoz has the dialogues; "
        "`turns` is a list of user and system turns by turns"
    ),
    "samsum": "corpus.7z of arXiv 1911.12237: records of dialogue and summary",
    "xsum": "EdinburghNLP/XSum: records of document and summary",
    "cnn_dailymail": "records of article and highlights",
    "records": (
        "the LLM-Adapters repository (AGI-Edgerunners/LLM-Adapters) has the task's files in its "
        "folder dataset"
    ),
}


def _describe(task: Task, split: str, data_dir: str | Path | None) -> str:
    if _in_catalogue(task, data_dir):
        return f"TFDS {CATALOGUE[task.name].name}, split {CATALOGUE[task.name].splits[split]}"
    if task.is_hub:
        return f"{task.name}, split {split}"
    generated = task.source == "generated"
    return f"task {task.name!r}" if generated else str(_path(task, split, data_dir))


# ------------------------------------------------------------------------------------------ reading


def _read(task: Task, split: str, data_dir: str | Path | None) -> Iterator[Record]:
    """The records of a split, from its source. Raises UserError, for none at all as well."""
    if task.source == "generated":
        yield from draw(task, split)
        return
    convert = CONVERT[task.source]
    span = _span(task, split, data_dir) or (None,)
    empty = True
    for where, raw in itertools.islice(_raw(task, split, data_dir), *span):
        require(
            isinstance(raw, dict),
            f"{where}: a record must be a JSON object, not {type(raw).__name__}",
        )
        found = convert(raw, where)
        for record in found if isinstance(found, list) else [found]:
            empty = False
            yield record
    if empty:
        raise UserError(
            f"{_describe(task, split, data_dir)} holds no records; it needs at least one"
        )


def _raw(task: Task, split: str, data_dir: str | Path | None) -> Iterator[tuple[str, Any]]:
    """`(place, record)` of each record as its source has it."""
    if task.is_hub:
        return hub_records(task.name, split)
    if _in_catalogue(task, data_dir):
        return _elements(task, split, data_dir)
    path = _path(task, split, data_dir)
    return parquet_records(path) if path.suffix == ".parquet" else raw_records(path)


def _elements(task: Task, split: str, data_dir: str | Path | None) -> Iterator[tuple[str, Any]]:
    """`(place, record)` of each element of a catalogue's split, as a file would hold it."""
    builder, official = _catalogue_split(task, split, data_dir)
    source = builder.as_data_source(official)
    for i in range(len(source)):
        where = f"{_describe(task, split, data_dir)}: record {i} (from 0)"
        with told_of(where):
            raw = CATALOGUE[task.name].convert(_decode(source[i]))
        if raw is not None:
            yield where, raw


# ------------------------------------------------------------------------------------------ caching


def _cache_key(task: Task, split: str, data_dir: str | Path | None) -> str:
    # The suffix decides how a file's bytes are read, so it is part of the key.
    elsewhere = task.source == "generated" or task.is_hub or _in_catalogue(task, data_dir)
    suffix = "" if elsewhere else _path(task, split, data_dir).suffix
    span = _span(task, split, data_dir)
    parts = [_FORMAT, task.source, split, suffix, data_hash(task, split, data_dir)]
    if span:
        parts.append(str(span))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _prepare(task: Task, split: str, records: Iterable[Record], directory: Path) -> None:
    """Writes `records` as they come and moves the result to `directory` in one step, so that a
    process that is killed, or another one that prepares the same data, leaves either all of it or
    nothing."""
    from flora_jax.data.builders import open_writer

    parent = directory.parent
    shown = progress(records, None, "preparing", "record")
    with contextlib.ExitStack() as stack:
        with filling_cache(parent):
            parent.mkdir(parents=True, exist_ok=True)
            place = plain_path(parent, "FLORA_CACHE")
            scratch = tempfile.TemporaryDirectory(dir=place, prefix="preparing-")
            built = Path(stack.enter_context(scratch)) / "built"
            writer = open_writer(task.source, split, built)
        # What goes wrong in reading them has nothing to do with the cache.
        while chunk := [_packed(task, record) for record in itertools.islice(shown, _CHUNK)]:
            with filling_cache(parent):
                writer.add_examples({split: chunk})
        with filling_cache(parent):
            writer.close_all()
            try:
                built.rename(directory)
            except OSError:
                # there it is when another process was first, with the same data
                if not directory.exists():
                    raise


def _packed(task: Task, record: Record) -> Record:
    """A record in the features of its kind (`builders.FEATURES`)."""
    if task.source != "jsonl":
        return record
    return {**record, "messages": json.dumps(record["messages"], ensure_ascii=False)}


def _unpacked(task: Task, element: Any) -> Record:
    """The record that was packed so."""
    record = _decode(element)
    if task.source != "jsonl":
        return record
    return {**record, "messages": json.loads(record["messages"])}


@contextlib.contextmanager
def _undamaged(directory: Path) -> Iterator[None]:
    """Raises UserError where prepared data is damaged."""
    try:
        yield
    # TFDS and array_record have no narrower class for it
    except Exception as error:
        if isinstance(error, UserError) or disk_fault(error):
            raise
        why = " ".join(str(error).split())[:120]
        raise UserError(
            f"prepared data in {directory} is damaged ({why}); remove that folder"
        ) from error


class _Made(Sequence[Item]):
    """A number of items, each made when it is asked for."""

    def __init__(self, size: int, make: Callable[[int], Item]):
        self._size = size
        self._make = make

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> Item:
        if not 0 <= i < self._size:
            raise IndexError(i)
        return self._make(i)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS reports on stdout, which belongs to the command, and draws bars: both only on a
    terminal's stderr."""
    import tensorflow_datasets as tfds

    terminal, verbosity = sys.stderr.isatty(), logging.get_verbosity()
    if not terminal:
        tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)  # it warns of every configuration that is made at run time
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(sys.stderr if terminal else nowhere),
        ):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _decode(value: Any) -> Any:
    """A TFDS element as plain Python: text from bytes, and a sequence of dicts from TFDS's dict of
    sequences."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | np.ndarray):
        return [_decode(one) for one in value]
    if isinstance(value, dict):
        return {key: _decode_field(one) for key, one in value.items()}
    return value


def _decode_field(value: Any) -> Any:
    if isinstance(value, dict) and all(isinstance(v, list | np.ndarray) for v in value.values()):
        rows = zip(*value.values(), strict=True)
        return [dict(zip(value, map(_decode, row), strict=True)) for row in rows]
    return _decode(value)
