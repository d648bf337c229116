"""The evaluation scripts of LLM-Adapters with their faults, to compare with published numbers.
`answers` mends the faults.

(evaluate.py at its commit 32e03af, commomsense_evaluate.py at e0efdc0.)

- The prompt that is scored is not the one that was trained on: its frame has other spaces.
- Prompts of choice tasks are padded on the left with token 0, in batches, and there is no attention
  mask. The model reads the padding before a short prompt, so a score depends on the batch.
- Numbers: commas are deleted ("1,2" is 12), every hyphen before a digit is a sign ("5-3" ends in
  -3), digits inside words count, a text without any is infinity.
- An option letter is the first capital A to E of any word. A label is the first mention of any, as
  a substring.

Not repeated: beam search over four beams (answers here are greedy), and spaces around an
instruction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from flora_jax.data.tasks import Message
from flora_jax.tokens import Tokenizer

METRICS = ("number", "letter", "choice")  # of the tasks that have a script

_FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request. "
    f"\n\n{' ' * 16}### Instruction:\n{' ' * 16}{{}}\n\n{' ' * 16}### Response:\n{' ' * 16}"
)
_PAD = 0


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The token ids of a prompt in the frame of the scripts."""
    text = _FRAME.format("\n\n".join(message.content for message in messages))
    return tokenizer(text, verbose=False)["input_ids"]


def pad(prompts: Sequence[list[int]], metric: str, batch_size: int) -> list[list[int]]:
    """The prompts as the scripts read them: those of a choice task have padding before them, batch
    by batch in the given order."""
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
            found = ["inf", *re.findall(r"-?\d+\.?\d*", text.replace(",", ""))]
            return abs(float(answer.replace(",", "")) - float(found[-1])) <= 1e-3
        case "letter":
            return re.findall("[A-E]", text)[:1] == [answer]
    if labels[0] == "answer1":  # five of them, even where a question has three
        labels = [f"answer{i}" for i in range(1, 6)]
    return re.findall("|".join(labels), text)[:1] == [answer]
