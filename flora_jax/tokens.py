"""Conversations as text, and token ids where a text begins and where a turn ends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flora_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What Llama 3's chat template names as today where it is given nothing: with any other date, the same data and the same
# prompt would change every day.
DATE = "26 Jul 2024"


def encode_open(tokenizer: PreTrainedTokenizerFast, text: str, add_special_tokens: bool = True) -> list[int]:
    """The ids of `text` with what the tokenizer puts before a text (bos, by its own rule, but no second one before that
    of a rendered chat), and without what some put behind it (`add_eos_token`): the text goes on."""
    special = add_special_tokens and not text.startswith(tokenizer.bos_token or "\0")
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"] if special else [0]
    return ids[: len(ids) - (mask[::-1].index(0) if 0 in mask else 0)]


def render(tokenizer: PreTrainedTokenizerFast, conversation: Sequence[Mapping[str, str]], **how: Any) -> str:
    """The conversation, `{"role", "content"}` by turn, as the tokenizer's chat template has it. Raises UserError where
    the template refuses it."""
    try:
        return tokenizer.apply_chat_template(list(conversation), tokenize=False, date_string=DATE, **how)
    except Exception as error:  # a template is a program, which may raise anything at what is not for it
        roles = ", ".join(str(turn.get("role")) for turn in conversation)
        raise UserError(f"the tokenizer's chat template refuses a conversation of roles {roles}: {error}") from None


def ends(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens by which a model says that it is done: eos, and the special ones that the chat template ends an answer
    with, such as ChatML's `<|im_end|>` (none without a template, or where a turn ends in words)."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not tokenizer.chat_template:
        return eos
    answer = "0123456789"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        rendered = render(tokenizer, turns)
    except UserError:
        return eos
    if answer not in rendered:
        return eos
    after = tokenizer(rendered.rpartition(answer)[2].lstrip(), add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    special = lambda id: id in added and added[id].special and id != tokenizer.bos_token_id  # noqa: E731
    return list(dict.fromkeys([*eos, *itertools.takewhile(special, after)]))
