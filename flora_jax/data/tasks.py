"""The task table: what a record of each data set asks, the right answer, and how it is scored.

A task is one row of `TASKS`. Adding one is one row, and a parse function if its records look like
nothing here. A parse function turns one record (a plain dict, as `sources` yields it) into an
`Example`, which holds everything that training and every evaluation protocol need; nothing
downstream looks at a record again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from flora_jax.data.numbers import canonical_number, final_number, same_number
from flora_jax.errors import UserError, near_misses, require

ROLES = ("system", "user", "assistant", "tool")
# what the name of a task ends in that is a file of people's own
OWN_FILES = (".jsonl", ".parquet")
# what the name of a task begins with that is a data set of the Hugging Face Hub
HUB = "hub:"
CONTAMINATED = 0.01  # the share of a test's questions that may be in the training data


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str
    trained: ClassVar[bool] = True
    more: ClassVar[str] = ""


@dataclasses.dataclass(frozen=True)
class Turn(Message):
    """A turn that says more."""

    trained: bool = True  # whether an assistant's counts in the loss
    # what else the chat template is given of it (`tool_calls`, …; a `content` of null): JSON
    more: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """One record, parsed; besides messages it has what its task has."""

    messages: tuple[Message, ...]  # the last is the assistant's target
    choices: tuple[str, ...] = ()  # the texts to choose from
    gold: int | None = None  # index of the right one
    # the gold answer as text: a number, a letter, a label word or a whole reply
    answer: str | None = None
    # all texts that a generated one is compared with; the first is the target
    references: tuple[str, ...] = ()
    question: str | None = None  # the question alone, without instructions and choices
    labels: tuple[str, ...] = ()  # the label word of each choice, e.g. answer1, solution2, true
    # (context, continuation) of each choice, as lm-eval scores it
    requests: tuple[tuple[str, str], ...] = ()
    # the functions that a conversation's assistant may call: a JSON list for the chat template
    tools: str = ""

    @functools.cached_property
    def prompt_digest(self) -> str:
        """sha256 of all before the answer, normalised: by which `dedupe` knows a prompt again."""
        return _digest(self.messages[:-1], self.tools)

    @functools.cached_property
    def digest(self) -> str:
        """`prompt_digest` of prompt and answer."""
        return _digest(self.messages, self.tools)


@dataclasses.dataclass(frozen=True)
class Generator:
    """What a generated (reasoning-gym) task draws.

    The sizes are those of the splits. `seed` moves the training draw alone, so that every run is
    tested on the same questions and trained on none of them.
    """

    dataset: str
    settings: Mapping[str, Any]
    train: int = 4000
    validation: int = 200
    test: int = 500
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """One row: `source` says how records are read ('records', 'texts', 'generated' or 'jsonl'),
    `metric` how an answer is scored ('choice', 'number', 'letter', 'rouge' or 'exact'), `parse`
    makes an `Example` of a record."""

    name: str
    source: str
    metric: str
    parse: Callable[[Mapping[str, Any]], Example]
    # split -> file, unless {split}.json(l)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # split -> its part of the file
    spans: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    generator: Generator | None = None
    # of a generated answer: room for reasoning before it, unless the answer stands alone
    new_tokens: int = 256

    @property
    def is_file(self) -> bool:
        """Whether it is one file, named by its path."""
        return self.name.endswith(OWN_FILES) and not self.is_hub

    @property
    def is_hub(self) -> bool:
        """Whether it is a data set of the Hugging Face Hub."""
        return self.name.startswith(HUB)


# ------------------------------------------------------------------------------------------ parsing

_OPERATORS = frozenset("-+*/=()<>%^[]{}&|~#")
_SAME = str.maketrans("−×÷", "-*/")


@functools.lru_cache(maxsize=4096)
def _tells_apart(token: str) -> bool:
    """Whether a word, a number or a single sign makes another prompt of it.

    All but ASCII's and Unicode's punctuation do. Marks are what Indic vowels are written with.
    """
    if len(token) > 1 or token.isalnum() or token in _OPERATORS:
        return True
    kind = unicodedata.category(token)[0]
    return kind == "M" or (kind == "S" and not token.isascii())


def normalise(text: str) -> str:
    """The words, numbers, operators and symbols of `text` in lower case, spaced alike.

    `"It's 3.50 + 4 !"` is `"it s 3.50 + 4"`. Operators stay because a minus for a plus makes
    another sum.
    """
    text = unicodedata.normalize("NFC", text.lower()).translate(_SAME)
    return " ".join(filter(_tells_apart, re.findall(r"\d+(?:\.\d+)?|[^\W\d]+|[^\w\s]", text)))


def _instruction(record: Mapping[str, Any]) -> str:
    parts = (record["instruction"].strip(), record["input"].strip())
    return "\n".join(parts) if parts[1] else parts[0]


def _turns(prompt: str, target: str) -> tuple[Message, ...]:
    return Message("user", prompt), Message("assistant", target)


def _parse_choice(
    record: Mapping[str, Any], requests: Callable[..., Iterable[tuple[str, str]]]
) -> Example:
    """An LLM-Adapters multiple-choice record.

    It reads `…: QUESTION`, then `Answer1: … Answer2: …` (Solution, Option likewise), then `Answer
    format: answer1/answer2`; or it is a question with the answer format `true/false`.
    """
    prompt = _instruction(record)
    body, found, form = prompt.rpartition("Answer format:")
    require(found, "field 'instruction' has no line 'Answer format: …'")
    labels = tuple(form.strip().split("/"))
    question, choices = _split_choices(body.partition(": ")[2], labels)
    require(
        record["answer"] in labels,
        f"field 'answer' is {record['answer']!r}; the answer format allows {', '.join(labels)}",
    )
    gold = labels.index(record["answer"])
    return Example(
        messages=_turns(prompt, _label_target(labels[gold])),
        choices=choices,
        gold=gold,
        answer=labels[gold],
        question=question,
        labels=labels,
        requests=tuple(requests(question, choices)),
    )


def _split_choices(text: str, labels: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The question, and the text behind each label's mark."""
    if labels == ("true", "false"):
        return text.strip(), ("yes", "no")
    first, *others = (f"{label.capitalize()}:" for label in labels)
    start = text.rfind(first)
    rest = text[start + len(first) :] if start >= 0 else ""
    choices = []
    for mark in others:
        choice, found, rest = rest.partition(mark)
        require(
            found, f"field 'instruction' has no choice '{mark}' although the answer format names it"
        )
        choices.append(_between_marks(choice))
    return text[:start].strip(), (*choices, _between_marks(rest))


