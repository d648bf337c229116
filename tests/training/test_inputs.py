"""What a run trains on: never a record of a test set or of the validation set, every drop counted,
all of it hashed."""

import collections
import importlib
import itertools
import json
import shutil
import weakref
from collections.abc import Sequence

import numpy as np
import pytest

from flora_jax.config import check_config
from flora_jax.data import get_task, open_examples
from flora_jax.data.store import StoreWriter
from flora_jax.data.tasks import MIXTURES
from flora_jax.errors import UserError
from flora_jax.models.tokenizer import byte_tokenizer
from flora_jax.progress import progress
from flora_jax.tokens import tokenizer_digest
from flora_jax.training.inputs import load_inputs


@pytest.fixture
def inputs(small, tmp_path):
    """`inputs(**{"data.limit": 3})`: the inputs of this configuration over the folder
    `tmp_path`."""

    def load(tokenizer=None, **fields):
        config = small(
            **{
                "data.dir": str(tmp_path),
                "data.tasks": "gsm8k",
                "data.validation_size": 20,
                **fields,
            }
        )
        return load_inputs(config, tokenizer or byte_tokenizer())

    load.folder = tmp_path
    return load


@pytest.fixture
def write(tmp_path):
    """`write("gsm8k", train=range(9))` writes the problems "What is i + 1?" of these numbers."""

    def files(task, **splits):
        (tmp_path / task).mkdir(exist_ok=True)
        for split, numbers in splits.items():
            # Test questions differ in case and spaces, as copies in other data sets do.
            text = "what is  {} +1 ?" if split == "test" else "What is {} + 1?"
            records = [
                {"instruction": text.format(i), "output": f"It is {i + 1}.", "answer": str(i + 1)}
                for i in numbers
            ]
            (tmp_path / task / f"{split}.json").write_text(json.dumps(records))

    return files


def asked(encoded):
    """The numbers of the problems, in order, read off the tokens."""
    return [int(bytes(e.tokens[:-1].tolist()).decode().split(" ")[2]) for e in encoded]


def counts(account):
    return account["dropped_as_in_test"], account["dropped_from_validation"]


def test_records_of_test_and_validation_sets_are_dropped_and_counted(inputs, write):
    write("gsm8k", train=range(20), validation=range(16, 25), test=(0, 1, 24, 99))
    write("AddSub", train=range(50, 53), test=(2, 17))
    alone = inputs()
    assert asked(alone.train) == list(range(2, 16))  # 0 and 1 are tested, 16 to 19 validated
    assert asked(alone.validation) == list(range(16, 24)) and counts(alone.account) == (6, 1)
    # A task that is only scored keeps its test set out too; 17 is then tested, not validated.
    scored = inputs(**{"eval.tasks": "AddSub", "data.allow_contaminated": True})
    assert (
        scored.account["share_of_test_in_train"] == {"AddSub": 1.0}
        and alone.account["share_of_test_in_train"] == {}
    )
    assert asked(scored.train) == list(range(3, 16))
    assert asked(scored.validation) == [16, *range(18, 24)] and counts(scored.account) == (7, 2)
    # So does a task trained beside it, whose own records are held out where it has no validation
    # split.
    both = inputs(**{"data.tasks": "gsm8k,AddSub"})
    [held_out] = set(range(50, 53)) & set(asked(both.validation))
    assert asked(both.train) == [*range(3, 16), *sorted({50, 51, 52} - {held_out})]
    assert counts(both.account) == (7, 2)
    for found in (alone, scored, both):
        assert found.account["train"]["kept"] == len(found.train)
        assert found.account["validation"]["kept"] == len(found.validation)


def test_one_task_does_not_train_on_what_validates_another(inputs, write):
    write("gsm8k", train=range(10), validation=(30, 31), test=(90,))
    write("AddSub", train=range(29, 39), validation=(9, 40), test=(91,))
    found = inputs(**{"data.tasks": "gsm8k,AddSub"})
    assert asked(found.train) == [*range(9), 29, *range(32, 39)] and counts(found.account) == (3, 0)


