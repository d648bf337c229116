"""Token ids of a text that something follows: an answer, a continuation, what is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_open(tokenizer: PreTrainedTokenizerFast, text: str, add_special_tokens: bool = True) -> list[int]:
    """The ids of `text` with what the tokenizer puts before a text (bos, by its own rule), but without what some put
    behind it (`add_eos_token`): the text goes on."""
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"] if add_special_tokens else [0]
    return ids[: len(ids) - mask[::-1].index(0)]