def _between_marks(text: str) -> str:
    """A choice without its separators alone: a data set's own trailing space is scored, too."""
    text = text.removeprefix(" ")
    return text.removesuffix("\n\n" if text.endswith("\n\n") else " ")


def _after(context: str, question: str, choices: Sequence[str]) -> list[tuple[str, str]]:
    """One context for all choices: `Question: {}\\nAnswer:` continued by each of them."""
    # boolq's harness prompt brings its own question mark; a record's own must not double it.
    question = question.rstrip(" ?") if "{}?" in context else question
    return [(context.format(question), f" {choice}") for choice in choices]


def _blank(sentence: str, choices: Sequence[str]) -> list[tuple[str, str]]:
    """Partial evaluation: each option fills the context's blank `_`, and the rest is scored."""
    before, found, after = sentence.partition("_")
    require(found, "field 'instruction' has no blank '_' to fill")
    return [(before + choice, f" {after.strip()}") for choice in choices]


def _choice(context: str) -> Callable[[Mapping[str, Any]], Example]:
    return functools.partial(_parse_choice, requests=functools.partial(_after, context))


def _parse_number(record: Mapping[str, Any]) -> Example:
    """A word problem.

    `output` is often a wrong rationale: it is the target only where it ends at the answer.
    """
    prompt = _instruction(record)
    try:
        answer = canonical_number(record["answer"])
    except ValueError:
        raise UserError(f"field 'answer' is {record['answer']!r}; it must be a number") from None
    rationale = record["output"].strip().removeprefix("A:").strip()
    right = same_number(final_number(rationale), answer)
    return Example(
        messages=_turns(prompt, rationale if right else f"The answer is {answer}."),
        answer=answer,
        question=prompt,
    )


def _parse_letter(record: Mapping[str, Any]) -> Example:
    """AQuA: `… Answer Choices: (A) … (B) … (E) …`, answered by a letter."""
    prompt = _instruction(record)
    question, _, options = prompt.partition("Answer Choices:")
    parts = re.split(r"\(([A-E])\)", options)
    letters, choices = parts[1::2], tuple(part.strip() for part in parts[2::2])
    require(
        letters and letters == list("ABCDE"[: len(letters)]),
        "field 'instruction' has no 'Answer Choices: (A) … (B) …' in order",
    )
    require(
        record["answer"] in letters,
        f"field 'answer' is {record['answer']!r}; it must be one of {', '.join(letters)}",
    )
    rationale = record["output"].strip()
    right = re.findall(r"\(([A-E])\)", rationale)[-1:] == [record["answer"]]
    return Example(
        messages=_turns(prompt, rationale if right else f"The answer is ({record['answer']})."),
        choices=choices,
        gold=letters.index(record["answer"]),
        answer=record["answer"],
        question=question.strip(),
    )


