"""What the training command says to bad input: exit code 2, one line that names the field or file,
nothing written."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flora_jax.config import get_config
from flora_jax.errors import run_command
from flora_jax.train import main
from flora_jax.training.run import prepare

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = (
    "--config",
    "configs/tiny.py",
    "--config.data.generator.train=60",
    "--config.data.generator.validation=10",
    "--config.data.generator.test=6",
    "--config.data.validation_size=8",
)


@pytest.fixture
def refused(tmp_path, tree_hash, capsys, caches):
    """`refused(words, *flags)`: the command refuses them with one line that holds the words, and
    writes nothing."""

    def check(words, *flags, workdir=None):
        workdir = tmp_path / "new/workdir" if workdir is None else workdir
        capsys.readouterr()
        before = tree_hash(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            run_command(main, ["train", f"--workdir={workdir}", *map(str, flags)])
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, err
        assert (
            out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 500
        ), err
        for word in words:
            assert word in err, (word, err)
        assert tree_hash(tmp_path) == before and not (tmp_path / "new").exists()

    check.cache = f"--config.data.cache_dir={caches / 'data'}"
    return check


def test_command_line(refused, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(main, ["train", *TINY])
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: --workdir is missing\n"
    refused(["--config is missing"])
    refused(["config.train.stpes", "'train.steps'"], *TINY, "--config.train.stpes=3")
    refused(["config.trian.steps", "'train.steps'"], *TINY, "--config.trian.steps=3")
    refused(["config.train ", "'train.seed'"], *TINY, "--config.train=3")
    refused(["--config.train.steps=many", "int"], *TINY, "--config.train.steps=many")
    refused(["--config.train.steps=1.5", "int"], *TINY, "--config.train.steps=1.5")
    refused(["--config.adapter.rslora=maybe", "oolean"], *TINY, "--config.adapter.rslora=maybe")
    refused(
        ["--config.optim.learning_rate=fast", "float"], *TINY, "--config.optim.learning_rate=fast"
    )
    refused(["'workdri'", "workdir"], *TINY, "--workdri=x")
    refused(["unexpected argument 'train.steps=3'"], *TINY, "train.steps=3")


def test_configuration_file(refused, tmp_path):
    begin = (
        "from flora_jax.config import get_config as base\n\ndef get_config():\n"
        "    c = base('tiny')\n"
    )

    def file(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return f"--config={path}"

    refused(["absent.py", "no such file"], f"--config={tmp_path / 'absent.py'}")
    refused(["mine.py", "SyntaxError", "line 1"], file("steps: 3 batch 8"))
    refused(["mine.py", "get_config() must return"], file("config = {}"))
    refused(["mine.py", "get_config() must return"], file(begin))
    refused(
        ["mine.py, line 2", "ModuleNotFoundError", "no_such_module"],
        file("\nimport no_such_module"),
    )
    refused(
        ["mine.py, line 5", "TypeError", "'steps'"],
        file(begin + "    c.train.steps = 'x'\n    return c"),
    )
    refused(
        ["config.train.stpes", "'train.steps'"], file(begin + "    c.train.stpes = 3\n    return c")
    )
    refused(
        ["config.train.steps=None", "integer"],
        file(begin + "    c.train.steps = None\n    return c"),
    )
    refused(
        ["config.eval.tasks=None", "str"], file(begin + "    c.eval.tasks = None\n    return c")
    )
    refused(
        ["config.train.batch_size=True", "integer"],
        file(begin + "    c.train.batch_size = True\n    return c"),
    )
    refused(["config.train.steps is missing"], file(begin + "    del c.train.steps\n    return c"))


FIELDS = [
    (["adapter.method", "'fbba'", "'ffba'"], "--config.adapter.method=fbba"),
    (["adapter.targets", "'qq'", "'q'"], "--config.adapter.targets=qq,k"),
    (["adapter.rank=5", "does not divide 96", "4, 6"], "--config.adapter.rank=5"),
    (["adapter.rank=0"], "--config.adapter.rank=0"),
    (["adapter.dropout=1.5"], "--config.adapter.dropout=1.5"),
    (["adapter.activation='relu'"], "--config.adapter.activation=relu"),
    (["model.preset='tinny'", "'tiny'"], "--config.model.preset=tinny"),
    (["model.dtype='float16'", "'bfloat16'"], "--config.model.dtype=float16"),
    (["optim.schedule='cosinus'", "'cosine'"], "--config.optim.schedule=cosinus"),
    (["optim.learning_rate=nan"], "--config.optim.learning_rate=nan"),
    (["optim.warmup_steps=60", "train.steps=50"], "--config.optim.warmup_steps=60"),
    (
        ["optim.rate_rules", "'adapter/.*_B'", "PATH_RULE=FACTOR"],
        "--config.optim.rate_rules=adapter/.*_B",
    ),
    (["optim.rate_rules", "'adpter/.*_B'"], "--config.optim.rate_rules=adpter/.*_B=16"),
    (
        ["optim.rate_rules", "'adapter/(_B'", "regular expression"],
        "--config.optim.rate_rules=adapter/(_B=16",
    ),
    (
        ["train.trainable", "'params/.*nrom/scale'", "norm/scale'"],
        "--config.train.trainable=params/.*nrom/scale",
    ),
    (["train.batch_size=0", "at least 1"], "--config.train.batch_size=0"),
    (["train.accumulation=3", "train.batch_size=8"], "--config.train.accumulation=3"),
    (["train.seed=-1"], "--config.train.seed=-1"),
    (["config.mesh", "1,2,1", "1 device"], "--config.mesh.data=1 --config.mesh.fsdp=2"),
    (["config.mesh", "only one axis", "-1,-1,1"], "--config.mesh.fsdp=-1"),
    (["mesh.tensor=0"], "--config.mesh.tensor=0"),
    (["data.tasks", "names no task"], "--config.data.tasks=,"),
    (["'chainsum'", "'chain_sum'"], "--config.data.tasks=chainsum"),
    (["'boolq'", "data.dir"], "--config.data.tasks=boolq"),
    (["data.max_length=32", "too short", "97"], "--config.data.max_length=32"),
    (["chain_sum", "max_terms must be >= min_terms"], "--config.data.generator.max_terms=1"),
    (["eval.protocol='lm-eval'", "'lm_eval'"], "--config.eval.protocol=lm-eval"),
    (["'chain_sums'", "'chain_sum'"], "--config.eval.tasks=chain_sums"),
    (["distributed.coordinator"], "--config.distributed.processes=2"),
    (
        ["distributed.coordinator='localhost'", "host:port"],
        "--config.distributed.processes=2 --config.distributed.coordinator=localhost",
    ),
    (
        ["distributed.coordinator='localhost:abc'", "65535"],
        "--config.distributed.processes=2 --config.distributed.coordinator=localhost:abc",
    ),
    (
        ["distributed.coordinator=':70000'", "65535"],
        "--config.distributed.processes=2 --config.distributed.coordinator=:70000",
    ),
    (
        ["distributed.coordinator='a:1'", "beside distributed.auto"],
        "--config.distributed.auto --config.distributed.coordinator=a:1",
    ),
    (
        ["distributed.processes=2", "beside distributed.auto"],
        "--config.distributed.auto --config.distributed.processes=2",
    ),
    (
        ["distributed.process_id=1", "beside distributed.auto"],
        "--config.distributed.auto --config.distributed.process_id=1",
    ),
    (["train.trainable", "'adapter/.*'"], "--config.train.trainable=adapter/.*"),
    (["train.seed=99999999999999999999", "64 bits"], "--config.train.seed=99999999999999999999"),
    (["train.seed=4294967296", "2**32"], "--config.train.seed=4294967296"),
    (["optim.eps=inf", "finite"], "--config.optim.eps=inf"),
    (["optim.eps=1e-50", "float32"], "--config.optim.eps=1e-50"),
    (["eval.max_length=1", "at least 2"], "--config.eval.max_length=1"),
    (["eval.max_new_tokens=0", "at least 1"], "--config.eval.max_new_tokens=0"),
    (
        ["protocol lm_eval scores choices as plain text", "prompt_style='chat'"],
        "--config.eval.tasks=boolq,chain_sum --config.eval.protocol=lm_eval "
        "--config.data.prompt_style=chat",
    ),
    (
        ["leaves no room", "chain_sum"],
        "--config.eval.max_length=40 --config.eval.tasks=chain_sum "
        "--config.eval.protocol=llm_adapters",
    ),
]


@pytest.mark.parametrize(
    ("words", "flags"), FIELDS, ids=[flags.removeprefix("--config.") for _, flags in FIELDS]
)
def test_fields(refused, words, flags):
    refused(words, *TINY, refused.cache, *flags.split())


def test_data_files(refused, tmp_path):
    def from_folder(words, task="gsm8k", folder=tmp_path / "data"):
        refused(
            words,
            *TINY,
            refused.cache,
            f"--config.data.tasks={task}",
            f"--config.data.dir={folder}",
        )

    file, mine = tmp_path / "data/gsm8k/train.json", tmp_path / "mine.jsonl"
    file.parent.mkdir(parents=True)
    from_folder(["config.data.dir", "not a directory", "nowhere"], folder=tmp_path / "nowhere")
    from_folder(["config.data.dir='tfds:'", "not a directory"], folder="tfds:")
    from_folder(["gsm8k/train.json is missing"])
    file.write_text("[]")
    from_folder([str(file), "no records"])
    file.write_text('[{"instruction": "1 + 1?",\n "answer": 2')
    from_folder([f"{file}:2", "malformed JSON"])
    mine.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"}\n')
    from_folder([f"{mine}:2", "malformed JSON"], task=mine)
    mine.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n')
    from_folder([f"{mine}:3", "'completion' is missing"], task=mine)
    from_folder(["absent.jsonl is missing"], task=tmp_path / "absent.jsonl")
    good = "".join(json.dumps({"prompt": f"a{i}", "completion": "b"}) + "\n" for i in range(9))

    def turns(*roles):
        return json.dumps(
            {"messages": [{"role": r, "content": f"{r} {i}"} for i, r in enumerate(roles)]}
        )

    for line, words in (
        ('{"prompt": "a \\ud83d", "completion": "b"}', "half a character"),
        ('{"prompt": "a", "completion": ' + "9" * 5000 + "}", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (turns("system", "assistant", "user", "assistant"), "begins with the assistant's turn"),
    ):
        mine.write_text(good + line)
        from_folder([f"{mine}:10", words], task=mine)
    replies = tmp_path / "data/dailydialogpp/train.json"
    replies.parent.mkdir()
    replies.write_text('[{"context": ["hi \\ud83d"], "positive_responses": ["ho"]}]')
    from_folder([str(replies), "'context'", "half a character"], task="dailydialogpp")
    mine.write_text(good + turns("user", "assistant", "user", "assistant"))
    from_folder(["holds one answer", "'user 0'"], task=mine)
    mine.write_text('{"prompt": "a", "completion": "b"}\n')
    # one record to hold out, none to train on
    from_folder(["mine.jsonl", "one record is too few"], task=mine)


def test_examples_longer_than_the_model(refused, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(
        "".join(
            json.dumps({"prompt": f"{i} " + "a" * 3000, "completion": "b"}) + "\n" for i in range(9)
        )
    )
    words = ["data.max_length=4096", "an example of 3004 positions", "max_position_embeddings=2048"]
    refused(
        words, *TINY, refused.cache, f"--config.data.tasks={mine}", "--config.data.max_length=4096"
    )
    # One that is left out refuses nothing: what is short of data.max_length is all that counts.
    mine.write_text(
        "".join(
            json.dumps({"prompt": f"{i} " + "a" * n, "completion": "b"}) + "\n"
            for i, n in enumerate([5000, *[9] * 20])
        )
    )
    config = get_config("tiny", "lora")
    config.model.weights = "random"
    config.data.update(tasks=str(mine), max_length=4096, validation_size=4)
    account = prepare(config, tmp_path / "workdir").inputs.account
    assert account["train"]["too_long"] + account["validation"]["too_long"] == 1


def test_models(refused, tmp_path, hf_directory):
    model = hf_directory(tmp_path / "model")
    weights, config, tokenizer = (
        model / name for name in ("model.safetensors", "config.json", "tokenizer.json")
    )
    whole, stored = weights.read_bytes(), config.read_text()

    def from_model(words, source=model):
        for tasks in ("", "chain_sum"):  # no data is prepared for it, either
            refused(
                words,
                *TINY,
                f"--config.data.cache_dir={tmp_path / 'cache'}",
                f"--config.model.weights={source}",
                f"--config.eval.tasks={tasks}",
                "--config.eval.protocol=llm_adapters",
            )

    from_model(["nowhere", "no such directory"], tmp_path / "nowhere")
    weights.unlink()
    from_model([str(model), "no model.safetensors"])
    weights.write_bytes(whole[:-64])
    from_model([str(weights), "not a complete safetensors file"])
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({**tensors, "model.norm.weight": np.ones(95, np.float32)}, weights)
    from_model(["'model.norm.weight'", "[95]", "[96]"])
    weights.write_bytes(whole)
    config.write_text(json.dumps({**json.loads(stored), "model_type": "gemma2"}))
    from_model([str(config), "'gemma2'"])
    config.write_text(json.dumps({**json.loads(stored), "vocab_size": 200}))
    from_model(["tokenizer", "200"])
    config.write_text(stored)
    tokenizer.unlink()
    from_model([str(model), "tokenizer.json"])
    gguf = tmp_path / "other.gguf"
    name, value = b"general.architecture", b"gemma"
    gguf.write_bytes(
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", len(name))
        + name
        + struct.pack("<IQ", 8, len(value))
        + value
        + b"\0" * 64
    )
    from_model([str(gguf), "gemma"], gguf)
    (tmp_path / "text.gguf").write_text("not a model")
    from_model(["text.gguf"], tmp_path / "text.gguf")


def test_workdir(refused, tmp_path):
    file, other, run = tmp_path / "file", tmp_path / "other", tmp_path / "run"
    file.write_text("x")
    refused([f"--workdir={file} ", f"{file} is not a directory"], *TINY, workdir=file)
    refused([f"--workdir={file}/w ", f"{file} is not a directory"], *TINY, workdir=file / "w")
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    refused([f"--workdir={other}", "no config.json"], *TINY, workdir=other)
    run.mkdir()
    for text in ("{", "[]", '{"config": 1}', "{}"):
        (run / "config.json").write_text(text)
        refused([f"{run / 'config.json'} is not the configuration of a run"], *TINY, workdir=run)
    refused(["too long"], *TINY, workdir=tmp_path / ("w" * 300))
    refused(["--workdir", "no UTF-8"], *TINY, workdir=tmp_path / "w\udcff")
    refused(["/proc/w cannot be"], *TINY, workdir="/proc/w")


def test_names_that_are_too_long(refused):
    refused(["too long"], *TINY, f"--config.model.weights={'x' * 300}")
    refused(["too long"], *TINY, f"--config.data.tasks={'x' * 300}.jsonl")


def test_cache_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(["cannot be written"], *TINY, f"--config.data.cache_dir={tmp_path / 'file/cache'}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--config.adapter.rank=5",), "adapter.rank=5"),
        (("--config.data.tasks=boolq",), "data.dir"),
        (("--config.nothing=1",), "config.nothing"),
    ],
)
def test_as_a_process(command, tmp_path, flags, words):
    done = command(*TINY, f"--workdir={tmp_path / 'w'}", *flags)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.count("\n") == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()
