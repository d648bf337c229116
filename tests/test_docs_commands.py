"""Every command of README and docs is run, and so is their Python: on a tiny model, in a folder of
its own.

What a command is given beside its own flags, so that it ends soon, stands in SMALLER. Where a page
says `<!-- not run: REASON -->` nothing is run. `make test-slow` runs all but the README's, which
are fast.
"""

import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import documents
import jax.numpy as jnp
import numpy as np
import pytest
from support import PLANS, ROOT

from flora_jax import Llama
from flora_jax.adapters import METHODS
from flora_jax.errors import run_command
from flora_jax.models.architectures import ARCHITECTURES

TRAIN = (
    "--config.model.weights=model --config.model.preset=tiny --config.adapter.rank=8"
    " --config.data.max_length=256 --config.data.validation_size=4 --config.train.steps=2"
    " --config.train.batch_size=2 --config.train.eval_every=2 --config.train.save_every=2"
)
CLOCK = "--prompt_length 8 --new_tokens 4 --rounds 2"
LATENCY = (
    "--prompt_lengths 8 --batch_sizes 1,2 --rank 8 --new_tokens 4 --rounds 2 --prefill_rounds 1"
)
RUNS = "--model model --rank 8 --steps 1 --limit 2"
SMALLER = {
    "flora_jax.train": TRAIN,
    "flora_jax.evaluate": "--limit 2 --batch_size 2",
    "flora_jax.generate": "--max_new_tokens 4",
    "flora_jax.export": "",
    "flora_jax.latency": LATENCY,
    "flora_jax.launches": "--batch_sizes 1 --targets h100 --methods base,ffba",
    "experiments.ablations": "--model model --steps 1 --limit 2",
    "experiments.accuracy": RUNS + " --methods base,lora,ffba --validation_size 4",
    "experiments.bank": f"--model random --preset tiny --rank 8 --adapters 1,2 --batch_size 2 "
    f"{CLOCK}",
    "experiments.export_latency": f"--model random --preset tiny --rank 8 --batch_sizes 1 {CLOCK}",
    "experiments.export_memory": "--preset tiny",
    "experiments.faults": "--kills 2 --others 1",
    "experiments.fuzz": "--count 2",
    "experiments.gpu_report": "--minutes 4 --device cpu --preset tiny --cells "
    "device,latency-tiny-ffba-b1-p8",
    "experiments.harness_peer": "--limit 2 --new_tokens 4",
    "experiments.load": "--requests 20",
    "experiments.quantized_latency": f"--model random --preset tiny --rank 8 --batch_sizes 1 "
    f"{CLOCK}",
    "experiments.quantized_memory": "--preset tiny --quantizations int8,fp8 --rank 8 --length 16",
    "experiments.quantized_quality": "--model model --quantizations int8,fp8 --limit 2 --tokens "
    "600",
    "experiments.quantized_training": "--model model --methods ffba --steps 2 --rounds 1",
    "experiments.real_text": "--methods ffba --steps 1 --limit 2",
    "experiments.replica_speed": "--model model --rank 8 --replicas 2 --rows 1 --length 16",
    "experiments.switching": "--rank 8 --rounds 2",
    "experiments.train_throughput": "--rows 1 --length 16 --rounds 1",
    "experiments.tune_decode": "--batch_sizes 1 --rank 4 --minutes 0.1",
    "experiments.vllm_exports": "--model model --rank 8",
}
# What is large, or stands for something of the reader's own.
REPLACED = {
    r"--preset \S+": "--preset tiny",
    r"smollm2-135m-instruct|llama3\.2-1b|\b(MODEL|FILE)\b": "model",
    r"\b(DATA|DIR)\b": "data",
    r"\bADAPTER\b": "runs/ffba_1b/adapter",
    r"\bnf4\b": "fp8",  # whose blocks the tiny model's rows do not fill
}
NEEDS = {
    "flora_jax.launches": PLANS,
    "experiments.quantized_memory": PLANS,
}


def record(task, i):
    """In the format of LLM-Adapters."""
    answers = ("true", "false") if task == "boolq" else tuple(f"answer{n}" for n in (1, 2, 3, 4))
    lines = "" if task == "boolq" else "Answer1: one Answer2: two Answer3: three Answer4: four\n\n"
    return {
        "instruction": f"Answer the question: is it {task} {i}?\n\n"
        f"{lines}Answer format: {'/'.join(answers)}",
        "input": "",
        "output": f"the correct answer is {answers[i % len(answers)]}",
        "answer": answers[i % len(answers)],
    }