def _parse_generated(record: Mapping[str, Any]) -> Example:
    """A generated arithmetic problem; its prompt states the answer format, in training as well."""
    prompt = f"{record['question']}\nGive only the final number."
    return Example(
        messages=_turns(prompt, record["answer"]),
        answer=record["answer"],
        question=record["question"],
    )


def _parse_text(record: Mapping[str, Any], instruction: str, cue: str) -> Example:
    """A text to answer with a text: instruction, the record's text, and the cue of the answer."""
    first, *_ = references = tuple(record["references"])
    prompt = f"{instruction}\n\n{record['text']}\n\n{cue}"
    return Example(
        messages=_turns(prompt, first), answer=first, references=references, question=record["text"]
    )


def _text(instruction: str, cue: str) -> Callable[[Mapping[str, Any]], Example]:
    return functools.partial(_parse_text, instruction=instruction, cue=cue)


def _parse_messages(record: Mapping[str, Any]) -> Example:
    """People's own conversations; the last assistant turn is the answer."""
    messages = tuple(
        Message(m["role"], m["content"]) if m["trained"] and not m["more"] else Turn(**m)
        for m in record["messages"]
    )
    question = next(m.content for m in reversed(messages) if m.role == "user")
    return Example(
        messages=messages, answer=messages[-1].content, question=question, tools=record["tools"]
    )


# -------------------------------------------------------------------------------------------- table

_QA = _choice("Question: {}\nAnswer:")
_DIALOGUE = _text("Summarize the following dialogue.", "Summary:")
_ARTICLE = _text("Summarize the following article.", "Summary:")
_REPLY = _text("Write the next reply of this conversation.", "Reply:")
_BLANK = functools.partial(_parse_choice, requests=_blank)
_SUMS = MappingProxyType({"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2})
# Files that a split is read from where they are not named after it.
_VALIDATION = MappingProxyType({"test": "validation.jsonl"})
_FIRST_100 = MappingProxyType({"test": "test100.jsonl"})


def _sums(name: str) -> Task:
    drawn = Generator(name, _SUMS)
    return Task(name, "generated", "number", _parse_generated, generator=drawn, new_tokens=32)


_ROWS = (
    Task("ARC-Easy", "records", "choice", _QA, new_tokens=32),
    Task("ARC-Challenge", "records", "choice", _QA, new_tokens=32),
    Task("piqa", "records", "choice", _QA, new_tokens=32),
    Task("openbookqa", "records", "choice", _choice("{}"), new_tokens=32),
    Task("social_i_qa", "records", "choice", _choice("Q: {}\nA:"), new_tokens=32),
    Task("boolq", "records", "choice", _choice("Question: {}?\nAnswer:"), new_tokens=32),
    Task("winogrande", "records", "choice", _BLANK, new_tokens=32),
    # The harness begins the second half of a context with a capital; records hold both as one.
    Task("hellaswag", "records", "choice", _choice("{}"), new_tokens=32, files=_VALIDATION),
    Task("AddSub", "records", "number", _parse_number),
    Task("MultiArith", "records", "number", _parse_number),
    Task("SingleEq", "records", "number", _parse_number),
    Task("SVAMP", "records", "number", _parse_number),
    Task("gsm8k", "records", "number", _parse_number),
    # mawps/train.json repeats most questions of the other math test sets word for word.
    Task("mawps", "records", "number", _parse_number, files={"train": "train_decontaminated.json"}),
    Task("AQuA", "records", "letter", _parse_letter),
    # The published training file is not always at hand; the validation file then gives both parts.
    Task(
        "dialogsum",
        "texts",
        "rouge",
        _DIALOGUE,
        new_tokens=80,
        files={"train": "validation.jsonl"},
        spans={"train": (0, 400), "validation": (400, 500)},
    ),
    Task("samsum", "texts", "rouge", _DIALOGUE, new_tokens=80),
    Task("xsum", "texts", "rouge", _ARTICLE, new_tokens=64),
    Task("cnn_dailymail", "texts", "rouge", _ARTICLE, new_tokens=128, files=_FIRST_100),
    Task("dailydialogpp", "texts", "rouge", _REPLY, new_tokens=40),
    Task("multiwoz", "texts", "rouge", _REPLY, new_tokens=60),
    _sums("chain_sum"),
    _sums("basic_arithmetic"),
    Task("jsonl", "jsonl", "exact", _parse_messages),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ROWS})

# What LLM-Adapters trains its adapters on at once, each example once an epoch (commonsense_170k;
# math_10k less what it repeats of the test sets).
MIXTURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "commonsense": (
            *("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande"),
            *("ARC-Easy", "ARC-Challenge", "openbookqa"),
        ),
        "math": ("gsm8k", "mawps", "AQuA"),
    }
)


