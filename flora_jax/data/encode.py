"""From an `Example` to token ids and a loss mask.

The mask is built together with the tokens and never read off token ids: `pad` may equal `eos`, and
an answer may contain any token. What stands before an answer has the ids that generation will be
given, which tokenises the prompt alone. In chat style the rendered conversation is tokenised once
and has the ids of `apply_chat_template`, with one exception: where a token would run from the
prompt into the answer (`\\n` and `\\n` in a vocabulary that has `\\n\\n`), it is cut there, and a
prompt that ends in several spaces has the ids that it has alone (GPT-2's split takes the last of
them apart where something follows).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from flora_jax.data.tasks import Example, Message
from flora_jax.errors import UserError, require, require_known
from flora_jax.progress import progress
from flora_jax.tokens import (
    Tokenizer,
    encode_batch,
    encode_cut,
    encode_open,
    encode_open_batch,
    render,
)

Style = Literal["plain", "chat", "llm_adapters"]
STYLES = get_args(Style)
LossOn = Literal["answer", "all"]

# The prompt that LLM-Adapters' finetune.py trains on (at its commit 91770ab), indentation included.
_IN = " " * 16
_TRAINED_ON = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.  \n\n"
    f"{_IN}### Instruction:\n{_IN}{{}}\n{_IN}\n{_IN}### Response:\n{_IN}"
)

_CHUNK = 512  # examples that are tokenised at once


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One training example of n tokens: n - 1 positions, each with the next token as its target."""

    tokens: np.ndarray  # int32 [n]
    loss: np.ndarray  # bool [n]: whether the token counts as a target


@dataclasses.dataclass(frozen=True)
class EncodeReport:
    """What became of the examples. Lengths are in positions, tokens less one."""

    kept: int
    too_long: int
    positions: int  # of the kept, together
    loss_tokens: int  # of the kept: targets that count
    longest: int  # of all


def encode(
    example: Example,
    tokenizer: Tokenizer,
    *,
    style: Style,
    loss_on: LossOn,
    max_length: int,
) -> Encoded | None:
    """Tokens and loss mask of one example, or None if its n - 1 positions exceed `max_length`.

    'plain': the prompt as the tokenizer encodes it (BOS by its own policy), a space, the answer,
    EOS; the answer and EOS count. 'llm_adapters': the same with the prompt in that project's frame.
    'chat': the tokenizer's chat template; of each assistant turn all that follows the prompt to it
    counts, up to its end-of-turn token. With `loss_on='all'` every token counts. Turns that are not
    to be trained on count in neither. Raises UserError for what the style cannot express, and for a
    conversation of which the template makes several examples (`encode_all`).
    """
    _check(tokenizer, style, loss_on)
    [found] = _finish([_plan(example, tokenizer, style, loss_on)], tokenizer)
    require(
        len(found) <= 1,
        f"the tokenizer's chat template makes {len(found)} training examples of this "
        "conversation; encode_all gives them",
    )
    return found[0] if len(found[0].tokens) - 1 <= max_length else None


def encode_all(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    style: Style,
    loss_on: LossOn,
    max_length: int,
    silent: bool = False,
) -> tuple[list[Encoded], EncodeReport]:
    """`encode` of each example that fits, and the counts, as `encode_each` has them."""
    kept = []
    report = encode_each(
        examples,
        len(examples),
        tokenizer,
        kept.append,
        style=style,
        loss_on=loss_on,
        max_length=max_length,
        silent=silent,
    )
    return kept, report


def encode_each(
    examples: Iterable[Example],
    total: int,
    tokenizer: Tokenizer,
    keep: Callable[[Encoded], None],
    *,
    style: Style,
    loss_on: LossOn,
    max_length: int,
    silent: bool = False,
) -> EncodeReport:
    """Hands what `encode` makes of each of `total` examples to `keep`, if it fits; the counts.

    Where the chat template renders a turn otherwise once others follow it (thinking stripped from
    earlier turns), a conversation is one example for each turn that is trained on, each behind the
    prompt to that turn. silent: without a bar or lines. Raises UserError if there are no examples,
    or none fits.
    """
    _check(tokenizer, style, loss_on)
    kept = too_long = positions = loss_tokens = longest = 0
    shortest = None
    shown = progress(examples, total, "encoding", "example", silent)
    for encoded in _encode(shown, tokenizer, style, loss_on):
        length = len(encoded.tokens) - 1
        longest = max(longest, length)
        shortest = length if shortest is None else min(shortest, length)
        if length > max_length:
            too_long += 1
            continue
        keep(encoded)
        kept += 1
        positions += length
        loss_tokens += int(encoded.loss[1:].sum())
    require(
        shortest is not None,
        "there are no examples to encode; data.tasks must name data that holds some",
    )
    require(
        kept,
        f"data.max_length={max_length} is too short for each of the {too_long} examples; "
        f"the shortest needs {shortest}",
    )
    return EncodeReport(kept, too_long, positions, loss_tokens, longest)


