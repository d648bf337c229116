"""From an `Example` to token ids and a loss mask.

The mask is built together with the tokens, never from token ids: `pad` may equal `eos`, and an
answer may contain any token. The ids before an answer are those of the prompt tokenised alone,
which is where generation starts. In chat style the rendered conversation is tokenised once, and its
ids are those of `apply_chat_template` with two exceptions. A token that would run from the prompt
into the answer (`\\n` and `\\n` in a vocabulary that has `\\n\\n`) is cut between them. A prompt
that ends in several spaces keeps the ids that it has alone (GPT-2's split takes the last space
apart if text follows).
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
_INDENT = " " * 16
_LLM_ADAPTERS = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.  \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}"
)

_CHUNK = 512  # examples tokenised at once


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One training example of n tokens: n - 1 positions, each with the next token as its target."""

    tokens: np.ndarray  # int32 [n]
    loss: np.ndarray  # bool [n]: whether the token counts as a target


@dataclasses.dataclass(frozen=True)
class EncodeReport:
    """Counts of examples. Lengths are in positions: tokens less one."""

    kept: int
    too_long: int
    positions: int  # of all kept examples together
    loss_tokens: int  # targets of the kept examples that count
    longest: int  # of all examples, kept or not


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
    """Calls `keep` with each example encoded whose n - 1 positions are at most `max_length`, and
    returns the counts.

    Style 'plain': the prompt as the tokenizer encodes it (BOS by its own policy), a space, the
    answer, EOS; the answer and EOS count in the loss. 'llm_adapters': the same, with the prompt in
    that project's frame. 'chat': the tokenizer's chat template; of each assistant turn everything
    after its prompt counts, end-of-turn token included. With `loss_on='all'` every token counts. A
    turn that is not to be trained on never counts.

    If the chat template changes a turn once others follow it (as where it strips the thinking of
    earlier turns), a conversation becomes one example per turn that is trained on, each with the
    prompt to that turn. total: the number of examples; silent: show no progress. Raises UserError
    for what the style cannot express, and if there are no examples or none fits.
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
    """The token ids to generate from: exactly those that training puts before the answer.

    prompt: an example, whose last turn (the answer) is left out, or messages that end with the
    user's turn. tools: `Example.tools` for messages; an example has its own. Raises UserError for
    what the style cannot express.
    """
    _check(tokenizer, style)
    if isinstance(prompt, Example):
        messages = prompt.messages[:-1]
        tools = prompt.tools
    else:
        messages = tuple(prompt)
    if style != "chat":
        refuse_tools(messages, style, tools)
        return encode_open(tokenizer, _plain_prompt(messages, style))
    text = _render(messages, tools, tokenizer, add_generation_prompt=True)
    answers = _answers(messages, tools, tokenizer, needed=False)
    # If the template changes earlier turns, training does not cut them either.
    cuts = _cuts(answers) if _holds(text, answers) else []
    return list(itertools.chain(*encode_cut(tokenizer, text, cuts)))


def _check(tokenizer: Tokenizer, style: Style, loss_on: LossOn = "answer") -> None:
    require_known(style, STYLES, f"data.prompt_style={style!r}")
    require_known(loss_on, get_args(LossOn), f"data.loss_on={loss_on!r}")
    require(
        style != "chat" or tokenizer.chat_template,
        "data.prompt_style='chat' needs a chat template and the tokenizer has none; use 'plain'",
    )


def _encode(
    examples: Iterable[Example], tokenizer: Tokenizer, style: Style, loss_on: LossOn
) -> Iterator[Encoded]:
    """Encodes the examples in order, `_CHUNK` at once. A UserError names the example."""
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
    """One training example before it is tokenised: prompt, text and end, and what of it counts."""

    prompt: str | None  # tokenised with BOS; None in chat style, where the text has it all
    text: str
    cuts: list[int]  # the characters at which the text is cut into pieces
    counts: list[bool]  # whether the prompt, then each piece, counts in the loss
    end: list[int]  # token ids behind the last piece, which count if it does


def _plan(example: Example, tokenizer: Tokenizer, style: Style, loss_on: LossOn) -> list[_Plan]:
    """The plan of an example; in chat style there may be several.

    Raises UserError for what the style cannot express.
    """
    everything = loss_on == "all"
    if style == "chat":
        return _chat_plans(example, tokenizer, everything)
    *before, answer = example.messages
    refuse_tools(example.messages, style, example.tools)
    prompt = _plain_prompt(before, style)
    require(
        tokenizer.eos_token_id is not None,
        f"data.prompt_style={style!r} ends answers with EOS, but the tokenizer has no eos_token",
    )
    text = answer.content
    if not (prompt[-1:].isspace() or text[:1].isspace()):
        # The space belongs to the answer's first token, where byte-level vocabularies expect it.
        text = f" {text}"
    return [_Plan(prompt, text, [], [everything, True], [tokenizer.eos_token_id])]


def _finish(plans: Sequence[list[_Plan]], tokenizer: Tokenizer) -> list[list[Encoded]]:
    """Encodes each example's plans; all of them are tokenised together, which is faster."""
    flat = list(itertools.chain(*plans))
    prompts = [plan.prompt for plan in flat if plan.prompt is not None]
    prompt_ids = iter(encode_open_batch(tokenizer, prompts))
    encodings = encode_batch(tokenizer, [plan.text for plan in flat])
    encoded = []
    for plan, encoding in zip(flat, encodings, strict=True):
        prompt = [] if plan.prompt is None else next(prompt_ids)
        pieces = encode_cut(tokenizer, plan.text, plan.cuts, encoding)
        pieces[-1] = [*pieces[-1], *plan.end]
        encoded.append(_encoded([prompt, *pieces], plan.counts))
    finished = iter(encoded)
    return [[next(finished) for _ in group] for group in plans]


