"""ROUGE of generated texts against the package's own numbers and against sums done by hand."""

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from flora_jax.evaluation.rouge import KINDS, rouge

TEXTS = ["The cats were sitting on the mat.\nIt rained.", "nothing at all", "", "a b c d"]
REFERENCES = [
    ["The cat sat on the mat.\nIt was raining.", "A cat sits."], ["something else"], ["silence"], ["a x c d", "a b"],
]  # fmt: skip


def test_means_and_best_are_those_of_the_package():
    found, scorer = rouge(TEXTS, REFERENCES), RougeScorer(KINDS, use_stemmer=True)
    for kind in KINDS:
        pairs = zip(TEXTS, REFERENCES, strict=True)
        each = [[scorer.score(r, text)[kind].fmeasure for r in own] for text, own in pairs]
        assert found[kind] == pytest.approx(np.mean([np.mean(own) for own in each]))
        assert found[f"{kind}_max"] == pytest.approx(np.mean([max(own) for own in each]))
        deviation = np.std([np.mean(own) for own in each], ddof=1)
        assert found[f"{kind}_stderr"] == pytest.approx(deviation / math.sqrt(4))
    assert found["items"] == pytest.approx([np.mean([scorer.score(r, t)["rougeL"].fmeasure for r in own])
                                            for t, own in zip(TEXTS, REFERENCES, strict=True)], abs=1e-6)  # fmt: skip


def test_by_hand():
    """Three of four words are shared, two of three pairs; against the second reference both of its two words."""
    found = rouge(["a b c d"], [["a x c d"]])
    assert found["rouge1"] == pytest.approx(3 / 4) and found["rouge2"] == pytest.approx(1 / 3)
    assert found["rougeL"] == pytest.approx(3 / 4) and found["rougeL_stderr"] == 0
    two = rouge(["a b c d"], [["a x c d", "a b"]])
    assert two["rouge1"] == pytest.approx((3 / 4 + 2 / 3) / 2) and two["rouge1_max"] == pytest.approx(3 / 4)
    # Stemming: cats and cat are one word. Lsum joins what separate lines share, L does not cross their order.
    assert rouge(["cats"], [["cat"]])["rouge1"] == 1
    turned = rouge(["one two\nthree four"], [["three four\none two"]])
    assert turned["rougeLsum"] == pytest.approx(1) and turned["rougeL"] == pytest.approx(1 / 2)
