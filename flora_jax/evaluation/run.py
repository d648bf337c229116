"""Evaluates a model on tasks: scores, and everything needed to reproduce them.

There are two protocols. `lm_eval` scores choice tasks by the log-likelihood of the choices, as the
lm-eval harness does; for other tasks it generates an answer and matches the final one.
`llm_adapters` generates an answer to the instruction prompt that adapters are trained on, and reads
the label word, number or letter in it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flora_jax.device import check_jax, versions
from flora_jax.errors import told_of
from flora_jax.evaluation.generated import Asked, accuracy, ask, score_answers
from flora_jax.evaluation.loglik import Pairs, encode_pairs, token_loglik
from flora_jax.evaluation.rouge import KINDS
from flora_jax.evaluation.task_data import Settings, TaskData, few_shot_requests, is_generated
from flora_jax.inference.generator import Generator, check_sizes
from flora_jax.models.adapted import Adapted
from flora_jax.models.config import LlamaConfig
from flora_jax.tokens import Tokenizer

SCHEMA_VERSION = 1
_PACKAGES = ("flora_jax", "jax", "flax", "transformers", "tokenizers", "numpy")


def evaluate_tasks(
    tasks: Sequence[TaskData],
    adapted: Adapted,
    settings: Settings = Settings(),
    *,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates a model and returns the result as a JSON-ready dict.

    `about`, e.g. model and adapter, goes in as it is, with the settings and versions. `tasks` has
    for each task, as far as its metric has them:

    - `accuracy` and `stderr`, sqrt(p (1 − p) / n); with scored choices `accuracy_norm` and
      `stderr_norm`; with compared texts `rouge1`, `rouge2`, `rougeL` and `rougeLsum` (rouge.py)
    - `items`: 1 or 0 for each question, in order, or the rougeL of a text
    - `texts`: the generated ones, None where the prompt was too long
    - `finished`, `unfinished`: the shares that ended at a token, and neither there nor at a stop
      text
    - `n`, `num_fewshot`, `scoring`, `decode`, `data_hash`, `seconds`, and one whole `prompt`

    Raises UserError if no prompt leaves room, for choices beyond max_position_embeddings, and for
    sizes that no Generator of this base can have; raises FloatingPointError for logits that are not
    finite.
    """
    check_jax()
    # Refuses a task whose prompts leave no room, or whose choices are too long, before any task is
    # scored.
    asked = check_prompts(tasks, adapted.config, adapted.tokenizer, settings)
    sizes = (settings.max_length, settings.batch_size)
    if any(is_generated(data.task, settings.protocol) for data in tasks):
        check_sizes(adapted.config, adapted.base, *sizes)
    packages = versions(*_PACKAGES)
    generator = functools.cache(lambda: Generator.of(adapted, *sizes))
    results: dict[str, Any] = {}
    for data in tasks:
        name = data.task.name
        start = time.perf_counter()
        if is_generated(data.task, settings.protocol):
            scores = score_answers(data, asked[name], generator(), settings)
        else:
            scores = _score_choices(data, asked[name], adapted, settings.batch_size)
        results[name] = {
            **scores,
            "n": len(data.examples),
            "num_fewshot": len(data.shots),
            "data_hash": data.data_hash,
            "seconds": round(time.perf_counter() - start, 3),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        **(about or {}),
        **_describe_run(adapted, settings),
        "versions": packages,
        "tasks": results,
    }


def _describe_run(adapted: Adapted, settings: Settings) -> dict[str, Any]:
    """The settings in a result."""
    mask = "explicit; padding is never attended to and never scored"
    if settings.published_faults:
        mask = "none over the padding of choice tasks, as published"
    return {
        "adapter_config": adapted.adapter_config and dataclasses.asdict(adapted.adapter_config),
        "protocol": settings.protocol,
        "prompt_style": settings.prompt_style,
        "published_faults": settings.published_faults,
        "split": "test",
        "batch_size": settings.batch_size,
        "max_length": settings.max_length,
        "dtype": adapted.dtype,
        "mask": mask,
        "device": jax.devices()[0].device_kind,
    }


def check_prompts(
    tasks: Sequence[TaskData],
    config: LlamaConfig,
    tokenizer: Tokenizer,
    settings: Settings,
) -> dict[str, Asked | Pairs]:
    """By task, the prompts, or the token ids of choices.

    It needs no model, so that a run can refuse its test data before it trains. Logs how many
    prompts leave no room, and where answers may be cut. Raises UserError for prompts that the style
    cannot express, where none leaves room, and for choices that are too long.
    """
    asked = {}
    max_length = min(settings.max_length, config.max_position_embeddings)
    for data in tasks:
        name = data.task.name
        if is_generated(data.task, settings.protocol):
            asked[name] = ask(data, tokenizer, settings, max_length)
        else:
            requests = [few_shot_requests(example, data.shots) for example in data.examples]
            with told_of(name):
                asked[name] = encode_pairs(config, tokenizer, requests)
    return asked


def describe(scores: Mapping[str, Any]) -> str:
    """A task's scores in one line."""
    if "rougeL" in scores:
        return "  ".join(
            f"{kind} {scores[kind]:.4f} ± {scores[f'{kind}_stderr']:.4f}" for kind in KINDS
        )
    line = f"{scores['accuracy']:.4f} ± {scores['stderr']:.4f}"
    if "accuracy_norm" in scores:
        line += f"  norm {scores['accuracy_norm']:.4f}"
    return line


def _score_choices(
    data: TaskData, pairs: Pairs, adapted: Adapted, batch_size: int
) -> dict[str, Any]:
    """A task's scores from the tokens of its choices, JSON-ready."""

    def describe(i: int) -> str:
        return f"{data.task.name}: question {i}"

    right = []
    right_norm = []
    scores = token_loglik(adapted, pairs, batch_size, describe)
    for example, found in zip(data.examples, scores, strict=True):
        loglik = [value for value, _ in found]
        characters = [len(choice) for choice in example.choices]
        right.append(int(np.argmax(loglik)) == example.gold)
        right_norm.append(int(np.argmax(np.divide(loglik, characters))) == example.gold)
    return {
        **accuracy("accuracy", "stderr", right),
        **accuracy("accuracy_norm", "stderr_norm", right_norm),
        "items": [int(one) for one in right],
        "scoring": "log-likelihood of each choice; accuracy_norm divides by its characters",
        "decode": None,
        "prompt": "".join(few_shot_requests(data.examples[0], data.shots)[0]),
    }
