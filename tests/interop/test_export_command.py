"""`python -m flora_jax.export`: runs and adapter directories in, directories for others out; what
it refuses."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import struct

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support import random_adapter

from flora_jax.adapters import AdapterConfig
from flora_jax.errors import UserError, run_command
from flora_jax.export import main
from flora_jax.interop import formats
from flora_jax.interop.adapter_files import load_adapter, save_adapter
from flora_jax.interop.exports import MARKER
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama
from flora_jax.models.loading import find_licence, load_pretrained
from flora_jax.train import run
from flora_jax.training.loop import train
from flora_jax.training.trained import read_run

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")


@pytest.fixture(scope="module")
def lora_run(small, tmp_path_factory):
    """A run of 6 steps with a checkpoint every second step."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    settings = {
        "train.steps": 6,
        "train.keep": 3,
        "optim.schedule": "constant",
        "eval.tasks": "chain_sum",
        "eval.limit": 4,
        "eval.batch_size": 4,
    }
    run(small("lora", **settings), workdir)
    return workdir


@pytest.fixture(scope="module")
def ffba_run(small, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ffba") / "run"
    run(small("ffba", **{"train.trainable": "params/.*norm/scale"}), workdir)
    return workdir


def command(*flags):
    main(["export", *map(str, flags)])


def test_every_format_of_a_run(lora_run, tmp_path, capsys):
    for form in ("merged", "peft", "transformers"):
        command("--workdir", lora_run, "--format", form, "--out", tmp_path / form)
        said = capsys.readouterr().out
        assert "logits: training moves them by up to" in said and str(tmp_path / form) in said
        report = json.loads((tmp_path / form / MARKER).read_text())
        assert report["schema_version"] == 1 and report["format"] == form
        digests = {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / form).iterdir()
        }
        assert report["files"] == {
            name: digest for name, digest in digests.items() if name != MARKER
        }
        card = (tmp_path / form / "README.md").read_text()
        assert card.startswith("---\n") and "`lora` (LoRA," in card and "rank | 8" in card
        assert (
            "flora_jax.export --workdir" in card
            and "jax " in card
            and "chain_sum (llm_adapters" in card
        )
        summary = json.loads((lora_run / "eval.json").read_text())
        loss = summary["validation_losses"][str(summary["step"])]
        assert (
            f"validation loss {loss:.4f}" in card
            and summary["data"]["sha256"]["chain_sum/train"] in card
        )
        assert ".from_pretrained(" in card
    _, trained = load_adapter(tmp_path / "peft", TINY)
    own = flatten_dict(load_adapter(lora_run / "adapter", TINY)[1], sep="/")
    for path, value in flatten_dict(trained, sep="/").items():
        np.testing.assert_array_equal(value, own[path])


