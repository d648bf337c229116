"""ROUGE of generated texts, by Google's `rouge-score` package with Porter stemming.

A text is scored against each of its references. `rouge1`, `rouge2`, `rougeL` and `rougeLsum`
(summary level: lines are sentences) are F-measures averaged over a text's references; the names
with `_max` take the best reference.

The package's tokenizer knows the letters a to z and the digits 0 to 9 alone and drops all else: a
Chinese text becomes empty, and "été" becomes "t". If a task's references lose more than a trace of
their letters, `UnicodeTokenizer` cuts all texts of the task instead. English texts with a foreign
name here and there keep the package's scores. A single text among them whose references would lose
more letters than they keep is also cut by `UnicodeTokenizer`.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
POLICY = "F-measure with stemming; mean over the references of a text, _max: the best of them"
# Of all languages with letters beyond a to z, German has the smallest share of them, 1.5 %; English
# news has 0.004 %.
_TRACE = 0.005

# Scripts that put no space between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, ideographs.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def _package() -> ModuleType:
    """rouge_score, imported where it is used: with nltk and scipy it takes seconds."""
    # nltk needs a folder for downloads, even without a home directory.
    if os.path.expanduser("~") == "~":
        os.environ.setdefault("NLTK_DATA", tempfile.gettempdir())
    from rouge_score import rouge_scorer

    return rouge_scorer


class UnicodeTokenizer:
    """Cuts a text into words of letters, marks and digits of any script, in lower case.

    Where a script has no spaces between words, each character (with its marks) is a word. Words of
    a to z and 0 to 9 are stemmed as the package stems them.
    """

    name = "unicode: words of any script; characters where it has no spaces between words"

    def __init__(self):
        self._ascii = _package().tokenizers.DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """The tokens of `text`."""
        pieces = []
        alone = False  # whether the character before stands alone
        for character in unicodedata.normalize("NFKC", text).lower():
            kind = unicodedata.category(character)
            if kind[0] in "LN":
                before = alone
                alone = bool(_UNSPACED.match(character))
                pieces.append(" " * (alone or before) + character)
            elif kind[0] == "M":
                pieces.append(character)
            elif kind != "Cf":  # joiners and soft hyphens stand inside words
                pieces.append(" ")
        tokens = []
        for word in "".join(pieces).split():
            if word.isascii():
                tokens += self._ascii.tokenize(word)
            else:
                tokens.append(word)
        return tokens


def choose_tokenizer(references: Sequence[Sequence[str]]) -> UnicodeTokenizer | None:
    """The tokenizer for all texts of a task, by its references; None: the package's own."""
    kept, dropped = np.sum([(0, 0), *map(_count_letters, references)], axis=0)
    if dropped > _TRACE * (kept + dropped):
        return UnicodeTokenizer()
    return None


def _count_letters(texts: Sequence[str]) -> tuple[int, int]:
    """How many letters, marks and digits of `texts` the package's tokenizer keeps, and how many it
    drops."""
    kept = dropped = 0
    for character in "".join(texts).lower():
        if character.isascii():
            kept += character.isalnum()
        else:
            dropped += unicodedata.category(character) in ("Ll", "Lo", "Lm", "Mn", "Mc", "Nd")
    return kept, dropped


def rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """ROUGE of each text against its references, from 0 to 1.

    Returns, for each of KINDS, the mean over the texts as `<kind>`, `<kind>_max` and
    `<kind>_stderr` (standard deviation over sqrt(n)), and also `items`, the rougeL of each text,
    and `tokenizer`, the name of what cut the texts.
    """
    tokenizer = choose_tokenizer(references)
    scorer = _package().RougeScorer(KINDS, use_stemmer=True, tokenizer=tokenizer)
    unicode = _package().RougeScorer(KINDS, tokenizer=UnicodeTokenizer())
    others = 0
    scores = []
    for text, own in zip(texts, references, strict=True):
        kept, dropped = _count_letters(own)
        its_scorer = scorer
        if tokenizer is None and dropped > kept:
            its_scorer = unicode
            others += 1
        scores.append([its_scorer.score(target, text) for target in own])
    name = "rouge_score: a-z and 0-9"
    if tokenizer is not None:
        name = tokenizer.name
    if others:
        name += f"; of {others} texts in other scripts, {UnicodeTokenizer.name}"
    result: dict[str, Any] = {"tokenizer": name}
    for kind in KINDS:
        each = [[score[kind].fmeasure for score in own] for own in scores]
        means = np.array([np.mean(own) for own in each])
        result[kind] = float(means.mean())
        result[f"{kind}_max"] = float(np.mean([max(own) for own in each]))
        error = 0.0
        if len(means) > 1:
            error = float(means.std(ddof=1) / math.sqrt(len(means)))
        result[f"{kind}_stderr"] = error
        if kind == "rougeL":
            result["items"] = [round(float(mean), 6) for mean in means]
    return result
