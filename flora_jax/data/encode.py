"""From an `Example` to token ids and a loss mask.

The mask is built together with the tokens, piece by piece, and never read off token ids: `pad` may equal `eos`,
and an answer may contain any token. Prompt and answer are tokenised apart, so the boundary between them lies
where generation will put it: it too tokenises the prompt alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from flora_jax.data.tasks import Example, Message
from flora_jax.errors import UserError, near_misses
from flora_jax.tokens import encode_open, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Style = Literal["plain", "chat", "llm_adapters"]
STYLES = get_args(Style)
LossOn = Literal["answer", "all"]

# The prompt that LLM-Adapters' finetune.py trains on (at its commit 91770ab), indentation included.
_TRAINED_ON = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  "
    f"\n\n{' ' * 16}### Instruction:\n{' ' * 16}{{}}\n{' ' * 16}\n{' ' * 16}### Response:\n{' ' * 16}"
)

_Piece = tuple[list[int], bool]  # tokens, and whether they are what the assistant is to produce


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One training example of n tokens. It takes n - 1 positions, each with the next token as its target."""

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
    example: Example, tokenizer: PreTrainedTokenizerFast, *, style: Style, loss_on: LossOn, max_length: int
) -> Encoded | None:
    """Tokens and loss mask of one example, or None if its n - 1 positions exceed `max_length`.

    'plain': the prompt as the tokenizer encodes it (BOS by its own policy), a space, the answer, EOS; the answer
    and EOS count. 'llm_adapters': the same with the prompt in that project's frame. 'chat': the tokenizer's chat
    template; the content of each assistant turn and its end-of-turn token count. With `loss_on='all'` every token
    counts. Raises UserError for what the style cannot express.
    """
    encoded = _encode(example, tokenizer, style, loss_on)
    return encoded if len(encoded.tokens) - 1 <= max_length else None


def encode_all(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerFast, *, style: Style, loss_on: LossOn, max_length: int
) -> tuple[list[Encoded], EncodeReport]:
    """`encode` of each example that fits, and the counts. Raises UserError if there are none, or none fits."""
    encoded = []
    for i, example in enumerate(examples):
        try:
            encoded.append(_encode(example, tokenizer, style, loss_on))
        except UserError as error:
            start = " ".join(example.messages[0].content.split())[:40]
            raise UserError(f"{error} (example {i}, which begins {start!r})") from None
    if not encoded:
        raise UserError("there are no examples to encode; data.tasks must name data that holds some")
    lengths = [len(e.tokens) - 1 for e in encoded]
    kept = [e for e, length in zip(encoded, lengths, strict=True) if length <= max_length]
    if not kept:
        raise UserError(
            f"data.max_length={max_length} is too short for each of the {len(encoded)} examples; "
            f"the shortest needs {min(lengths)}"
        )
    return kept, EncodeReport(
        kept=len(kept),
        too_long=len(encoded) - len(kept),
        positions=sum(len(e.tokens) - 1 for e in kept),
        loss_tokens=sum(int(e.loss[1:].sum()) for e in kept),
        longest=max(lengths),
    )


def encode_prompt(
    prompt: Example | Sequence[Message], tokenizer: PreTrainedTokenizerFast, style: Style
) -> list[int]:
    """The tokens to generate from: of an example exactly its training tokens before the (last) answer, of
    messages, which end with the user's turn, what training would put before the answer to them."""
    messages = prompt.messages[:-1] if isinstance(prompt, Example) else tuple(prompt)
    pieces = _pieces((*messages, None), tokenizer, style)
    return [token for tokens, _ in pieces for token in tokens]


def _encode(example: Example, tokenizer: PreTrainedTokenizerFast, style: Style, loss_on: LossOn) -> Encoded:
    if loss_on not in ("answer", "all"):
        raise UserError(f"data.loss_on={loss_on!r} is unknown; {near_misses(str(loss_on), ('answer', 'all'))}")
    pieces = _pieces(example.messages, tokenizer, style)
    tokens = np.concatenate([np.asarray(tokens, np.int32) for tokens, _ in pieces])
    loss = np.concatenate([np.full(len(tokens), counts or loss_on == "all") for tokens, counts in pieces])
    return Encoded(tokens, loss)