@pytest.fixture(scope="module")
def material(tmp_path_factory, hf_directory):
    """What commands are asked to read: a tiny model, benchmarks, records, and of the repository
    what a command reads or starts."""
    folder = tmp_path_factory.mktemp("material")
    hf_directory(folder / "model")
    for name in ("configs", "flora_jax"):
        (folder / name).symlink_to(ROOT / name)
    for task in ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq"):
        (folder / "data" / task).mkdir(parents=True)
        for split, numbers in {"train": range(30), "test": range(500, 510)}.items():
            records = [record(task, i) for i in numbers]
            (folder / f"data/{task}/{split}.json").write_text(json.dumps(records))
    (folder / "mine").mkdir()
    lines = [json.dumps({"prompt": f"{i} + 1 =", "completion": str(i + 1)}) for i in range(30)]
    (folder / "mine/train.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(material, caches, quick_compile):
    """The workdir of a run, as the README's first command leaves it."""
    with contextlib.chdir(material), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_CACHE", str(caches / "data"))
        train = "python -m flora_jax.train --config configs/ffba_1b.py --workdir trained"
        here(smaller(f"{train} --config.data.dir=DATA"))
    return material / "trained"


@pytest.fixture
def folder(material, tmp_path, monkeypatch, caches):
    """A folder of its own for a command, with what it reads."""
    for path in material.iterdir():
        if path.name != "trained":
            (tmp_path / path.name).symlink_to(path)
    # Without their results, so that none is written over.
    (tmp_path / "experiments").mkdir()
    for path in (ROOT / "experiments").glob("*.py"):
        (tmp_path / "experiments" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLORA_CACHE", str(caches / "data"))
    return tmp_path


def smaller(line):
    """The words of a command after `python -m`, made small."""
    for pattern, value in REPLACED.items():
        line = re.sub(pattern, value, line)
    command = documents.Command("", line, "")
    return [command.module, *command.flags, *SMALLER[command.module].split()]


def here(words):
    """Runs a command in this process, and returns what it says."""
    main = importlib.import_module(words[0]).main
    printed, said = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(said),
        pytest.raises(SystemExit) as ended,
    ):
        run_command(main, words)
    assert ended.value.code == 0, said.getvalue()
    return printed.getvalue() + said.getvalue()


def alone(words, environment):
    """Runs it in a process of its own; of a run of two processes both."""
    commands = [words]
    if "--config.distributed.process_id=0" in words:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        words = [word.replace("HOST_OF_0:1234", address) for word in words]
        commands = [words, [*words, "--config.distributed.process_id=1"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([sys.executable, "-m", *command], env=environment, **pipes)
        for command in commands
    ]
    ends = [process.communicate(timeout=1200) for process in started]
    for process, (_, said) in zip(started, ends, strict=True):
        assert process.returncode == 0 and "Traceback" not in said, said[-3000:]
    return "".join(ends[0])


def is_name(command):
    """A command of ours that is named without the flags it needs."""
    return not command.flags and (command.module or "").startswith("flora_jax.")


RUN = {
    f"{command.page}: {command.line[10:70]}": command
    for command in documents.commands()
    if not command.reason and not is_name(command)
}


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            command, id=name, marks=[] if command.page == "README.md" else pytest.mark.slow
        )
        for name, command in RUN.items()
    ],
)
def test_it_runs(command, folder, trained, environment, folder_at):
    assert command.module in SMALLER, "made small by what? or `<!-- not run: REASON -->`"
    if not NEEDS.get(command.module, True):
        pytest.skip("an extra gpu-plan is not installed")
    words = smaller(command.line)
    flags = dict(itertools.pairwise(words))
    if command.module.startswith("experiments") and "--data_dir" in flags:
        (folder / "data").unlink()
        (folder / "data").symlink_to(folder_at("FLORA_DATA", "data"))
    if command.module != "flora_jax.train":
        for run in {flags.get("--workdir"), flags.get("--adapter", "").partition("/adapter")[0]}:
            if run:
                shutil.copytree(trained, folder / run)
    if command.page == "README.md":
        said = here(words)
    else:
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        said = alone(words, {**environment, "PYTHONPATH": paths})
    written = [flags[flag] for flag in ("--out", "--workdir") if flag in flags]
    assert written or said
    for name in written:  # a file, a folder, or NAME.json and NAME.md
        path = folder / name
        files = [*path.parent.glob(f"{path.name}.*"), path, *path.glob("**/*")]
        assert any(file.is_file() and file.stat().st_size for file in files), name


@pytest.mark.parametrize("page", documents.TEXTS)
def test_every_mark_is_of_commands(page):
    """Each is read, and no command stands outside a block and backticks, where none is looked
    for."""
    text = documents.TEXTS[page]
    read = {one.reason for one in documents.commands() if one.page == page and one.reason}
    assert read == set(re.findall("<!-- not run: ([^…]*?) -->", text, re.DOTALL))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"^python -m", prose, re.MULTILINE)


@pytest.fixture
def tables():
    """Rows that are added go again."""
    before = [(table, dict(table)) for table in (METHODS, ARCHITECTURES)]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)


def check_readme(names, printed):
    assert names["logits"].shape == (1, names["tokens"].shape[1], names["config"].vocab_size)
    assert printed


def check_generator(names, printed):
    """Fused, the same logits; split again, the same trees."""
    readme = Llama(names["config"], names["adapter_config"]).apply(
        {"params": names["base"], "adapter": names["adapter"]}, names["tokens"]
    )
    bound = 1e-5 * float(jnp.abs(readme).max())
    np.testing.assert_allclose(names["logits"], readme, rtol=0, atol=bound)
    assert printed


def check_develop(names, printed):
    example = names["row"].parse({"en": "cat", "fr": "chat"})
    assert example.messages[-1].content == example.answer == "chat"


# In this order: a page's code goes on where that of the page before it ends.
CODE = [
    {"README.md": check_readme, "docs/generator.md": check_generator},
    {"docs/develop.md": check_develop},
]


def test_all_pages_with_code_are_run():
    found = [page for page in documents.TEXTS if documents.python(page)]
    assert sorted(found) == sorted(page for pages in CODE for page in pages)


@pytest.mark.usefixtures("quick_compile", "folder", "tables")
@pytest.mark.parametrize(
    "source", ["model", pytest.param("smollm2-135m-instruct", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("pages", CODE, ids=" ".join)
def test_the_code_runs(pages, source, capsys):
    """On a tiny model, and slowly as it stands."""
    names = {}
    for page, check in pages.items():
        for code in documents.python(page):
            code = code.replace("smollm2-135m-instruct", source)
            exec(compile(code, page, "exec"), names)
        check(names, capsys.readouterr().out)
