"""Where records come from: files of a data directory, the TFDS catalogue or a generator; validated, prepared by TFDS
and cached.

A split is read and checked once, written by its TFDS builder (`builders`) as array_record under the cache
directory, and read back from there as a TFDS data source. The cache key is the content of the source, so
changed data is prepared anew and unchanged data is found again whatever its path.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from flora_jax.data.catalogue import CATALOGUE, compose_ending, hellaswag
from flora_jax.data.tasks import ROLES, Example, Task, normalise
from flora_jax.errors import UserError, near_misses
from flora_jax.files import cache_root

SPLITS = ("train", "validation", "test")
_FORMAT = "1"  # part of every cache key: raise it when a builder's features or a reader's output change

Record = dict[str, Any]

if TYPE_CHECKING:  # importing it takes a second
    import tensorflow_datasets as tfds


def load_examples(
    task: Task, split: str, data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> list[Example]:
    """`load_records`, parsed. A record that its task cannot parse is a UserError naming file, record and field."""
    examples = []
    for i, record in enumerate(load_records(task, split, data_dir, cache_dir)):
        try:
            examples.append(task.parse(record))
        except UserError as error:
            raise UserError(f"{_describe(task, split, data_dir)}: record {i} (from 0): {error}") from None
    return examples


def load_records(
    task: Task, split: str, data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> Sequence[Record]:
    """The records of one split of a task ('train', 'validation' or 'test'), in the order of its source.

    Records are dicts of str: `instruction, input, output, answer` of a 'records' task, `text` and `references` (a list)
    of a 'texts' one, `question, answer` of a generated one, `messages` (a list of `role, content`) of a 'jsonl' one.
    `data_dir` is a folder of files, or `tfds` or `tfds:DIR` for the TFDS catalogue in TFDS's own folder or in DIR;
    generated tasks need none. Prepared data is cached in `cache_dir`, by default `$FLORA_CACHE` or else
    `~/.cache/flora_jax`. Raises UserError for a missing, empty or malformed source, naming file and record.
    """
    directory = cache_root(cache_dir) / "tfds" / _cache_key(task, split, data_dir)
    if not directory.exists():
        _prepare(task, split, _read(task, split, data_dir), directory)
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(next(directory.glob("*/*/*"))).as_data_source(split)
    return [_decode(source[i]) for i in range(len(source))]


def data_hash(task: Task, split: str, data_dir: str | Path | None) -> str:
    """sha256 (hex) of the file that a split is read from, of the catalogue's files (with data set, version and split),
    or of everything that determines a generated one."""
    if task.source == "generated":
        return hashlib.sha256(_generated_key(task, split).encode()).hexdigest()
    if _in_catalogue(task, data_dir):
        builder, official = _catalogue_split(task, split, data_dir)
        digest = hashlib.sha256(f"{builder.info.full_name}\n{official}\n".encode())
        for path in sorted(builder.info.splits[official].filepaths):
            digest.update(Path(path).read_bytes())
        return digest.hexdigest()
    return hashlib.sha256(_path(task, split, data_dir).read_bytes()).hexdigest()


def has_split(task: Task, split: str, data_dir: str | Path | None) -> bool:
    """Whether `load_records` would find the split (of the TFDS catalogue: where its data set is at hand)."""
    if _in_catalogue(task, data_dir):
        _check_split(task, split)
        return task.name in CATALOGUE and split in CATALOGUE[task.name].splits
    found = task.source == "generated" or any(path.is_file() for path in _candidates(task, split, data_dir))
    if not found or split == "test" or task.files.get("test") is None:
        return found
    # Some tasks are tested on the file of the official validation split, which is then no other split's.
    return split in task.files or task.files["test"] not in [path.name for path in _candidates(task, split, data_dir)]


# ---------------------------------------------------------------------------------------------- locating


def _check_split(task: Task, split: str) -> None:
    if split not in SPLITS:
        hint = " (a sample is never a test set)" if split == "sample" else ""
        raise UserError(f"split {split!r} of task {task.name!r} is unknown{hint}; {near_misses(split, SPLITS)}")


def _in_catalogue(task: Task, data_dir: str | Path | None) -> bool:
    """Whether the task is to be read from the TFDS catalogue: `data_dir` says so, and it needs a `data_dir` at all."""
    named = str(data_dir).partition(":")[0] == "tfds"
    return named and task.source != "generated" and not task.name.endswith(".jsonl")


def _catalogue_split(task: Task, split: str, data_dir: str | Path) -> tuple[tfds.core.DatasetBuilder, str]:
    """A prepared TFDS builder, and its own name of a split of ours."""
    _check_split(task, split)
    if task.name not in CATALOGUE:
        raise UserError(f"data.dir={data_dir}: task {task.name!r} is not in the TFDS catalogue, which has "
                        f"{', '.join(CATALOGUE)}; set data.dir to the folder that holds its files")  # fmt: skip
    if split not in CATALOGUE[task.name].splits:
        raise UserError(f"split {split!r} of task {task.name!r} is not in the TFDS catalogue; TFDS "
                        f"{CATALOGUE[task.name].name} gives {', '.join(CATALOGUE[task.name].splits)}")  # fmt: skip
    folder = str(data_dir).partition(":")[2]
    if folder and not Path(folder).is_dir():
        raise UserError(f"data.dir={data_dir}: {folder} is not a directory; make it, or name one with prepared data")
    from flora_jax.data.builders import catalogue_builder

    with _quiet():
        builder = catalogue_builder(CATALOGUE[task.name].name, folder or None)
    official = CATALOGUE[task.name].splits[split]
    if official not in builder.info.splits:
        raise UserError(f"TFDS {builder.info.full_name} was prepared without its split {official!r}; "
                        f"there are {', '.join(builder.info.splits) or 'none'}")  # fmt: skip
    return builder, official


def _candidates(task: Task, split: str, data_dir: str | Path | None) -> list[Path]:
    """The files that could hold a split, the first that exists is it."""
    _check_split(task, split)
    if task.name.endswith(".jsonl"):
        # The file itself, for the one split that is asked of it. It cannot validate what was trained on it.
        if split == "validation":
            return []
        if Path(task.name).stem == "sample" and split == "test":
            raise UserError(f"{task.name}: a sample is never a test set; name a file of your own test records")
        return [Path(task.name), *([Path(data_dir) / task.name] if data_dir else [])]
    if data_dir is None:
        other = f", or to tfds for {CATALOGUE[task.name].name} of the TFDS catalogue" if task.name in CATALOGUE else ""
        raise UserError(f"task {task.name!r} is read from files; set data.dir to the folder that holds them{other}")
    folder = Path(data_dir) if task.source == "jsonl" else Path(data_dir) / task.name
    names = [task.files[split]] if split in task.files else [f"{split}.json", f"{split}.jsonl"]
    return [folder / name for name in names if task.source != "jsonl" or name.endswith(".jsonl")]


def _path(task: Task, split: str, data_dir: str | Path | None) -> Path:
    candidates = _candidates(task, split, data_dir)
    for path in candidates:
        if path.is_file():
            return path
    if not candidates:
        raise UserError(f"{task.name}: one file has no validation split; use task 'jsonl' and a folder with one")
    folder = candidates[0].parent
    there = sorted(p.name for p in folder.glob("*.json*")) if folder.is_dir() else []
    never = " (a sample is never a test set)" if any(name.startswith("sample.") for name in there) else ""
    get = _WHERE.get(task.name, _WHERE_RECORDS if task.source == "records" else "")
    get = f"; {get}" if get else ""
    get += "; or set data.dir=tfds to read the TFDS catalogue's" if task.name in CATALOGUE else ""
    raise UserError(
        f"{candidates[0]} is missing: split {split!r} of task {task.name!r}; "
        f"{folder.name or folder}/ has {', '.join(there) or 'no data files'}{never}{get}"
    )


_WHERE_RECORDS = "the LLM-Adapters repository (AGI-Edgerunners/LLM-Adapters) has the task's files in its folder dataset"
_WHERE = {
    "hellaswag": "hellaswag_val.jsonl of rowanz/hellaswag is the split that is tested on",
    "dialogsum": "DialogSum_Data of cylnlp/dialogsum has the files, dialogsum.dev.jsonl is validation.jsonl",
    "dailydialogpp": "dataset/ of iitmnlp/DailyDialog-plusplus has the files",
    "multiwoz": "ConvLab's data/multiwoz has the dialogues; `turns` is a list of user and system turns by turns",
    "samsum": "corpus.7z of arXiv 1911.12237: records of dialogue and summary",
    "xsum": "EdinburghNLP/XSum: records of document and summary",
    "cnn_dailymail": "records of article and highlights",
}


def _describe(task: Task, split: str, data_dir: str | Path | None) -> str:
    if _in_catalogue(task, data_dir):
        return f"TFDS {CATALOGUE[task.name].name}, split {CATALOGUE[task.name].splits[split]}"
    return f"task {task.name!r}" if task.source == "generated" else str(_path(task, split, data_dir))


# ----------------------------------------------------------------------------------------------- reading


def _read(task: Task, split: str, data_dir: str | Path | None) -> list[Record]:
    if task.source == "generated":
        return _draw(task, split)
    found_in = _elements if _in_catalogue(task, data_dir) else _raw_records
    convert = {"jsonl": _conversation, "texts": _texts, "records": _adapters_record}[task.source]
    records = []
    for where, raw in itertools.islice(found_in(task, split, data_dir), *task.spans.get(split, (None,))):
        if not isinstance(raw, dict):
            raise UserError(f"{where}: a record must be a JSON object, not {type(raw).__name__}")
        found = convert(raw, where)
        records += found if isinstance(found, list) else [found]
    if not records:
        raise UserError(f"{_describe(task, split, data_dir)} holds no records; it needs at least one")
    return records


def _elements(task: Task, split: str, data_dir: str | Path | None) -> Iterator[tuple[str, Any]]:
    """`(place, record)` of each element of a catalogue's split, as a file would hold it."""
    builder, official = _catalogue_split(task, split, data_dir)
    source = builder.as_data_source(official)
    for i in range(len(source)):
        where = f"{_describe(task, split, data_dir)}: record {i} (from 0)"
        try:
            raw = CATALOGUE[task.name].convert(_decode(source[i]))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if raw is not None:
            yield where, raw


