"""ROUGE of generated texts, by Google's `rouge-score` package with Porter stemming.

A text is scored against each of its references. `rouge1`, `rouge2`, `rougeL` and `rougeLsum` (summary level: lines are
sentences) are F-measures averaged over a text's references; the same with `_max` take the best reference.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
POLICY = "F-measure with stemming; mean over the references of a text, _max: the best of them"


def rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Means over the texts of each kind, `<kind>_max`, and `<kind>_stderr` (standard deviation over sqrt(n)); `items`:
    the rougeL of each text."""
    # nltk, which it imports, needs a folder for what it might download, even where there is no home directory.
    if os.path.expanduser("~") == "~":
        os.environ.setdefault("NLTK_DATA", tempfile.gettempdir())
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(KINDS, use_stemmer=True)
    scores = [[scorer.score(target, text) for target in own] for text, own in zip(texts, references, strict=True)]
    result = {}
    for kind in KINDS:
        each = [[score[kind].fmeasure for score in own] for own in scores]
        means = np.array([np.mean(own) for own in each])
        result[kind] = float(means.mean())
        result[f"{kind}_max"] = float(np.mean([max(own) for own in each]))
        result[f"{kind}_stderr"] = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else 0.0
        if kind == "rougeL":
            result["items"] = [round(float(mean), 6) for mean in means]
    return result