def expand(names: Iterable[str]) -> list[str]:
    """Names of tasks, those of `MIXTURES` replaced by their tasks."""
    return [task for name in names for task in MIXTURES.get(name, (name,))]


def get_task(name: str, generator: Mapping[str, Any] | None = None) -> Task:
    """The row called `name`; a path of JSONL or Parquet is a task of its own, and a Hub data set.

    `generator` overrides fields of a generated task's `Generator` (`train`, `validation`, `test`,
    `seed`) and its settings (`max_terms`, …); tasks that are not generated ignore it. Raises
    UserError for an unknown task or field.
    """
    own = dataclasses.replace(TASKS["jsonl"], name=name)
    if own.is_file or own.is_hub:
        return own
    require(
        name not in MIXTURES,
        f"{name!r} is a mixture to train on; the tasks to score are named one by one",
    )
    if name not in TASKS:
        near = near_misses(name, TASKS)
        own = f"a path ending in {' or '.join(OWN_FILES)}, or {HUB}ORG/NAME"
        raise UserError(f"task {name!r} is unknown; {near} (or {own})")
    task = TASKS[name]
    if task.generator is None or not generator:
        return task
    _check_generator(task, generator)
    own = task.generator.settings
    settings = {field: generator.get(field, value) for field, value in own.items()}
    sizes = {field: value for field, value in generator.items() if field not in own}
    drawn = dataclasses.replace(task.generator, settings=settings, **sizes)
    return dataclasses.replace(task, generator=drawn)


def _check_generator(task: Task, generator: Mapping[str, Any]) -> None:
    """Raises UserError for a field that the task's generator has not, or that is no such number."""
    known = ("train", "validation", "test", "seed", *task.generator.settings)
    for field, value in generator.items():
        if field not in known:
            near = near_misses(field, known)
            raise UserError(f"task {task.name!r} has no generator field {field!r}; {near}")
        least = 0 if field == "seed" else 1
        require(
            isinstance(value, int) and not isinstance(value, bool) and value >= least,
            f"generator field {field}={value!r} of task {task.name!r} must be an integer, "
            f"at least {least}",
        )


# ----------------------------------------------------------------------------------------- requests


def lm_eval_request(example: Example) -> tuple[tuple[str, str], ...]:
    """`(context, continuation)` of each choice, as the lm-eval harness scores it zero-shot.

    Only winogrande's contexts differ between choices (partial evaluation). Raises UserError for an
    example that offers no choices to score.
    """
    if not example.requests:
        raise UserError(
            "protocol lm_eval needs a multiple-choice task; "
            f"this prompt has none: {_start(example)!r}"
        )
    return example.requests


def label_request(example: Example) -> tuple[str, tuple[str, ...]]:
    """`(prompt, targets)`: the LLM-Adapters instruction, and a sentence that names each label."""
    if not example.labels:
        raise UserError(
            f"label words need a multiple-choice task; this prompt has none: {_start(example)!r}"
        )
    return example.messages[0].content, tuple(_label_target(label) for label in example.labels)


def _label_target(label: str) -> str:
    return f"the correct answer is {label}"


def _start(example: Example) -> str:
    return " ".join(example.messages[0].content.split())[:60]


def dedupe(
    train: Sequence[Example], test: Iterable[Example], answers: bool = False
) -> tuple[list[Example], int]:
    """`train` without the examples that `test` holds, and how many were dropped.

    They are known by their prompt (everything before the answer, normalised), with `answers` by
    prompt and answer.
    """
    field = "digest" if answers else "prompt_digest"
    held_out = {getattr(example, field) for example in test}
    if not held_out:
        return list(train), 0
    kept = [example for example in train if getattr(example, field) not in held_out]
    return kept, len(train) - len(kept)


def prompt_digests(examples: Iterable[Example]) -> set[str]:
    """64 bits of the sha256 of each prompt, as `dedupe` compares them: enough to know it again."""
    return {example.prompt_digest[:16] for example in examples}


def _digest(messages: Sequence[Message], tools: str) -> str:
    said = "\n".join(normalise(message.content) or message.content.strip() for message in messages)
    beside = [message.more for message in messages if message.more] + [tools] * bool(tools)
    return hashlib.sha256("\n".join([said, *beside]).encode()).hexdigest()
