"""Numbers in texts: the last one of a rationale or a generated answer, and whether two are equal.

Thousands are joined as people write them: 1,234 and 12,34,567 (Indian), 1 234 (any kind of space), 1'234, 1_234 and,
from two groups on, 1.234.567. A comma is decimal only where another sign has parted the thousands (1.234,56 and
1 234,56): "1,5" may be two numbers, and is read as such; so may "1.234", which is read as English writes it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

_GAPS = " \u00a0\u2007\u2009\u202f'’_"
_VALUE = "(?:{})".format("|".join((
    r"\d+(?:/\d+)+",  # a fraction or date, left as it stands
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?!\d|,\d)(?:\.\d+)?"
    rf"|(?P<gapped>[1-9]\d{{0,2}}(?P<gap>[{_GAPS}])\d{{3}}(?:(?P=gap)\d{{3}})*(?!(?P=gap)?\d)"
    r"(?:\.\d+|,\d{1,2}(?![\d,]))?)"
    r"|(?P<dotted>[1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?!\d|\.\d)(?:,\d+)?|\.\d{3},\d{1,2}(?![\d,])))"
    r"|\d+(?:\.\d+)?)(?:[eE][+-]?\d+)?",
    r"\.\d+",
)))  # fmt: skip
# Behind it a number is called the answer.
_STATED = r"(?:(?i:\banswer\s*(?:(?:is|would\s+be)\s*+[:=]?|[:=]))|####|\\boxed\{)[\s*$'\"({−–-]*+(?i:the\s+)?[*$]*"
# Not inside a word, a decimal, or another number; ordinals (3rd) count nothing, but for one that is called the answer.
_NUMBER = re.compile(rf"(?<![\w.])(?P<value>(?>{_VALUE}))(?!\d|(?:st|nd|rd|th)\b)")
_ORDINAL = re.compile(rf"{_STATED}(?P<value>\d+(?:,\d{{3}})*)(?:st|nd|rd|th)\b")
# A remark holds no answer: "18 (see step 2)" is 18. It is one where it points elsewhere, in brackets; any is one behind
# what is called the answer, and behind what the text begins with.
_PLACES = "step|line|equation|eq|part|section|figure|table|page|note"
_POINTS = rf"(?i:see\b|cf\b|(?:[a-z]+ +){{0,3}}(?:{_PLACES})s?\.? *[(#]?\d)"
_BRACKETED = r"(?:[^()\[\]=]|\([^()=]*\))*[)\]]"
_POINTER = re.compile(rf"[(\[] *{_POINTS}{_BRACKETED}")
_REMARK = re.compile(
    rf"((?:{_STATED}|\A\W*)(?>{_VALUE})[^\d()\[\]=+*/×÷\n]{{0,30}}?)"
    rf"(?:\((?=[^()=]*[^\W\d]){_BRACKETED}|\[{_BRACKETED}|\b(?:as\b|{_POINTS})[^\n=]*)"
)
_SPACED_SIGN = re.compile(r"[=(+*/]\s*[-−–] $")  # "= - 7"; elsewhere "- 7" is a list's item or a subtraction
# LaTeX's 1{,}234, 1,\!234, 1\,234 and \frac{1}{2}, as plain text has them.
_LATEX = (
    (re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d)"), ","),
    (re.compile(r"(?<=\d)\\[,;: ](?=\d)"), "\u2009"),
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
)
# What begins another question, which some models ask themselves once they have answered.
_NEXT = re.compile(
    r"(?:^|(?<=[\s*#]))(?:(?:Question|QUESTION|Problem|PROBLEM|Exercise) *#?\d*|Q *\d*)\W{0,3}:"
    r"|^[*#> ]{0,8}(?i:question|problem|exercise|example|task) *#?\d*\W{0,3}:"
    r"|(?<=\n)[ \t\r]{0,8}\n[*#> ]{0,8}(?:Question|Problem|Exercise)\b"
    r"|#{1,8} *Instruction\b|^[*#> ]{0,8}(?:Instruction|Human|User|USER) *:|<\|im_start\|>|\[INST\]",
    re.MULTILINE,
)

_QUESTIONS = 8  # how many of them may have nothing before them
_CURRENCIES = "$€£₹¥"  # which may stand between a number and its sign

_TOLERANCE = 1e-3  # of LLM-Adapters: answers there are rounded to two or three decimals


def read_answer(text: str, read: Callable[[str], str | None]) -> str | None:
    """What `read` finds in `text` before another question begins there; where nothing is found before it, the question
    may be the one that was asked, and what follows is read, too."""
    ends = [match.start() for match in itertools.islice(_NEXT.finditer(text), _QUESTIONS)]
    found = (read(text[:end]) for end in (*ends, len(text)))
    return next((answer for answer in found if answer is not None), None)


def final_number(text: str) -> str | None:
    """The last number of `text`, before it goes on to another question, as written, without thousands' signs and with
    its own: "It is −1,234.50 $." gives "-1234.50". A fraction comes back whole ("3/4"). None without any."""
    return read_answer(text, _last_number)


def _last_number(text: str) -> str | None:
    for written, plain in _LATEX:
        text = written.sub(plain, text)
    text = _REMARK.sub(r"\1", _POINTER.sub("", text))
    found = [*_NUMBER.finditer(text), *_ORDINAL.finditer(text)]
    if not found:
        return None
    last = max(found, key=lambda match: match.start("value"))
    before = _without_currency(text[: last.start("value")])
    return ("-" if _is_signed(before) else "") + _without_thousands(last)


def _without_thousands(match: re.Match[str]) -> str:
    kinds = match.groupdict()
    if kinds.get("gapped"):
        return match["value"].replace(match["gap"], "").replace(",", ".")
    if kinds.get("dotted"):
        return match["value"].replace(".", "").replace(",", ".")
    return match["value"].replace(",", "")


def _without_currency(before: str) -> str:
    return before[:-1] if before and before[-1] in _CURRENCIES else before


def _is_signed(before: str) -> bool:
    """Whether the text before a number ends with its sign: a minus that does not stand behind what it could take the
    number from, a digit, a word's end ("COVID-19") or a bracket. After a word and a space it is a sign ("is -5")."""
    if _SPACED_SIGN.search(before):
        return True
    if not before or before[-1] not in "-−–":
        return False
    rest = _without_currency(before[:-1])
    taken_from = rest.rstrip(" \t")
    if not taken_from or taken_from[-1] in f"-−–+*/=(:,{_CURRENCIES}\n":
        return True
    if taken_from[-1].isdigit() or taken_from[-1] in ")]%":
        return False
    return len(taken_from) < len(rest) or not taken_from[-1].isalnum()


def same_number(found: str | None, answer: str) -> bool:
    """Whether two numbers are equal within 1e-3, so that "5" is "5.0". What is no number (None, a fraction) is equal
    to nothing but its own text."""
    if found is None:
        return False
    try:
        return abs(float(found) - float(answer.replace(",", ""))) <= _TOLERANCE
    except ValueError:
        return found == answer


def canonical_number(text: str) -> str:
    """`"576.0"`, `"1,080"` and `"- 7"` as `"576"`, `"1080"` and `"-7"`; a ValueError if it is no number."""
    text = text.replace(",", "").replace(" ", "")
    value = float(text)
    if not math.isfinite(value) or "_" in text:
        raise ValueError(text)
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return text.replace("-.", "-0.") if not text.startswith(".") else "0" + text