def test_a_step_of_several(lora_run, small, tmp_path):
    """Step 2 of 6 is what a run of two steps ends with."""
    settings = {
        "train.steps": 2,
        "train.keep": 1,
        "optim.schedule": "constant",
        "optim.warmup_steps": 1,
    }
    run(small("lora", **settings), tmp_path / "two")
    wanted = load_file(tmp_path / "two/adapter/adapter_model.safetensors")
    for step in (2, 4):
        command(
            "--workdir",
            lora_run,
            "--step",
            step,
            "--format",
            "peft",
            "--out",
            tmp_path / f"step{step}",
        )
        found = load_file(tmp_path / f"step{step}/adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        same = [np.array_equal(found[name], wanted[name]) for name in wanted]
        assert all(same) if step == 2 else not any(same)
        assert f"| step | {step} |" in (tmp_path / f"step{step}/README.md").read_text()
    # scores of another step
    assert "chain_sum (llm_adapters" not in (tmp_path / "step4/README.md").read_text()


def test_a_method_of_its_own_with_trained_norms(ffba_run, tmp_path):
    command(
        "--workdir",
        ffba_run,
        "--format",
        "transformers",
        "--dtype",
        "bfloat16",
        "--out",
        tmp_path / "out",
    )
    norms = load_adapter(ffba_run / "adapter", TINY)[1]["params"]
    stored = load_file(tmp_path / "out/model.safetensors")
    for i in range(2):
        trained = norms["layers"]["mlp_norm"]["scale"][i]
        assert trained.std() > 0
        np.testing.assert_array_equal(
            stored[f"model.layers.{i}.post_attention_layernorm.weight"],
            trained.astype(jax.numpy.bfloat16),
        )


def test_without_scores_and_from_an_adapter_directory(ffba_run, hf_directory, tmp_path):
    """A run whose eval.json is gone, and an adapter directory of our own over the base it belongs
    to."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in ("adapter", "config.json"):
        os.symlink(ffba_run / name, workdir / name)
    command("--workdir", workdir, "--format", "transformers", "--out", tmp_path / "out")
    assert "## Scores" not in (tmp_path / "out/README.md").read_text()

    base = hf_directory(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\nA base.")
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    config, params = load_pretrained(str(base))
    adapter_config = AdapterConfig("ffba", 8)
    trained = {"adapter": random_adapter(TINY, adapter_config, 1), "params": {}}
    save_adapter(
        tmp_path / "a", trained, config, adapter_config, str(base), base_fingerprint(params)
    )
    command(
        "--model",
        base,
        "--adapter",
        tmp_path / "a",
        "--format",
        "transformers",
        "--out",
        tmp_path / "pair",
    )
    card = (tmp_path / "pair/README.md").read_text()
    assert (
        "license: mit" in card
        and "| licence of the base | mit |" in card
        and "| base model | base |" in card
    )
    assert json.loads((tmp_path / "pair/generation_config.json").read_text()) == {
        "temperature": 0.6,
        "eos_token_id": [257, 260],
    }


def test_a_tied_base_with_a_head_of_its_own(hf_directory, tmp_path):
    """What is exported loads in transformers with the logits of the base's own head, adapter and
    all."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    base = hf_directory(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1] * 3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    config, params = load_pretrained(str(base))
    tokens = np.arange(40).reshape(2, 20)
    for method, form in (("ffba", "transformers"), ("lora", "merged")):
        adapter_config = AdapterConfig(method, 8)
        adapter, out = random_adapter(config, adapter_config, 1), tmp_path / f"{method}_{form}"
        save_adapter(
            out / "a",
            {"adapter": adapter, "params": {}},
            config,
            adapter_config,
            str(base),
            base_fingerprint(params),
        )
        command("--model", base, "--adapter", out / "a", "--format", form, "--out", out / "out")
        ours = Llama(config, adapter_config).apply({"params": params, "adapter": adapter}, tokens)
        model = AutoModelForCausalLM.from_pretrained(
            out / "out", trust_remote_code=True, dtype=torch.float32
        ).eval()
        with torch.no_grad():
            theirs = model(torch.tensor(tokens)).logits.numpy()
        assert np.abs(theirs - np.asarray(ours)).max() <= 2e-4, form
        assert json.loads((out / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "readme",
    ["", "no header", "---\ntags: 3\nlicense: [a]\n---", "---\n1: x\n---", "---\n: {\n---"],
)
def test_licences_of_strange_cards(hf_directory, tmp_path, readme):
    (hf_directory(tmp_path / "base") / "README.md").write_text(readme)
    assert find_licence(str(tmp_path / "base")) is None


@pytest.mark.parametrize(
    ("number", "overwrite"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, False)],
)
def test_interrupted(lora_run, tmp_path, monkeypatch, capsys, number, overwrite, tree_hash):
    """By a signal in the middle of the weights: exit code 1, one line, and what stood there
    stands."""
    # where tests run under nohup it is ignored
    before_it = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    out = tmp_path / "new/out"
    flags = ["export", "--workdir", str(lora_run), "--format", "merged", "--out", str(out)]
    if overwrite:
        main(flags)
        flags.append("--overwrite")
    before = tree_hash(tmp_path)

    def stop(*_):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(formats, "write_shards", stop)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(main, flags)
    assert (
        stopped.value.code == 1
        and capsys.readouterr().err == "stopped by a signal; nothing was written\n"
    )
    assert tree_hash(tmp_path) == before and (tmp_path / "new").exists() == overwrite
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, before_it)


