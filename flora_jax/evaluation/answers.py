"""The final answer in a generated text: a number, an option letter, or a label word, and whether it is right.

The evaluation scripts of LLM-Adapters set the protocol, and these of its faults are mended here (`published` has them):

- commas are deleted before numbers are read, so "1,2" is 12; here only thousands are joined ("1,234");
- every hyphen before a digit is a sign, so "5-3" ends in −3; here it is one only where nothing is subtracted from;
  a true minus sign (−) is not read there;
- digits inside words are answers ("answer2" is 2, "the 3rd" is 3), and so is half of a fraction ("3/4" is 4);
- a text without any number is infinity, which is compared like a number; here it is None and wrong;
- the option letter is the first capital A to E of any word, so "Because …" is B and "A train …" is A;
- a label is the first mention of any, as a substring: "answer1 is wrong, so answer2" is answer1, "untrue" is true.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from flora_jax.data.numbers import final_number, same_number
from flora_jax.errors import UserError


def final_letter(text: str, letters: str = "ABCDE") -> str | None:
    """The option letter that `text` settles on, or None: behind "answer is" (the last time), or else what it begins
    with ("B", "B. 12"), or else the last one in brackets or after "option". Options listed in order, "(A) 1 (B) 2
    (C) 3 …", are repeated from the question and do not count."""
    one = f"[{letters}]"
    # Behind "answer is" a bare letter must end there: in "the answer is A train" it is an article.
    stated = (
        r"(?i:answer(?:\s+(?:choice|option))?\s*(?:is|would be|:|=)[\s:*$]*(?:option\s+)?)"
        rf"(?:\((?P<bracketed>(?i:{one}))\)|(?P<bare>{one})(?=\W*$|[).:,;*]|\s*\n|\s+(?:because|since|as)\b))"
    )
    found = [match["bracketed"] or match["bare"] for match in re.finditer(stated, text)]
    if found:
        return found[-1].upper()
    begins = re.match(rf"\W*({one})(?:\W*$|[.:]\s)", text)
    if begins:
        return begins[1]
    named = re.finditer(rf"\b({one})[)}}]|(?i:\b(?:option|choice)\s+)({one})\b", text)
    marks = _without_lists([match[1] or match[2] for match in named], letters)
    return marks[-1] if marks else None


def _without_lists(marks: list[str], letters: str) -> list[str]:
    """`marks` without runs of at least three that count up from the first letter."""
    kept, run = [], []
    for mark in [*marks, ""]:
        if mark != "" and mark == letters[len(run) : len(run) + 1]:
            run.append(mark)
            continue
        kept += run if len(run) < 3 else []
        run = [mark] if mark == letters[0] else []
        kept += [mark] if mark and not run else []
    return kept


def final_label(text: str, labels: Sequence[str]) -> str | None:
    """The label word (one of `labels`, any case, as a whole word) that `text` settles on: the last behind "answer is",
    or else the last mentioned. A label before a colon heads a repeated choice ("Answer1: …") and does not count."""
    word = rf"\b({'|'.join(map(re.escape, labels))})\b(?!\s*:)"
    stated = re.findall(rf"answer\s*(?:is|:)\W*{word}", text, re.IGNORECASE)
    found = stated or re.findall(word, text, re.IGNORECASE)
    return next(label for label in labels if label.lower() == found[-1].lower()) if found else None


def is_right(metric: str, text: str, answer: str, labels: Sequence[str] = ()) -> bool:
    """Whether the generated `text` gives `answer`, by a task's metric: 'number', 'letter', 'choice' (a label word of
    `labels`) or 'exact' (the same text but for spaces around it)."""
    match metric:
        case "number":
            return same_number(final_number(text), answer)
        case "letter":
            return final_letter(text) == answer
        case "choice":
            return final_label(text, labels) == answer
        case "exact":
            return text.strip() == answer.strip()
    raise UserError(f"metric {metric!r} is unknown; known: choice, exact, letter, number")