def _raw_records(task: Task, split: str, data_dir: str | Path | None) -> Iterator[tuple[str, Any]]:
    """`(place, value)` of each record of a `.json` list or a `.jsonl` file; place is `file:line` or names the index."""
    path = _path(task, split, data_dir)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if path.suffix == ".jsonl":
        # Split at newlines alone: JSON strings may hold the other separators that str.splitlines cuts at.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _json(line, path, number)
    elif text.strip():
        values = _json(text, path, 1)
        if not isinstance(values, list):
            raise UserError(f"{path}: the file must hold a JSON list of records, not {type(values).__name__}")
        for i, value in enumerate(values):
            yield f"{path}: record {i} (from 0)", value


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise UserError(f"{place}: malformed JSON at column {error.colno}: {error.msg}") from None


def _field(raw: Mapping[str, Any], name: str, where: str, default: str | None = None, number: bool = False) -> str:
    """A text field, checked. `default` makes it optional and lets it be empty."""
    if name not in raw:
        if default is not None:
            return default
        raise UserError(f"{where}: field {name!r} is missing; there are {', '.join(map(repr, raw)) or 'none'}")
    value = raw[name]
    if number and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is {type(value).__name__} {value!r:.40}; it must be a string")
    if default is None and not value.strip():
        raise UserError(f"{where}: field {name!r} is empty; it needs text")
    return value