def encode_prompt(
    prompt: Example | Sequence[Message],
    tokenizer: Tokenizer,
    style: Style,
    tools: str = "",
) -> list[int]:
    """The tokens to generate from.

    Of an example they are exactly its training tokens before the (last) answer, of messages, which
    end with the user's turn, what training would put before the answer to them.
    tools: as `Example` has them; of an example its own.
    """
    _check(tokenizer, style)
    if isinstance(prompt, Example):
        messages, tools = prompt.messages[:-1], prompt.tools
    else:
        messages = tuple(prompt)
    if style != "chat":
        return encode_open(tokenizer, _plain_prompt(messages, style, tools))
    text = _render(messages, tools, tokenizer, add_generation_prompt=True)
    answers = _answers(messages, tools, tokenizer, needed=False)
    # Where the template changes earlier turns, training has cut none of them either.
    whole = all(answer is not None and text.startswith(answer.text) for answer in answers)
    pieces = encode_cut(tokenizer, text, _cuts(answers) if whole else [])
    return list(itertools.chain(*pieces))


def _check(tokenizer: Tokenizer, style: Style, loss_on: LossOn = "answer") -> None:
    require_known(style, STYLES, f"data.prompt_style={style!r}")
    require_known(loss_on, ("answer", "all"), f"data.loss_on={loss_on!r}")
    require(
        style != "chat" or tokenizer.chat_template,
        "data.prompt_style='chat' needs a chat template and the tokenizer has none; use 'plain'",
    )


def _encode(
    examples: Iterable[Example], tokenizer: Tokenizer, style: Style, loss_on: LossOn
) -> Iterator[Encoded]:
    """What each example gives, in order. Raises UserError that names the example."""
    number = 0
    examples = iter(examples)
    while chunk := list(itertools.islice(examples, _CHUNK)):
        plans = []
        for example in chunk:
            try:
                plans.append(_plan(example, tokenizer, style, loss_on))
            except UserError as error:
                start = " ".join(example.messages[0].content.split())[:40]
                raise UserError(f"{error} (example {number}, which begins {start!r})") from None
            number += 1
        yield from itertools.chain(*_finish(plans, tokenizer))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One training example as text: prompt, text and end, and which pieces of it count."""

    prompt: str | None  # as the tokenizer begins a text; None: no such part
    text: str
    cuts: list[int]  # where the text is cut into pieces
    counts: list[bool]  # of the prompt and of each piece
    end: list[int]  # tokens, which count as the last piece does


def _plan(example: Example, tokenizer: Tokenizer, style: Style, loss_on: LossOn) -> list[_Plan]:
    """What is to be tokenised of an example, and what of it counts.

    Raises UserError for what the style cannot express.
    """
    everything = loss_on == "all"
    if style == "chat":
        return _chat_plans(example, tokenizer, everything)
    *before, answer = example.messages
    refuse_tools(example.messages, style, example.tools)
    prompt = _plain_prompt(before, style, example.tools)
    require(
        tokenizer.eos_token_id is not None,
        f"data.prompt_style={style!r} ends answers with EOS, but the tokenizer has no eos_token",
    )
    # One space between them, in the answer's first token, where byte-level vocabularies expect it.
    glue = "" if prompt[-1:].isspace() or answer.content[:1].isspace() else " "
    return [_Plan(prompt, glue + answer.content, [], [everything, True], [tokenizer.eos_token_id])]


def _finish(plans: Sequence[list[_Plan]], tokenizer: Tokenizer) -> list[list[Encoded]]:
    """The plans, tokenised together."""
    flat = list(itertools.chain(*plans))
    begun = [plan.prompt for plan in flat if plan.prompt is not None]
    prompts = iter(encode_open_batch(tokenizer, begun))
    encodings = encode_batch(tokenizer, [plan.text for plan in flat])
    encoded = []
    for plan, encoding in zip(flat, encodings, strict=True):
        prompt = [] if plan.prompt is None else next(prompts)
        pieces = encode_cut(tokenizer, plan.text, plan.cuts, encoding)
        encoded.append(_encoded([prompt, *pieces], plan))
    finished = iter(encoded)
    return [[next(finished) for _ in several] for several in plans]


def _encoded(pieces: list[list[int]], plan: _Plan) -> Encoded:
    pieces[-1] = [*pieces[-1], *plan.end]
    lengths = [len(piece) for piece in pieces]
    return Encoded(
        np.fromiter(itertools.chain(*pieces), np.int32, sum(lengths)),
        np.repeat(plan.counts, lengths),
    )


def _plain_prompt(before: Sequence[Message], style: Style, tools: str) -> str:
    require(
        not any(message.role == "assistant" for message in before),
        f"data.prompt_style={style!r} holds one answer, but a conversation has several; use 'chat'",
    )
    refuse_tools(before, style, tools)
    prompt = "\n\n".join(message.content for message in before)
    return _TRAINED_ON.format(prompt) if style == "llm_adapters" else prompt


def calls_tools(message: Message) -> bool:
    """Whether an assistant's turn calls tools, with or without a text."""
    return bool(message.more) and "tool_calls" in json.loads(message.more)


