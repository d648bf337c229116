"""The training command end to end: what a run leaves behind, every method, every field of the
configuration."""

import ast
import dataclasses
import hashlib
import json
import re

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from support import ROOT, silent_pieces

from flora_jax import finetune
from flora_jax import train as command
from flora_jax.adapters import METHODS
from flora_jax.config import adapter_config as make_adapter_config
from flora_jax.config import check_config, fields, generator_settings, get_config
from flora_jax.config_files import read_config
from flora_jax.data import get_task, load_examples, prompt_digests
from flora_jax.errors import UserError, run_command
from flora_jax.evaluation.run import evaluate_tasks
from flora_jax.evaluation.task_data import Settings, load_task_data
from flora_jax.interop.adapter_files import load_adapted, load_adapter, read_trained_on
from flora_jax.models.config import LlamaConfig
from flora_jax.train import main, run
from flora_jax.training import loop
from flora_jax.training import run as runs
from flora_jax.training.rules import paths
from flora_jax.training.sharding import shard_batch

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
# The same rows of the table, or the same trees, under other names.
DOUBLES = ("pf_lora", "parallel", "ffba_qd_add")
# these two have tests of their own
OTHERS = [m for m in METHODS if m not in ("lora", "ffba_qg_add")]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return [line["loss"] for line in lines(workdir) if "loss" in line]


