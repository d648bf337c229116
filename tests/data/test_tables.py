"""Conversations in columns: they give the examples that the same records give as JSONL."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flora_jax.data import data_hash, get_task, has_split, load_examples
from flora_jax.data.tables import parquet_records
from flora_jax.errors import UserError

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