def _encoded(pieces: Sequence[list[int]], counts: Sequence[bool]) -> Encoded:
    """counts: whether each piece counts in the loss."""
    lengths = [len(piece) for piece in pieces]
    return Encoded(
        np.fromiter(itertools.chain(*pieces), np.int32, sum(lengths)),
        np.repeat(counts, lengths),
    )


def _plain_prompt(before: Sequence[Message], style: Style) -> str:
    require(
        not any(message.role == "assistant" for message in before),
        f"data.prompt_style={style!r} holds one answer, but a conversation has several; use 'chat'",
    )
    prompt = "\n\n".join(message.content for message in before)
    if style == "llm_adapters":
        return _LLM_ADAPTERS.format(prompt)
    return prompt


def calls_tools(message: Message) -> bool:
    """Whether an assistant's turn calls tools, with or without text."""
    return bool(message.more) and "tool_calls" in json.loads(message.more)


def refuse_tools(messages: Sequence[Message], style: Style, tools: str = "") -> None:
    """Raises UserError for tools, their calls or results in a style other than 'chat'."""
    used = tools or any(message.role == "tool" or calls_tools(message) for message in messages)
    require(
        style == "chat" or not used,
        f"data.prompt_style={style!r} has no place for tools; use 'chat'",
    )


@dataclasses.dataclass(frozen=True)
class _Answer:
    """An assistant's turn in the rendered conversation."""

    text: str  # the conversation to the end of the turn, end-of-turn token included
    start: int  # where in `text` the answer begins
    trained: bool  # whether the turn is trained on


def _chat_plans(example: Example, tokenizer: Tokenizer, everything: bool) -> list[_Plan]:
    """One plan of the conversation up to the last turn that is trained on.

    Its text is cut before each answer and behind the answer's end-of-turn token: `…assistant\\n` |
    `Hello.<|im_end|>` | `\\n<|im_start|>user…`. If the template changes earlier turns, there is a
    plan for each turn that is trained on instead. With `everything`, prompts count in the loss as
    well, but of several plans only a prompt without an earlier answer: no token may count twice,
    and no answer that is not trained on at all.
    """
    trained = [message.role == "assistant" and message.trained for message in example.messages]
    last = max(i for i, one in enumerate(trained) if one)
    answers = _answers(example.messages[: last + 1], example.tools, tokenizer)
    if _holds(answers[-1].text, answers):
        groups = [answers]
    else:
        groups = [[answer] for answer in answers if answer is not None and answer.trained]
    plans = []
    for group in groups:
        prompts_count = everything and group[0] is answers[0]
        counts = [one for answer in group for one in (prompts_count, answer.trained)]
        plans.append(_Plan(None, group[-1].text, _cuts(group)[:-1], [False, *counts], []))
    return plans


def _holds(text: str, answers: Sequence[_Answer | None]) -> bool:
    """Whether `text` begins with the conversation as it was rendered up to each answer."""
    return all(answer is not None and text.startswith(answer.text) for answer in answers)


def _cuts(answers: Sequence[_Answer]) -> list[int]:
    """The characters at which each answer begins and ends."""
    return [cut for answer in answers for cut in (answer.start, len(answer.text))]


def _answers(
    messages: Sequence[Message], tools: str, tokenizer: Tokenizer, needed: bool = True
) -> list[_Answer | None]:
    """The assistant's turns in order; None for one that cannot be told from its prompt.

    needed: raise UserError instead if that turn is trained on.
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
    """The last turn of the conversation, which is the assistant's.

    Raises UserError unless it is rendered as its prompt, the content and an end-of-turn token.
    """
    *before, message = messages
    prompt = _render(before, tools, tokenizer, add_generation_prompt=True)
    whole = _render(messages, tools, tokenizer, add_generation_prompt=False)
    if not whole.startswith(prompt):
        asked = _render(before, tools, tokenizer, add_generation_prompt=False)
        raise UserError(_why_apart(asked, prompt, whole))
    turn = whole[len(prompt) :].rstrip()
    content = message.content.strip()
    if content not in turn:
        # Some templates leave out the text beside a call. Others change the thinking, but not the
        # last word.
        content = "" if calls_tools(message) else content.split()[-1]
    if content:
        lead, found, end = turn.partition(content)
    else:
        lead = ""
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        end = next((token for token in added if turn.endswith(token)), "")
        # A template that knows no tools renders nothing of a call.
        found = not calls_tools(message) or turn != end
    if lead.strip():
        # Behind a generation prompt the model writes the lead; without one it is the turn's header.
        found = found and prompt != _render(before, tools, tokenizer, add_generation_prompt=False)
    require(
        found and end.strip(),
        f"the tokenizer's chat template renders the assistant's turn {message.content[:30]!r} "
        f"as {turn[:40]!r}; it must be the content and then an end-of-turn token "
        "(data.prompt_style='plain' needs no template)",
    )
    return _Answer(prompt + turn, len(prompt), message.trained)


def _why_apart(asked: str, prompt: str, whole: str) -> str:
    """Why `whole`, the rendered conversation, does not begin with its prompt.

    asked: the turns before the answer, rendered without a generation prompt.
    """
    if whole.startswith(asked) and prompt.startswith(asked):  # Only the generation prompt differs.
        return (
            f"the tokenizer's chat template ends a prompt in {prompt[len(asked) :][-40:]!r}, but "
            f"renders the assistant's turn as {whole[len(asked) :][:40]!r}, which does not begin "
            "with it; the model would answer a prompt that it was never trained on "
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