def _adapters_record(raw: Mapping[str, Any], where: str) -> Record:
    """An LLM-Adapters record. Raw MAWPS (`original_text`, `ans`) and GSM8K's own layout (`question`, `answer` with
    its number after ####) become one."""
    if "original_text" in raw:
        question, answer = _field(raw, "original_text", where), _field(raw, "ans", where, number=True)
        return {"instruction": question, "input": "", "output": "", "answer": answer}
    if "endings" in raw:
        return _hellaswag(raw, where)
    if "question" in raw and "instruction" not in raw:
        question = _field(raw, "question", where)
        rationale, mark, answer = _field(raw, "answer", where).rpartition("####")
        if not mark:
            raise UserError(f"{where}: field 'answer' has no '####' before its final number")
        output = re.sub(r"<<.*?>>", "", rationale).strip() + f"\nThe answer is {answer.strip().replace(',', '')}."
        return {"instruction": question, "input": "", "output": output.strip(), "answer": answer.strip()}
    return {
        "instruction": _field(raw, "instruction", where),
        "input": _field(raw, "input", where, default=""),
        "output": _field(raw, "output", where, default=""),
        "answer": _field(raw, "answer", where, number=True),
    }


def _hellaswag(raw: Mapping[str, Any], where: str) -> Record:
    """HellaSwag's own layouts as the LLM-Adapters record, whose wording this is."""
    if "activity_label" in raw:
        raw = hellaswag({**raw, "context": _field(raw, "ctx", where), "endings": _strings(raw, "endings", where)})
    context, endings = _field(raw, "activity_and_ctx", where), _strings(raw, "endings", where)
    try:
        return compose_ending(context, endings, raw.get("label"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


_TEXTS = ("dialogue", "document", "article")


def _texts(raw: Mapping[str, Any], where: str) -> Record | list[Record]:
    """A text with the texts that answer it: DialogSum and SAMSum (`dialogue`), XSum (`document`), CNN/DailyMail
    (`article`, `highlights`), DailyDialog++ (`context`, `positive_responses`), MultiWOZ (`turns`: each of the system's
    answers the conversation before it)."""
    if "context" in raw:
        references = _strings(raw, "positive_responses", where)
        return {"text": _spoken(_strings(raw, "context", where)), "references": references}
    if "turns" in raw:
        turns = [" ".join(turn.split()) for turn in _strings(raw, "turns", where)]
        return [{"text": _spoken(turns[:i]), "references": [turns[i]]} for i in range(1, len(turns), 2)]
    kind = next((field for field in _TEXTS if field in raw), None)
    if kind is None:
        known = ", ".join([*_TEXTS, "context", "turns"])
        raise UserError(f"{where}: the record has none of the fields {known}; there are {', '.join(map(repr, raw))}")
    answers = [field for field in ("summary", "highlights", "summary1", "summary2", "summary3") if field in raw]
    if not answers:
        raise UserError(f"{where}: the record has neither 'summary', 'summary1' nor 'highlights' beside {kind!r}")
    text, *references = (_untagged(_field(raw, field, where)) for field in (kind, *answers))
    return {"text": text, "references": references}


def _strings(raw: Mapping[str, Any], name: str, where: str) -> list[str]:
    """A field that is a list of texts, checked."""
    value = raw.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise UserError(f"{where}: field {name!r} must be a list of texts, not {value!r:.60}")
    return value


def _spoken(turns: Sequence[str]) -> str:
    return "\n".join(f"{'AB'[i % 2]}: {turn.strip()}" for i, turn in enumerate(turns))


def _untagged(text: str) -> str:
    """`<t> a . </t> <t> b . </t>`, as some CNN/DailyMail files mark sentences, one sentence a line."""
    return re.sub(r"\s*</t>\s*<t>\s*", "\n", text).replace("<t>", "").replace("</t>", "").strip()


def _conversation(raw: Mapping[str, Any], where: str) -> Record:
    """`{"prompt", "completion"}` or `{"messages": [{"role", "content"}, …]}` as messages ending with the assistant."""
    if "messages" not in raw:
        if "prompt" not in raw and "completion" not in raw:
            raise UserError(
                f"{where}: a record needs 'messages', or 'prompt' and 'completion'; "
                f"there are {', '.join(map(repr, raw)) or 'no fields'}"
            )
        prompt, completion = _field(raw, "prompt", where), _field(raw, "completion", where)
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}
    turns = raw["messages"]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: field 'messages' must be a list of at least one message, not {turns!r:.40}")
    messages = []
    for i, turn in enumerate(turns):
        place = f"{where}: messages[{i}]"
        if not isinstance(turn, dict):
            raise UserError(f"{place} must be an object with 'role' and 'content', not {type(turn).__name__}")
        role = _field(turn, "role", place)
        if role not in ROLES:
            raise UserError(f"{place}: role {role!r} is unknown; {near_misses(role, ROLES)}")
        messages.append({"role": role, "content": _field(turn, "content", place)})
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise UserError(f"{where}: 'messages' ends with role {roles[-1]!r}; the last turn must be the assistant's")
    if "user" not in roles:
        raise UserError(f"{where}: 'messages' has no turn with role 'user'; the assistant must answer one")
    return {"messages": messages}


# -------------------------------------------------------------------------------------------- generating

# Item i of reasoning-gym's seed s is Random(s + i), so draws from neighbouring seeds are the same problems:
# every draw gets a block of seeds to itself. The held-out blocks do not depend on the training seed.
_BLOCK = 10**8
_TRIES = 50  # candidates drawn for each problem wanted, before the space of problems counts as too small


def _draw(task: Task, split: str) -> list[Record]:
    """Problems of one split, no question of which is in another: test questions are drawn first and are all
    different, validation avoids them, and training replaces every draw that is in either."""
    try:
        import reasoning_gym
    except ModuleNotFoundError:
        raise UserError(f"task {task.name!r} is generated by reasoning-gym; pip install reasoning-gym") from None
    generator, settings, held_out = task.generator, dict(task.generator.settings), set()
    for block, drawn in enumerate(("test", "validation", "train")):
        size, records = getattr(generator, drawn), []
        if size * _TRIES > _BLOCK:
            raise UserError(f"generator field {drawn}={size} of task {task.name!r} is above {_BLOCK // _TRIES}")
        first = _BLOCK * (block + (generator.seed if drawn == "train" else 0))
        try:
            problems = reasoning_gym.create_dataset(generator.dataset, seed=first, size=size * _TRIES, **settings)
        except AssertionError as error:
            raise UserError(f"task {task.name!r}: generator settings {settings} are refused: {error}") from None
        for problem in itertools.islice(problems, size * _TRIES):
            key = normalise(problem["question"])
            if key not in held_out:
                records.append({"question": problem["question"], "answer": problem["answer"]})
                if drawn != "train":
                    held_out.add(key)
            if len(records) == size:
                break
        if len(records) < size:
            raise UserError(
                f"task {task.name!r}: only {len(records)} of {drawn}={size} problems are new under {settings}; "
                f"ask for fewer or for a wider range of problems"
            )
        if drawn == split:
            return records
    raise AssertionError(split)


def _generated_key(task: Task, split: str) -> str:
    if split not in SPLITS:
        raise UserError(f"split {split!r} of task {task.name!r} is unknown; {near_misses(split, SPLITS)}")
    generator = task.generator
    key = {"reasoning-gym": importlib.metadata.version("reasoning-gym"), "split": split, "test": generator.test}
    key |= {"dataset": generator.dataset, "settings": dict(generator.settings)}
    if split != "test":
        key |= {"validation": generator.validation}
    if split == "train":
        key |= {"train": generator.train, "seed": generator.seed}
    return json.dumps(key, sort_keys=True)


# ----------------------------------------------------------------------------------------------- caching


def _cache_key(task: Task, split: str, data_dir: str | Path | None) -> str:
    # The suffix decides how a file's bytes are read, so it is part of the key.
    files = task.source != "generated" and not _in_catalogue(task, data_dir)
    suffix = _path(task, split, data_dir).suffix if files else ""
    span = str(task.spans.get(split, ""))
    parts = (_FORMAT, task.source, split, suffix, data_hash(task, split, data_dir), *([span] if span else []))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _prepare(task: Task, split: str, records: list[Record], directory: Path) -> None:
    """Writes `records` with the task's builder and moves the result to `directory` in one step, so that a process
    that is killed, or another one that prepares the same data, leaves either all of it or nothing."""
    from flora_jax.data.builders import BUILDERS, SourceConfig

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=directory.parent, prefix="preparing-")
    except OSError as error:
        why = f"cache directory {directory.parent} cannot be written ({error.strerror})"
        raise UserError(f"{why}; set FLORA_CACHE to one that can") from None
    with scratch, _quiet():
        built = Path(scratch.name) / "built"
        config = SourceConfig(name=split, split=split, records=records)
        builder = BUILDERS[task.source](config=config, data_dir=built, file_format="array_record")
        builder.download_and_prepare()
        try:
            built.rename(directory)
        except OSError:
            if not directory.exists():  # there it is when another process was first, with the same data
                raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS reports on stdout, which belongs to the command, and draws bars: both only on a terminal's stderr."""
    import tensorflow_datasets as tfds

    terminal, verbosity = sys.stderr.isatty(), logging.get_verbosity()
    if not terminal:
        tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)  # it warns of every configuration that is made at run time
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stderr if terminal else nowhere):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _decode(value: Any) -> Any:
    """A TFDS element as plain Python: text from bytes, and a sequence of dicts from TFDS's dict of sequences."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | np.ndarray):
        return [_decode(one) for one in value]
    if isinstance(value, dict):
        return {
            key: [dict(zip(v, map(_decode, turn), strict=True)) for turn in zip(*v.values(), strict=True)]
            if isinstance(v, dict) and all(isinstance(one, list | np.ndarray) for one in v.values()) else _decode(v)
            for key, v in value.items()
        }  # fmt: skip
    return value