@pytest.fixture
def refused(tmp_path, tree_hash, capsys):
    def check(words, *flags):
        before = tree_hash(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command(main, ["export", *map(str, flags)])
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, err
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        for word in words:
            assert word in err, (word, err)
        assert tree_hash(tmp_path) == before

    return check


def test_what_is_refused(refused, lora_run, ffba_run, small, tmp_path):
    out = ("--out", tmp_path / "new/out")
    both = ("--format", "merged", *out)
    refused(["--format"], "--workdir", lora_run, *out)
    refused(["--format 'megred'", "'merged'"], "--workdir", lora_run, "--format", "megred", *out)
    refused(["--workdir", "--model"], *both)
    refused(
        ["--adapter goes with --model"],
        "--workdir",
        lora_run,
        "--adapter",
        lora_run / "adapter",
        *both,
    )
    refused(["--model needs --adapter"], "--model", tmp_path, *both)
    refused(
        ["--step goes with --workdir"],
        "--model",
        tmp_path,
        "--adapter",
        tmp_path,
        "--step",
        1,
        *both,
    )
    refused(["--step 3", "steps 2, 4, 6"], "--workdir", lora_run, "--step", 3, *both)
    refused(["no such directory"], "--workdir", tmp_path / "nothing", *both)
    refused(["config.json", "a run of flora_jax.train has one"], "--workdir", tmp_path, *both)
    refused(["ffba goes around", "--format transformers"], "--workdir", ffba_run, *both)
    refused(["exists"], "--workdir", lora_run, "--format", "merged", "--out", tmp_path)
    refused(
        ["cannot be written"],
        "--workdir",
        lora_run,
        "--format",
        "merged",
        "--out",
        lora_run / "config.json/out",
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"config": {"model": 3}}')
    refused(["config.json", "config.model is no field"], "--workdir", tmp_path / "run", *both)
    (tmp_path / "run/config.json").write_text('{"config": {"train": {"seed": "x"}}}')
    refused(
        ["config.json", "config.train.seed='x' is of the wrong type"],
        "--workdir",
        tmp_path / "run",
        *both,
    )
    for value in ("", "float16", "auto"):  # the last is no run's: it has what that stood for
        text = json.dumps({"config": {"model": {"param_dtype": value}}})
        (tmp_path / "run/config.json").write_text(text)
        words = ["config.json", f"config.model.param_dtype={value!r}", "bfloat16"]
        refused(words, "--workdir", tmp_path / "run", *both)
    (tmp_path / "run/config.json").write_bytes((lora_run / "config.json").read_bytes())
    refused(["has not ended", "--step"], "--workdir", tmp_path / "run", *both)
    refused(["--step 1", "none is in"], "--workdir", tmp_path / "run", "--step", 1, *both)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "summary",
    [{"data": 3}, {"evaluation": {"tasks": {"a": 3}}}, {"validation_losses": 3, "step": 1}],
)
def test_a_damaged_summary_is_refused(refused, lora_run, tmp_path, summary):
    for name in ("adapter", "config.json"):
        os.symlink(lora_run / name, tmp_path / name)
    (tmp_path / "eval.json").write_text(json.dumps(summary))
    refused(["eval.json"], "--workdir", tmp_path, "--format", "peft", "--out", tmp_path / "out")


def test_another_base_or_adapter_is_refused(refused, lora_run, tmp_path):
    stored = json.loads((lora_run / "config.json").read_text())
    for field, value, words in [
        ("seed", 5, ["another base"]),
        ("method", "pf_lora", ["adapter.method='lora'", "'pf_lora'"]),
    ]:
        workdir = tmp_path / field
        workdir.mkdir()
        config = json.loads(json.dumps(stored))
        config["config"]["train" if field == "seed" else "adapter"][field] = value
        (workdir / "config.json").write_text(json.dumps(config))
        for name in ("adapter", "checkpoints", "eval.json"):
            os.symlink(lora_run / name, workdir / name)
        step = () if field == "seed" else ("--step", 4)
        refused(words, "--workdir", workdir, *step, "--format", "merged", "--out", tmp_path / "out")
    refused(
        ["fingerprint"],
        "--workdir",
        tmp_path / "seed",
        "--step",
        4,
        "--format",
        "merged",
        "--out",
        tmp_path / "out",
    )


def test_a_damaged_checkpoint_is_refused(refused, lora_run, tmp_path):
    shutil.copytree(lora_run, workdir := tmp_path / "run")
    meta = workdir / "checkpoints/4/meta/metadata"
    meta.write_text(meta.read_text()[:20])
    step = ["--workdir", workdir, "--step", 4, "--format", "peft", "--out", tmp_path / "out"]
    refused(
        ["checkpoint 4 of --workdir", "cannot be read", "take another with --step 2 or 6"], *step
    )
    shutil.copy(lora_run / "checkpoints/4/meta/metadata", meta)
    shutil.rmtree(workdir / "checkpoints/4/state/d")
    refused(["checkpoint 4 of --workdir", "cannot be read"], *step)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_checkpoint_that_is_not_finite_is_refused(refused, lora_run, tmp_path):
    """By the export of its step, and by the run that would go on from it."""
    shutil.copytree(lora_run, workdir := tmp_path / "run")
    state, checkpointer = workdir / "checkpoints/6/state", ocp.PyTreeCheckpointer()
    tree = checkpointer.restore(state)
    product = tree["trainable"]["adapter"]["layers"]["mlp"]["down"]
    product["A"] = product["A"].at[0, 1, 2].set(np.nan)
    checkpointer.save(state, tree, force=True)
    step = ["--workdir", workdir, "--step", 6, "--format", "peft", "--out", tmp_path / "out"]
    words = [
        "checkpoint 6 of --workdir",
        "trainable/adapter/layers/mlp/down/A holds a value that is not finite",
    ]
    refused([*words, "take another with --step 2 or 4"], *step)
    config = read_run(workdir)
    with pytest.raises(
        UserError, match=r"down/A holds a value that is not finite.* goes on from step 4"
    ):
        train(config, workdir)


