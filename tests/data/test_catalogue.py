"""The TFDS catalogue as a source: TFDS's own builders, prepared here from a few elements written by
hand."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support import ROOT, load_records
from tensorflow_datasets.core import registered

from flora_jax.data import catalogue, sources
from flora_jax.data.catalogue import CATALOGUE
from flora_jax.data.tasks import TASKS, get_task
from flora_jax.errors import UserError

DATA = Path(os.environ.get("FLORA_DATA") or ROOT.parent / "shared" / "data")
ASK = "Please choose the correct"


def choice(ask, marked, answer, end="\n\n"):
    labels = re.findall(r"(\w+\d): ", marked)
    form = "/".join(label.lower() for label in labels)
    return {
        "instruction": f"{ASK} {ask}\n\n{marked}{end}Answer format: {form}",
        "input": "",
        "output": "",
        "answer": answer,
    }


def arc(texts, key, labels):
    return {
        "id": "1",
        "question": "Why?",
        "choices": {"text": texts, "label": labels},
        "answerKey": key,
    }


def swag(context, endings, label):
    return {
        "context": context,
        "endings": endings,
        "activity_label": "Roof",
        "label": label,
        "split_type": "indomain",
        "source_id": "wikihow~1",
    }


OBQA = {
    "question": {
        "stem": "The sun is",
        "choice_A": "a",
        "choice_B": "b ",
        "choice_C": "c",
        "choice_D": "d",
    },
    "fact1": "f",
    "humanScore": 1.0,
    "clarity": 2.0,
    "turkIdAnonymized": "t",
    "answerKey": "C",
}
PIQA = {"id": "1", "goal": "How to wait?", "sol1": "Sit: down.", "sol2": "Run ", "label": 1}
BLANK = {"sentence": "Café _ met Bob.", "option1": "Ann", "option2": "Eve"}
SUM = {
    "question": "How much?",
    "answer": "3*4 = <<3*4=12>>12.\n#### 1,012",
    "annotation": "",
    "short_answer": "",
}
NEWS = {
    "article": "A man. He sat.",
    "highlights": "Man sits .\nHe sat .",
    "publisher": "cnn",
    "id": "1",
}

# task, our split, its official split, an element as TFDS's builder would yield it, the same record
# as a file holds it
CASES = [
    (
        "ARC-Easy",
        "test",
        "test",
        arc(["x", "y z", "w"], "B", ["A", "B", "C"]),
        choice("answer to the question: Why?", "Answer1: x Answer2: y z Answer3: w", "answer2"),
    ),
    (
        "ARC-Challenge",
        "validation",
        "validation",
        arc(list("vwxyz"), "E", list("ABCDE")),
        choice(
            "answer to the question: Why?",
            "Answer1: v Answer2: w Answer3: x Answer4: y Answer5: z",
            "answer5",
        ),
    ),
    (
        "openbookqa",
        "train",
        "train",
        OBQA,
        choice(
            "answer to the question: The sun is",
            "Answer1: a Answer2: b  Answer3: c Answer4: d",
            "answer3",
        ),
    ),
    (
        "piqa",
        "test",
        "validation",
        PIQA,
        choice(
            "solution to the question: How to wait?",
            "Solution1: Sit: down.\n\nSolution2: Run ",
            "solution2",
        ),
    ),
    (
        "winogrande",
        "test",
        "validation",
        {**BLANK, "label": "2"},
        choice(
            "answer to fill in the blank to complete the given sentence: Café _ met Bob.",
            "Option1: Ann Option2: Eve",
            "option2",
            end=" ",
        ),
    ),
    (
        "winogrande",
        "train",
        "train_xl",
        {**BLANK, "label": "1"},
        choice(
            "answer to fill in the blank to complete the given sentence: Café _ met Bob.",
            "Option1: Ann Option2: Eve",
            "option1",
            end=" ",
        ),
    ),
    (
        "boolq",
        "test",
        "validation",
        {"question": "is it so", "passage": "p", "answer": np.bool_(False), "title": "t"},
        {
            "instruction": "Please answer the following question with true or false, question: is "
            "it so?\n\n"
            "Answer format: true/false",
            "answer": "false",
        },
    ),
    (
        "hellaswag",
        "test",
        "validation",
        swag(
            "[header] How to sit [title] Find a seat. [step] Look. he",
            ["[step] sits.", "b [title] c", "d", "e"],
            2,
        ),
        {
            "activity_and_ctx": "Roof: How to sit. Find a seat. Look. he",
            "label": 2,
            "endings": ["sits.", "b. c", "d", "e"],
        },
    ),
    ("gsm8k", "test", "test", SUM, SUM),
    (
        "samsum",
        "validation",
        "validation",
        {"dialogue": "A: hi\r\nB: ho", "summary": "They greet.", "id": "7"},
        {"dialogue": "A: hi\r\nB: ho", "summary": "They greet."},
    ),
    (
        "xsum",
        "train",
        "train",
        {"document": "A text.", "summary": "A."},
        {"document": "A text.", "summary": "A."},
    ),
    ("cnn_dailymail", "test", "test", NEWS, NEWS),
]


def builder_class(name):
    """TFDS's own. The older ones are in packages that import TensorFlow as a whole, although each
    does without."""
    try:
        return tfds.builder_cls(name)
    except registered.DatasetNotFoundError:
        root = Path(tfds.__file__).parent
        [path] = [
            path
            for path in root.glob(f"*/**/{name}.py")
            if path.parent.parent in (root, root / "text")
        ]
        spec = importlib.util.spec_from_file_location(f"older_{name}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        with registered.skip_registration():
            spec.loader.exec_module(module)
        [found] = [
            v
            for v in vars(module).values()
            if isinstance(v, type) and issubclass(v, tfds.core.DatasetBuilder)
        ]
        return found


def prepare(directory, name, **splits):
    """Prepares TFDS's data set `name` with `splits`, a list of elements each, in place of a
    download."""
    kind, _, config = name.partition("/")
    real = builder_class(kind)
    changed = {
        "name": kind,
        # there would be checksums beside it, found with a package that TFDS does not declare
        "code_path": None,
        "MANUAL_DOWNLOAD_INSTRUCTIONS": None,
        "_split_generators": lambda self, manager: {
            split: iter(enumerate(splits[split])) for split in splits
        },
    }
    with registered.skip_registration():
        builder = type(real.__name__, (real,), changed)
    builder(
        config=config or None, data_dir=directory, file_format="array_record"
    ).download_and_prepare()


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")


@pytest.mark.parametrize(
    "name, split, official, element, record", CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_an_element_is_read_as_the_same_record_of_a_file(
    name, split, official, element, record, tmp_path, capfd
):
    prepare(tmp_path / "tfds", CATALOGUE[name].name, **{official: [element]})
    capfd.readouterr()
    task, file = get_task(name), TASKS[name].files.get(split, f"{split}.jsonl")
    write(tmp_path / name / file, [record])
    wanted = load_records(task, split, tmp_path, tmp_path / "cache")
    assert load_records(task, split, f"tfds:{tmp_path / 'tfds'}", tmp_path / "cache") == wanted
    examples = sources.load_examples(task, split, f"tfds:{tmp_path / 'tfds'}", tmp_path / "cache")
    assert examples == sources.load_examples(task, split, tmp_path, tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
    assert "tensorflow" not in sys.modules or importlib.util.find_spec("tensorflow")


def test_every_row_of_the_catalogue_is_tried():
    assert {case[0] for case in CASES} == set(CATALOGUE)


# What a builder would yield of a parsed record of LLM-Adapters' own files.
ELEMENTS = {
    "ARC-Easy": lambda e: {
        "question": e.question,
        "answerKey": e.gold,
        "choices": [{"text": text, "label": i} for i, text in enumerate(e.choices)],
    },
    "openbookqa": lambda e: {
        "question": {"stem": e.question, **dict(zip(OPENBOOK, e.choices, strict=True))},
        "answerKey": e.gold,
    },
    "piqa": lambda e: {
        "goal": e.question,
        "sol1": e.choices[0],
        "sol2": e.choices[1],
        "label": e.gold,
    },
    "winogrande": lambda e: {
        "sentence": e.question,
        "option1": e.choices[0],
        "option2": e.choices[1],
        "label": e.gold,
    },
    "boolq": lambda e: {"question": e.question.removesuffix("?"), "answer": e.gold == 0},
}
ELEMENTS["ARC-Challenge"] = ELEMENTS["ARC-Easy"]
OPENBOOK = ("choice_A", "choice_B", "choice_C", "choice_D")


@pytest.mark.skipif(
    not DATA.is_dir(), reason="benchmark files absent: set FLORA_DATA to their folder"
)
@pytest.mark.parametrize("name", [*ELEMENTS, "social_i_qa"])
def test_the_wording_is_that_of_llm_adapters_byte_for_byte(name):
    files = sorted((DATA / name).glob("*.json"))
    assert files
    for file in files:
        for record in json.loads(file.read_text(encoding="utf-8")):
            example = TASKS[name].parse(record)
            if name in ELEMENTS:
                made = CATALOGUE[name].convert(ELEMENTS[name](example))
            else:  # TFDS does not have it
                made = catalogue._compose(example.question, example.choices, example.gold)
            assert (made["instruction"], made["answer"]) == (
                record["instruction"],
                record["answer"],
            )


def test_hash_and_cache_follow_the_data_and_not_its_place(tmp_path, monkeypatch):
    elements = [{**PIQA, "goal": f"Goal {i}?"} for i in range(3)]
    for folder, count in (("a", 3), ("b", 3), ("c", 2)):
        prepare(tmp_path / folder, "piqa", train=elements, validation=elements[:count])
    task, cache = get_task("piqa"), tmp_path / "cache"
    hashes = {
        (s, f): sources.data_hash(task, s, f"tfds:{tmp_path / f}")
        for s in ("train", "test")
        for f in "abc"
    }
    assert hashes["test", "a"] == hashes["test", "b"] != hashes["test", "c"]
    assert hashes["train", "a"] == hashes["train", "c"] != hashes["test", "a"]
    first = load_records(task, "test", f"tfds:{tmp_path / 'a'}", cache)
    assert len(first) == 3 and len(load_records(task, "test", f"tfds:{tmp_path / 'c'}", cache)) == 2
    monkeypatch.setattr(
        sources, "_prepare", lambda *args: pytest.fail("prepared what the cache holds")
    )
    assert load_records(task, "test", f"tfds:{tmp_path / 'b'}", cache) == first
    # TFDS's own folder, as $TFDS_DATA_DIR sets it
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "a"))
    assert load_records(task, "test", "tfds", cache) == first


def test_a_folder_whose_path_is_a_pattern(tmp_path, monkeypatch):
    """TFDS looks for its files with glob; `~` and its own folder too may lead there."""
    home, folder = tmp_path / "a[b]*?%s {x}~", tmp_path / "a[b]*?%s {x}~/data [v=1]"
    prepare(tmp_path / "plain", "piqa", validation=[PIQA, {**PIQA, "goal": "How [to] sit?"}])
    wanted = load_records(
        get_task("piqa"), "test", f"tfds:{tmp_path / 'plain'}", tmp_path / "cache"
    )
    home.mkdir()
    (tmp_path / "plain").rename(folder)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))
    for i, name in enumerate((f"tfds:{folder}", "tfds:~/data [v=1]", "tfds")):
        assert load_records(get_task("piqa"), "test", name, tmp_path / f"cache{i}") == wanted
    with pytest.raises(
        UserError, match=re.escape(f"TFDS hellaswag is not prepared in {folder}, and")
    ):
        load_records(get_task("hellaswag"), "test", "tfds:~/data [v=1]", tmp_path / "cache")


def test_splits_and_tasks_that_need_no_catalogue(tmp_path):
    def splits(name):
        return [s for s in sources.SPLITS if sources.has_split(get_task(name), s, "tfds")]

    assert splits("piqa") == ["train", "test"]
    assert splits("ARC-Easy") == splits("chain_sum") == list(sources.SPLITS)
    assert splits("dialogsum") == splits("jsonl") == []
    write(tmp_path / "mine.jsonl", [{"prompt": "p", "completion": "c"}])
    assert sources.has_split(get_task(str(tmp_path / "mine.jsonl")), "train", "tfds")
    assert (
        len(load_records(get_task("chain_sum", {"test": 3}), "test", "tfds", tmp_path / "cache"))
        == 3
    )
    with pytest.raises(UserError, match=r"split 'tests' .*did you mean 'test'"):
        sources.has_split(get_task("piqa"), "tests", "tfds")


def test_texts_that_are_empty_are_left_out(tmp_path):
    record = {"dialogue": "A: hi", "summary": "A greets.", "id": "1"}
    prepare(
        tmp_path, "samsum", train=[record, {**record, "dialogue": ""}, {**record, "summary": " "}]
    )
    assert (
        len(load_records(get_task("samsum"), "train", f"tfds:{tmp_path}", tmp_path / "cache")) == 1
    )


def refused(words, name, split, directory):
    with pytest.raises(UserError, match=words) as error:
        load_records(get_task(name), split, directory, Path(directory[5:]) / "cache")
    return str(error.value)


def test_what_the_catalogue_cannot_give(tmp_path, monkeypatch, capfd):
    here = f"tfds:{tmp_path}"
    for name in ("dialogsum", "social_i_qa", "jsonl"):
        words = refused(
            f"task '{name}' is not in the TFDS catalogue, which has ARC-Easy", name, "test", here
        )
        assert all(task in words for task in ("hellaswag", "cnn_dailymail", "data.dir"))
    refused("task 'dialogsum' is not in the TFDS catalogue", "dialogsum", "train", here)
    refused(
        "split 'validation' of task 'piqa' is not in the TFDS catalogue;"
        " TFDS piqa gives train, test",
        "piqa",
        "validation",
        here,
    )
    refused("piqa' is unknown .a sample is never a test set", "piqa", "sample", here)
    # Not prepared: one of TFDS's older builders, and one whose download fails.
    words = refused(
        "TFDS hellaswag is not prepared in .* needs tensorflow", "hellaswag", "test", here
    )
    assert (
        "`tfds build hellaswag --file_format=array_record --data_dir=DIR`" in words
        and "tfds:DIR" in words
    )

    def offline(self, **kwargs):
        raise ConnectionError("no\nnetwork " + "x" * 999)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    words = refused(
        r"TFDS piqa is not prepared in .* \(ConnectionError: no network x+…\)", "piqa", "test", here
    )
    assert "`tfds build piqa " in words and len(words) < 800
    monkeypatch.undo()
    prepare(tmp_path, "piqa", train=[PIQA])
    capfd.readouterr()
    refused(
        r"piqa/1\.0\.0 was prepared without its split 'validation'; there are train",
        "piqa",
        "test",
        here,
    )
    prepare(tmp_path, "winogrande", validation=[{**BLANK, "label": -1}])
    capfd.readouterr()
    refused(
        r"TFDS winogrande, split validation: record 0 \(from 0\): field 'label' is -1;"
        r" .* one of 2 options",
        "winogrande",
        "test",
        here,
    )
    info = tmp_path / "piqa/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    refused(
        r"TFDS piqa in .*tfrecord.*`tfds build piqa --file_format=array_record --overwrite`",
        "piqa",
        "train",
        here,
    )
    assert capfd.readouterr() == ("", "")


def test_absent_files_name_the_catalogue(tmp_path):
    for name, other in (("piqa", True), ("samsum", True), ("dialogsum", False)):
        for folder in (tmp_path, None):
            with pytest.raises(UserError) as error:
                load_records(get_task(name), "test", folder)
            assert ("tfds" in str(error.value)) == other


def test_hellaswag_files_of_either_layout_are_one_record(tmp_path):
    """The published one (`activity_label`, `ctx`, WikiHow's marks) and the one with both joined and
    no marks."""
    endings = ["[title] Wash it [step] twice.", "Eat it.", "Paint it.", "Sell it."]
    published = {
        "ind": 1,
        "activity_label": "Home",
        "ctx_a": "a",
        "ctx_b": "b",
        "label": 2,
        "endings": endings,
        "ctx": "[header] How to clean [title] Start",
    }
    joined = {
        "ind": 1,
        "activity_and_ctx": "Home: How to clean. Start",
        "label": 2,
        "endings": ["Wash it twice.", *endings[1:]],
    }
    found = []
    for name, record in (("published", published), ("joined", joined)):
        folder = tmp_path / name / "hellaswag"
        folder.mkdir(parents=True)
        (folder / "validation.jsonl").write_text(json.dumps(record))
        found += load_records(get_task("hellaswag"), "test", folder.parent, tmp_path / "cache")
    assert found[0] == found[1] and found[0]["answer"] == "ending3"
