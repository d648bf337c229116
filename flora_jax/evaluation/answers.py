"""The final answer in a generated text: a number, an option letter, or a label word, and whether it
is right.

The evaluation scripts of LLM-Adapters set the protocol, and these of its faults are mended here
(`published` has them):

- commas are deleted before numbers are read, so "1,2" is 12; here only thousands are joined
  ("1,234");
- every hyphen before a digit is a sign, so "5-3" ends in −3; here it is one only where nothing is
  subtracted from; a true minus sign (−) is not read there;
- digits inside words are answers ("answer2" is 2, "the 3rd" is 3), and so is half of a fraction
  ("3/4" is 4);
- a text without any number is infinity, which is compared like a number; here it is None and wrong;
- the option letter is the first capital A to E of any word, so "Because …" is B and "A train …" is
  A;
- a label is the first mention of any, as a substring: "answer1 is wrong, so answer2" is answer1,
  "untrue" is true.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from flora_jax.data.numbers import final_number, read_answer, same_number
from flora_jax.errors import UserError


def final_letter(text: str) -> str | None:
    """The option letter that `text` settles on, or None: behind "answer is" (the last time), or
    else what it begins with ("B", "B. 12", "b) 12"), or else the last one in brackets, after
    "option" or before "is correct" or "is the answer". Options listed in order, "(A) 1 (B) 2 (C) 3
    …", are repeated from the question and do not count; nor does one behind "not", nor what stands
    behind a next question."""
    return read_answer(text, _letter)


def _letter(text: str) -> str | None:
    letters = "ABCDE"
    one = f"[{letters}]"
    # Behind "answer is" a bare letter must end there: in "the answer is A train" it is an article.
    ends = r"\W*$|[).:,;*'\"]|\s*\n|\s+\(|\s+(?:because|since|as|and)\b"
    stated = (
        r"(?i:(?:answer(?:\s+(?:choice|option))?|(?:correct|right|best)\s+(?:choice|option))"
        r"\s*(?:is|would be|:|=)(?:\s+(?:therefore|thus|then))?[\s:*$'\"]*(?:option\s+)?)"
        rf"(?:[(\[](?P<bracketed>(?i:{one}))[)\]]|(?P<bare>{one})(?={ends}))"
    )
    found = [match["bracketed"] or match["bare"] for match in re.finditer(stated, text)]
    if found:
        return found[-1].upper()
    # "A: …" may be who speaks, and counts where nothing else does.
    begins = re.match(rf"\W*(?:({one})(?:\W*$|\.\s)|([{letters[1:]}]):\s)", text)
    if begins:
        return begins[begins.lastindex]
    bracketed = rf"\b({one})[)}}\]]"
    said = (
        rf"(?i:\b(?:option|choice)\s+)({one})\b",
        rf"\b({one})(?=\s+is\s+(?:the\s+)?(?:correct|right|answer)\b)",
    )
    ways = [rf"(?<!\b[Nn]ot )(?<!\b[Nn]ot [(\[]){way}" for way in (bracketed, *said)]
    marks: list[str] = []
    listed: list[str] = []
    for match in re.finditer("|".join(ways), text):
        if match.lastindex == 1:
            listed.append(match[1])
        else:
            marks += [*_without_lists(listed, letters), match[match.lastindex]]
            listed = []
    marks += _without_lists(listed, letters)
    if marks:
        return marks[-1]
    # "b) 12" is an answer, "a) 1 b) 2" a list.
    opening = re.match(
        rf"\W*(?:((?i:{one}))\)(?!.*(?<!\w)(?i:{one})\))|({one}):\s)", text, re.DOTALL
    )
    return opening[opening.lastindex].upper() if opening else None


def _without_lists(marks: list[str], letters: str) -> list[str]:
    """`marks` without runs of at least three that count up from the first letter."""
    kept: list[str] = []
    run: list[str] = []
    for mark in [*marks, ""]:
        if mark != "" and mark == letters[len(run) : len(run) + 1]:
            run.append(mark)
            continue
        if len(run) < 3:
            kept += run
        run = [mark] if mark == letters[0] else []
        if mark and not run:
            kept.append(mark)
    return kept


def final_label(text: str, labels: Sequence[str]) -> str | None:
    """The label word (one of `labels`, any case, as a whole word) that `text` settles on: the last
    behind "answer is", or else the last mentioned. What lists them in order, "Answer1: cat Answer2:
    dog" or "answer1/answer2", is repeated from the question and does not count; nor does one behind
    "not", nor what stands behind a next question."""
    return read_answer(text, functools.partial(_label, labels=labels))


def _label(text: str, labels: Sequence[str]) -> str | None:
    words = "|".join(map(re.escape, labels))
    mention = (
        rf"(?P<stated>\banswer\s*(?:is|:)\W*)?\b(?<!\bnot )(?P<label>{words})\b\s*(?P<mark>[:/]?)"
    )
    order = [label.lower() for label in labels]
    # of (which label, whether "answer is" stands before it)
    lists: list[list[tuple[int, bool]]] = []
    goes_on = False
    for match in re.finditer(mention, text, re.IGNORECASE):
        which = order.index(match["label"].lower())
        stated = match["stated"] is not None
        if goes_on and not stated and which == lists[-1][-1][0] + 1:
            lists[-1].append((which, stated))
        else:
            lists.append([(which, stated)])
        # "The answer is answer1: cat" is no list's beginning, "the answer is answer1/answer2" is
        # one.
        goes_on = match["mark"] == "/" or (match["mark"] == ":" and not stated)
    alone = [one[0] for one in lists if len(one) == 1]
    found = [which for which, stated in alone if stated] or [which for which, _ in alone]
    return labels[found[-1]] if found else None


def is_right(metric: str, text: str, answer: str, labels: Sequence[str] = ()) -> bool:
    """Whether the generated `text` gives `answer`, by a task's metric: 'number', 'letter', 'choice'
    (a label word of `labels`) or 'exact' (the same text but for spaces around it)."""
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
