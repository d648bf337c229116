"""Conversations in columns: they give the examples that the same records give as JSONL."""

import datetime
import json
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flora_jax.data import data_hash, get_task, has_split, load_examples
from flora_jax.data.tables import hub_hash, hub_splits, parquet_records
from flora_jax.errors import UserError
from flora_jax.training.inputs import load_inputs

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": [2, None]}}}
OTHER = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
# What one row lacks another has: as columns all have all of it, and null in place.
RECORDS = [
    {"messages": [{"role": "system", "content": "Be brief."}, *TURNS], "topic": "greeting"},
    {"prompt": "2+2=", "completion": "4"},
    {
        "messages": [
            {"role": "user", "content": "Line\u2028separator\x85 é"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "3", "tool_call_id": "x"},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": "Now.", "tool_calls": [OTHER]},
        ],
        "tools": [TOOL],
    },
]


def write(path, records, **options):
    pq.write_table(pa.Table.from_pylist(records), path, **options)
    return path


def write_lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def columns(*named):
    """A record with these columns alone; those that are missing from the first are no columns."""
    return [{name: one.get(name) for name in named} for one in RECORDS]


def examples(path, tmp_path, split="train"):
    return load_examples(get_task(str(path)), split, None, tmp_path / "cache")


@pytest.mark.parametrize("options", [{}, {"row_group_size": 2, "compression": "zstd"}])
def test_parquet_is_read_as_jsonl_is(tmp_path, monkeypatch, options):
    monkeypatch.setattr("flora_jax.data.tables._BATCH", 7)
    records = columns("topic", "messages", "prompt", "completion", "tools") * 20
    parquet = write(tmp_path / "mine.parquet", records, **options)
    lines = write_lines(tmp_path / "mine.jsonl", RECORDS * 20)
    found = examples(parquet, tmp_path)
    assert len(found) == 60 and found == examples(lines, tmp_path)
    assert found == examples(parquet, tmp_path)  # from the cache
    assert found[2].messages[1].more and json.loads(found[2].messages[1].more) == {
        "tool_calls": [CALL],
        "content": None,
    }
    assert data_hash(get_task(str(parquet)), "train", None) != data_hash(
        get_task(str(lines)), "train", None
    )


def test_parquet_by_its_path_and_as_a_folder(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.parquet", [{"prompt": split, "completion": "x"}])
    task = get_task("jsonl")
    for split in ("train", "validation", "test"):
        [found] = load_examples(task, split, tmp_path, tmp_path / "cache")
        assert found.question == split and has_split(task, split, tmp_path)
    [found] = examples(tmp_path / "test.parquet", tmp_path, "test")
    assert found.question == "test"
    one = get_task(str(tmp_path / "train.parquet"))
    assert one.is_file and not has_split(one, "validation", None)
    beside = load_examples(get_task("train.parquet"), "train", tmp_path, tmp_path / "cache")
    assert beside[0].question == "train"
    write(tmp_path / "sample.parquet", [{"prompt": "p", "completion": "x"}])
    with pytest.raises(UserError, match="a sample is never a test set"):
        examples(tmp_path / "sample.parquet", tmp_path, "test")
    with pytest.raises(UserError, match=r"nowhere\.parquet is missing"):
        examples(tmp_path / "nowhere.parquet", tmp_path)


def test_maps_are_objects(tmp_path):
    called = pa.struct(
        [("function", pa.struct([("arguments", pa.map_(pa.string(), pa.string()))]))]
    )
    turn = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(called))]
    )
    calls = [{"function": {"arguments": [("zone", "UTC")]}}]
    rows = [[TURNS[0], {"role": "assistant", "content": "", "tool_calls": calls}]]
    table = pa.table({"messages": pa.array(rows, pa.list_(turn))})
    pq.write_table(table, tmp_path / "m.parquet")
    [found] = examples(tmp_path / "m.parquet", tmp_path)
    [call] = json.loads(found.messages[-1].more)["tool_calls"]
    assert call == {"function": {"arguments": {"zone": "UTC"}}}


GOOD = {"prompt": "p", "completion": "c"}
DATED = {"role": "assistant", "content": "x", "tool_calls": [{"at": datetime.date(2020, 1, 2)}]}
HOSTILE = [
    ([{"text": "p", "label": 1}], r"a column 'messages', or .*; there are 'text', 'label'"),
    ([{"prompt": "p"}], r"a column 'messages', or 'prompt' and 'completion'; there are 'prompt'"),
    ([GOOD, {"prompt": "p"}], r"record 1 \(from 0\): field 'completion' is missing; there are"),
    ([GOOD, GOOD, {"prompt": " ", "completion": "c"}], r"record 2 .*field 'prompt' is empty"),
    ([{"prompt": b"p", "completion": "c"}], r"record 0 .*field 'prompt' is bytes b'p'"),
    ([{"messages": TURNS[:1]}], r"record 0 .*ends with role 'user'"),
    ([{"messages": [TURNS[0], DATED]}], r"record 0 .*messages\[1\]: .*date is not JSON"),
    ([], r"there must be a column"),
]


@pytest.mark.parametrize(("records", "message"), HOSTILE)
def test_hostile_columns(tmp_path, records, message):
    path = write(tmp_path / "mine.parquet", records)
    with pytest.raises(UserError, match=message) as error:
        examples(path, tmp_path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_no_rows(tmp_path):
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in GOOD}), path)
    with pytest.raises(UserError, match=r"mine\.parquet holds no records"):
        examples(path, tmp_path)


