"""Files that are no files, and faults found by experiments/fuzz.py, each as its smallest input."""

import itertools
import json
import os
import random

import pytest

from experiments.fuzz import inputs
from experiments.fuzz_faults import spoil
from experiments.load import Models, calls
from experiments.soak import soak
from flora_jax.config_files import read_command
from flora_jax.data.records import raw_records
from flora_jax.errors import UserError
from flora_jax.files import read_json
from flora_jax.interop.adapter_files import read_tensors
from flora_jax.models.config import LlamaConfig
from flora_jax.models.gguf import GgufFile
from flora_jax.models.loading import load_pretrained
from flora_jax.models.template_check import check_template
from flora_jax.models.tokenizer import load_tokenizer
from flora_jax.training.checkpoints import Checkpoints
from flora_jax.training.workdir import check_workdir


def put(path, kind):
    """What may stand in a file's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "circle": path, "nowhere": "nothing"}[kind])
    return path


@pytest.mark.parametrize("kind", ["device", "pipe", "circle", "nowhere", "folder"])
@pytest.mark.parametrize(
    "read, name",
    [
        (read_json, "x.json"),
        (GgufFile, "x.gguf"),
        (lambda path: list(raw_records(path)), "x.jsonl"),
        (lambda path: read_tensors(path.parent), "adapter_model.safetensors"),
        (lambda path: check_workdir(path.parent, {}), "config.json"),
        (lambda path: load_pretrained(str(path.parent)), "config.json"),
    ],
)
def test_what_has_no_end_is_not_read(kind, read, name, tmp_path):
    with pytest.raises(UserError) as error:
        read(put(tmp_path / "x" / name, kind))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["device", "pipe"])
@pytest.mark.parametrize(
    "load, name",
    [
        (load_pretrained, "config.json"),
        (load_pretrained, "model.safetensors"),
        (load_tokenizer, "tokenizer.json"),
        (load_tokenizer, "tokenizer_config.json"),
        (load_tokenizer, "chat_template.jinja"),
    ],
)
def test_a_model_of_what_has_no_end(kind, load, name, hf_directory, tmp_path):
    hf_directory(tmp_path / "model")
    put(tmp_path / "model" / name, kind)
    with pytest.raises(UserError):
        load(str(tmp_path / "model"))


def test_a_number_of_positions_that_is_none(hf_directory, tmp_path):
    """transformers compares it when it first encodes."""
    path = hf_directory(tmp_path / "model") / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "many"}))
    with pytest.raises(UserError, match=r"the tokenizer cannot be read .*'int' and 'str'"):
        load_tokenizer(str(tmp_path / "model"))


LONG = "{{ 'x' * 10**11 }}"
TEMPLATES = {
    "no end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set n = namespace(x='ab') %}"
    "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "one word": LONG,
    "behind a refusal": "{% if not add_generation_prompt %}{{ raise_exception('x') }}{% endif %}"
    + LONG,
    "where it is for real": "{% if raise_exception is defined and tools is none %}"
    + LONG
    + "{% endif %}",
    "output": "{% for i in range(99999) %}{{ messages }}{% endfor %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_takes_too_much(kind, hf_directory, tmp_path):
    """It is known before transformers has so much as compiled it."""
    hf_directory(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATES[kind])
    with pytest.raises(UserError, match=r"the chat template takes more than 2 seconds, 1024 MB or"):
        load_tokenizer(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no system turn') }}",
        "{% generation %}{{ messages[-1].content }}{% endgeneration %}{{ eos_token }}",
        "{{ messages[9].content.x }}",
        "{% for",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_that_refuses_is_no_danger(text):
    check_template(text, "here")


def test_a_message_is_one_line_that_ends():
    error = UserError(f"field 'x'={'y' * 10_000}\nand z; use another")
    assert "\n" not in str(error) and len(str(error)) < 1600
    assert str(error).startswith("field 'x'=") and str(error).endswith("and z; use another")


@pytest.mark.parametrize("template", [5, True, {"default": 5}, {"default": ["x"]}])
def test_a_template_that_is_no_text(template, hf_directory, tmp_path):
    path = hf_directory(tmp_path / "model") / "tokenizer_config.json"
    path.with_name("chat_template.jinja").unlink()  # it comes first
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with pytest.raises(UserError):
        load_tokenizer(str(tmp_path / "model"))


def test_a_flag_longer_than_any():
    with pytest.raises(UserError, match="is no flag"):
        read_command(["train", "--config", "configs/tiny.py", "--workdir", "w", "--rank" * 1000])


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/manifest.ocdbt"])
def test_a_pipe_in_a_checkpoint(name, tmp_path):
    """orbax waits for what it has to say, in a thread that no signal reaches."""
    put(tmp_path / "checkpoints/1" / name, "pipe")
    with pytest.raises(UserError, match="is a device or a pipe, not a file"):
        Checkpoints(tmp_path / "checkpoints", keep=1)


def test_an_index_that_names_no_file(hf_directory, tmp_path):
    """Its name is longer than a file system takes."""
    hf_directory(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "x" * 300}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"cannot be read .*File name too long"):
        load_pretrained(str(tmp_path / "model"))


def test_numbers_that_jax_does_not_take():
    hf = LlamaConfig.preset("tiny").to_hf()
    assert isinstance(LlamaConfig.from_hf({**hf, "rms_norm_eps": 2**31}).rms_norm_eps, float)
    for model_type in ("llama", "smollm3"):
        with pytest.raises(UserError, match=r"num_hidden_layers=2147483648 must be at most 10000"):
            LlamaConfig.from_hf({**hf, "model_type": model_type, "num_hidden_layers": 2**31})
    with pytest.raises(UserError, match=r"rms_norm_eps=.* must be a positive number"):
        LlamaConfig.from_hf({**hf, "rms_norm_eps": 10**400})


def test_faults_are_drawn_from_their_seed(tmp_path):
    whole = json.dumps({"a": {"b": [1, 2.5, "c"]}, "d": None})
    outside = tmp_path / "outside"
    found = []
    for _ in range(2):
        said = []
        for seed in range(300):
            path = tmp_path / "own.json"
            path.unlink(missing_ok=True)
            path.write_text(whole)
            what = spoil(path, outside, random.Random(seed))
            said.append((what, path.read_bytes() if path.is_file() else None))
            if path.is_dir():
                path.rmdir()
        found.append(said)
    assert found[0] == found[1]
    assert len({data for _, data in found[0]}) > 150
    assert not outside.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config", "adapter", "records", "parquet", "commands"]
)
def test_spoilt_inputs(name):
    """A slice that experiments/fuzz.py has not gone through."""
    wrong = [one for one in inputs(name, 10**6, 50) if one["became"] not in ("accepted", "refused")]
    assert not wrong


@pytest.mark.slow
def test_requests_of_every_kind_are_answered_as_alone(quick_compile):
    """Batches and streams, switched adapters and a bank."""
    asked = itertools.islice(calls(Models("ffba_qg_add"), seed=8), 4)
    judged = [one for call in asked for one in call]
    assert {one["kind"] for one in judged} == {"batch", "stream", "stream left"}
    assert all(one["equal"] for one in judged), judged


@pytest.mark.slow
def test_two_minutes_of_everything(capsys):
    """Kills, spoilt files, requests; tests/training/test_resume.py has single kills."""
    found = soak(2.0, seed=10**6)
    assert {"kills", "request"} < set(found) and len(found) >= 3
    assert not any(map(any, found.values())), capsys.readouterr().out
