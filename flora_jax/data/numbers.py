"""Numbers in texts: the last one of a rationale or a generated answer, and whether two are equal."""

from __future__ import annotations

import math
import re

# A fraction or date, left as it stands; or a number: thousands joined by commas, decimals, an exponent.
_VALUE = r"\d+(?:/\d+)+|(?:\d{1,3}(?:,\d{3})+(?![\d]|,\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+"
# Not inside a word, a decimal, or another number; ordinals (3rd) count nothing, but for one that is called the answer.
_NUMBER = re.compile(rf"(?<![\w.])(?P<value>{_VALUE})(?!\d|(?:st|nd|rd|th)\b)")
_ORDINAL = re.compile(r"(?i:\banswer(?:\s+is|\s*[:=])\s*(?:the\s+)?|#### *)(?P<value>\d+)(?:st|nd|rd|th)\b")
_SPACED_SIGN = re.compile(r"[=(+*/]\s*[-−–] $")  # "= - 7"; elsewhere "- 7" is a list's item or a subtraction
# LaTeX's 1{,}234 and \frac{1}{2}, as plain text has them.
_LATEX = ((re.compile(r"(?<=\d)\{,\}(?=\d)"), ","), (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"))

_CURRENCIES = "$€£"  # which may stand between a number and its sign

_TOLERANCE = 1e-3  # of LLM-Adapters: answers there are rounded to two or three decimals


def final_number(text: str) -> str | None:
    """The last number of `text` as written, without thousands' commas and with its sign: "It is −1,234.50 $." gives
    "-1234.50". A fraction comes back whole ("3/4"). None without any."""
    for written, plain in _LATEX:
        text = written.sub(plain, text)
    found = [*_NUMBER.finditer(text), *_ORDINAL.finditer(text)]
    if not found:
        return None
    last = max(found, key=lambda match: match.start("value"))
    before = _without_currency(text[: last.start("value")])
    return ("-" if _is_signed(before) else "") + last["value"].replace(",", "")


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
