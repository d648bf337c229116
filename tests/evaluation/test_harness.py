"""The lm-evaluation-harness on our models: against its own Hugging Face model in torch, and against
our protocol."""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from support import random_adapter, spread
from test_chat_templates import VICUNA, sentencepiece
from tokenizers.processors import TemplateProcessing

from flora_jax import harness as harness_command
from flora_jax.adapters import AdapterConfig
from flora_jax.data.encode import encode_prompt
from flora_jax.data.tasks import Message
from flora_jax.errors import UserError, run_command
from flora_jax.evaluation.loglik import choice_loglik, encode_pair, token_loglik
from flora_jax.evaluation.task_data import Settings, load_task_data
from flora_jax.inference.generator import Generator
from flora_jax.interop.adapter_files import load_adapted, save_adapter
from flora_jax.models.adapted import Adapted, base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import init_base
from flora_jax.models.tokenizer import load_tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from flora_jax.evaluation import harness, rounds
from flora_jax.evaluation.harness import HarnessLM, load_harness_tasks

# As many embeddings as the tokenizer has ids: with an adapter, the harness's torch model drops
# those beyond.
TINY = dataclasses.replace(LlamaConfig.preset("tiny"), vocab_size=261)
MAX_LENGTH = 64

PAIRS = [
    ("Question: why?\nAnswer:", " yes"),
    ("Question: why?\nAnswer:", " because it is so"),
    ("Question: why?\nAnswer:", " n"),
    ("The sky ", "is blue"),
    ("The sea \n", "is blue"),
    ("", "no context"),
    ("", "at all"),
    ("", "<|bos|>once"),
    ("<|bos|>ab", "cd"),
    ("x" * 100, "y" * 20),
    ("x" * 50, "y" * 15),
    ("x" * 50, "z" * 14),
    ("long", "y" * MAX_LENGTH),
]
TEXTS = [
    "",
    "short",
    "x" * (MAX_LENGTH - 1),
    "x" * MAX_LENGTH,
    "ab" * MAX_LENGTH + "c",
    "<|bos|>" + "so " * 70,
]


def requests(kind, arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def adapted(base, tokenizer=None):
    """The base alone, with the tiny preset's tokenizer where none is given."""
    tokenizer = tokenizer or load_tokenizer("tiny")
    return Adapted(config=TINY, base=base, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def base(quick_compile):
    return spread(init_base(jax.random.key(0), TINY))


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    """`checkpoint(adds_bos)`: a tiny HF checkpoint whose tokenizer does or does not begin each text
    with bos, and a LoRA for it in PEFT's format."""

    @functools.cache
    def make(adds_bos):
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(TINY.to_hf()))
        tensors = {name: np.ascontiguousarray(value) for name, value in to_hf_tensors(TINY, base)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        tokenizer = load_tokenizer("tiny")
        if adds_bos:
            bos = [("<|bos|>", tokenizer.bos_token_id)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                "<|bos|> $A", special_tokens=bos
            )
        tokenizer.save_pretrained(folder)
        adapter_config = AdapterConfig("lora", 8)
        trained = {"adapter": random_adapter(TINY, adapter_config, seed=1), "params": {}}
        save_adapter(
            folder / "adapter", trained, TINY, adapter_config, str(folder), base_fingerprint(base)
        )
        return folder

    return make


@pytest.fixture(scope="module")
def models(checkpoint):
    """`models(adds_bos, adapter)`: the harness's own model in torch, and `ours(batch_size)`."""
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    @functools.cache
    def make(adds_bos=False, adapter=False):
        folder = checkpoint(adds_bos)
        if adapter:
            pytest.importorskip("peft")
        peft = {"peft": str(folder / "adapter")} if adapter else {}
        theirs = HFLM(
            pretrained=str(folder),
            device="cpu",
            dtype="float32",
            batch_size=1,
            max_length=MAX_LENGTH,
            **peft,
        )
        model = load_adapted(str(folder), folder / "adapter" if adapter else None)

        def ours(batch_size):
            return HarnessLM(model, batch_size=batch_size, max_length=MAX_LENGTH)

        return theirs, ours

    return make


@pytest.mark.parametrize("adds_bos, adapter", [(False, False), (True, False), (False, True)])
def test_loglikelihood_equals_the_harness_in_torch(models, adds_bos, adapter):
    theirs, ours = models(adds_bos, adapter)
    # Of all single characters, one at most is the best; over several contexts some is.
    greedy = [(context, chr(c)) for context in ("ab", "cd", "ef", "gh") for c in range(32, 127)]
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS + greedy), disable_tqdm=True)
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    for batch_size in (1, 3):
        pairs = PAIRS + (greedy if batch_size == 3 else [])
        found = ours(batch_size).loglikelihood(requests("loglikelihood", pairs))
        for pair, (score, is_greedy), (reference, is_best) in zip(
            pairs, found, expected, strict=False
        ):
            assert score == pytest.approx(reference, abs=1e-3), pair
            assert is_greedy is is_best, pair


