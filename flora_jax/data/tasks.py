"""The task table: what a record of each data set asks, the right answer, and how it is scored.

A new task is one more row of `TASKS`, and a parse function if no other task's records look like its
own. A parse function turns one record (a plain dict from `sources`) into an `Example`, which holds
all that training and every evaluation protocol need: nothing downstream sees the record.
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
# A task whose name ends so is a user's own file.
OWN_FILES = (".jsonl", ".parquet")
# A task whose name begins so is a data set of the Hugging Face Hub.
HUB = "hub:"
CONTAMINATED = 0.01  # the largest share of test questions that may be in the training data


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str
    trained: ClassVar[bool] = True
    more: ClassVar[str] = ""


@dataclasses.dataclass(frozen=True)
class Turn(Message):
    """A turn with more than role and content."""

    trained: bool = True  # whether an assistant's turn counts in the loss
    # what else the chat template is given (`tool_calls`, …; a `content` of null), as JSON
    more: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """One parsed record. What its task does not have stays empty."""

    messages: tuple[Message, ...]  # the last is the assistant's, the target
    choices: tuple[str, ...] = ()  # the texts to choose from
    gold: int | None = None  # index of the right choice
    # the right answer as text: a number, a letter, a label word or a whole reply
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
        """sha256 (hex) of everything before the answer, normalised; `dedupe` compares it."""
        return _digest(self.messages[:-1], self.tools)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) of prompt and answer, normalised."""
        return _digest(self.messages, self.tools)


@dataclasses.dataclass(frozen=True)
class Generator:
    """What a generated (reasoning-gym) task draws."""

    dataset: str
    settings: Mapping[str, Any]
    train: int = 4000  # problems of each split
    validation: int = 200
    test: int = 500
    seed: int = 0  # of training alone: every run is tested on the same questions


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the table."""

    name: str
    source: str  # how records are read: 'records', 'texts', 'generated' or 'jsonl'
    metric: str  # how an answer is scored: 'choice', 'number', 'letter', 'rouge' or 'exact'
    parse: Callable[[Mapping[str, Any]], Example]  # raises UserError for a malformed record
    # split -> file, where it is not {split}.json or {split}.jsonl
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # split -> (start, stop) of its records, where splits share a file
    spans: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    generator: Generator | None = None
    # the most tokens of a generated answer; the default leaves room to reason before it
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
    """Whether a word, a number or a single sign tells a prompt from one without it.

    All do but punctuation and ASCII's symbols that are no operators. Unicode's marks (M) write the
    vowels of Indic scripts.
    """
    if len(token) > 1 or token.isalnum() or token in _OPERATORS:
        return True
    kind = unicodedata.category(token)[0]
    return kind == "M" or (kind == "S" and not token.isascii())


def normalise(text: str) -> str:
    """The words, numbers, operators and symbols of `text` in lower case, spaced alike.

    `"It's 3.50 + 4 !"` becomes `"it s 3.50 + 4"`. Operators stay, since with a minus for a plus it
    is another sum.
    """
    text = unicodedata.normalize("NFC", text.lower()).translate(_SAME)
    return " ".join(filter(_tells_apart, re.findall(r"\d+(?:\.\d+)?|[^\W\d]+|[^\w\s]", text)))


def _instruction(record: Mapping[str, Any]) -> str:
    return f"{record['instruction'].strip()}\n{record['input'].strip()}".rstrip()


def _turns(prompt: str, target: str) -> tuple[Message, ...]:
    return Message("user", prompt), Message("assistant", target)


def _parse_choice(
    record: Mapping[str, Any], requests: Callable[..., Iterable[tuple[str, str]]]
) -> Example:
    """An LLM-Adapters multiple-choice record.

    Its text is `…: QUESTION`, then `Answer1: … Answer2: …` (or Solution, Option, Ending), then
    `Answer format: answer1/answer2`; or a question and the answer format `true/false`.
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
    """The question, and the text behind each label's mark (`Answer1:`)."""
    if labels == ("true", "false"):
        return text.strip(), ("yes", "no")
    missing = "field 'instruction' has no choice '{}' although the answer format names it"
    first, *others = (f"{label.capitalize()}:" for label in labels)
    question, found, rest = text.rpartition(first)
    require(found, missing.format(first))
    choices = []
    for mark in others:
        choice, found, rest = rest.partition(mark)
        require(found, missing.format(mark))
        choices.append(_between_marks(choice))
    return question.strip(), (*choices, _between_marks(rest))


