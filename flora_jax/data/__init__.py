"""Data: tasks and their records, tokens and loss masks, packing and batches."""

from flora_jax.data.encode import (
    Encoded,
    EncodeReport,
    encode_each,
    encode_prompt,
)
from flora_jax.data.pipeline import eval_batches, train_iterator
from flora_jax.data.sources import (
    data_hash,
    has_split,
    load_examples,
    open_examples,
)
from flora_jax.data.tasks import (
    CONTAMINATED,
    TASKS,
    Example,
    Message,
    Task,
    dedupe,
    expand,
    get_task,
    label_request,
    lm_eval_request,
    prompt_digests,
)

__all__ = [
    "CONTAMINATED",
    "TASKS",
    "EncodeReport",
    "Encoded",
    "Example",
    "Message",
    "Task",
    "data_hash",
    "dedupe",
    "encode_each",
    "encode_prompt",
    "eval_batches",
    "expand",
    "get_task",
    "has_split",
    "label_request",
    "lm_eval_request",
    "load_examples",
    "open_examples",
    "prompt_digests",
    "train_iterator",
]
