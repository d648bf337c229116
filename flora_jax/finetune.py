"""A whole run: everything is checked, then trained, and its best step is written and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from flora_jax.adapters import Tree, quantization_of
from flora_jax.config import (
    check_config,
    generator_settings,
    scored_tasks,
    weights_source,
)
from flora_jax.errors import UserError, expand_path, require, split_names, writing
from flora_jax.evaluation.run import check_prompts, evaluate_tasks
from flora_jax.evaluation.task_data import Settings, TaskData, is_generated, load_task_data
from flora_jax.files import make_cache, read_json, write_result
from flora_jax.interop.adapter_files import save_adapter
from flora_jax.models.adapted import Adapted
from flora_jax.models.loading import base_name
from flora_jax.training.cluster import join, settle, together
from flora_jax.training.loop import train
from flora_jax.training.report import say
from flora_jax.training.run import Result, Setup, check_run


def run(config: ml_collections.ConfigDict, workdir: str | Path, profile: int = 0) -> dict[str, Any]:
    """Trains, writes `adapter/` and `eval.json`, and returns the latter's contents. profile: as
    `train` has it.

    Raises as `train` does.
    """
    workdir = Path(expand_path(workdir))
    check_config(config)
    config = settle(join(config))
    tasks, settings = together(lambda: _check(config, workdir))
    result = train(config, workdir, profile)
    summary = dict(result.summary)
    if jax.process_index() != 0:
        return summary
    _write_adapter(result, config, workdir / "adapter")
    path = workdir / "eval.json"
    _write_summary(path, summary)
    say(f"step {summary['step']} is the best; its adapter is in {workdir / 'adapter'}")
    if tasks:
        run = result.run
        adapted = Adapted(
            config=run.model_config,
            base=_as_decoded(result.variables["params"]),
            tokenizer=run.tokenizer,
            fingerprint=run.fingerprint,
            adapter_config=run.adapter_config,
            adapter=result.variables.get("adapter"),
        )
        summary["evaluation"] = evaluate_tasks(tasks, adapted, settings)
        write_result(path, summary, str(path))
    return summary


def _check(config: ml_collections.ConfigDict, workdir: Path) -> tuple[list[TaskData], Settings]:
    """Checks all but what training does; the tasks to score, and how they are scored."""
    setup = check_run(config, workdir)  # before its data is prepared and kept
    settings = Settings(
        protocol=config.eval.protocol,
        prompt_style=_prompt_style(config),
        published_faults=config.eval.published_faults,
        batch_size=config.eval.batch_size,
        max_length=min(config.eval.max_length, setup.model_config.max_position_embeddings),
        max_new_tokens=config.eval.max_new_tokens,
    )
    _refuse_tensor_axis(config, setup)
    make_cache(config.data.cache_dir)
    scored = split_names(config.eval.tasks)
    if not scored:
        return [], settings
    tasks = load_task_data(
        scored,
        config.data.dir,
        settings,
        limit=config.eval.limit,
        generator=generator_settings(config),
        cache_dir=config.data.cache_dir,
    )
    check_prompts(tasks, setup.model_config, setup.tokenizer, settings)
    return tasks, settings


def _as_decoded(base: Tree) -> Tree:
    """The base in the dtype that answers are decoded in: float32 on a CPU, where a product of one
    row is slow in bfloat16."""
    if jax.default_backend() != "cpu":
        return base

    def wide(leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(wide, base)


def _prompt_style(config: ml_collections.ConfigDict) -> str:
    """How the scored tasks are asked: as in training, but plain where choices are scored."""
    scored = scored_tasks(config)
    if all(is_generated(task, config.eval.protocol) for task in scored):
        return config.data.prompt_style
    others = any(task.metric != "choice" for task in scored)
    require(
        config.data.prompt_style == "plain" or not others,
        f"config.eval.tasks={config.eval.tasks!r}: protocol lm_eval scores choices as plain "
        "text, and would ask the others so, too, not in "
        f"config.data.prompt_style={config.data.prompt_style!r}; name tasks of one kind, and "
        "score the others with flora_jax.evaluate",
    )
    return "plain"


def _refuse_tensor_axis(config: ml_collections.ConfigDict, setup: Setup) -> None:
    generated = [
        task.name for task in scored_tasks(config) if is_generated(task, config.eval.protocol)
    ]
    tensor = setup.mesh.shape["tensor"]
    if tensor > 1 and generated:
        raise UserError(
            f"config.mesh.tensor={tensor}: answers are generated without tensor parallelism, and "
            f"config.eval.tasks has {generated[0]!r}; use config.mesh.fsdp, or leave it out and "
            "score the adapter with flora_jax.evaluate"
        )


def _write_adapter(result: Result, config: ml_collections.ConfigDict, directory: Path) -> None:
    trained_on = {
        "tasks": result.run.inputs.account["tasks"],
        "prompts": [f"{digest:016x}" for digest in result.run.inputs.prompts.tolist()],
    }
    with writing(str(directory), "make room, and the same command writes it"):
        save_adapter(
            directory,
            result.trained,
            result.run.model_config,
            result.run.adapter_config,
            base_model=base_name(weights_source(config)),
            fingerprint=result.run.fingerprint,
            trained_on=trained_on,
            quantization=quantization_of(result.run.frozen.get("params", {})),
        )


def _write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Writes `eval.json`; the scores of a run that had finished stay until there are new ones."""
    try:
        before = read_json(path) if path.exists() else {}
    except UserError:  # damaged, and about to be written anew
        before = {}
    before.pop("evaluation", None)
    if before != json.loads(json.dumps(summary)):
        write_result(path, summary, str(path))