# ------------------------------------------------------------------------------------ hostile input


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


@pytest.fixture
def lora_directory(tmp_path):
    """As PEFT writes one: it says nothing of the base but its name."""
    config = AdapterConfig("lora", 4)
    trained = {"adapter": random_adapter(TINY, config, 1), "params": {}}
    save_adapter(tmp_path / "a", trained, TINY, config, "base", "f")
    (tmp_path / "a/flora_config.json").unlink()
    return tmp_path / "a"


def test_pickles_are_never_opened(refused, hf_directory, lora_directory, tmp_path):
    mark = str(tmp_path / "executed")
    payload = pickle.dumps(Payload(mark))
    base = hf_directory(tmp_path / "base")
    source = ("--model", base, "--adapter", lora_directory)
    # Beside what is read, and in its place.
    (base / "pytorch_model.bin").write_bytes(payload)
    (lora_directory / "adapter_model.bin").write_bytes(payload)
    command(*source, "--format", "merged", "--out", tmp_path / "out")
    (lora_directory / "adapter_model.safetensors").rename(tmp_path / "kept.safetensors")
    refused(["adapter_model.bin is a pickle"], *source, "--format", "peft", "--out", tmp_path / "b")
    (lora_directory / "adapter_model.safetensors").write_bytes(payload)
    refused(
        ["not a complete safetensors file"], *source, "--format", "peft", "--out", tmp_path / "b"
    )
    (lora_directory / "adapter_model.safetensors").write_bytes(
        (tmp_path / "kept.safetensors").read_bytes()
    )
    (base / "model.safetensors").unlink()
    refused(["pytorch_model.bin is a pickle"], *source, "--format", "peft", "--out", tmp_path / "b")
    assert not os.path.exists(mark)
    pickle.loads(payload)
    assert os.path.exists(mark)  # the payload does work


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 20) + b'{"a": {"dtype": "F3',
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,99999999999]}}',
    ],
)
def test_damaged_safetensors(refused, hf_directory, lora_directory, tmp_path, content):
    base = hf_directory(tmp_path / "base")
    flags = (
        "--model",
        base,
        "--adapter",
        lora_directory,
        "--format",
        "peft",
        "--out",
        tmp_path / "out",
    )
    whole = (lora_directory / "adapter_model.safetensors").read_bytes()
    (lora_directory / "adapter_model.safetensors").write_bytes(content)
    refused([str(lora_directory / "adapter_model.safetensors"), "safetensors file"], *flags)
    (lora_directory / "adapter_model.safetensors").write_bytes(whole)
    (base / "model.safetensors").write_bytes(content)
    refused([str(base / "model.safetensors"), "safetensors file"], *flags)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "a/../../x.safetensors"]
)
def test_shards_outside_the_directory(refused, hf_directory, lora_directory, tmp_path, shard):
    base = hf_directory(tmp_path / "base")
    names = load_file(base / "model.safetensors").keys()
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, shard)})
    )
    refused(
        [repr(shard), "outside the checkpoint's directory"],
        "--model",
        base,
        "--adapter",
        lora_directory,
        "--format",
        "merged",
        "--out",
        tmp_path / "out",
    )


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_value_in_an_adapter_config_loads_or_is_refused(tmp_path_factory, data):
    method = data.draw(st.sampled_from(["lora", "ffba"]))
    path = tmp_path_factory.getbasetemp() / f"any-{method}"
    if not path.exists():
        config = AdapterConfig(method, 8)
        save_adapter(
            path,
            {"adapter": random_adapter(TINY, config, 1), "params": {}},
            TINY,
            config,
            "base",
            "f",
        )
        (path / "whole.json").write_bytes((path / "adapter_config.json").read_bytes())
    stored = json.loads((path / "whole.json").read_text())
    field = data.draw(
        st.sampled_from(
            [*stored, "rank_pattern", "use_dora", "init_lora_weights", "layers_to_transform"]
        )
    )
    (path / "adapter_config.json").write_text(json.dumps({**stored, field: data.draw(ANYTHING)}))
    try:
        found, _ = load_adapter(path, TINY, "f")
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert found.rank == 8 and isinstance(found.rslora, bool)