def _between_marks(text: str) -> str:
    """A choice without its separators. A trailing space of the data's own stays: it is scored."""
    text = text.removeprefix(" ")
    return text.removesuffix("\n\n" if text.endswith("\n\n") else " ")


def _after(context: str, question: str, choices: Sequence[str]) -> list[tuple[str, str]]:
    """One context for all choices: `Question: {}\\nAnswer:` continued by each of them."""
    if "{}?" in context:
        # lm-eval's prompt of boolq has a question mark; the record's own must not double it.
        question = question.rstrip(" ?")
    return [(context.format(question), f" {choice}") for choice in choices]


def _blank(sentence: str, choices: Sequence[str]) -> list[tuple[str, str]]:
    """Partial evaluation: each option fills the context's blank `_`, and the rest is scored."""
    before, found, after = sentence.partition("_")
    require(found, "field 'instruction' has no blank '_' to fill")
    return [(before + choice, f" {after.strip()}") for choice in choices]


def _choice(context: str) -> Callable[[Mapping[str, Any]], Example]:
    """`_parse_choice` with lm-eval's context for all choices; `{}` is the question."""
    return functools.partial(_parse_choice, requests=functools.partial(_after, context))


def _parse_number(record: Mapping[str, Any]) -> Example:
    """A word problem.

    Its `output` is often a wrong rationale: it is the target only if it ends in the answer.
    """
    prompt = _instruction(record)
    try:
        answer = canonical_number(record["answer"])
    except ValueError:
        raise UserError(f"field 'answer' is {record['answer']!r}; it must be a number") from None
    target = record["output"].strip().removeprefix("A:").strip()
    if not same_number(final_number(target), answer):
        target = f"The answer is {answer}."
    return Example(messages=_turns(prompt, target), answer=answer, question=prompt)


def _parse_letter(record: Mapping[str, Any]) -> Example:
    """AQuA: `… Answer Choices: (A) … (B) … (E) …`, answered by a letter."""
    prompt = _instruction(record)
    question, _, options = prompt.partition("Answer Choices:")
    parts = re.split(r"\(([A-E])\)", options)
    letters = parts[1::2]
    require(
        letters and letters == list("ABCDE"[: len(letters)]),
        "field 'instruction' has no 'Answer Choices: (A) … (B) …' in order",
    )
    answer = record["answer"]
    require(
        answer in letters,
        f"field 'answer' is {answer!r}; it must be one of {', '.join(letters)}",
    )
    target = record["output"].strip()
    if re.findall(r"\(([A-E])\)", target)[-1:] != [answer]:
        target = f"The answer is ({answer})."
    return Example(
        messages=_turns(prompt, target),
        choices=tuple(part.strip() for part in parts[2::2]),
        gold=letters.index(answer),
        answer=answer,
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
    """A text to answer with a text. The prompt is the instruction, the record's text and a cue."""
    references = tuple(record["references"])
    prompt = f"{instruction}\n\n{record['text']}\n\n{cue}"
    return Example(
        messages=_turns(prompt, references[0]),
        answer=references[0],
        references=references,
        question=record["text"],
    )


def _text(instruction: str, cue: str) -> Callable[[Mapping[str, Any]], Example]:
    return functools.partial(_parse_text, instruction=instruction, cue=cue)


def _parse_messages(record: Mapping[str, Any]) -> Example:
    """A conversation; its last turn is the answer, and the last of the user the question."""
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
# Files of the test split that are not named after it.
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
    # lm-eval capitalises the second half of a context; here records hold both halves as one.
    Task("hellaswag", "records", "choice", _choice("{}"), new_tokens=32, files=_VALIDATION),
    Task("AddSub", "records", "number", _parse_number),
    Task("MultiArith", "records", "number", _parse_number),
    Task("SingleEq", "records", "number", _parse_number),
    Task("SVAMP", "records", "number", _parse_number),
    Task("gsm8k", "records", "number", _parse_number),
    # mawps/train.json repeats most questions of the other math test sets word for word.
    Task("mawps", "records", "number", _parse_number, files={"train": "train_decontaminated.json"}),
    Task("AQuA", "records", "letter", _parse_letter),
    # Without the published training file, the validation file gives both splits.
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

# LLM-Adapters' training sets commonsense_170k, and math_10k less what it repeats of the test sets.
MIXTURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "commonsense": (
            "boolq",
            "piqa",
            "social_i_qa",
            "hellaswag",
            "winogrande",
            "ARC-Easy",
            "ARC-Challenge",
            "openbookqa",
        ),
        "math": ("gsm8k", "mawps", "AQuA"),
    }
)