def _pieces(
    messages: Sequence[Message | None], tokenizer: PreTrainedTokenizerFast, style: Style
) -> list[_Piece]:
    """The token pieces of a conversation in order. A last message of None stands for the answer to come: the
    pieces are then those before it, by the very code that training runs."""
    if style not in STYLES:
        raise UserError(f"data.prompt_style={style!r} is unknown; {near_misses(str(style), STYLES)}")
    if style == "chat" and not tokenizer.chat_template:
        raise UserError("data.prompt_style='chat' needs a chat template and the tokenizer has none; use 'plain'")
    return _chat(messages, tokenizer) if style == "chat" else _plain(messages, tokenizer, style)


def _plain(messages: Sequence[Message | None], tokenizer: PreTrainedTokenizerFast, style: Style) -> list[_Piece]:
    *before, answer = messages
    if any(message.role == "assistant" for message in before):
        raise UserError(f"data.prompt_style={style!r} holds one answer, but a conversation has several; use 'chat'")
    if answer is not None and tokenizer.eos_token_id is None:
        raise UserError(f"data.prompt_style={style!r} ends answers with EOS, but the tokenizer has no eos_token")
    prompt = "\n\n".join(message.content for message in before)
    prompt = _TRAINED_ON.format(prompt) if style == "llm_adapters" else prompt
    pieces = [(encode_open(tokenizer, prompt), False)]
    if answer is not None:
        # One space between the two, in the answer's first token, where byte-level vocabularies expect it.
        glue = "" if prompt[-1:].isspace() or answer.content[:1].isspace() else " "
        pieces.append(([*_tokens(glue + answer.content, tokenizer), tokenizer.eos_token_id], True))
    return pieces


def _chat(messages: Sequence[Message | None], tokenizer: PreTrainedTokenizerFast) -> list[_Piece]:
    """Cuts the rendered conversation before each assistant's content and after its end-of-turn token, by rendering
    it up to the turn and then with it: `…assistant\\n` | `Hello.<|im_end|>` | `\\n<|im_start|>user…`."""
    pieces, done = [], ""  # `done`: the rendered text already in pieces
    for i, message in enumerate(messages):
        if message is not None and message.role != "assistant":
            continue
        before = _render(messages[:i], tokenizer, add_generation_prompt=True)
        pieces.append((_tokens(_suffix(before, done), tokenizer), False))
        if message is None:
            break
        turn = _suffix(_render(messages[: i + 1], tokenizer, add_generation_prompt=False), before)
        # Some templates strip what they are given.
        content = message.content if turn.startswith(message.content) else message.content.strip()
        end = turn.removeprefix(content).rstrip()
        if not turn.startswith(content) or not end:
            raise UserError(
                f"the tokenizer's chat template renders the assistant's turn {content[:30]!r} as {turn[:40]!r}; it "
                f"must be the content and then an end-of-turn token (data.prompt_style='plain' needs no template)"
            )
        pieces.append((_tokens(content + end, tokenizer), True))
        done = before + content + end
    return pieces  # what a template puts after the last end-of-turn token is nothing to learn from


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, *, add_generation_prompt: bool) -> str:
    conversation = [dataclasses.asdict(message) for message in messages]
    return render(tokenizer, conversation, add_generation_prompt=add_generation_prompt)


def _suffix(text: str, prefix: str) -> str:
    """What follows `prefix` in `text`; that it is a prefix is what the loss mask rests on."""
    if not text.startswith(prefix):
        raise UserError(
            "the tokenizer's chat template changes earlier turns when a later one is added, so the answers cannot be "
            "told apart (data.prompt_style='plain' needs no template)"
        )
    return text[len(prefix):]


def _tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