@pytest.mark.parametrize("adds_bos", [False, True])
def test_rolling_equals_the_harness_in_torch(models, adds_bos):
    theirs, ours = models(adds_bos)
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert all(score < -1 for score in expected[1:])
    for batch_size in (1, 3):
        np.testing.assert_allclose(
            ours(batch_size).loglikelihood_rolling(asked), expected, atol=1e-3
        )


@pytest.mark.parametrize("adapter", [False, True])
def test_generated_text_equals_the_harness_in_torch(models, adapter):
    """To the end and up to a stop string, also behind a context that is too long."""
    theirs, ours = models(False, adapter)
    contexts = ["ab", "Question: why?\nAnswer:", "The sky is", "x" * 100, "once upon"]
    asked = [(c, {"until": [], "max_gen_toks": 24}) for c in contexts]
    free = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    found = [re.search("[!-~]{2}|[!-~]", text[1:]) for text in free]
    stops = [match[0] if match else "never" for match in found]
    assert stops.count("never") <= 1
    asked += [
        (c, {"until": ["never", stop], "max_gen_toks": 24})
        for c, stop in zip(contexts, stops, strict=True)
    ]
    same = {"do_sample": False, "temperature": 0.0, "max_new_tokens": 12, "num_beams": 1}
    asked += [(c, {"until": stop, **same}) for c, stop in zip(contexts[:2], stops, strict=False)]
    expected = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert expected[:5] == free and all(
        stop not in text for text, stop in zip(expected[5:10], stops, strict=True)
    )
    for batch_size in (3,) if adapter else (1, 3):
        assert ours(batch_size).generate_until(requests("generate_until", asked)) == expected


def test_generation_in_rounds_is_one_generation(models, monkeypatch):
    _, ours = models()
    asked = requests(
        "generate_until",
        [(c, {"until": ["never"], "max_gen_toks": 45}) for c in ("ab", "", "The sky")],
    )
    expected = ours(3).generate_until(asked)
    monkeypatch.setattr(rounds, "FIRST_ROUND", 4)
    lm = ours(3)
    assert lm.generate_until(asked) == expected
    until = expected[0][6:8]
    lengths = []
    generate = harness.Generator.generate

    def count(self, prompts, n, *rest):
        lengths.append((len(prompts), n))
        return generate(self, prompts, n, *rest)

    monkeypatch.setattr(harness.Generator, "generate", count)
    asked[0].arguments = ("ab", {"until": until, "max_gen_toks": 45})
    assert lm.generate_until(asked) == [expected[0].split(until)[0], *expected[1:]]
    assert (
        [n for _, n in lengths] == [4, 4, 8, 16, 13] and lengths[0][0] == 3 and lengths[-1][0] == 2
    )


def test_sampling_is_followed_or_refused(models):
    _, ours = models()
    lm = ours(3)

    def text(**arguments):
        return lm.generate_until(
            requests("generate_until", [("ab", {"max_gen_toks": 20, **arguments})])
        )[0]

    best = text()
    assert text(do_sample=False, temperature=0.7, top_p=0.9) == best  # the harness's rule: greedy
    assert text(do_sample=True, temperature=5.0) == text(temperature=5.0) != best
    assert text(do_sample=True, temperature=5.0, top_k=1) == best
    for arguments, words in (
        ({"typical_p": 0.9}, "typical_p=0.9"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"do_sample": True}, "temperature above 0"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"max_gen_toks": 64}, "max_length=64 no room"),
    ):
        with pytest.raises(UserError, match=words):
            text(**arguments)


def test_where_our_own_tokenisation_differs(checkpoint):
    """What the module's docstring says of `encode_pair`, and that nothing else of it differs."""
    for adds_bos in (False, True):
        model = load_adapted(str(checkpoint(adds_bos)), None)
        lm = HarnessLM(model)
        seen = []
        lm._loglikelihood_tokens = lambda pairs, disable_tqdm, seen=seen: seen.extend(pairs)
        lm.loglikelihood(requests("loglikelihood", [*PAIRS, (" \n", "spaces")]))
        differ = {
            pair for pair, *tokens in seen if tuple(tokens) != encode_pair(model.tokenizer, *pair)
        }
        assert differ == {("", "<|bos|>once")}


