"""What experiments/accuracy.py compares: the arms, and the suites of data that they train on."""

from __future__ import annotations

import dataclasses

# What is compared, in the order of running: the method, and the side of the budget that its rank is
# on.
ARMS = {
    "base": (None, "nearest"),
    "lora": ("lora", "nearest"),
    "ffba_qg_add": ("ffba_qg_add", "nearest"),
    "zflora_above": ("zflora", "above"),
    "fft": ("fft", "nearest"),
    "ffba": ("ffba", "nearest"),
    "fpa": ("fpa", "nearest"),
    "ffa": ("ffa", "nearest"),
    "zflora_below": ("zflora", "below"),
}


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is trained on and tested on, how answers are read, and how long a row and a run are."""

    train: tuple[str, ...]
    tests: tuple[str, ...]
    protocol: str
    max_length: int
    steps: int
    batch_size: int


SUITES = {
    "commonsense": Suite(
        ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq"),
        ("ARC-Easy", "openbookqa", "boolq", "piqa", "social_i_qa", "hellaswag"),
        "llm_adapters",
        256,
        200,
        4,
    ),
    "math": Suite(
        ("gsm8k", "mawps"),
        ("AddSub", "MultiArith", "SingleEq", "gsm8k", "AQuA"),
        "llm_adapters",
        384,
        150,
        4,
    ),
    "dialogue": Suite(("dailydialogpp",), ("dailydialogpp",), "llm_adapters", 256, 150, 4),
    "summary": Suite(("dialogsum",), ("dialogsum",), "llm_adapters", 512, 120, 2),
}
