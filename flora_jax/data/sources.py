"""Where records come from: files, the TFDS catalogue, the Hugging Face Hub or a generator.

A split is read and checked once, a record at a time, and written with TFDS (`builders`) as
array_record to the cache directory. From there each record is read when it is asked for. The cache
key is a hash of the source's content: changed data is prepared anew, and unchanged data is found
again wherever it lies.
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
from flora_jax.errors import (
    UserError,
    disk_fault,
    expand_path,
    in_a_line,
    near_misses,
    require,
    told_of,
)
from flora_jax.files import cache_root, filling_cache, plain_path
from flora_jax.progress import progress

if TYPE_CHECKING:  # importing it takes a second
    import tensorflow_datasets as tfds

SPLITS = ("train", "validation", "test")
# Part of every cache key: raise it when the features of a record or a reader's output change.
_FORMAT = "3"
_CHUNK = 512  # records written at once
_BLOCK = 2**20  # bytes read at once
_SET_DIR = "set data.dir (evaluate: --data_dir) to"

Item = TypeVar("Item")


def load_examples(
    task: Task, split: str, data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> list[Example]:
    """`open_examples`, all of them at once."""
    return list(open_examples(task, split, data_dir, cache_dir))


def open_examples(
    task: Task, split: str, data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> Sequence[Example]:
    """`open_records`, each parsed when it is asked for. Raises UserError then if it cannot be."""
    records = open_records(task, split, data_dir, cache_dir)

    def example(i: int) -> Example:
        record = records[i]
        try:
            return task.parse(record)
        except UserError as error:
            where = _describe(task, split, data_dir)
            raise UserError(f"{where}: record {i} (from 0): {error}") from None

    return _Lazy(len(records), example)


def open_records(
    task: Task, split: str, data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> Sequence[Record]:
    """The records of one split ('train', 'validation' or 'test'), in the order of its source.

    Each is read from disk when it is asked for, by its index (from 0; no slices). A record is a
    dict of str; what it has depends on the task's source:

        records      instruction, input, output, answer
        texts        text, references (a list)
        generated    question, answer
        jsonl        tools, messages (a list of role, content, trained, more, as in `Turn`)

    data_dir: a folder of files, or `tfds` or `tfds:DIR` for the TFDS catalogue in TFDS's own folder
    or in DIR; generated tasks and those of the Hub need none. cache_dir: where prepared data is
    kept, by default `$FLORA_CACHE` or else `~/.cache/flora_jax`. Raises UserError for a missing,
    empty or malformed source, with file and record.
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

    return _Lazy(len(source), record)


def data_hash(task: Task, split: str, data_dir: str | Path | None) -> str:
    """sha256 (hex) of what a split is read from. Raises UserError for a missing source.

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
    """Whether the task has the split in `data_dir` (in the catalogue, whether TFDS defines it)."""
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
    # Some tasks are tested on the file of the official validation split. It is no other split then.
    shared = task.files.get("test") in [path.name for path in candidates]
    return split == "test" or split in task.files or not shared


# ----------------------------------------------------------------------------------------- locating


def _check_split(task: Task, split: str) -> None:
    if split not in SPLITS:
        hint = ""
        if split == "sample":
            hint = " (a sample is never a test set)"
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
    """The task's prepared TFDS builder, and the official name of our split. Raises UserError."""
    _check_split(task, split)
    known = CATALOGUE.get(task.name)
    require(
        known is not None,
        f"data.dir={data_dir}: task {task.name!r} is not in the TFDS catalogue, which has "
        f"{', '.join(CATALOGUE)}; {_SET_DIR} the folder that holds its files",
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
    except UserError as error:  # The user knows the folder by its own path.
        raise UserError(str(error).replace(str(place), str(folder))) from None
    official = known.splits[split]
    require(
        official in builder.info.splits,
        f"TFDS {builder.info.full_name} was prepared without its split {official!r}; "
        f"there are {', '.join(builder.info.splits) or 'none'}",
    )
    return builder, official


def _candidates(task: Task, split: str, data_dir: str | Path | None) -> list[Path]:
    """The files that may hold a split: the first one that exists does. Raises UserError."""
    _check_split(task, split)
    if task.is_file:
        # A file serves as whichever split it is named for, but cannot validate its own training.
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
            f"task {task.name!r} is read from files; {_SET_DIR} the folder that holds them{other}"
        )
    data_dir = expand_path(data_dir)
    folder = Path(data_dir)
    require(folder.is_dir(), f"data.dir={data_dir!r} is not a directory (nor tfds, nor tfds:DIR)")
    if task.source == "jsonl":
        return [folder / f"{split}{suffix}" for suffix in OWN_FILES]
    names = [f"{split}.json", f"{split}.jsonl"]
    if split in task.files:
        # The listed file comes first, but behind the split's own if splits share it.
        place = len(names) if split in task.spans else 0
        names.insert(place, task.files[split])
    return [folder / task.name / name for name in names]


def _path(task: Task, split: str, data_dir: str | Path | None) -> Path:
    """The file that holds a split. Raises UserError if there is none."""
    candidates = _candidates(task, split, data_dir)
    require(
        candidates,
        f"{task.name}: one file has no validation split; use task 'jsonl' and a folder with one",
    )
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"{candidates[0]} is missing: split {split!r} of task {task.name!r}; "
        f"{_what_there_is(candidates[0].parent)}{_how_to_get(task)}"
    )


def _what_there_is(folder: Path) -> str:
    """The data files of a folder, for errors."""
    files = folder.iterdir() if folder.is_dir() else ()
    names = sorted(path.name for path in files if path.suffix in (".json", *OWN_FILES))
    found = f"{folder.name or folder}/ has {', '.join(names) or 'no data files'}"
    if any(name.startswith("sample.") for name in names):
        found += " (a sample is never a test set)"
    return found


