"""ROUGE of generated texts against the package's own numbers and against sums done by hand."""

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from flora_jax.evaluation.rouge import KINDS, rouge

TEXTS = ["The cats were sitting on the mat.\nIt rained.", "nothing at all", "", "a b c d"]
REFERENCES = [
    ["The cat sat on the mat.\nIt was raining.", "A cat sits."],
    ["something else"],
    ["silence"],
    ["a x c d", "a b"],
]


def test_means_and_best_are_those_of_the_package():
    found, scorer = rouge(TEXTS, REFERENCES), RougeScorer(KINDS, use_stemmer=True)
    for kind in KINDS:
        pairs = zip(TEXTS, REFERENCES, strict=True)
        each = [[scorer.score(r, text)[kind].fmeasure for r in own] for text, own in pairs]
        assert found[kind] == pytest.approx(np.mean([np.mean(own) for own in each]))
        assert found[f"{kind}_max"] == pytest.approx(np.mean([max(own) for own in each]))
        deviation = np.std([np.mean(own) for own in each], ddof=1)
        assert found[f"{kind}_stderr"] == pytest.approx(deviation / math.sqrt(4))
    assert found["items"] == pytest.approx(
        [
            np.mean([scorer.score(r, t)["rougeL"].fmeasure for r in own])
            for t, own in zip(TEXTS, REFERENCES, strict=True)
        ],
        abs=1e-6,
    )


def test_by_hand():
    """Three of four words are shared, two of three pairs; against the second reference both of its
    two words."""
    found = rouge(["a b c d"], [["a x c d"]])
    assert found["rouge1"] == pytest.approx(3 / 4) and found["rouge2"] == pytest.approx(1 / 3)
    assert found["rougeL"] == pytest.approx(3 / 4) and found["rougeL_stderr"] == 0
    two = rouge(["a b c d"], [["a x c d", "a b"]])
    assert two["rouge1"] == pytest.approx((3 / 4 + 2 / 3) / 2) and two[
        "rouge1_max"
    ] == pytest.approx(3 / 4)
    # Stemming: cats and cat are one word. Lsum joins what separate lines share, L does not cross
    # their order.
    assert rouge(["cats"], [["cat"]])["rouge1"] == 1
    turned = rouge(["one two\nthree four"], [["three four\none two"]])
    assert turned["rougeLsum"] == pytest.approx(1) and turned["rougeL"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    "text, reference, words, pairs, sequence",
    # shares by hand: F of the words that both have, of their pairs, of the longest common sequence
    [
        ("今天天气很好", "今天天气很好", 1, 1, 1),
        (
            "今天很好",
            "今天天气很好",
            2 * 4 / (4 + 6),
            2 * 2 / (3 + 5),
            2 * 4 / (4 + 6),
        ),  # 今天 and 很好
        ("GPT模型 2024", "GPT 模型 2023", 3 / 4, 2 / 3, 3 / 4),  # gpt 模 型 2024
        ("Кошка сидит дома.", "кошка спит дома", 2 / 3, 0, 2 / 3),
        ("बिल्ली घर में है", "बिल्ली बाहर है", 2 * 2 / (4 + 3), 0, 2 * 2 / (4 + 3)),
        ("L’été est chaud", "l'été était chaud", 3 / 4, 1 / 3, 3 / 4),  # l été est chaud
        ("Die Straße ist schön", "die Strasse ist schön", 3 / 4, 1 / 3, 3 / 4),
        ("고양이가 집에 있다", "고양이가 밖에 있다", 2 / 3, 0, 2 / 3),
        # NFKC parts the vowel of ดำ, whose mark stays with its letter: five characters against six.
        ("แมวดำ", "แมวขาว", 2 * 4 / (5 + 6), 2 * 2 / (4 + 5), 2 * 4 / (5 + 6)),
        ("القطة في البيت", "القطة في الخارج", 2 / 3, 1 / 2, 2 / 3),
        ("e\u0301te\u0301", "été", 1, 0, 1),
    ],
)
def test_texts_that_the_package_would_drop(text, reference, words, pairs, sequence):
    found = rouge([text], [[reference]])
    assert found["tokenizer"].startswith("unicode")
    assert found["rouge1"] == pytest.approx(words)
    assert found["rouge2"] == pytest.approx(pairs)
    assert found["rougeL"] == pytest.approx(sequence)


def test_a_task_has_one_tokenizer_and_english_keeps_the_packages():
    """By its references: a name with an accent here and there makes no other language of a task,
    nor does an answer in Chinese; and one that is another language is not scored with two
    tokenizers."""
    english = [
        "The café in Zürich was closed, so they went home and had dinner there instead. "
        + "It rained. " * 60
    ]
    found, scorer = (
        rouge(["They went home to Zürich: 回家"], [english]),
        RougeScorer(KINDS, use_stemmer=True),
    )
    assert found["tokenizer"] == "rouge_score: a-z and 0-9"
    score = scorer.score(english[0], "They went home to Zürich: 回家")
    assert {kind: found[kind] for kind in KINDS} == {kind: score[kind].fmeasure for kind in KINDS}
    mixed = rouge(["The cats sat", "猫在这里"], [["The cat sat"], ["猫在这里"]])
    # and a to z are stemmed as before
    assert mixed["tokenizer"].startswith("unicode") and mixed["rougeL"] == 1
    assert rouge(["1 234 “quoted” — 5 €"], [["1 234 quoted 5"]])["tokenizer"].startswith(
        "rouge_score"
    )


def test_a_text_in_another_script_among_many_in_english():
    english = "the cat sat " * 500
    found = rouge(["今天很好", english, "a b c d"], [["今天天气很好"], [english], ["a x c d"]])
    # 今天 and 很好 of four characters and six; the others as the package scores them.
    assert found["items"] == pytest.approx([2 * 4 / (4 + 6), 1, 3 / 4])
    assert found["tokenizer"].startswith(
        "rouge_score: a-z and 0-9; of 1 texts in other scripts, unicode"
    )
    # Neither a name within an English text nor an answer in another script changes what cuts it.
    alone = rouge([english, "a 天 c d"], [[english], ["a 天 c d"]])
    assert alone["tokenizer"] == "rouge_score: a-z and 0-9" and alone["items"] == [1, 1]
