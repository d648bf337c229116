"""The final answer in a generated text: a number, an option letter, or a label word, and whether it
is right.

The evaluation scripts of LLM-Adapters set the protocol. This module mends these of their faults
(`published` keeps them):

- they delete commas before they read numbers, so "1,2" is 12; here only thousands are joined
  ("1,234");
- every hyphen before a digit is a sign, so "5-3" ends in −3; here it is a sign only where there is
  nothing to subtract from. They do not read a true minus sign (−);
- digits inside words are answers ("answer2" is 2, "the 3rd" is 3), and so is half of a fraction
  ("3/4" is 4);
- a text without any number is infinity and compared like a number; here it is None and wrong;
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
    """The option letter that `text` settles on, or None.

    That is the letter behind the last "answer is". Without one, it is the letter that begins the
    text ("B", "B. 12", "b) 12"), or else the last one in brackets, after "option" or before "is
    correct" or "is the answer". Options listed in order, "(A) 1 (B) 2 (C) 3 …", repeat the question
    and do not count. Neither does a letter behind "not", nor anything behind a next question.
    """
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
    # "A: …" may name a speaker, so it counts only where nothing else does.
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
    if opening:
        return opening[opening.lastindex].upper()
    return None


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
        run = []
        if mark == letters[0]:
            run.append(mark)
        elif mark:
            kept.append(mark)
    return kept


def final_label(text: str, labels: Sequence[str]) -> str | None:
    """The label word (one of `labels`, any case, as a whole word) that `text` settles on, or None.

    That is the last label behind "answer is", or else the last one mentioned. Labels listed in
    order, "Answer1: cat Answer2: dog" or "answer1/answer2", repeat the question and do not count.
    Neither does a label behind "not", nor anything behind a next question.
    """
    return read_answer(text, functools.partial(_label, labels=labels))


def _label(text: str, labels: Sequence[str]) -> str | None:
    words = "|".join(map(re.escape, labels))
    mention = (
        rf"(?P<stated>\banswer\s*(?:is|:)\W*)?\b(?<!\bnot )(?P<label>{words})\b\s*(?P<mark>[:/]?)"
    )
    order = [label.lower() for label in labels]
    # Of pairs: the label's index, and whether "answer is" stands before it.
    lists: list[list[tuple[int, bool]]] = []
    goes_on = False
    for match in re.finditer(mention, text, re.IGNORECASE):
        which = order.index(match["label"].lower())
        stated = match["stated"] is not None
        if goes_on and not stated and which == lists[-1][-1][0] + 1:
            lists[-1].append((which, stated))
        else:
            lists.append([(which, stated)])
        # "The answer is answer1/answer2" begins a list, "the answer is answer1: cat" does not.
        goes_on = match["mark"] == "/" or (match["mark"] == ":" and not stated)
    alone = [one[0] for one in lists if len(one) == 1]
    found = [which for which, stated in alone if stated] or [which for which, _ in alone]
    if not found:
        return None
    return labels[found[-1]]


def is_right(metric: str, text: str, answer: str, labels: Sequence[str] = ()) -> bool:
    """Whether the generated `text` gives `answer`, by a task's metric.

    metric: 'number', 'letter', 'choice' (a label word of `labels`) or 'exact' (the same text but
    for spaces around it). Raises UserError for any other.
    """
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
