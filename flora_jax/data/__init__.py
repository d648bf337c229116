"""Data: tasks and their records, tokens and loss masks, packing and batches."""

from flora_jax.data.encode import (
    Encoded,
    EncodeReport,
    encode,
    encode_all,
    encode_each,
    encode_prompt,
)
from flora_jax.data.pipeline import eval_batches, train_iterator
from flora_jax.data.sources import (
    data_hash,
    has_split,
    load_examples,
    load_records,
    open_examples,
    open_records,
)
from flora_jax.data.tasks import (
    CONTAMINATED,
    MIXTURES,
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
    "MIXTURES",
    "TASKS",
    "EncodeReport",
    "Encoded",
    "Example",
    "Message",
    "Task",
    "data_hash",
    "dedupe",
    "encode",
    "encode_all",
    "encode_each",
    "encode_prompt",
    "eval_batches",
    "expand",
    "get_task",
    "has_split",
    "label_request",
    "lm_eval_request",
    "load_examples",
    "load_records",
    "open_examples",
    "open_records",
    "prompt_digests",
    "train_iterator",
]