def expand(names: Iterable[str]) -> list[str]:
    """The names of tasks, with each name of `MIXTURES` replaced by those of its tasks."""
    return [task for name in names for task in MIXTURES.get(name, (name,))]


def get_task(name: str, generator: Mapping[str, Any] | None = None) -> Task:
    """The task called `name`: a row of `TASKS`, a path of JSONL or Parquet, or a Hub data set.

    generator: values for a generated task's `train`, `validation`, `test` and `seed`, and for its
    settings (`max_terms`, …); other tasks ignore it. Raises UserError for an unknown task or field,
    and for a value that is no such integer.
    """
    own = dataclasses.replace(TASKS["jsonl"], name=name)
    if own.is_file or own.is_hub:
        return own
    require(
        name not in MIXTURES,
        f"{name!r} is a mixture to train on; the tasks to score are named one by one",
    )
    if name not in TASKS:
        raise UserError(
            f"task {name!r} is unknown; {near_misses(name, TASKS)} "
            f"(or a path ending in {' or '.join(OWN_FILES)}, or {HUB}ORG/NAME)"
        )
    task = TASKS[name]
    if task.generator is None or not generator:
        return task
    _check_generator(task, generator)
    defaults = task.generator.settings
    settings = {field: generator.get(field, value) for field, value in defaults.items()}
    fields = {field: value for field, value in generator.items() if field not in defaults}
    drawn = dataclasses.replace(task.generator, settings=settings, **fields)
    return dataclasses.replace(task, generator=drawn)


def _check_generator(task: Task, generator: Mapping[str, Any]) -> None:
    """Raises UserError for an unknown field, or a value that is no integer or too small."""
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
    example without choices.
    """
    if not example.requests:
        raise UserError(
            "protocol lm_eval needs a multiple-choice task; "
            f"this prompt has none: {_start(example)!r}"
        )
    return example.requests


def label_request(example: Example) -> tuple[str, tuple[str, ...]]:
    """`(prompt, targets)`: the LLM-Adapters instruction, and a sentence for each label word.

    Raises UserError for an example without labels.
    """
    if not example.labels:
        raise UserError(
            f"label words need a multiple-choice task; this prompt has none: {_start(example)!r}"
        )
    return example.messages[0].content, tuple(_label_target(label) for label in example.labels)


def _label_target(label: str) -> str:
    return f"the correct answer is {label}"


def _start(example: Example) -> str:
    """The beginning of the prompt, for errors."""
    return " ".join(example.messages[0].content.split())[:60]


def dedupe(
    train: Sequence[Example], test: Iterable[Example], answers: bool = False
) -> tuple[list[Example], int]:
    """`train` without the examples that `test` holds, and how many were dropped.

    Examples are compared by prompt (everything before the answer, normalised); with `answers`, by
    prompt and answer.
    """
    field = "digest" if answers else "prompt_digest"
    held_out = {getattr(example, field) for example in test}
    if not held_out:
        return list(train), 0
    kept = [example for example in train if getattr(example, field) not in held_out]
    return kept, len(train) - len(kept)


def prompt_digests(examples: Iterable[Example]) -> set[str]:
    """The first 64 bits (hex) of each `prompt_digest`: enough to tell prompts apart."""
    return {example.prompt_digest[:16] for example in examples}


def _digest(messages: Sequence[Message], tools: str) -> str:
    said = "\n".join(normalise(message.content) or message.content.strip() for message in messages)
    rest = filter(None, [*(message.more for message in messages), tools])
    return hashlib.sha256("\n".join([said, *rest]).encode()).hexdigest()