def test_chat_template_and_names(base):
    tokenizer = load_tokenizer("tiny")
    lm = HarnessLM(adapted(base, tokenizer))
    messages = [{"role": "user", "content": "hi"}]
    dated, tokenizer.chat_template = (
        tokenizer.chat_template,
        "{{ date_string }}" + tokenizer.chat_template,
    )
    # as training renders it
    assert lm.apply_chat_template(messages).startswith("26 Jul 2024<|im_start|>")
    tokenizer.chat_template = dated
    assert (
        lm.apply_chat_template(messages)
        == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert lm.chat_template(True) == tokenizer.chat_template
    assert lm.tokenizer_name.startswith("sha256-") and lm.max_length == TINY.max_position_embeddings
    tokenizer.chat_template = tokenizer.chat_template + "{# another #}"
    assert lm.tokenizer_name != HarnessLM(adapted(base)).tokenizer_name
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match="no such role"):
        lm.apply_chat_template(messages)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        lm.apply_chat_template(messages)


def test_a_rendered_conversation_gets_no_second_bos(checkpoint):
    """Llama 3's template begins with BOS, and its tokenizer begins every text with one."""
    model = load_adapted(str(checkpoint(True)), None)
    tokenizer = model.tokenizer
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    said = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    trained = encode_prompt([Message("user", "hi")], tokenizer, "chat")
    assert (
        tokenizer(text).input_ids[:2] == [tokenizer.bos_token_id] * 2
        and trained.count(tokenizer.bos_token_id) == 1
    )
    generator = Generator(
        model.config, model.base, tokenizer=tokenizer, max_length=128, batch_size=1
    )
    twice, once = (
        generator.generate([[tokenizer.bos_token_id, *trained]], 8),
        generator.generate([trained], 8),
    )
    assert twice != once == generator.generate([text], 8)
    # with its BOS
    assert generator.generate(["hi"], 8) == generator.generate([tokenizer("hi").input_ids], 8)


def test_a_chat_has_the_special_tokens_of_its_template_alone(base):
    """Vicuna's template has no bos, its tokenizer begins every other text with one."""
    tokenizer = sentencepiece("bpe", "first", VICUNA)
    lm = HarnessLM(adapted(base, tokenizer))
    assert lm.tok_encode("hello") == tokenizer("hello").input_ids and lm.tok_encode("hello")[0] == 1
    said = [{"role": "user", "content": "hello"}]
    expected = tokenizer.apply_chat_template(said, tokenize=True, add_generation_prompt=True)[
        "input_ids"
    ]
    assert lm.tok_encode(lm.apply_chat_template(said)) == expected
    assert (
        expected == encode_prompt([Message("user", "hello")], tokenizer, "chat")
        and expected[0] != 1
    )


def test_a_chat_leaves_the_next_evaluation_its_bos(base, monkeypatch):
    tokenizer = sentencepiece("bpe", "first", VICUNA)
    lm = HarnessLM(adapted(base, tokenizer))
    said = [{"role": "user", "content": "hello"}]

    def evaluate(lm, apply_chat_template, **others):
        text = lm.apply_chat_template(said) if apply_chat_template else "hello"
        return {"ids": lm.tok_encode(text)}

    monkeypatch.setattr(harness, "simple_evaluate", evaluate)
    chat, plain = (
        harness.evaluate_harness(lm, [], apply_chat_template=asked)["lm_eval"]["ids"]
        for asked in (True, False)
    )
    assert chat[0] != 1
    assert plain == tokenizer("hello").input_ids


def test_what_cannot_be_scored_is_refused(models, base):
    _, ours = models()
    lm = ours(1)
    with pytest.raises(UserError, match="0 tokens"):
        lm.loglikelihood(requests("loglikelihood", [("a", "")]))
    with pytest.raises(UserError, match="65 tokens; 1 to max_length=64"):
        lm.loglikelihood(requests("loglikelihood", [("a", "b" * 65)]))
    nowhere = {**base, "final_norm": {"scale": base["final_norm"]["scale"] * np.nan}}
    spoilt = HarnessLM(adapted(nowhere))
    for score, given in (
        (spoilt.loglikelihood, ("The sky", " is")),
        (spoilt.loglikelihood_rolling, ("The sky is",)),
    ):
        with pytest.raises(
            FloatingPointError, match=r"harness request .*The sky is', choice 0: the logits are not"
        ):
            score(requests(score.__name__, [given]))
    with pytest.raises(FloatingPointError, match=r"prompt 0 \('The sky'\)"):
        spoilt.generate_until(
            requests("generate_until", [("The sky", {"until": ["."], "max_gen_toks": 4})])
        )
    for arguments, words in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": 4096}, "max_position_embeddings=2048"),
    ):
        with pytest.raises(UserError, match=words):
            HarnessLM(adapted(base), **arguments)


