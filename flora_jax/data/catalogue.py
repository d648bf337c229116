"""The tasks in the TFDS catalogue: names, splits, and how an element becomes a file's record.

Multiple-choice elements are worded as in LLM-Adapters' files. Like those files, a task is tested on
the official validation split if the official test split has no answers.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flora_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """A task's place in the TFDS catalogue."""

    name: str
    splits: Mapping[str, str]  # our split -> the official one
    # element -> the record that a file would hold, or None to leave the element out
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]


def _compose(
    question: str,
    choices: Sequence[str],
    gold: Any,
    *,
    ask: str = "Please choose the correct answer to the question",
    label: str = "answer",
    between: str = " ",
    end: str = "\n\n",
) -> dict[str, str]:
    """An LLM-Adapters record of a question; without choices the answer is true or false.

    gold: the index of the right answer; between, end: what separates and follows the choices.
    """
    labels = [f"{label}{i}" for i in range(1, len(choices) + 1)] or ["true", "false"]
    require(
        isinstance(gold, int) and 0 <= gold < len(labels),
        f"field 'label' is {gold!r}; it must be the index of one of {len(labels)} {label}s",
    )
    listed = ""
    if choices:
        marked = zip(labels, choices, strict=True)
        listed = between.join(f"{mark.capitalize()}: {choice}" for mark, choice in marked) + end
    prompt = f"{ask}: {question}\n\n{listed}Answer format: {'/'.join(labels)}"
    return {"instruction": prompt, "input": "", "output": "", "answer": labels[gold]}


compose_ending = functools.partial(
    _compose, ask="Please choose the correct ending to complete the given sentence", label="ending"
)


def _arc(element: Mapping[str, Any]) -> dict[str, str]:
    choices = element["choices"]
    key = element["answerKey"]
    labels = [choice["label"] for choice in choices]
    known = ", ".join(map(str, labels))
    require(key in labels, f"field 'answerKey' is {key!r}; the choices are {known}")
    return _compose(element["question"], [choice["text"] for choice in choices], labels.index(key))


def _openbookqa(element: Mapping[str, Any]) -> dict[str, str]:
    question = element["question"]
    return _compose(
        question["stem"], [question[f"choice_{letter}"] for letter in "ABCD"], element["answerKey"]
    )


def _piqa(element: Mapping[str, Any]) -> dict[str, str]:
    ask = "Please choose the correct solution to the question"
    solutions = [element["sol1"], element["sol2"]]
    return _compose(
        element["goal"], solutions, element["label"], ask=ask, label="solution", between="\n\n"
    )


def _winogrande(element: Mapping[str, Any]) -> dict[str, str]:
    ask = "Please choose the correct answer to fill in the blank to complete the given sentence"
    options = [element["option1"], element["option2"]]
    return _compose(
        element["sentence"], options, element["label"], ask=ask, label="option", end=" "
    )


def _boolq(element: Mapping[str, Any]) -> dict[str, str]:
    """BoolQ without its passage, as LLM-Adapters asks it."""
    ask = "Please answer the following question with true or false, question"
    return _compose(f"{element['question']}?", (), 0 if element["answer"] else 1, ask=ask)


def hellaswag(element: Mapping[str, Any]) -> dict[str, Any]:
    """HellaSwag's layout of one context, without WikiHow's marks ([header], [title], …)."""

    def plain(text: str) -> str:
        text = re.sub(r"\[(?:header|title|step|substeps?)\]", "", text.replace(" [title]", ". "))
        return text.replace("  ", " ").strip()

    return {
        "activity_and_ctx": plain(f"{element['activity_label']}: {element['context']}"),
        "endings": [*map(plain, element["endings"])],
        "label": element["label"],
    }


def _unless_empty(element: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The element, or None if a text is empty: a user cannot mend a data set of the catalogue."""
    return element if all(text.strip() for text in element.values()) else None


_OFFICIAL = MappingProxyType({split: split for split in ("train", "validation", "test")})
_TESTED = MappingProxyType({"train": "train", "test": "validation"})

CATALOGUE: Mapping[str, Catalogue] = MappingProxyType(
    {
        "ARC-Easy": Catalogue("ai2_arc/ARC-Easy", _OFFICIAL, _arc),
        "ARC-Challenge": Catalogue("ai2_arc/ARC-Challenge", _OFFICIAL, _arc),
        "piqa": Catalogue("piqa", _TESTED, _piqa),
        "openbookqa": Catalogue("openbookqa", _OFFICIAL, _openbookqa),
        "boolq": Catalogue("bool_q", _TESTED, _boolq),
        # The largest of its training splits; the others are parts of it.
        "winogrande": Catalogue("winogrande", {**_TESTED, "train": "train_xl"}, _winogrande),
        "hellaswag": Catalogue("hellaswag", _TESTED, hellaswag),
        "gsm8k": Catalogue("gsm8k", {"train": "train", "test": "test"}, dict),
        "samsum": Catalogue("samsum", _OFFICIAL, _unless_empty),
        "xsum": Catalogue("xsum", _OFFICIAL, _unless_empty),
        "cnn_dailymail": Catalogue("cnn_dailymail", _OFFICIAL, _unless_empty),
    }
)