def test_mixtures_and_weights(inputs, write, small):
    """Each example once an epoch without weights; with them each task a part of its own."""
    for number, task in enumerate(MIXTURES["math"][:2]):
        first = 100 * number
        write(
            task,
            train=range(first, first + 20 + number),
            validation=(first + 30,),
            test=(first + 40, first),
        )
    (tmp := inputs.folder / "mawps/train.json").rename(tmp.with_name("train_decontaminated.json"))
    with pytest.raises(UserError, match=r"AQuA.*'train' of task 'AQuA'"):
        inputs(**{"data.tasks": "math"})
    plain = inputs(**{"data.tasks": "gsm8k,mawps"})
    mixed = inputs(**{"data.tasks": "gsm8k,mawps", "data.weights": "3, 1"})
    assert (
        plain.parts is None
        and mixed.parts == [(19, 3.0), (20, 1.0)]
        and mixed.account["weights"] == [3.0, 1.0]
    )
    assert asked(mixed.train) == asked(plain.train) == [*range(1, 20), *range(101, 121)]
    assert mixed.account["train"] == plain.account["train"]
    limited = inputs(**{"data.tasks": "gsm8k,mawps", "data.weights": "3,1", "data.limit": 10})
    assert sum(size for size, _ in limited.parts) == 10 == len(limited.train)
    with pytest.raises(UserError, match=r"task '(gsm8k|mawps)', which has a weight: "):
        inputs(**{"data.tasks": "gsm8k,mawps", "data.weights": "3,1", "data.limit": 1})
    for tasks, weights in (
        ("gsm8k,mawps", "1"),
        ("math", "1,1"),
        ("gsm8k", "0"),
        ("gsm8k", "one"),
        ("gsm8k", "nan"),
        ("gsm8k,mawps", "3,,1"),
        ("gsm8k,mawps", "1e-300,1"),
    ):
        with pytest.raises(UserError, match=r"config\.data\.weights=.*positive number"):
            check_config(small(**{"data.tasks": tasks, "data.weights": weights}))
    with pytest.raises(UserError, match="names a task twice"):
        check_config(small(**{"data.tasks": "math,gsm8k"}))
    with pytest.raises(UserError, match="'math' is a mixture to train on"):
        get_task("math")