def _how_to_get(task: Task) -> str:
    """Where a task's files can be found, for errors."""
    hints = [_WHERE.get(task.name) or _WHERE.get(task.source)]
    if task.name in CATALOGUE:
        hints.append(f"or {_SET_DIR} tfds to read the TFDS catalogue's")
    return "".join(f"; {hint}" for hint in hints if hint)


def _span(task: Task, split: str, data_dir: str | Path | None) -> tuple[int, int] | None:
    """The `(start, stop)` of a split's records in a file that splits share; None for all of it."""
    # They share it only if training has no file of its own.
    if split in task.spans and _path(task, "train", data_dir).name == task.files["train"]:
        return task.spans[split]
    return None


# A task or a source -> where its files can be found.
_WHERE = {
    "hellaswag": "hellaswag_val.jsonl of rowanz/hellaswag is the split that is tested on",
    "dialogsum": (
        "DialogSum_Data of cylnlp/dialogsum has the files, dialogsum.dev.jsonl is validation.jsonl"
    ),
    "dailydialogpp": "dataset/ of iitmnlp/DailyDialog-plusplus has the files",
    "multiwoz": (
        "ConvLab's data/multiwoz has the dialogues; "
        "`turns` is a list of user and system turns in alternation"
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
    """Where a split comes from, for errors."""
    if _in_catalogue(task, data_dir):
        return f"TFDS {CATALOGUE[task.name].name}, split {CATALOGUE[task.name].splits[split]}"
    if task.is_hub:
        return f"{task.name}, split {split}"
    if task.source == "generated":
        return f"task {task.name!r}"
    return str(_path(task, split, data_dir))


# ------------------------------------------------------------------------------------------ reading


def _read(task: Task, split: str, data_dir: str | Path | None) -> Iterator[Record]:
    """The records of a split, from its source. Raises UserError if they are malformed or none."""
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
        records = convert(raw, where)
        if not isinstance(records, list):
            records = [records]
        empty = empty and not records
        yield from records
    if empty:
        raise UserError(
            f"{_describe(task, split, data_dir)} holds no records; it needs at least one"
        )


def _raw(task: Task, split: str, data_dir: str | Path | None) -> Iterator[tuple[str, Any]]:
    """`(place, record)` of each record of the source, unchecked."""
    if task.is_hub:
        return hub_records(task.name, split)
    if _in_catalogue(task, data_dir):
        return _elements(task, split, data_dir)
    path = _path(task, split, data_dir)
    if path.suffix == ".parquet":
        return parquet_records(path)
    return raw_records(path)


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
    suffix = ""
    if not (task.source == "generated" or task.is_hub or _in_catalogue(task, data_dir)):
        # It decides how a file's bytes are read.
        suffix = _path(task, split, data_dir).suffix
    parts = [_FORMAT, task.source, split, suffix, data_hash(task, split, data_dir)]
    span = _span(task, split, data_dir)
    if span is not None:
        parts.append(str(span))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _prepare(task: Task, split: str, records: Iterable[Record], directory: Path) -> None:
    """Writes the records, as they come, to a new `directory`.

    They are moved there in one step at the end, so that it never holds a part of them: neither if
    the process is killed, nor if another one prepares the same data.
    """
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
        # The records are read outside `filling_cache`, since their errors are not the cache's.
        while chunk := [_packed(task, record) for record in itertools.islice(shown, _CHUNK)]:
            with filling_cache(parent):
                writer.add_examples({split: chunk})
        with filling_cache(parent):
            writer.close_all()
            try:
                built.rename(directory)
            except OSError:
                # Another process may have been first, with the same data.
                if not directory.exists():
                    raise


def _packed(task: Task, record: Record) -> Record:
    """A record in the features of its kind (`builders.FEATURES`)."""
    if task.source != "jsonl":
        return record
    return {**record, "messages": json.dumps(record["messages"], ensure_ascii=False)}


def _unpacked(task: Task, element: Any) -> Record:
    """Undoes `_packed`."""
    record = _decode(element)
    if task.source != "jsonl":
        return record
    return {**record, "messages": json.loads(record["messages"])}


@contextlib.contextmanager
def _undamaged(directory: Path) -> Iterator[None]:
    """Raises UserError if the block finds the prepared data in `directory` damaged."""
    try:
        yield
    # TFDS and array_record have no narrower class for it.
    except Exception as error:
        if isinstance(error, UserError) or disk_fault(error):
            raise
        raise UserError(
            f"prepared data in {directory} is damaged ({in_a_line(error)}); remove that folder"
        ) from error


class _Lazy(Sequence[Item]):
    """`size` items, each made when it is asked for."""

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
    """Keeps TFDS's reports and bars off stdout, which belongs to the command.

    They go to stderr if that is a terminal, else nowhere.
    """
    import tensorflow_datasets as tfds

    terminal = sys.stderr.isatty()
    if not terminal:
        tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every configuration made at run time.
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(sys.stderr if terminal else nowhere),
        ):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _decode(value: Any) -> Any:
    """A TFDS element in plain Python: text for bytes, Python's types for numpy's."""
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
    """`_decode`; TFDS's dict of sequences becomes the list of dicts that it stands for."""
    if isinstance(value, dict) and all(isinstance(v, list | np.ndarray) for v in value.values()):
        rows = zip(*value.values(), strict=True)
        return [dict(zip(value, map(_decode, row), strict=True)) for row in rows]
    return _decode(value)
