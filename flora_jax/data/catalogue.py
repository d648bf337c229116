"""What the TFDS catalogue has of the tasks: names, splits, and elements as the records of files.

Multiple-choice elements get the wording of LLM-Adapters' files, whose test sets are official
validation splits where the official test has no answers.
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
    splits: Mapping[str, str]  # which official split each of ours is
    # makes the record that a file would hold of an element; None leaves an element out
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
    """What tasks.py takes apart: a question as LLM-Adapters words it, or true/false."""
    labels = [f"{label}{i}" for i in range(1, len(choices) + 1)] or ["true", "false"]
    require(
        isinstance(gold, int) and 0 <= gold < len(labels),
        f"field 'label' is {gold!r}; it must be the index of one of {len(labels)} {label}s",
    )
    marked = between.join(
        f"{mark.capitalize()}: {choice}" for mark, choice in zip(labels, choices, strict=False)
    )
    prompt = (
        f"{ask}: {question}\n\n{marked + end if choices else ''}Answer format: {'/'.join(labels)}"
    )
    return {"instruction": prompt, "input": "", "output": "", "answer": labels[gold]}


compose_ending = functools.partial(
    _compose, ask="Please choose the correct ending to complete the given sentence", label="ending"
)


def _arc(element: Mapping[str, Any]) -> dict[str, str]:
    choices, key = element["choices"], element["answerKey"]
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
    """Without its passage, as LLM-Adapters asks it."""
    ask = "Please answer the following question with true or false, question"
    return _compose(f"{element['question']}?", (), 0 if element["answer"] else 1, ask=ask)


def hellaswag(element: Mapping[str, Any]) -> dict[str, Any]:
    """HellaSwag without WikiHow's marks ([header], [title], …), which nobody reads as language."""

    def plain(text: str) -> str:
        text = re.sub(r"\[(?:header|title|step|substeps?)\]", "", text.replace(" [title]", ". "))
        return text.replace("  ", " ").strip()

    return {
        "activity_and_ctx": plain(f"{element['activity_label']}: {element['context']}"),
        "endings": [*map(plain, element["endings"])],
        "label": element["label"],
    }


def _unless_empty(element: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A text and its summary as they are; without either it is left out: nobody can mend it."""
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
        # Of its training splits the largest: the others are parts of it.
        "winogrande": Catalogue("winogrande", {**_TESTED, "train": "train_xl"}, _winogrande),
        "hellaswag": Catalogue("hellaswag", _TESTED, hellaswag),
        "gsm8k": Catalogue("gsm8k", {"train": "train", "test": "test"}, dict),
        "samsum": Catalogue("samsum", _OFFICIAL, _unless_empty),
        "xsum": Catalogue("xsum", _OFFICIAL, _unless_empty),
        "cnn_dailymail": Catalogue("cnn_dailymail", _OFFICIAL, _unless_empty),
    }
)