def refuse_tools(messages: Sequence[Message], style: Style, tools: str = "") -> None:
    """Raises UserError where a style without turns is to write tools, their results or calls."""
    used = tools or any(message.role == "tool" or calls_tools(message) for message in messages)
    require(
        style == "chat" or not used,
        f"data.prompt_style={style!r} has no place for tools; use 'chat'",
    )


@dataclasses.dataclass(frozen=True)
class _Answer:
    """An assistant's turn."""

    text: str  # the conversation as the template renders it, up to the turn's last token
    start: int  # the characters before the answer
    trained: bool  # whether it is to be trained on


def _chat_plans(example: Example, tokenizer: Tokenizer, everything: bool) -> list[_Plan]:
    """The rendered conversation up to the last turn that is trained on.

    It is cut before each answer and behind its end-of-turn token: `…assistant\\n` |
    `Hello.<|im_end|>` | `\\n<|im_start|>user…`. Where that text does not hold each turn as it was
    rendered when it was the last, there is one plan for each that is trained on; of `everything`
    the prompt then counts where it holds no earlier answer, so that none counts twice, nor one that
    is not to be trained on.
    """
    trained = (message.role == "assistant" and message.trained for message in example.messages)
    last = max(i for i, one in enumerate(trained) if one)
    answers = _answers(example.messages[: last + 1], example.tools, tokenizer)
    if all(answer is not None and answers[-1].text.startswith(answer.text) for answer in answers):
        together = [answers]
    else:
        together = [[answer] for answer in answers if answer is not None and answer.trained]
    plans = []
    for several in together:
        asked = everything and several[0] is answers[0]
        counts = [one for answer in several for one in (asked, answer.trained)]
        plans.append(_Plan(None, several[-1].text, _cuts(several)[:-1], [False, *counts], []))
    return plans


def _cuts(answers: Sequence[_Answer]) -> list[int]:
    """Where each answer begins and ends."""
    return [cut for answer in answers for cut in (answer.start, len(answer.text))]


def _answers(
    messages: Sequence[Message], tools: str, tokenizer: Tokenizer, needed: bool = True
) -> list[_Answer | None]:
    """The assistant's turns; None for one that cannot be told from its prompt.

    Raises UserError for such a one that is to be trained on, if it is needed.
    """
    answers = []
    for i, message in enumerate(messages):
        if message.role == "assistant":
            try:
                answers.append(_answer(messages[: i + 1], tools, tokenizer))
            except UserError:
                if needed and message.trained:
                    raise
                answers.append(None)
    return answers


def _answer(messages: Sequence[Message], tools: str, tokenizer: Tokenizer) -> _Answer:
    """The last turn of the conversation, the assistant's."""
    *before, message = messages
    prompt = _render(before, tools, tokenizer, add_generation_prompt=True)
    whole = _render(messages, tools, tokenizer, add_generation_prompt=False)
    if not whole.startswith(prompt):
        asked = _render(before, tools, tokenizer, add_generation_prompt=False)
        raise UserError(_why_apart(asked, prompt, whole))
    turn = whole[len(prompt) :].rstrip()
    content = message.content.strip()
    if content not in turn:
        # Beside a call some templates leave out the text. Others render thinking anew: what is said
        # last is then found.
        content = "" if calls_tools(message) else content.split()[-1]
    if content:
        lead, found, end = turn.partition(content)
    else:
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        end = next((token for token in added if turn.endswith(token)), "")
        # a template without tools leaves nothing of a call
        lead, found = "", not calls_tools(message) or turn != end
    if lead.strip():  # what follows the template's prompt is the model's to write; a header is not
        found = found and prompt != _render(before, tools, tokenizer, add_generation_prompt=False)
    require(
        found and end.strip(),
        f"the tokenizer's chat template renders the assistant's turn {message.content[:30]!r} "
        f"as {turn[:40]!r}; it must be the content and then an end-of-turn token "
        "(data.prompt_style='plain' needs no template)",
    )
    return _Answer(prompt + turn, len(prompt), message.trained)


def _why_apart(asked: str, prompt: str, whole: str) -> str:
    """Why a rendered conversation does not begin with its prompt; asked: what both begin with."""
    if whole.startswith(asked) and prompt.startswith(asked):  # what differs is the prompt's own end
        return (
            f"the tokenizer's chat template ends a prompt in {prompt[len(asked) :][-40:]!r}, which "
            f"the assistant's turn as it renders it, {whole[len(asked) :][:40]!r}, does not begin "
            "with; a model would be asked otherwise than it was trained "
            "(data.prompt_style='plain' needs no template)"
        )
    return (
        "the tokenizer's chat template changes earlier turns when a later one is added, so the "
        "answers cannot be told apart (data.prompt_style='plain' needs no template)"
    )


def _render(
    messages: Sequence[Message],
    tools: str,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool,
) -> str:
    conversation = [
        {"role": message.role, "content": message.content, **json.loads(message.more or "{}")}
        for message in messages
    ]
    given = {"tools": json.loads(tools)} if tools else {}
    return render(tokenizer, conversation, add_generation_prompt=add_generation_prompt, **given)