# -------------------------------------------------------------------------------------------- tasks


def official(name):
    """A task file of the harness's own, as it is."""
    import lm_eval.tasks

    return yaml.safe_load((Path(lm_eval.tasks.__file__).parent / name).read_text())


def write_task(folder, name, config, docs):
    """A task of local documents, which takes the place of the harness's own of this name."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    kwargs = {
        "data_files": {"test": str(folder / f"{name}.jsonl")},
        "cache_dir": str(folder / "cache"),
    }
    config = {
        **config,
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": kwargs,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def arc_doc(question, choices, gold):
    labels = list("ABCDE"[: len(choices)])
    return {
        "question": question,
        "choices": {"text": list(choices), "label": labels},
        "answerKey": labels[gold],
    }


def piqa_doc(question, choices, gold):
    return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": gold}


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    docs = [arc_doc(f"Which is {i}?", (str(i), f"{i} and more", "none"), i % 3) for i in range(6)]
    write_task(folder, "arc_easy", official("arc/arc_easy.yaml"), docs)
    generate = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answerKey}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
        "metadata": {"version": 0},
    }
    write_task(folder, "ask", generate, docs)
    missing = {
        **generate,
        "task": "missing",
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}},
    }
    (folder / "missing.yaml").write_text(yaml.safe_dump(missing))
    unsafe = {
        **yaml.safe_load((folder / "ask.yaml").read_text()),
        "task": "unsafe",
        "unsafe_code": True,
    }
    (folder / "unsafe.yaml").write_text(yaml.safe_dump(unsafe))
    other = {
        **generate,
        "output_type": "multiple_choice",
        "doc_to_text": "{{absent.field}}",
        "doc_to_choice": ["a"],
    }
    write_task(folder, "other", other, docs)
    (folder / "both.yaml").write_text(
        yaml.safe_dump({"group": "both", "task": ["arc_easy", "ask"]})
    )
    return folder


@pytest.fixture
def few_tasks(monkeypatch):
    """Leaves the harness's own thousands of tasks out, whose index takes seconds."""
    monkeypatch.setattr(
        harness, "TaskManager", functools.partial(TaskManager, include_defaults=False)
    )


def command(*arguments):
    try:
        run_command(harness_command.main, ["harness", *map(str, arguments)])
    except SystemExit as exit:
        return exit.code
    return 0