def test_what_a_task_is_tested_on_does_not_validate_it(inputs):
    """HellaSwag's test is the file of its official validation split: records of train are held out
    instead."""
    folder = inputs.folder / "hellaswag"
    folder.mkdir()
    for split, first in (("train", 0), ("validation", 50)):
        lines = [
            {
                "activity_and_ctx": f"Sums: {i} and one is",
                "endings": ["a.", "b.", "c.", "d."],
                "label": 1,
            }
            for i in range(first, first + 30)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = inputs(**{"data.tasks": "hellaswag", "data.max_length": 512})
    assert len(found.validation) == 3 and len(found.train) == 27 and counts(found.account) == (0, 0)


def test_nothing_left_is_refused(inputs, write):
    write("gsm8k", train=range(5), validation=range(5, 7), test=range(5))
    with pytest.raises(
        UserError, match=r"data\.tasks=gsm8k: each of 5 training records is also in a test"
    ):
        inputs()
    write("gsm8k", test=range(5, 7))
    with pytest.raises(
        UserError, match=r"data\.tasks=gsm8k: each validation record is also in a test set"
    ):
        inputs()
    write("gsm8k", validation=range(5), test=(9,))
    with pytest.raises(
        UserError, match=r"each of 5 training records is also in a test or the validation set"
    ):
        inputs()


def test_one_prompt_may_have_many_answers_in_a_file_of_ones_own(inputs, tmp_path):
    """What is held out is left out of training with its answer, not with all that shares its
    prompt."""
    mine = tmp_path / "mine.jsonl"
    lines = [
        json.dumps({"prompt": "Write in my style.", "completion": f"Text {i}."}) for i in range(20)
    ]
    mine.write_text("\n".join([*lines, lines[0]]))
    found = inputs(**{"data.tasks": str(mine)})
    answers = {bytes(e.tokens[:-1].tolist()).decode() for e in found.train}
    held_out = {bytes(e.tokens[:-1].tolist()).decode() for e in found.validation}
    assert len(answers) + len(held_out) == 20 and not answers & held_out


def test_what_is_held_out_counts_as_training_data_that_holds_a_test(inputs, write):
    write("gsm8k", train=range(200))
    held_out = asked(inputs().validation)
    write("AddSub", test=[*held_out[:3], *range(900, 997)])
    with pytest.raises(UserError, match=r"3\.0 % of the test questions of 'AddSub'"):
        inputs(**{"eval.tasks": "AddSub"})


def test_one_file_is_a_test_set_only_where_it_is_scored(inputs, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(
        "".join(
            json.dumps({"prompt": f"What is {i} + 1?", "completion": "?"}) + "\n" for i in range(20)
        )
    )
    found = inputs(**{"data.tasks": str(mine)})
    assert sorted(asked(found.train) + asked(found.validation)) == list(range(20)) and counts(
        found.account
    ) == (0, 0)
    with pytest.raises(UserError, match="is also in a test set"):
        inputs(
            **{"data.tasks": str(mine), "eval.tasks": str(mine), "data.allow_contaminated": True}
        )


def test_data_that_holds_a_test_is_refused_by_name(inputs, write):
    """More than one question in a hundred; those that match are dropped either way, their near
    doubles cannot be."""
    write("gsm8k", train=range(300), validation=range(500, 510), test=range(900, 910))
    write("AddSub", test=[*range(4), *range(1000, 1196)])
    write("SingleEq", test=[*range(2), *range(1000, 1198)])
    with pytest.raises(
        UserError, match=r"2\.0 % of the test questions of 'AddSub' are in the training data"
    ) as error:
        inputs(**{"eval.tasks": "SingleEq,AddSub"})
    assert "config.data.allow_contaminated" in str(error.value) and "\n" not in str(error.value)
    found = inputs(**{"eval.tasks": "SingleEq"})
    assert found.account["share_of_test_in_train"] == {"SingleEq": 0.01} and counts(
        found.account
    ) == (2, 0)
    allowed = inputs(**{"eval.tasks": "SingleEq,AddSub", "data.allow_contaminated": True})
    assert allowed.account["share_of_test_in_train"] == {"SingleEq": 0.01, "AddSub": 0.02}
    assert asked(allowed.train) == list(range(4, 300))


@pytest.mark.parametrize("field", ["data.tasks", "eval.tasks"])
def test_a_task_named_twice_is_refused(small, field):
    with pytest.raises(
        UserError, match=rf"config\.{field}='chain_sum, chain_sum' names a task twice"
    ):
        check_config(small(**{field: "chain_sum, chain_sum"}))


def test_the_hashes_tell_templates_and_tokenizers_apart(inputs, write):
    """A run goes on only on the same hashes (see test_resume)."""
    write("gsm8k", train=range(20), test=(99,))
    other_template, other_tokens = byte_tokenizer(), byte_tokenizer()
    other_template.chat_template = other_template.chat_template.replace("\n", "\n\n")
    other_tokens.add_tokens(["What"])
    hashes = {
        (name, style): inputs(tokenizer, **{"data.prompt_style": style}).account["sha256"]
        for name, tokenizer in (
            ("byte", None),
            ("template", other_template),
            ("tokens", other_tokens),
        )
        for style in ("plain", "chat")
    }
    assert len({h["gsm8k/train"] for h in hashes.values()}) == 1
    for key in ("tokens", "validation tokens"):
        # Plain prompts read no template.
        assert hashes["byte", "plain"][key] == hashes["template", "plain"][key]
        assert len({h[key] for h in hashes.values()}) == 5
    assert hashes["byte", "plain"] == inputs().account["sha256"]
    # What counts in the loss enters too, though the tokens are the same.
    assert (
        hashes["byte", "plain"]["tokens"]
        != inputs(**{"data.loss_on": "all"}).account["sha256"]["tokens"]
    )


def test_limit(inputs, write):
    """N of the records that are left, in their order and not simply the first; the same ones every
    time."""
    write("gsm8k", train=range(40), validation=(50,), test=range(10))
    everything, some = inputs(), inputs(**{"data.limit": 7})
    numbers = asked(some.train)
    assert len(numbers) == some.account["train"]["kept"] == 7 and numbers == sorted(set(numbers))
    assert set(numbers) < set(asked(everything.train)) == set(range(10, 40)) and numbers != list(
        range(10, 17)
    )
    assert asked(inputs(**{"data.limit": 7}).train) == numbers and asked(some.validation) == [50]
    whole = inputs(**{"data.limit": 30}).train
    assert all(
        np.array_equal(a.tokens, b.tokens) for a, b in zip(whole, everything.train, strict=True)
    )


def same(one, other):
    arrays = [
        [array for e in (*x.train, *x.validation) for array in (e.tokens, e.loss)]
        for x in (one, other)
    ]
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(*arrays, strict=True))
    assert (one.account, one.parts) == (other.account, other.parts)
    assert np.array_equal(one.prompts, other.prompts)
    assert len(one.train) == len(other.train)


def test_a_second_start_reads_what_the_first_prepared(inputs, write, tmp_path, monkeypatch):
    write("gsm8k", train=range(40), validation=(50, 51), test=(3, 99))
    write("mawps", train=range(100, 120), test=(99,))
    (tmp_path / "mawps/train.json").rename(tmp_path / "mawps/train_decontaminated.json")
    fields = {
        "data.tasks": "gsm8k,mawps",
        "data.weights": "3,1",
        "data.cache_dir": str(tmp_path / "cache"),
    }
    first = inputs(**fields)
    [kept] = (tmp_path / "cache" / "encoded").iterdir()  # and no scratch is left behind
    with monkeypatch.context() as patch:
        patch.setattr(
            "flora_jax.training.inputs.open_examples", lambda *_: pytest.fail("read what is kept")
        )
        same(inputs(**fields), first)
        assert inputs(**fields).parts == [(first.parts[0][0], 3.0), (first.parts[1][0], 1.0)]
    whole = kept.read_bytes()
    half_changed = bytearray(whole)
    half_changed[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(half_changed), b"", b"x"):
        kept.unlink()  # which the first has mapped
        kept.write_bytes(damaged)
        same(inputs(**fields), first)
        assert kept.read_bytes() == whole  # rebuilt


def test_what_another_process_kept_meanwhile_stays(inputs, write, tmp_path, monkeypatch):
    """It has it mapped."""
    write("gsm8k", train=range(20), test=(99,))
    fields = {"data.cache_dir": str(tmp_path / "cache")}
    first = inputs(**fields)
    [kept] = (tmp_path / "cache" / "encoded").iterdir()
    file = kept.stat().st_ino
    aside = kept.rename(tmp_path / "aside")
    prepare = importlib.import_module("flora_jax.training.inputs")._prepare

    def and_another_is_first(*given):
        prepare(*given)
        aside.rename(kept)

    monkeypatch.setattr("flora_jax.training.inputs._prepare", and_another_is_first)
    same(inputs(**fields), first)
    assert kept.stat().st_ino == file and [kept] == list(kept.parent.iterdir())


def test_examples_are_not_kept_in_memory(inputs, write, monkeypatch):
    """Of those read and of those encoded, no more than twice what is tokenised at once."""
    write("gsm8k", train=range(200), validation=range(300, 320), test=range(400, 420))
    expected = inputs(**{"data.cache_dir": str(inputs.folder / "other")})
    monkeypatch.setattr(importlib.import_module("flora_jax.data.encode"), "_CHUNK", 8)
    most = collections.Counter()
    alive = collections.defaultdict(list)

    def watch(kind, one):
        alive[kind] = [other for other in [*alive[kind], weakref.ref(one)] if other()]
        most[kind] = max(most[kind], len(alive[kind]))
        return one

    class Watched(Sequence):
        def __init__(self, *given):
            self.examples = open_examples(*given)

        def __len__(self):
            return len(self.examples)

        def __getitem__(self, i):
            return watch("read", self.examples[i])

    add = StoreWriter.add
    monkeypatch.setattr("flora_jax.training.inputs.open_examples", Watched)
    monkeypatch.setattr(StoreWriter, "add", lambda self, one: add(self, watch("encoded", one)))
    found = inputs(**{"data.cache_dir": str(inputs.folder / "cache")})
    same(found, expected)
    assert len(found.train) == 200 and 8 <= most["read"] <= 18 and 1 <= most["encoded"] <= 9


def test_whatever_changes_the_inputs_is_prepared_anew(inputs, write, tmp_path):
    write("gsm8k", train=range(40), validation=(50, 51), test=(99,))
    write("AddSub", test=(98,))
    base = {"data.cache_dir": str(tmp_path / "cache"), "data.prompt_style": "chat"}
    folder = tmp_path / "cache" / "encoded"
    changed_template, changed_tokens = byte_tokenizer(), byte_tokenizer()
    changed_template.chat_template = changed_template.chat_template.replace("\n", "\n\n")
    changed_tokens.add_tokens(["What"])
    runs = [
        (None, {}),
        (changed_template, {}),
        (changed_tokens, {}),
        (None, {"data.prompt_style": "plain"}),
        (None, {"data.loss_on": "all"}),
        (None, {"data.max_length": 100}),
        (None, {"data.limit": 5}),
        (None, {"data.validation_size": 1}),
        (None, {"eval.tasks": "AddSub"}),
    ]
    for number, (tokenizer, fields) in enumerate(runs, 1):
        inputs(tokenizer, **{**base, **fields})
        assert len(list(folder.iterdir())) == number
    inputs(**base)
    assert len(list(folder.iterdir())) == len(runs)
    for split, numbers in (("train", range(39)), ("validation", (50,)), ("test", (97,))):
        write("gsm8k", **{split: numbers})
        found = inputs(**base)
        assert len(list(folder.iterdir())) == len(runs) + 1
        runs.append(split)
    assert len(found.train) == 39 and len(found.validation) == 1


def test_a_tokenizer_is_known_by_all_that_changes_its_ids():
    tokenizer, whole = byte_tokenizer(), byte_tokenizer()
    assert tokenizer_digest(whole) == tokenizer_digest(tokenizer)
    tokenizer.split_special_tokens = True
    assert tokenizer("<|im_end|>")["input_ids"] != whole("<|im_end|>")["input_ids"]
    assert tokenizer_digest(tokenizer) != tokenizer_digest(whole)


def test_a_cache_that_cannot_be_written_is_no_error(inputs, write, tmp_path):
    write("gsm8k", train=range(20), test=(99,))
    fields = {"data.cache_dir": str(tmp_path / "cache")}
    first = inputs(**fields)
    shutil.rmtree(tmp_path / "cache" / "encoded")
    (tmp_path / "cache" / "encoded").write_text("in the way")
    same(inputs(**fields), first)


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    clock = itertools.count(0, 1.5)
    monkeypatch.setattr("flora_jax.progress.time.monotonic", lambda: next(clock))
    assert list(progress(range(8), 8, "encoding", "example")) == list(range(8))
    assert capsys.readouterr().err.splitlines() == [
        "encoding: 2 of 8 examples, 1 a second, 00:09 left",
        "encoding: 4 of 8 examples, 1 a second, 00:06 left",
        "encoding: 6 of 8 examples, 1 a second, 00:03 left",
        "encoding: 8 of 8 examples, 1 a second, 00:00 left",
    ]
    assert len(list(progress(range(8), None, "preparing", "record"))) == 8
    assert capsys.readouterr().err.splitlines()[:2] == [
        "preparing: 2 records, 1 a second",
        "preparing: 4 records, 1 a second",
    ]
    assert (
        list(progress(range(8), 8, "encoding", "example", silent=True))
        and not capsys.readouterr().err
    )
