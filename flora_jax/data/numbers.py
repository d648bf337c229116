"""Numbers in texts: the last one of a rationale or a generated answer, and whether two are equal.

Separators of thousands are read as people write them: 1,234 and 12,34,567 (Indian), 1 234 (any kind
of space), 1'234, 1_234 and, with two or more of them, 1.234.567. A single "1.234" is a decimal, as
in English. A comma is decimal only if another sign separates the thousands (1.234,56 and 1 234,56);
"1,5" is two numbers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

_GAPS = " \u00a0\u2007\u2009\u202f'’_"
_FRACTION = r"\d+(?:/\d+)+"  # Or a date; both stay as they are.
_GROUPED = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?!\d|,\d)(?:\.\d+)?"
# But "2 500ml bottles" and "2 100-page books" are a count and a size. No size begins with 0.
_GAPPED = (
    r"(?!\d+ [1-9]\d\d-?[A-Za-z])"
    rf"(?P<gapped>[1-9]\d{{0,2}}(?P<gap>[{_GAPS}])\d{{3}}(?:(?P=gap)\d{{3}})*(?!(?P=gap)?\d)"
    r"(?:\.\d+|,\d{1,2}(?![\d,]))?)"
)
_DOTTED = (
    r"(?P<dotted>[1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?!\d|\.\d)(?:,\d+)?|\.\d{3},\d{1,2}(?![\d,])))"
)
_WHOLE = rf"(?:{_GROUPED}|{_GAPPED}|{_DOTTED}|\d+(?:\.\d+)?)(?:[eE][+-]?\d+)?"
_VALUE = rf"(?:{_FRACTION}|{_WHOLE}|\.\d+)"
# What stands before a number that is called the answer.
_STATED = (
    r"(?:(?i:\banswer\s*(?:(?:is|would\s+be)\s*+[:=]?|[:=]))|####|\\boxed\{)"
    r"[\s*$'\"({−–-]*+(?i:the\s+)?[*$]*"
)
# Not inside a word, a decimal, or another number. An ordinal (3rd) is read only if it is called the
# answer.
_NUMBER = re.compile(rf"(?<![\w.])(?P<value>(?>{_VALUE}))(?!\d|(?:st|nd|rd|th)\b)")
_ORDINAL = re.compile(rf"{_STATED}(?P<value>\d+(?:,\d{{3}})*)(?:st|nd|rd|th)\b")
# The numbers of a remark are no answer: "18 (see step 2)" is 18. Brackets that point elsewhere are
# a remark. Behind what is called the answer, or a number that begins the text, so are any brackets
# with words in them, and the rest of a line from "as" or "see" on.
_PLACES = "step|line|equation|eq|part|section|figure|table|page|note"
_POINTS = rf"(?i:see\b|cf\b|(?:[a-z]+ +){{0,3}}(?:{_PLACES})s?\.? *[(#]?\d)"
_BRACKETED = r"(?:[^()\[\]=]|\([^()=]*\))*[)\]]"
_POINTER = re.compile(rf"[(\[] *{_POINTS}{_BRACKETED}")
_REMARK = re.compile(
    rf"((?:{_STATED}|\A\W*)(?>{_VALUE})[^\d()\[\]=+*/×÷\n]{{0,30}}?)"
    rf"(?:\((?=[^()=]*[^\W\d]){_BRACKETED}|\[{_BRACKETED}|\b(?:as\b|{_POINTS})[^\n=]*)"
)
# "= - 7"; elsewhere "- 7" is a list item or a subtraction.
_SPACED_SIGN = re.compile(r"[=(+*/]\s*[-−–] $")
# LaTeX's 1{,}234, 1,\!234, 1\,234 and \frac{1}{2} become plain text.
_LATEX = (
    (re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d)"), ","),
    (re.compile(r"(?<=\d)\\[,;: ](?=\d)"), "\u2009"),
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
)
# What begins another question: some models answer, and then ask themselves the next one. The end of
# a turn and a user's turn (group `turn`) always do; the others may also head the question that was
# asked, in an answer that repeats it.
_ENDED = (
    "end|endoftext|end_of_text|end_of_turn|end▁of▁sentence|eot_id|eom_id|EOT|im_end|im_start"
    "|start_header_id"
)
_ASKS = "question|problem|exercise|example|task|input"
_NEXT = re.compile(
    rf"(?P<turn><[|｜](?:{_ENDED}|(?i:user|human))[|｜]>|</s>|<(?:end|start)_of_turn>|<eos>|\[INST\]"
    r"|#{1,8} *Instruction\b|^[*#> ]{0,8}(?:Instruction|Human|User|USER) *:)"
    r"|(?<![A-Za-z_])(?:(?:Question|QUESTION|Problem|PROBLEM|Exercise) *#?\d*|Q *\d*)\W{0,3}:"
    rf"|^[*#> ]{{0,8}}(?i:(?:next|new|another|follow-?up) +)?(?i:{_ASKS}) *#?\d*\W{{0,3}}:"
    r"|^[*#> ]{0,8}(?:(?:Question|Problem|Exercise) *#?|Q)\d+[.)]"
    r"|^[*#> ]{1,8}(?:Question|Problem|Exercise)\b"
    r"|(?<=\n)[ \t\r]{0,8}\n[*#> ]{0,8}(?:Question|Problem|Exercise)\b",
    re.MULTILINE,
)
_QUESTIONS = 16  # beginnings that are tried
# The text before a beginning states an answer if (1) it calls something the answer, directly behind
# "answer:" or within a few words of "answer is"; (2) it calls something right; (3) it, or a line
# headed as an answer, is little more than an answer; or (4) its last paragraph ends in a sum or a
# conclusion, and nothing after it is called the answer.
_CALLED = re.compile(
    r"(?i:\banswer(?: +(?:to|for|choice|option)\b[^\n.:=]{0,40}?)?\s{0,8}"
    r"|\b(?:correct|right|best) +(?:choice|option) *)"
    r"(?:(?i:is|was|would be)\b(?P<said>(?:[^\w\n]{0,8}[\w.]+){1,4})"
    r"|[:=](?P<set>(?:\W{0,8}[\w.]+){1,2}))"
    r"|####(?P<marked>\W{0,8}\w+)|(?P<boxed>\\boxed\{)"
)
_RIGHT = re.compile(r"((?:\S{1,40} ){0,2}\S{1,40}) is (?:the )?(?:correct|right|answer)\b")
_HEADED = re.compile(
    r"(?:^\W{0,4}(?:A|(?i:ans|answer|solution|response|result|output|assistant))\W{0,3}:|\A)"
    r"\W{0,8}(?P<line>\S[^\n]*)",
    re.MULTILINE,
)
_SUM = re.compile(
    r"\d[)%]?\s?[-−–+*/×÷x]\s?[$(]?\d[\d.,)%]{0,15}\s?=\s?[^\w\n=]{0,4}\d[^\n=]{0,60}$"
    r"|(?i:\b(?:so|thus|therefore|hence)\b)"
)
_LATER = re.compile(r"(?i:\banswer (?:is|would be)\b)|####|\\boxed\{")
_MODEL_TURN = re.compile(r"(?i:assistant|response|model\n)|\[/INST\]")

_CURRENCIES = "$€£₹¥"  # A sign may stand before or behind them.

_TOLERANCE = 1e-3  # LLM-Adapters': its answers are rounded to two or three decimals.


def read_answer(text: str, read: Callable[[str], str | None]) -> str | None:
    """What `read` finds in `text`, up to where the text goes on to another question.

    A question that nothing answers yet ("We have 5. Problem: find twice that.") is the one that was
    asked: what follows it is read, too. read: text -> its last answer, or None.
    """
    for match in itertools.islice(_NEXT.finditer(text), _QUESTIONS):
        before = text[: match.start()]
        if match["turn"]:
            answered = _turn_has_answer(before)
        else:
            answered = _states_answer(before, text[match.start() :], read)
        if answered and (found := read(before)) is not None:
            return found
    return read(text)


def _turn_has_answer(before: str) -> bool:
    """False if the text begins with the user's turn and the model's has not begun."""
    first = _NEXT.match(before.lstrip())
    return not (first and first["turn"]) or bool(_MODEL_TURN.search(before))


def _states_answer(before: str, behind: str, read: Callable[[str], str | None]) -> bool:
    """Whether `before` states an answer to the question that was asked ((1) to (4) above)."""
    if any(_calls_answer(match, read) for match in _CALLED.finditer(before)):
        return True
    if any(read(match[1]) is not None for match in _RIGHT.finditer(before)):
        return True
    last = before.rstrip()
    if any(_heads_answer(match, last, read) for match in _HEADED.finditer(last)):
        return True
    gap = before[len(last) :] + behind[: len(behind) - len(behind.lstrip())]
    ends = _SUM.search(last[last.rfind("\n") + 1 :])
    return bool(ends) and gap.count("\n") > 1 and not _LATER.search(behind)


def _calls_answer(match: re.Match[str], read: Callable[[str], str | None]) -> bool:
    """Whether what a match of `_CALLED` calls the answer begins with one."""
    words = (match[match.lastgroup] or "").split()
    starts = (" ".join(words[:n]) for n in range(1, len(words) + 1))
    return bool(match["boxed"]) or any(read(start) is not None for start in starts)


def _heads_answer(match: re.Match[str], text: str, read: Callable[[str], str | None]) -> bool:
    """Whether the line of a match of `_HEADED` is little more than an answer."""
    words = match["line"].split()
    if (match.end() < len(text) and len(words) > 1) or words[-1].endswith("?"):
        return False
    most = 12  # An option may have its text with it: "B. a red hat".
    if any(map(str.isdigit, words[0])):
        most = 4  # A number may have three words: "18 eggs a day".
    return len(words) <= most and read(words[0]) is not None


def final_number(text: str) -> str | None:
    """The last number of `text` before it goes on to another question; None without any.

    It is as written, with its sign but without separators of thousands: "It is −1,234.50 $." gives
    "-1234.50". A fraction stays one: "3/4".
    """
    return read_answer(text, _last_number)


def _last_number(text: str) -> str | None:
    for written, plain in _LATEX:
        text = written.sub(plain, text)
    text = _REMARK.sub(r"\1", _POINTER.sub("", text))
    found = [*_NUMBER.finditer(text), *_ORDINAL.finditer(text)]
    if not found:
        return None
    last = max(found, key=lambda match: match.start("value"))
    number = _without_thousands(last)
    if _is_signed(_without_currency(text[: last.start("value")])):
        return f"-{number}"
    return number


def _without_thousands(match: re.Match[str]) -> str:
    kinds = match.groupdict()
    if kinds.get("gapped"):
        return match["value"].replace(match["gap"], "").replace(",", ".")
    if kinds.get("dotted"):
        return match["value"].replace(".", "").replace(",", ".")
    return match["value"].replace(",", "")


def _without_currency(before: str) -> str:
    if before.endswith(tuple(_CURRENCIES)):
        return before[:-1]
    return before


def _is_signed(before: str) -> bool:
    """Whether the text before a number ends with its minus sign.

    A minus is no sign behind what the number could be taken from: a digit, a bracket, or directly
    behind a word ("COVID-19"). With a space between word and minus it is one ("is -5").
    """
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
    """Whether two numbers differ by at most 1e-3, so that "5" is "5.0".

    None equals nothing; what is no number (a fraction) equals only its own text.
    """
    if found is None:
        return False
    try:
        return abs(float(found) - float(answer.replace(",", ""))) <= _TOLERANCE
    except ValueError:
        return found == answer


def canonical_number(text: str) -> str:
    """`"576.0"`, `"1,080"` and `"- 7"` as `"576"`, `"1080"` and `"-7"`.

    Raises ValueError for what is no finite number.
    """
    text = text.replace(",", "").replace(" ", "")
    value = float(text)
    if not math.isfinite(value) or "_" in text:
        raise ValueError(text)
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if text.startswith("."):
        return f"0{text}"
    return text.replace("-.", "-0.")
