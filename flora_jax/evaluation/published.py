"""The evaluation scripts of LLM-Adapters with their faults, for numbers beside published ones;
`answers` mends them.

(evaluate.py at its commit 32e03af, commomsense_evaluate.py at e0efdc0.)

- The prompt that is scored is not the one that was trained on: its frame has other spaces.
- Choice tasks are asked in batches that are padded on the left, with token 0, and generated from
  without an attention mask, so that a short prompt is read with the padding before it, as tokens; a
  score then depends on the batch.
- Numbers: commas are deleted ("1,2" is 12), every hyphen before a digit is a sign ("5-3" ends in
  -3), digits inside words count, a text without any is infinity.
- An option letter is the first capital A to E of any word, a label the first mention of any, as a
  substring.

Not repeated: beam search over four beams (answers here are greedy), and spaces around an
instruction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from flora_jax.data.tasks import Message
from flora_jax.tokens import Tokenizer

METRICS = ("number", "letter", "choice")  # there is a script for

_FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request. "
    f"\n\n{' ' * 16}### Instruction:\n{' ' * 16}{{}}\n\n{' ' * 16}### Response:\n{' ' * 16}"
)
_PAD = 0


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The tokens to generate from, in the frame that is scored."""
    text = _FRAME.format("\n\n".join(message.content for message in messages))
    return tokenizer(text, verbose=False)["input_ids"]


def pad(prompts: Sequence[list[int]], metric: str, batch_size: int) -> list[list[int]]:
    """The prompts as they are read: of a choice task, batch by batch in the given order, with
    padding before them."""
    if metric != "choice":
        return list(prompts)
    padded = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        padded += [[_PAD] * (longest - len(one)) + one for one in batch]
    return padded


def is_right(metric: str, text: str, answer: str, labels: Sequence[str] = ()) -> bool:
    """`answers.is_right` by the published rules, for the metrics of METRICS."""
    text = text.split("### Response:")[0]
    match metric:
        case "number":
            found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
            last = float(found[-1]) if found else float("inf")
            return abs(float(answer.replace(",", "")) - last) <= 1e-3
        case "letter":
            return re.findall("[A-E]", text)[:1] == [answer]
    # "answer4" is looked for in a question of three answers too.
    labels = [f"answer{i}" for i in range(1, 6)] if labels[0] == "answer1" else labels
    return re.findall("|".join(labels), text)[:1] == [answer]