def checkpoint(workdir, step):
    """The trainable leaves in a checkpoint, read by orbax alone."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        state = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore())
        ).state
    return flatten_dict(state["trainable"], sep="/")


def test_a_run_leaves_what_the_readme_names(tmp_path, small, monkeypatch):
    """Norms train too; the best step is not the last; the best and the latest checkpoint stay; a
    task is scored."""
    validation = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.2}
    monkeypatch.setattr(loop, "validation_loss", lambda run: validation[int(run.state.step)])
    config = small(
        **{
            "train.steps": 8,
            "train.keep": 1,
            "train.trainable": "params/.*norm/scale",
            "eval.tasks": "chain_sum",
            "eval.limit": 4,
            "eval.batch_size": 4,
        }
    )
    summary = run(config, tmp_path / "w")
    workdir = tmp_path / "w"
    found = {path.name for path in workdir.iterdir()}
    assert found == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "adapter",
        "eval.json",
    }
    assert fields(json.loads((workdir / "config.json").read_text())["config"]) == fields(config)

    records = lines(workdir)
    logged = [record for record in records if "loss" in record]
    assert [record["step"] for record in logged] == list(range(1, 9))
    assert all(record["tokens_per_second"] > 0 and record["gradient_norm"] > 0 for record in logged)
    assert {
        r["step"]: r["validation_loss"] for r in records if "validation_loss" in r
    } == validation
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3

    written = json.loads((workdir / "eval.json").read_text())
    assert (
        written == json.loads(json.dumps(summary))
        and written["schema_version"] == 1
        and written["step"] == 4
    )
    assert written["validation_losses"] == {str(step): value for step, value in validation.items()}
    scores = written["evaluation"]["tasks"]["chain_sum"]
    assert (
        scores["n"] == 4
        and 0 <= scores["accuracy"] <= 1
        and scores["decode"]["max_new_tokens"] == 32
    )
    assert "Give only the final number." in scores["prompt"]

    tasks, prompts = read_trained_on(workdir / "adapter")
    trained_on = load_examples(
        get_task("chain_sum", generator_settings(config)), "train", None, config.data.cache_dir
    )
    assert tasks == ["chain_sum"] and prompts == prompt_digests(trained_on) and len(prompts) > 4

    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "8"]
    adapter_config, trained = load_adapter(workdir / "adapter", TINY, written["base_fingerprint"])
    assert adapter_config == make_adapter_config(config)
    saved, best = flatten_dict(trained, sep="/"), checkpoint(workdir, 4)
    norms = {
        "params/final_norm/scale",
        "params/layers/attention_norm/scale",
        "params/layers/mlp_norm/scale",
    }
    assert (
        saved.keys() == best.keys()
        and {path for path in saved if path.startswith("params")} == norms
    )
    last = checkpoint(workdir, 8)
    for path, value in saved.items():
        np.testing.assert_array_equal(value, best[path], err_msg=path)
        assert not np.array_equal(value, last[path]), path
        assert value.std() > 0, path  # norms begin as ones, B's or A's as zeros


def test_lora_is_saved_as_peft(tmp_path, small):
    """The layout; test_adapter_files loads such a directory in PEFT itself."""
    run(small("lora", **{"train.steps": 2}), tmp_path / "w")
    stored = json.loads((tmp_path / "w/adapter/adapter_config.json").read_text())
    assert (stored["peft_type"], stored["r"], stored["lora_alpha"]) == ("LORA", 8, 8)
    assert "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight" in load_file(
        tmp_path / "w/adapter/adapter_model.safetensors"
    )
    _, trained = load_adapter(tmp_path / "w/adapter", TINY)
    step = json.loads((tmp_path / "w/eval.json").read_text())["step"]
    for path, value in checkpoint(tmp_path / "w", step).items():
        np.testing.assert_array_equal(flatten_dict(trained, sep="/")[path], value)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow) if m in DOUBLES else m for m in OTHERS]
)
def test_every_method_trains(tmp_path, small, monkeypatch, method):
    """Every piece of the adapter in every layer has a gradient; the frozen base keeps its bits
    under weight decay."""
    runs, prepare = [], loop.prepare

    def noted(config, workdir):
        made = prepare(config, workdir)
        runs.append((made, jax.tree.map(np.array, made.frozen)))
        return made

    monkeypatch.setattr(loop, "prepare", noted)
    fields = {"train.steps": 3, "train.eval_every": 0, "optim.weight_decay": 0.1}
    summary = run(small(method, **fields), tmp_path / "w")
    [(made, before)] = runs
    assert not silent_pieces(optax.tree.get(made.state.optimizer, "mu"), 8)
    after = paths(made.frozen)
    assert paths(before).keys() == after.keys() and bool(after) == (method != "fft")
    for path, leaf in paths(before).items():
        assert leaf.tobytes() == np.asarray(after[path]).tobytes(), path
    assert summary["step"] == 3 and losses(tmp_path / "w")[-1] < losses(tmp_path / "w")[0]
    loaded, trained = load_adapter(tmp_path / "w/adapter", TINY, summary["base_fingerprint"])
    assert loaded.method == method and bool(trained["params"]) == (method == "fft")
    assert bool(trained["adapter"]) == (method != "fft")


def test_bfloat16_base_and_compute(tmp_path, small, hf_directory):
    """A checkpoint directory, within bfloat16's resolution of float32; what trains stays float32.
    The other commands take the adapter of either over this base, in either dtype, and over another
    base refuse it."""
    model = str(hf_directory(tmp_path / "model"))
    settings = {"model.weights": model, "train.steps": 3, "train.eval_every": 0}
    run(small(**settings), tmp_path / "a")
    run(
        small(**settings, **{"model.param_dtype": "bfloat16", "model.dtype": "bfloat16"}),
        tmp_path / "b",
    )
    np.testing.assert_allclose(losses(tmp_path / "b"), losses(tmp_path / "a"), rtol=2e-2)
    assert losses(tmp_path / "b") != losses(tmp_path / "a")
    assert all(leaf.dtype == np.float32 for leaf in checkpoint(tmp_path / "b", 3).values())
    a, b = (
        json.loads((tmp_path / name / "eval.json").read_text())["base_fingerprint"] for name in "ab"
    )
    assert a == b  # the same base
    other = str(hf_directory(tmp_path / "other", seed=1))
    for name in "ab":
        for dtype in ("float32", "bfloat16"):
            adapted = load_adapted(model, tmp_path / name / "adapter", dtype)
            assert adapted.fingerprint == a and adapted.adapter_config == make_adapter_config(
                small()
            )
            assert {leaf.dtype for leaf in jax.tree.leaves(adapted.base)} == {np.dtype(dtype)}
            loaded, saved = paths({"adapter": adapted.adapter}), checkpoint(tmp_path / name, 3)
            assert loaded.keys() == saved.keys()
            for path, leaf in loaded.items():
                np.testing.assert_array_equal(leaf, saved[path], err_msg=path)
        with pytest.raises(UserError, match=r"another base") as error:
            load_adapted(other, tmp_path / name / "adapter")
        assert model in str(error.value) and "\n" not in str(error.value)


def test_peoples_own_jsonl(tmp_path, small):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) + "\n" for i in range(30)
        )
    )
    turns = tmp_path / "folder/train.jsonl"
    turns.parent.mkdir()
    turns.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "system", "content": "Be brief."},
                        {"role": "user", "content": f"hello {i}"},
                        {"role": "assistant", "content": f"hi {i}"},
                    ]
                }
            )
            + "\n"
            for i in range(30)
        )
    )
    both = {
        "data.tasks": f"{pairs}, jsonl",
        "data.dir": str(turns.parent),
        "data.prompt_style": "chat",
    }
    summary = run(small(**both, **{"train.eval_every": 4}), tmp_path / "w")
    assert summary["data"]["tasks"] == [str(pairs), "jsonl"]
    # 30 each: a tenth of each is held out, since neither has a validation split.
    assert (summary["data"]["train"]["kept"], summary["data"]["validation"]["kept"]) == (54, 6)
    assert losses(tmp_path / "w")[-1] < losses(tmp_path / "w")[0]


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(
    tmp_path, small, monkeypatch, capsys
):
    config = small(**{"optim.learning_rate": 1e38, "optim.warmup_steps": 0, "train.eval_every": 0})
    with pytest.raises(FloatingPointError, match=r"at step 2; lower config\.optim\.learning_rate"):
        run(config, tmp_path / "a")
    monkeypatch.setattr(command, "read_command", lambda *_: (config, str(tmp_path / "b"), 0))
    with pytest.raises(SystemExit) as stopped:
        run_command(main, ["train"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and "is nan at step 2; lower config.optim.learning_rate" in error
    assert not (tmp_path / "b/adapter").exists() and not (tmp_path / "b/eval.json").exists()
    # Nor does one that was none before anything trained blame the rate.
    monkeypatch.setattr(loop, "validation_loss", lambda run: float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"is nan at step 0; nothing has trained yet: check config\.model"
    ):
        run(small(), tmp_path / "d")
    # Not on validation either: a checkpoint with such parameters is never written.
    monkeypatch.setattr(
        loop, "validation_loss", lambda run: 1.0 if run.state.step < 2 else float("nan")
    )
    with pytest.raises(FloatingPointError, match="validation loss is nan at step 2; lower"):
        run(small(), tmp_path / "c")
    assert not list((tmp_path / "c/checkpoints").iterdir())


def test_zflora_needs_a_second_layer(small, hf_directory, tmp_path):
    """Its q, k and v read in layer 0 what nothing has written: one layer has leaves without a
    value, which orbax refuses."""
    model = hf_directory(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if ".layers.1." not in k}, model / "model.safetensors"
    )
    (model / "config.json").write_text(
        json.dumps(json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1})
    )
    with pytest.raises(UserError, match=r"config\.adapter\.method='zflora' .*num_hidden_layers=1"):
        run(small("zflora", **{"model.weights": str(model)}), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_every_configuration_file(subtests):
    files = sorted((ROOT / "configs").glob("*.py"))
    assert len(files) > 20
    for path in files:
        with subtests.test(path.name):
            check_config(read_config(path))
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert re.search(
                rf"python -m flora_jax.train --config configs/{path.name}(:\w+)? --workdir",
                docstring,
            )


def test_a_configuration_of_another_form(tmp_path):
    for text, name, words in (
        ("x = 1", ":n", r"get_config\(\) must return"),
        ("get_config = lambda: 1", ":n", "takes no name; leave ':n' out"),
    ):
        (tmp_path / "made.py").write_text(text)
        with pytest.raises(UserError, match=words):
            read_config(f"{tmp_path}/made.py{name}")


def test_a_run_from_before_a_field_was_there_goes_on(tmp_path, small):
    """What config.json and a checkpoint do not say is the default; another value than that is
    refused."""
    config = small(**{"train.steps": 4})
    run(config, tmp_path / "w")
    path = tmp_path / "w/config.json"
    stored = json.loads(path.read_text())
    for section, field in (
        ("adapter", "zero_init"),
        ("eval", "published_faults"),
        ("data", "weights"),
    ):
        del stored["config"][section][field]
    path.write_text(json.dumps(stored))
    [*metas] = (tmp_path / "w/checkpoints").rglob("metadata")
    for meta in (p for p in metas if p.is_file() and '"zero_init"' in p.read_text()):
        meta.write_text(re.sub(r'"zero_init": "A",? ?|,? ?"zero_init": "A"', "", meta.read_text()))
    assert not any('"zero_init"' in p.read_text() for p in metas if p.is_file())
    assert run(config, tmp_path / "w")["step"] in (2, 4)
    with pytest.raises(UserError, match=r"config\.data\.weights=None, not '1'"):
        run(small(**{"train.steps": 4, "data.weights": "1"}), tmp_path / "w")


# ------------------------------------------------------------------------------------------- fields

# What is computed from a field is in the program of the step, the state it starts from, or what it
# reads.
COMPUTED = {
    "adapter.method": "ffba",
    "adapter.rank": 4,
    "adapter.alpha": 3.0,
    "adapter.rslora": True,
    "adapter.targets": "q,k,v,o",
    "adapter.add_to": "q",
    "adapter.dropout": 0.1,
    "model.param_dtype": "bfloat16",
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "model.quantization": "int8",
    "data.tasks": "basic_arithmetic",
    "data.max_length": 192,
    "data.prompt_style": "chat",
    "data.loss_on": "all",
    "data.packing": False,
    "data.limit": 20,
    "data.validation_size": 4,
    "data.generator.train": 50,
    "data.generator.validation": 6,
    "data.generator.seed": 1,
    "data.generator.min_terms": 3,
    "data.generator.max_terms": 4,
    "data.generator.min_digits": 2,
    "data.generator.max_digits": 3,
    "train.steps": 5,
    "train.batch_size": 6,
    "train.accumulation": 2,
    "train.seed": 1,
    "train.trainable": "params/final_norm/scale",
    "train.chunk_tokens": 64,
    "optim.learning_rate": 1e-3,
    "optim.schedule": "constant",
    "optim.warmup_steps": 2,
    "optim.final_fraction": 0.5,
    "optim.weight_decay": 0.1,
    "optim.clip_norm": 0.5,
    "optim.b1": 0.8,
    "optim.b2": 0.9,
    "optim.eps": 1e-3,
    "optim.rate_rules": "adapter/.*_B=16",
}
REFUSED = {  # on one device, for a linear method
    "model.preset": "tinny",
    "model.weights": "nowhere",
    "adapter.activation": "relu",
    "data.dir": "nowhere",
    "data.template_arguments": "thinking=false",
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "distributed.processes": 2,
    "distributed.process_id": 1,
    "distributed.coordinator": "localhost:1",
    "distributed.auto": True,
    "eval.tasks": "no_task",
}
# computed, of two tasks without repeat-and-add
WITH_ANOTHER = {"data.weights": "9,1", "adapter.zero_init": "B"}
ELSEWHERE = {
    "data.allow_contaminated",
    "data.generator.test",
    "data.cache_dir",
    "train.log_every",
    "train.logger",
    "train.eval_every",
    "train.save_every",
    "train.keep",
    "eval.protocol",
    "eval.published_faults",
    "eval.limit",
    "eval.batch_size",
    "eval.max_length",
    "eval.max_new_tokens",
}


def prepared(config, tmp_path):
    """Digests of a run before its first step: of what it reads and starts from, then of the step's
    program."""
    made = loop.prepare(config, tmp_path / "absent")
    batches = [next(made.iterator) for _ in range(2)]
    validation = [example.tokens for example in made.inputs.validation]
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((made.state.trainable, made.frozen, validation, batches)):
        digest.update(np.asarray(leaf).tobytes())
    yield digest.hexdigest()
    yield made.compiled_step.lower(
        made.state, made.frozen, shard_batch(batches[0], made.mesh)
    ).as_text()


def test_no_field_is_read_by_nothing(tmp_path, small, subtests, monkeypatch):
    # A field of the base configuration that is in no list below is one nobody proved.
    assert (
        fields(get_config()).keys()
        == COMPUTED.keys() | WITH_ANOTHER.keys() | REFUSED.keys() | ELSEWHERE
    )
    assert not (tmp_path / "absent").exists()
    made, init = {}, runs.init_base

    def init_once(key, model_config, dtype, placed):
        name = (np.asarray(jax.random.key_data(key)).tobytes(), dtype)
        if name not in made:
            made[name] = init(key, model_config, dtype, placed)
        return made[name]

    monkeypatch.setattr(runs, "init_base", init_once)
    first = list(prepared(small(), tmp_path))
    assert first == list(prepared(small(), tmp_path))
    for field, value in COMPUTED.items():
        with subtests.test(field):  # the program is made only where what it starts from is the same
            assert any(
                a != b
                for a, b in zip(prepared(small(**{field: value}), tmp_path), first, strict=True)
            )
    mixed = {"data.tasks": "chain_sum,basic_arithmetic", "adapter.add_to": ""}
    second = list(prepared(small(**mixed), tmp_path))
    for field, value in WITH_ANOTHER.items():
        with subtests.test(field):
            changed = prepared(small(**mixed, **{field: value}), tmp_path)
            assert any(a != b for a, b in zip(changed, second, strict=True))
    for field, value in REFUSED.items():
        with subtests.test(field), pytest.raises(UserError, match=str(value)):
            run(small(**{field: value}), tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_fully_fine_tuned_base_is_scored(tmp_path, small, hf_directory):
    """In the run itself, by generating, and as it is read back."""
    base = hf_directory(tmp_path / "base")
    summary = run(
        small(
            "fft",
            **{
                "model.weights": str(base),
                "train.steps": 2,
                "eval.tasks": "chain_sum",
                "eval.limit": 2,
            },
        ),
        tmp_path / "w",
    )
    texts = summary["evaluation"]["tasks"]["chain_sum"]["texts"]
    [data] = load_task_data(
        ["chain_sum"],
        None,
        limit=2,
        generator=dict(train=60, validation=10, test=6),
        cache_dir=str(tmp_path / "data"),
    )
    model = load_adapted(base, tmp_path / "w/adapter")
    result = evaluate_tasks([data], model, Settings(protocol="llm_adapters"))
    assert len(texts) == 2 and result["tasks"]["chain_sum"]["texts"] == texts


def test_what_is_due_after_a_step(small):
    train = small(
        **{"train.steps": 7, "train.log_every": 3, "train.eval_every": 2, "train.save_every": 4}
    ).train
    assert [step for step in range(1, 8) if loop.due(step, train).logs] == [3, 6]
    assert [step for step in range(1, 8) if loop.due(step, train).evaluates] == [2, 4, 6, 7]
    assert [step for step in range(1, 8) if loop.due(step, train).saves] == [4, 7]
    never = small(**{"train.eval_every": 0}).train
    assert not any(loop.due(step, never).evaluates for step in range(1, 5))


def test_fields_of_the_loop(tmp_path, small, monkeypatch):
    """The fields of ELSEWHERE: when lines, validations and checkpoints are written, and what
    scoring is given."""
    asked = {}

    def scored(tasks, _, settings):
        return asked.update(dataclasses.asdict(settings), n=len(tasks[0].examples)) or {}

    monkeypatch.setattr(finetune, "evaluate_tasks", scored)
    values = {
        "train.steps": 6,
        "train.log_every": 4,
        "train.logger": "none",
        "train.eval_every": 5,
        "train.save_every": 3,
        "train.keep": 3,
        "eval.tasks": "chain_sum",
        "eval.protocol": "lm_eval",
        "eval.limit": 5,
        "eval.batch_size": 3,
        "eval.max_length": 400,
        "eval.max_new_tokens": 24,
        "data.cache_dir": str(tmp_path / "cache"),
    }
    run(small(**values), tmp_path / "w")
    records = lines(tmp_path / "w")
    assert [r["step"] for r in records if "loss" in r] == [4]
    assert not (tmp_path / "w/tensorboard").exists()
    assert [r["step"] for r in records if "validation_loss" in r] == [0, 5, 6]
    assert {int(p.name) for p in (tmp_path / "w/checkpoints").iterdir()} == {3, 5, 6}
    assert (asked["protocol"], asked["n"], asked["batch_size"], asked["max_length"]) == (
        "lm_eval",
        5,
        3,
        400,
    )
    assert list((tmp_path / "cache").iterdir())
    assert asked["published_faults"] is False and asked["max_new_tokens"] == 24
    changed = {
        "eval.limit": 50,
        "data.generator.test": 4,
        "eval.protocol": "llm_adapters",
        "data.prompt_style": "llm_adapters",
        "data.max_length": 512,
    }
    run(small(**{**values, **changed, "eval.published_faults": True}), tmp_path / "v")
    assert asked["n"] == 4 and asked["published_faults"] is True