def test_command(checkpoint, tasks_dir, few_tasks, base, tmp_path, capsys):
    folder, out = checkpoint(False), tmp_path / "new" / "result.json"
    arguments = [
        "--model",
        folder,
        "--include_path",
        tasks_dir,
        "--limit",
        5,
        "--batch_size",
        3,
        "--out",
        out,
    ]
    assert command(*arguments, "--tasks", "both") == 0
    printed = capsys.readouterr().out
    assert "- arc_easy" in printed and "acc_norm" in printed and "exact_match" in printed
    result = json.loads(out.read_text())
    docs = [json.loads(line) for line in (tasks_dir / "arc_easy.jsonl").read_text().splitlines()][
        :5
    ]
    asked = [
        [(f"Question: {d['question']}\nAnswer:", f" {text}") for text in d["choices"]["text"]]
        for d in docs
    ]
    loglik = choice_loglik(adapted(base), asked)
    right = [np.argmax(scores) == i % 3 for i, scores in enumerate(loglik)]
    assert result["lm_eval"]["results"]["arc_easy"]["acc,none"] == np.mean(right)
    assert result["lm_eval"]["n-samples"]["ask"]["effective"] == 5 and result["schema_version"] == 1
    assert {"jax", "lm_eval"} <= result["versions"].keys() and result["adapter_config"] is None
    assert result["base_fingerprint"] == base_fingerprint(base) and result["max_length"] == 2048
    assert "pretty_env_info" not in result["lm_eval"]

    more = [
        "--tasks",
        "arc_easy",
        "--adapter",
        folder / "adapter",
        "--num_fewshot",
        1,
        "--apply_chat_template",
    ]
    assert command(*arguments, *more, "--max_length", 512) == 0
    result = json.loads(out.read_text())
    assert (
        result["adapter_config"]["method"] == "lora"
        and result["lm_eval"]["n-shot"]["arc_easy"] == 1
    )
    assert result["lm_eval"]["configs"].keys() == {"arc_easy"} and result["max_length"] == 512


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tasks", "arc_esy"], "did you mean 'arc_easy'?"),
        (["--tasks", "arc_easy,arc_easy"], "twice"),
        (["--tasks", "both,ask"], "harness task 'ask' comes with 'both' and with 'ask'"),
        (["--tasks", "ask,both"], "harness task 'ask' comes with 'ask' and with 'both'"),
        (["--tasks", ","], "tasks is empty"),
        (["--tasks", "missing"], "'missing': its data cannot be loaded"),
        (
            ["--tasks", "other"],
            "'other' does not fit its data (UndefinedError: 'absent' is undefined)",
        ),
        (["--tasks", "unsafe"], "'unsafe' runs generated code"),
        (["--tasks", "arc_easy", "--limit", "0"], "--limit 0"),
        (["--tasks", "arc_easy", "--num_fewshot", "-1"], "--num_fewshot -1"),
        (["--tasks", "arc_easy", "--batch_size", "0"], "--batch_size 0"),
        (["--tasks", "arc_easy", "--include_path", "./nowhere"], "there is no such folder"),
        (["--tasks", "arc_easy", "--out", "."], "--out . is a directory"),
        (["--tasks", "arc_easy", "--model", "./nowhere"], "nowhere"),
        ([], "--tasks"),
    ],
)
def test_bad_input_is_one_line(
    tasks_dir, few_tasks, capsys, hf_directory, tmp_path, arguments, words
):
    model = hf_directory(tmp_path / "model")
    assert command("--model", model, "--include_path", tasks_dir, *arguments) == 2
    error = capsys.readouterr().err
    assert (
        words in error
        and error.splitlines()[-1].startswith("error: ")
        and error.count("error:") == 1
    )


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command("--model", "./nowhere", "--tasks", "arc_easy") == 2
    assert (
        capsys.readouterr().err
        == "error: the harness is not installed; pip install -e '.[lm-eval]'\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, task, file, doc",
    [
        ("ARC-Easy", "arc_easy", "arc/arc_easy.yaml", arc_doc),
        ("piqa", "piqa", "piqa/piqa.yaml", piqa_doc),
    ],
)
def test_smollm2_equals_our_protocol(
    name, task, file, doc, tmp_path, monkeypatch, capsys, folder_at
):
    """The first 50 questions in the harness's own templates: each log-likelihood, accuracy and
    acc_norm is ours, whatever the batch."""
    from flora_jax.evaluation import run

    [data] = load_task_data([name], folder_at("FLORA_DATA", "data"), limit=50)
    model = load_adapted("smollm2-135m-instruct", None)
    scores = []
    monkeypatch.setattr(
        run, "token_loglik", lambda *args: scores.extend(token_loglik(*args)) or scores
    )
    ours = run.evaluate_tasks([data], model, Settings(batch_size=16))["tasks"][name]

    write_task(
        tmp_path, task, official(file), [doc(e.question, e.choices, e.gold) for e in data.examples]
    )
    lm = HarnessLM(model, batch_size=7)
    theirs = simple_evaluate(lm, tasks=load_harness_tasks([task], tmp_path), bootstrap_iters=0)
    items, worst = theirs["samples"][task], 0.0
    for item, example, found in zip(items, data.examples, scores, strict=True):
        loglik = [value for value, _ in found]
        assert [tuple(pair) for pair in item["arguments"]] == list(example.requests)
        worst = max(
            worst, np.abs(np.subtract([score for score, _ in item["filtered_resps"]], loglik)).max()
        )
        assert item["acc_norm"] == (
            np.argmax(np.divide(loglik, [len(c) for c in example.choices])) == example.gold
        )
    assert worst < 1e-4
    assert [item["acc"] for item in items] == ours["items"]
    metrics = theirs["results"][task]
    assert (metrics["acc,none"], metrics["acc_norm,none"]) == (
        ours["accuracy"],
        ours["accuracy_norm"],
    )
    with capsys.disabled():
        print(
            f"\n{name}: acc {ours['accuracy']} norm {ours['accuracy_norm']}, largest difference "
            f"{worst:.1e}"
        )
