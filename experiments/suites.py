"""What experiments/accuracy.py compares: the arms, the suites of data that they train on, and how a
device is filled."""

from __future__ import annotations

import dataclasses

# What is compared, in the order of running.
ARMS = ("base", "lora", "ffba_qg_add", "zflora", "fft", "ffba", "fpa", "ffa")


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


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a device is filled with.

    dtype: of the base and of a step; rows: of a step, in those of the suite; evaluations: of the
    validation loss in a run; eval_batch: prompts answered at once; remat: as in config.model.
    """

    dtype: str
    rows: int
    evaluations: int
    eval_batch: int
    remat: str


PROFILES = {
    "cpu": Profile("float32", 1, 3, 32, "products"),
    "gpu": Profile("bfloat16", 4, 10, 256, "none"),
}
