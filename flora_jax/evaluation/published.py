"""The evaluation scripts of LLM-Adapters with their faults, for numbers beside published ones; `answers` mends them.

- The prompt that is scored is not the one that was trained on: its frame has other spaces and line ends.
- Batches are padded on the left and generated from without an attention mask, so that a short prompt is read with
  the padding before it, as tokens; a score then depends on the batch.
- Numbers: commas are deleted ("1,2" is 12), every hyphen before a digit is a sign ("5-3" ends in -3), digits inside
  words count, a text without any is infinity.
- An option letter is the first capital A to E of any word, a label the first mention of any, as a substring.

Not repeated: beam search over four beams; answers here are greedy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flora_jax.data.tasks import Message
from flora_jax.evaluation import answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
    f"\n\n{' ' * 16}### Instruction:\n{' ' * 16}{{}}\n\n{' ' * 16}### Response:\n{' ' * 16}"
)


def prompts(
    asked: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> list[list[int]]:
    """The tokens of each prompt, batch by batch of the given order, short ones with padding before them."""
    texts = [_FRAME.format("\n\n".join(message.content for message in messages)) for messages in asked]
    tokens = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    padded = []
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        longest = max(map(len, batch))
        padded += [[pad] * (longest - len(one)) + one for one in batch]
    return padded


def is_right(metric: str, text: str, answer: str, labels: Sequence[str] = ()) -> bool:
    """`answers.is_right` by the published rules; 'exact' has none."""
    match metric:
        case "number":
            found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
            return abs(float(answer.replace(",", "")) - (float(found[-1]) if found else float("inf"))) <= 1e-3
        case "letter":
            return re.findall("[A-E]", text)[:1] == [answer]
        case "choice":
            # "answer4" is looked for in a question of three answers too.
            stems = [f"{labels[0][:-1]}{i}" for i in range(1, 6)] if labels[0].endswith("1") else list(labels)
            return re.findall("|".join(stems), text)[:1] == [answer]
    return answers.is_right(metric, text, answer, labels)