def test_damaged_parquet_is_one_line(tmp_path):
    """Cut anywhere, and with any byte of its end changed, where the file says what is where."""
    path = write(tmp_path / "mine.parquet", [GOOD] * 3)
    whole = path.read_bytes()
    right = list(parquet_records(path))
    damaged = [whole[:size] for size in range(0, len(whole), 40)]
    for at in range(len(whole) - 200, len(whole)):
        damaged.append(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = list(parquet_records(path))
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert len(found) == len(right)
    assert refused > 0.5 * len(damaged)


# ---- the Hub: `datasets` reads a folder as it reads a clone, and its cache as it does offline


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets`, with a cache of its own and no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield datasets
    hub_splits.cache_clear()
    hub_hash.cache_clear()


@pytest.fixture
def clone(hub, tmp_path):
    """A data set's folder with a training and a test split, its name as a task, and the records."""
    folder = tmp_path / "clone"
    folder.mkdir()
    splits = {"train": columns("topic", "messages", "prompt", "completion", "tools") * 5}
    splits["test"] = [{"messages": TURNS}, {"messages": TURNS}]
    for split, records in splits.items():
        write(folder / f"{split}.parquet", records)
    return folder, f"hub:{folder}", splits


def test_a_hub_data_set_is_read_as_jsonl_is(clone, tmp_path):
    _, name, _ = clone
    lines = write_lines(tmp_path / "mine.jsonl", RECORDS * 5)
    assert examples(name, tmp_path) == examples(lines, tmp_path)
    assert len(examples(name, tmp_path, "test")) == 2
    task = get_task(name)
    assert task.is_hub and not task.is_file and not get_task("hub:a/b.parquet").is_file
    there = [has_split(task, split, None) for split in ("train", "validation", "test")]
    assert there == [True, False, True]
    with pytest.raises(UserError, match=r"no split 'validation'; the data set has train, test"):
        examples(name, tmp_path, "validation")


def test_its_hash_is_that_of_its_rows(clone, tmp_path):
    folder, name, splits = clone
    first = data_hash(get_task(name), "train", None)
    assert first != data_hash(get_task(name), "test", None)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    # The same rows in two files, and with another column, of which nothing is read.
    (copy / "train.parquet").unlink()
    table = pq.read_table(folder / "train.parquet")
    table = table.append_column("more", [list(range(len(table)))])
    for i, half in enumerate((table.slice(0, 7), table.slice(7))):
        pq.write_table(half, copy / f"train-{i:05}-of-00002.parquet")
    assert data_hash(get_task(f"hub:{copy}"), "train", None) == first
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    splits["train"][0]["messages"][0]["content"] = "Be short."
    write(other / "train.parquet", splits["train"])
    assert data_hash(get_task(f"hub:{other}"), "train", None) != first


def test_a_run_on_a_hub_data_set(clone, small, tmp_path):
    """Its test is kept out of the training data, and some of that is held out."""
    from flora_jax.models.tokenizer import byte_tokenizer

    folder, name, _ = clone
    records = [{"prompt": f"What is {i}?", "completion": "x"} for i in range(40)]
    write(folder / "train.parquet", records)
    write(folder / "test.parquet", records[:3])
    fields = {"data.tasks": name, "data.validation_size": 2, "data.cache_dir": str(tmp_path / "c")}
    found = load_inputs(small(**fields), byte_tokenizer())
    assert found.account["dropped_as_in_test"] in (1, 2, 3)
    assert 35 <= len(found.train) <= 38 and 1 <= len(found.validation) <= 2
    assert found.account["sha256"][f"{name}/train"] == data_hash(get_task(name), "train", None)


def test_the_cache_of_datasets_is_enough(clone, hub, tmp_path):
    """Laid out as after a download of ORG/NAME, and found again without a network."""
    _, name, _ = clone
    known = examples(name, tmp_path)
    [kept] = (tmp_path / "hub/clone/default/0.0.0").glob("*/dataset_info.json")
    shutil.copytree(kept.parent, tmp_path / "hub/org___clone/default/0.0.0" / kept.parent.name)
    for other in ("hub:org/clone", "hub:org/clone:default"):
        assert examples(other, tmp_path) == known
        assert data_hash(get_task(other), "train", None) == data_hash(get_task(name), "train", None)
    with pytest.raises(UserError, match=r"'hub:org/clone:german' cannot be read .*'default'"):
        examples("hub:org/clone:german", tmp_path)
    with pytest.raises(UserError, match=r"'hub:org/other' cannot be read .*Couldn't reach"):
        examples("hub:org/other", tmp_path)


def test_hub_data_sets_that_will_not_do(clone, tmp_path):
    folder, name, _ = clone
    write(folder / "train.parquet", [{"text": "p", "label": 1}])
    write(folder / "test.parquet", [{"text": "p", "label": 1}])
    with pytest.raises(
        UserError, match=r"clone, split train: there must be a column .*'text', 'label'"
    ):
        examples(name, tmp_path)
    (tmp_path / "empty").mkdir()
    for wrong in ("hub:", "hub::x", f"hub:{tmp_path}/empty", "hub:a b", "hub:gs://a/b"):
        with pytest.raises(UserError) as error:
            examples(wrong, tmp_path)
        assert "\n" not in str(error.value)


def test_without_datasets_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hub:org/name.*pip install -e '\.\[hub\]'"):
        examples("hub:org/name", tmp_path)
