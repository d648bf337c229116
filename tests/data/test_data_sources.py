"""Sources and tasks: records as their files hold them, hostile files, generated problems, parsing,
requests."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from support import ROOT, load_records

from flora_jax.data import builders, sources, tasks
from flora_jax.data.generated import draw
from flora_jax.data.numbers import canonical_number, final_number, same_number
from flora_jax.data.tasks import TASKS, get_task
from flora_jax.errors import UserError

DATA = Path(os.environ.get("FLORA_DATA") or ROOT.parent / "shared" / "data")
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="benchmark files absent: set FLORA_DATA to their folder"
)
REFERENCE = DATA.parent / "reference" / "smollm2_mc_loglik.json"


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def record(**fields):
    return {"instruction": "What is 2 + 3?", "input": "", "output": "", "answer": "5", **fields}


# ---- files


def test_records_survive_the_cache_in_order_and_as_text(tmp_path, cache):
    wanted = [
        record(instruction=f"Café {i} naïve 中 ?", answer=str(i), output="a\nb" * (i % 3))
        for i in range(300)
    ]
    write(tmp_path / "AddSub" / "test.json", wanted)
    task = get_task("AddSub")
    assert load_records(task, "test", tmp_path, cache) == wanted  # prepared
    assert load_records(task, "test", tmp_path, cache) == wanted  # from the cache


def test_changed_data_is_rebuilt_and_unchanged_data_is_not(tmp_path, cache, monkeypatch):
    path, task = write(tmp_path / "AddSub" / "test.json", [record()]), get_task("AddSub")
    load_records(task, "test", tmp_path, cache)
    write(path, [record(answer="6")])
    assert load_records(task, "test", tmp_path, cache)[0]["answer"] == "6"
    monkeypatch.setattr(
        sources, "_prepare", lambda *args: pytest.fail("prepared what the cache holds")
    )
    write(path, [record()])
    assert load_records(task, "test", tmp_path, cache)[0]["answer"] == "5"


def test_cache_is_under_flora_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "here"))
    write(tmp_path / "AddSub" / "test.json", [record()])
    load_records(get_task("AddSub"), "test", tmp_path)
    assert list((tmp_path / "here" / "tfds").rglob("*.array_record*"))


def test_an_unwritable_cache_names_itself(tmp_path):
    write(tmp_path / "AddSub" / "test.json", [record()])
    with pytest.raises(UserError, match=r"cache directory .*file.* cannot be written"):
        load_records(
            get_task("AddSub"), "test", tmp_path, write(tmp_path / "file", "not a directory")
        )


def _load_addsub(arguments):
    data_dir, cache_dir = arguments
    return len(load_records(get_task("AddSub"), "test", data_dir, cache_dir))


def test_two_processes_prepare_the_same_data(tmp_path):
    write(tmp_path / "AddSub" / "test.json", [record(answer=str(i)) for i in range(2000)])
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_load_addsub, [(tmp_path, tmp_path / "cache")] * 2, chunksize=1) == [
            2000,
            2000,
        ]
    assert len(list((tmp_path / "cache" / "tfds").iterdir())) == 1  # and no scratch is left behind


def test_damaged_prepared_data_names_itself(tmp_path):
    write(tmp_path / "AddSub" / "test.json", [record()])

    def load():
        return load_records(get_task("AddSub"), "test", tmp_path, tmp_path / "cache")

    load()
    [entry] = (tmp_path / "cache" / "tfds").iterdir()
    for path in entry.rglob("*.array_record*"):
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=f"{entry.name} is damaged .*; remove that folder"):
        load()
    shutil.rmtree(entry)
    entry.mkdir()
    with pytest.raises(UserError, match="is damaged"):
        load()
    entry.rmdir()
    assert load() == [record()]


def test_losing_the_race_keeps_the_winner(tmp_path):
    task, directory = get_task("AddSub"), tmp_path / "tfds" / "key"
    sources._prepare(task, "test", [record()], directory)
    first = {p.name: p.read_bytes() for p in directory.rglob("*.array_record*")}
    sources._prepare(task, "test", [record(answer="9")], directory)
    assert {p.name: p.read_bytes() for p in directory.rglob("*.array_record*")} == first
    assert [p.name for p in directory.parent.iterdir()] == ["key"]


def test_preparing_prints_nothing(tmp_path, capfd):
    write(tmp_path / "AddSub" / "test.json", [record()])
    load_records(get_task("AddSub"), "test", tmp_path, tmp_path / "cache")
    assert capfd.readouterr() == ("", "")


def test_every_source_has_features_and_keeps_its_order(tmp_path):
    assert {task.source for task in TASKS.values()} == set(builders.FEATURES)
    for source in builders.FEATURES:
        builders.open_writer(source, "test", tmp_path / source).close_all()
        found = json.loads((tmp_path / source / "dataset_info.json").read_text())
        assert found["disableShuffling"] and found["fileFormat"] == "array_record"


def test_records_are_read_one_at_a_time(tmp_path, cache, monkeypatch):
    """From the source as they are written, and from the cache as they are asked for."""
    monkeypatch.setattr(sources, "_CHUNK", 10)
    path = write(tmp_path / "mine.jsonl", GOOD_LINE * 95 + '{"prompt": "p"}')
    known, ahead = [], []
    read = sources.raw_records

    def counted(path):
        for one in read(path):
            ahead.append(len(known))
            yield one

    class Writer:
        def add_examples(self, examples):
            known.extend(examples["train"])

    monkeypatch.setattr(sources, "raw_records", counted)
    monkeypatch.setattr(builders, "open_writer", lambda *_: Writer())
    with pytest.raises(UserError, match=r"mine\.jsonl:96: field 'completion' is missing"):
        load_records(get_task(str(path)), "train", None, tmp_path / "cache")
    assert len(known) == 90 and all(i - 10 <= done <= i for i, done in enumerate(ahead))
    assert not list((tmp_path / "cache" / "tfds").iterdir())
    monkeypatch.undo()

    lines = [json.dumps({"prompt": str(i), "completion": "c"}) for i in range(20)]
    write(path, "\n".join(lines))
    unpack = sources._unpacked
    unpacked = []

    def noted(task, element):
        unpacked.append(element)
        return unpack(task, element)

    monkeypatch.setattr(sources, "_unpacked", noted)
    examples = sources.open_examples(get_task(str(path)), "train", None, cache)
    assert len(examples) == 20 and not unpacked
    assert examples[7].question == "7" and len(unpacked) == 1
    assert [example.question for example in examples] == [str(i) for i in range(20)]
    for beyond in (20, -1):
        with pytest.raises(IndexError):
            examples[beyond]


def test_raw_mawps_and_gsm8k_layouts_become_records(tmp_path, cache):
    mawps = {
        "id": 1,
        "original_text": "Two and three ?",
        "segmented_text": "x",
        "equation": "X=2+3",
        "ans": 5.0,
    }
    write(tmp_path / "mawps" / "train_decontaminated.json", [mawps])
    write(tmp_path / "mawps" / "train.json", [{**mawps, "original_text": "contaminated"}])
    (example,) = sources.load_examples(get_task("mawps"), "train", tmp_path, cache)
    assert [m.content for m in example.messages] == ["Two and three ?", "The answer is 5."]

    gsm8k = {
        "question": "How much?",
        "answer": "She has 10*108 = <<10*108=1080>>1,080 coins.\n#### 1,080",
    }
    write(tmp_path / "gsm8k" / "train.jsonl", json.dumps(gsm8k) + "\n\n")
    (example,) = sources.load_examples(get_task("gsm8k"), "train", tmp_path, cache)
    assert example.messages[1].content == "She has 10*108 = 1,080 coins.\nThe answer is 1080."
    assert example.answer == "1080"


def test_jsonl_of_ones_own_as_folder_and_as_file(tmp_path, cache):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Line\u2028separator\x85"},
        {"role": "assistant", "content": "Bye"},
    ]
    lines = [{"prompt": "2+2=", "completion": "4"}, {"messages": turns}]
    # A byte order mark, as some editors write, and separators that are line ends to str.splitlines
    # but not to JSON.
    write(
        tmp_path / "train.jsonl",
        "\ufeff" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines),
    )
    first, second = sources.load_examples(get_task("jsonl"), "train", tmp_path, cache)
    assert [(m.role, m.content) for m in first.messages] == [("user", "2+2="), ("assistant", "4")]
    assert [dataclasses.asdict(m) for m in second.messages] == turns
    assert (second.question, second.answer) == ("Line\u2028separator\x85", "Bye")
    for name, data_dir in ((str(tmp_path / "train.jsonl"), None), ("train.jsonl", tmp_path)):
        assert sources.load_examples(get_task(name), "train", data_dir, cache) == [first, second]
    assert sources.has_split(get_task("jsonl"), "train", tmp_path)
    assert not sources.has_split(get_task("jsonl"), "validation", tmp_path)
    assert not sources.has_split(get_task(str(tmp_path / "train.jsonl")), "validation", None)


def test_data_hash_is_that_of_the_file(tmp_path):
    path = write(tmp_path / "AddSub" / "test.json", [record()])
    assert (
        sources.data_hash(get_task("AddSub"), "test", tmp_path)
        == hashlib.sha256(path.read_bytes()).hexdigest()
    )


CHOICE = (
    "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b\n\n"
    "Answer format: answer1/answer2"
)
GOOD_LINE = '{"prompt": "p", "completion": "c"}\n'
HOSTILE = [  # task, file, content, what the one line must say
    (
        "AddSub",
        "AddSub/test.json",
        '[\n{"instruction": "x",\n "answer" 5}]',
        r"test\.json:3: malformed JSON at column 11",
    ),
    ("AddSub", "AddSub/test.json", "", r"AddSub/test\.json holds no records"),
    ("AddSub", "AddSub/test.json", "[]", r"AddSub/test\.json holds no records"),
    ("AddSub", "AddSub/test.json", '{"a": 1}', r"must hold a JSON list of records, not dict"),
    (
        "AddSub",
        "AddSub/test.json",
        "[1]",
        r"record 0 \(from 0\): a record must be a JSON object, not int",
    ),
    (
        "AddSub",
        "AddSub/test.json",
        [record(), {"instruction": "x"}],
        r"record 1 \(from 0\): field 'answer' is missing",
    ),
    (
        "AddSub",
        "AddSub/test.json",
        [record(instruction=7)],
        r"field 'instruction' is int 7; it must be a string",
    ),
    ("AddSub", "AddSub/test.json", [record(instruction=" ")], r"field 'instruction' is empty"),
    ("AddSub", "AddSub/test.json", [record(answer=True)], r"field 'answer' is bool True"),
    (
        "AddSub",
        "AddSub/test.json",
        [record(), record(answer="five")],
        r"record 1 .*'answer' is 'five'; it must be a number",
    ),
    (
        "piqa",
        "piqa/test.json",
        [record()],
        r"record 0 .*'instruction' has no line 'Answer format: …'",
    ),
    (
        "piqa",
        "piqa/test.json",
        [record(instruction=CHOICE, answer="answer3")],
        r"'answer3'.*allows answer1, answer2",
    ),
    (
        "piqa",
        "piqa/test.json",
        [record(instruction=CHOICE.replace("Answer1:", ""))],
        r"no choice 'Answer1:'",
    ),
    (
        "piqa",
        "piqa/test.json",
        [record(instruction=CHOICE.replace("Answer2:", ""))],
        r"no choice 'Answer2:'",
    ),
    (
        "winogrande",
        "winogrande/test.json",
        [record(instruction=CHOICE, answer="answer1")],
        r"has no blank '_'",
    ),
    ("AQuA", "AQuA/test.json", [record(answer="A")], r"record 0 .*'Answer Choices: \(A\)"),
    (
        "gsm8k",
        "gsm8k/test.jsonl",
        '{"question": "q", "answer": "no mark"}',
        r"test\.jsonl:1: field 'answer' has no '####'",
    ),
    (
        "jsonl",
        "test.jsonl",
        GOOD_LINE + "\n" + '{"prompt": "p", ',
        r"test\.jsonl:3: malformed JSON",
    ),
    (
        "jsonl",
        "test.jsonl",
        GOOD_LINE + '{"prompt": "p"}',
        r"test\.jsonl:2: field 'completion' is missing",
    ),
    (
        "jsonl",
        "test.jsonl",
        '{"prompt": "p", "completion": null}',
        r"field 'completion' is NoneType",
    ),
    (
        "jsonl",
        "test.jsonl",
        '{"text": "p"}',
        r"needs 'messages', or 'prompt' and 'completion'; there are 'text'",
    ),
    ("jsonl", "test.jsonl", '{"messages": "hi"}', r"'messages' must be a list"),
    (
        "jsonl",
        "test.jsonl",
        '{"messages": ["hi"]}',
        r"test\.jsonl:1: messages\[0\] must be an object",
    ),
    (
        "jsonl",
        "test.jsonl",
        '{"messages": [{"role": "asistant", "content": "x"}]}',
        r"messages\[0\]: role 'asistant' is unknown; did you mean 'assistant'",
    ),
    (
        "jsonl",
        "test.jsonl",
        '{"messages": [{"role": "user", "content": "x"}]}',
        r"ends with role 'user'; the last turn must be the assistant's",
    ),
    (
        "jsonl",
        "test.jsonl",
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        r"no turn with role 'user'",
    ),
]


@pytest.mark.parametrize(("task", "file", "content", "message"), HOSTILE)
def test_hostile_files(tmp_path, cache, task, file, content, message):
    write(tmp_path / file, content)
    with pytest.raises(UserError, match=message) as error:
        sources.load_examples(get_task(task), "test", tmp_path, cache)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_text_that_is_not_utf8(tmp_path, cache):
    write(tmp_path / "test.jsonl", "").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"test\.jsonl: byte 12 is not UTF-8"):
        load_records(get_task("jsonl"), "test", tmp_path, cache)


def test_a_sample_is_never_a_test_set(tmp_path, cache):
    write(tmp_path / "SVAMP" / "sample.json", [record()])
    with pytest.raises(
        UserError, match=r"test\.json is missing.*has sample\.json \(a sample is never a test set\)"
    ):
        load_records(get_task("SVAMP"), "test", tmp_path, cache)
    with pytest.raises(UserError, match=r"split 'sample' .*never a test set"):
        load_records(get_task("SVAMP"), "sample", tmp_path, cache)
    path = write(tmp_path / "sample.jsonl", GOOD_LINE)
    with pytest.raises(UserError, match="a sample is never a test set"):
        load_records(get_task(str(path)), "test", tmp_path, cache)


def test_what_is_missing_or_unknown_is_said(tmp_path, cache):
    with pytest.raises(UserError, match="task 'ARC-Esay' is unknown; did you mean 'ARC-Easy'"):
        get_task("ARC-Esay")
    with pytest.raises(UserError, match=r"split 'tests' .*did you mean 'test'"):
        load_records(get_task("piqa"), "tests", tmp_path, cache)
    with pytest.raises(UserError, match=r"piqa/ has no data files; the LLM-Adapters repository"):
        load_records(get_task("piqa"), "test", tmp_path, cache)
    with pytest.raises(UserError, match=r"task 'piqa' is read from files; set data\.dir"):
        load_records(get_task("piqa"), "test", None, cache)
    with pytest.raises(UserError, match=r"nowhere\.jsonl is missing"):
        load_records(get_task("nowhere.jsonl"), "test", None, cache)


# ---- generated problems


@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic"])
def test_generated_splits_are_disjoint_right_and_deterministic(name, tmp_path, cache):
    task = get_task(name, {"train": 1500, "validation": 50, "test": 150})
    splits = {s: load_records(task, s, None, cache) for s in sources.SPLITS}
    assert [len(splits[s]) for s in sources.SPLITS] == [1500, 50, 150]
    questions = {s: {r["question"] for r in records} for s, records in splits.items()}
    assert len(questions["test"]) == 150  # all different
    assert (
        not questions["train"] & questions["test"]
        and not questions["train"] & questions["validation"]
    )
    assert not questions["validation"] & questions["test"]
    for r in splits["train"]:  # the arithmetic, by Python's own
        sum_ = r["question"].removeprefix(
            "State the final answer to the following arithmetic problem:"
        )
        assert eval(sum_.removeprefix("Calculate").strip(" =.")) == int(r["answer"])
    assert load_records(task, "train", None, tmp_path) == splits["train"]


def test_the_training_seed_moves_training_alone_and_far():
    sizes = {"train": 400, "test": 50, "validation": 5}
    first, second = (get_task("chain_sum", {"seed": seed, **sizes}) for seed in (0, 1))
    assert draw(first, "test") == draw(second, "test")
    trained = draw(first, "train")
    # Neighbouring seeds of the library itself share all but one problem.
    assert sum(problem in trained for problem in draw(second, "train")) < 200


def test_generator_settings_reach_the_problems_and_are_checked(cache):
    records = load_records(
        get_task(
            "chain_sum", {"max_terms": 2, "max_digits": 1, "train": 9, "test": 9, "validation": 9}
        ),
        "test",
        None,
        cache,
    )
    assert all(len(r["question"].split(":")[1].split()) == 4 for r in records)  # a + b =
    for overrides, message in (
        ({"max_term": 2}, "did you mean 'max_terms'"),
        ({"train": 0}, "train=0 .*at least 1"),
        ({"seed": "x"}, "seed='x' .*must be an integer"),
    ):
        with pytest.raises(UserError, match=message):
            get_task("chain_sum", overrides)
    with pytest.raises(UserError, match=r"generator settings .* are refused"):
        load_records(get_task("chain_sum", {"min_terms": 5}), "test", None, cache)
    with pytest.raises(UserError, match=r"generator settings .* are refused: .*digits"):
        load_records(get_task("chain_sum", {"max_digits": 5000, "test": 9}), "test", None, cache)
    tiny_space = {"max_terms": 2, "max_digits": 1, "test": 300}
    with pytest.raises(UserError, match=r"only \d+ of test=300 problems are new"):
        load_records(get_task("chain_sum", tiny_space), "test", None, cache)
    assert get_task("gsm8k", {"train": 3}) is TASKS["gsm8k"]


def test_generated_prompt_states_the_format(cache):
    example = sources.load_examples(get_task("chain_sum", {"test": 3}), "test", None, cache)[0]
    assert example.messages[0].content.endswith("\nGive only the final number.")
    assert example.messages[1].content == example.answer


# ---- parsing


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("576.0", "576"),
        ("1,080", "1080"),
        ("- 7", "-7"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("3.50", "3.50"),
        ("1,000,000", "1000000"),
    ],
)
def test_canonical_number(text, number):
    assert canonical_number(text) == number


@pytest.mark.parametrize("text", ["nan", "inf", "1e400", "1_000", "seven", ""])
def test_no_canonical_number(text):
    with pytest.raises(ValueError):
        canonical_number(text)


def test_a_wrong_rationale_is_no_target():
    parse = TASKS["gsm8k"].parse
    right = parse(record(output="\nA: 2 + 3 = 5. The answer is 5.", answer="5.0"))
    wrong = parse(record(output="\nA: 2 + 3 = 6. The answer is 6.", answer="5.0"))
    assert right.messages[1].content == "2 + 3 = 5. The answer is 5."
    assert wrong.messages[1].content == "The answer is 5."


def test_requests_of_each_format():
    piqa = TASKS["piqa"].parse(
        record(
            instruction="Please choose the correct solution to the question: How: why?\n\n"
            "Solution1: cut it\n\n"
            "Solution2: glue: it\n\nAnswer format: solution1/solution2",
            answer="solution2",
        )
    )
    assert (piqa.choices, piqa.gold) == (("cut it", "glue: it"), 1)
    assert tasks.lm_eval_request(piqa) == (
        ("Question: How: why?\nAnswer:", " cut it"),
        ("Question: How: why?\nAnswer:", " glue: it"),
    )
    prompt, targets = tasks.label_request(piqa)
    assert prompt.endswith("solution1/solution2")
    assert targets == ("the correct answer is solution1", "the correct answer is solution2")
    assert piqa.messages[1].content == targets[1]

    winogrande = TASKS["winogrande"].parse(
        record(
            instruction="Please choose the correct answer to fill in the blank to complete the "
            "given sentence: Sarah was "
            "better than Maria so _ got the easy cases.\n\nOption1: Sarah Option2: Maria Answer "
            "format: option1/option2",
            answer="option2",
        )
    )
    assert tasks.lm_eval_request(winogrande) == (
        ("Sarah was better than Maria so Sarah", " got the easy cases."),
        ("Sarah was better than Maria so Maria", " got the easy cases."),
    )

    boolq = TASKS["boolq"].parse(
        record(
            instruction="Please answer the following question with true or false, question: is "
            "it?\n\n"
            "Answer format: true/false",
            answer="false",
        )
    )
    assert tasks.lm_eval_request(boolq) == (
        ("Question: is it?\nAnswer:", " yes"),
        ("Question: is it?\nAnswer:", " no"),
    )
    assert boolq.gold == 1 and boolq.messages[1].content == "the correct answer is false"
    with pytest.raises(UserError, match="lm_eval needs a multiple-choice task"):
        tasks.lm_eval_request(TASKS["AddSub"].parse(record()))
    with pytest.raises(UserError, match="label words need a multiple-choice task"):
        tasks.label_request(TASKS["AddSub"].parse(record()))


@pytest.mark.parametrize(
    "one, other",
    [
        ("7 − 3 = ?", "7 × 3 = ?"),
        ("x ≤ 5", "x ≥ 5"),
        ("की", "का"),
        ("😀", "😡"),
        ("x[0]", "x{0}"),
        ("C#", "C"),
        ("?", "!"),
    ],
)
def test_signs_and_marks_of_every_script_tell_prompts_apart(one, other):
    def example(text):
        return tasks.Example((tasks.Message("user", text), tasks.Message("assistant", "a")))

    assert tasks.dedupe([example(one)], [example(other)]) == ([example(one)], 0)
    assert tasks.dedupe([example(one)], [example(f" {one} ")]) == ([], 1)
    assert tasks.normalise("7 − 3") == tasks.normalise("7-3 !")


def test_dedupe_compares_prompts_not_formatting_but_signs():
    def sums(*questions):
        return [TASKS["AddSub"].parse(record(instruction=q)) for q in questions]

    train = sums("What is 4 - 1 ?", "What is 4 + 1?", "Who's there?", "中 文?")
    kept, dropped = tasks.dedupe(train, sums("what  is 4 - 1?", "Who's there ?"))
    assert (kept, dropped) == ([train[1], train[3]], 2)


@needs_data
@pytest.mark.parametrize("name", ["ARC-Easy", "piqa", "openbookqa"])
def test_choices_match_an_independent_parse(name, cache):
    if not REFERENCE.is_file():
        pytest.skip(f"{REFERENCE.name} absent")
    docs = json.loads(REFERENCE.read_text())[name]["docs"]
    examples = sources.load_examples(get_task(name), "test", DATA, cache)
    assert len(docs) == 200
    for doc in docs:
        example = examples[doc["i"]]
        assert (len(example.choices), example.gold) == (doc["n"], doc["gold"])
        assert [len(choice) for choice in example.choices] == doc["chars"]


SIZES = {  # the split sizes that the data's own documentation states
    ("ARC-Easy", "test"): 2376,
    ("ARC-Easy", "train"): 2251,
    ("ARC-Challenge", "train"): 1119,
    ("openbookqa", "train"): 4957,
    ("social_i_qa", "test"): 1954,
    ("boolq", "test"): 3270,
    ("AddSub", "test"): 395,
    ("MultiArith", "test"): 600,
    ("SingleEq", "test"): 508,
    ("gsm8k", "test"): 1319,
    ("gsm8k", "train"): 7473,
    ("AQuA", "test"): 254,
    ("mawps", "test"): 238,
    ("mawps", "train"): 706,
}


@needs_data
@pytest.mark.parametrize(("name", "split"), SIZES)
def test_every_real_record_parses(name, split, cache):
    examples = sources.load_examples(get_task(name), split, DATA, cache)
    assert len(examples) == SIZES[name, split]
    if get_task(name).metric == "choice":
        assert all(0 <= e.gold < len(e.choices) and all(e.choices) and e.question for e in examples)
        assert {len(e.choices) for e in examples} <= ({2} if name == "boolq" else {3, 4, 5})
    if get_task(name).metric == "number":
        assert all(same_number(final_number(e.messages[1].content), e.answer) for e in examples)
        assert not any("<<" in e.messages[1].content for e in examples)


# Of gsm8k 771 are documented, by a reading that does not know "$118 000", which is right in two
# more.
@needs_data
@pytest.mark.parametrize(
    ("name", "count"), [("AddSub", 370), ("MultiArith", 560), ("SingleEq", 484), ("gsm8k", 771 + 2)]
)
def test_right_rationales_are_as_many_as_documented(name, count, cache):
    examples = sources.load_examples(get_task(name), "test", DATA, cache)
    assert sum(e.messages[1].content != f"The answer is {e.answer}." for e in examples) == count


@needs_data
def test_documented_overlaps_are_dropped(cache):
    raw = dataclasses.replace(get_task("mawps"), files={})  # the contaminated train.json
    contaminated = sources.load_examples(raw, "train", DATA, cache)
    clean = sources.load_examples(get_task("mawps"), "train", DATA, cache)
    for name, overlap in (("AddSub", 327), ("MultiArith", 452), ("SingleEq", 416)):
        test = sources.load_examples(get_task(name), "test", DATA, cache)
        assert len(test) - len(tasks.dedupe(test, contaminated)[0]) == overlap
        assert tasks.dedupe(clean, test) == (clean, 0)


TEXTS = {
    "dialogsum": [
        (
            {
                "fname": "t",
                "dialogue": "#Person1#: Hi.\n#Person2#: Bye.",
                "summary": "They met.",
                "topic": "x",
            },
            "#Person1#: Hi.\n#Person2#: Bye.",
            ["They met."],
        ),
        (
            {
                "dialogue": "A: Hi.",
                "summary1": "One.",
                "topic1": "x",
                "summary2": "Two.",
                "summary3": "Three.",
            },
            "A: Hi.",
            ["One.", "Two.", "Three."],
        ),
    ],
    "samsum": [
        ({"id": 1, "dialogue": "Ann: Hi", "summary": "Ann greets."}, "Ann: Hi", ["Ann greets."])
    ],
    "xsum": [({"document": "Much text.", "summary": "Text."}, "Much text.", ["Text."])],
    "cnn_dailymail": [
        (
            {"article": "<t> a b . </t> <t> c . </t>", "highlights": "<t> A . </t> <t> C . </t>"},
            "a b .\nc .",
            ["A .\nC ."],
        ),
    ],
    "dailydialogpp": [
        (
            {"dialog_id": 0, "context": ["Hi", "Hello "], "positive_responses": ["Well?", "So?"]},
            "A: Hi\nB: Hello",
            ["Well?", "So?"],
        ),
    ],
}


@pytest.mark.parametrize("task", TEXTS)
def test_texts_of_every_layout(tmp_path, cache, task):
    (tmp_path / task).mkdir()
    lines = [json.dumps(raw) for raw, _, _ in TEXTS[task]]
    (tmp_path / task / get_task(task).files.get("test", "test.jsonl")).write_text("\n".join(lines))
    found = sources.load_examples(get_task(task), "test", tmp_path, cache)
    for example, (_, text, references) in zip(found, TEXTS[task], strict=True):
        assert example.question == text and list(example.references) == references
        prompt, target = example.messages
        assert text in prompt.content and target.content == references[0] == example.answer


def test_every_answer_of_the_system_is_a_record(tmp_path, cache):
    (tmp_path / "multiwoz").mkdir()
    turns = ["a taxi  please", "where to ?", "home", "done", "thanks"]
    (tmp_path / "multiwoz/test.jsonl").write_text(json.dumps({"dialogue_id": "1", "turns": turns}))
    found = sources.load_examples(get_task("multiwoz"), "test", tmp_path, cache)
    assert [e.question for e in found] == [
        "A: a taxi please",
        "A: a taxi please\nB: where to ?\nA: home",
    ]
    assert [e.references for e in found] == [("where to ?",), ("done",)]


def test_parts_of_a_file(tmp_path, cache):
    """DialogSum's training file is not always at hand: 400 of the validation records train, 100
    validate."""
    (tmp_path / "dialogsum").mkdir()
    lines = [json.dumps({"dialogue": f"A: {i}", "summary": str(i)}) for i in range(500)]
    (tmp_path / "dialogsum/validation.jsonl").write_text("\n".join(lines))
    for split, numbers in (("train", range(400)), ("validation", range(400, 500))):
        found = sources.load_examples(get_task("dialogsum"), split, tmp_path, cache)
        assert [int(e.answer) for e in found] == list(numbers)
    # With a file of its own to train on, nothing is shared.
    (tmp_path / "dialogsum/train.jsonl").write_text(
        json.dumps({"dialogue": "A: 7", "summary": "7"})
    )
    for split, numbers in (("train", [7]), ("validation", range(500))):
        found = sources.load_examples(get_task("dialogsum"), split, tmp_path, cache)
        assert [int(e.answer) for e in found] == list(numbers)


def test_a_listed_file_is_no_must(tmp_path, cache):
    """MAWPS's decontaminated training set comes first, and the published one where there is
    none."""
    for name, answer in (("train", "1"), ("train_decontaminated", "2")):
        write(tmp_path / f"mawps/{name}.json", [record(answer=answer)])
        assert load_records(get_task("mawps"), "train", tmp_path, cache)[0]["answer"] == answer
    article = {"article": "Long.", "highlights": "Short."}
    write(tmp_path / "cnn_dailymail/test.jsonl", json.dumps(article))
    assert sources.load_examples(get_task("cnn_dailymail"), "test", tmp_path, cache)[
        0
    ].references == ("Short.",)


def test_hellaswag_is_a_choice(tmp_path, cache):
    (tmp_path / "hellaswag").mkdir()
    raw = {
        "ind": 0,
        "activity_and_ctx": "Roof: A man sits. he",
        "label": 3,
        "endings": ["a b.", "c.", "d's.", "e."],
    }
    path = tmp_path / "hellaswag/validation.jsonl"
    path.write_text(json.dumps(raw))
    [example] = sources.load_examples(get_task("hellaswag"), "test", tmp_path, cache)
    assert (
        example.gold == 3
        and example.answer == "ending4"
        and example.choices == ("a b.", "c.", "d's.", "e.")
    )
    assert tasks.lm_eval_request(example)[1] == ("Roof: A man sits. he", " c.")
    path.write_text(json.dumps({**raw, "label": 4}))
    with pytest.raises(UserError, match=r"validation\.jsonl:1: field 'label' is 4"):
        sources.load_examples(get_task("hellaswag"), "test", tmp_path, cache)


@pytest.mark.parametrize(
    "raw, words",
    [
        ({"text": "x"}, "has none of the fields dialogue, document, article, context, turns"),
        ({"dialogue": "x"}, "neither 'summary', 'summary1' nor 'highlights' beside 'dialogue'"),
        ({"dialogue": 3, "summary": "x"}, "field 'dialogue' is int"),
        ({"context": "Hi", "positive_responses": ["x"]}, "field 'context' must be a list of texts"),
        (
            {"context": ["Hi"], "positive_responses": []},
            "field 'positive_responses' must be a list of texts",
        ),
    ],
)
def test_malformed_texts(tmp_path, cache, raw, words):
    (tmp_path / "samsum").mkdir()
    (tmp_path / "samsum/test.jsonl").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=words) as error:
        sources.load_examples(get_task("samsum"), "test", tmp_path, cache)
    assert "test.jsonl:1" in str(error.value)


def test_absent_texts_say_where_to_get_them(tmp_path, cache):
    for task, words in (
        ("samsum", "TFDS"),
        ("dialogsum", "cylnlp"),
        ("hellaswag", "rowanz"),
        ("piqa", "LLM-Adapters"),
    ):
        with pytest.raises(UserError, match=words):
            sources.load_examples(get_task(task), "test", tmp_path, cache)
