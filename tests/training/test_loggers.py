"""Where log lines go beside metrics.jsonl. TensorBoard's events: test_resume.py."""

import importlib.util
import json
import struct

import pytest

from flora_jax.errors import UserError
from flora_jax.training import loggers
from flora_jax.training.loggers import check_logger
from flora_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_none_leaves_metrics_alone(small, tmp_path):
    train(small(**{"train.logger": "none"}), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", "config.json", "metrics.jsonl", "checkpoints"}
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert first["peak_memory_gb"] > 0


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    check_logger("tensorboard")
    with pytest.raises(UserError, match=r"pip install 'flora_jax\[wandb\]'"):
        check_logger("wandb")


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_offline(small, tmp_path, monkeypatch):
    """What its file holds is what metrics.jsonl does, under one id before and after a resume."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = small(**{"train.logger": "wandb", "train.steps": 4})
    train(config, tmp_path)
    [path] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert path.stem.removeprefix("run-") == (tmp_path / "wandb" / "id").read_text()

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    theirs = [
        {name: one[name] for name in ours} for ours, one in zip(lines, logged(path), strict=True)
    ]
    assert theirs == lines and any("loss" in line for line in lines)


def logged(path):
    """The values of each step in a file of wandb's: after 7 bytes, records of a checksum (4), a
    length (2) and a kind (1) that says it is whole; none here reaches the end of a block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()[7:]
    found = []
    while data:
        length, kind = struct.unpack("<HB", data[4:7])
        assert kind == 1
        record = Record.FromString(data[7 : 7 + length])
        data = data[7 + length :]
        if record.history.item:
            items = {item.key or item.nested_key[0]: item for item in record.history.item}
            found.append({name: json.loads(item.value_json) for name, item in items.items()})
    return found
