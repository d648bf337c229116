"""Fine-tunes a Llama: `python -m flora_jax.train --config configs/ffba_1b.py --workdir DIR [--config.FIELD=VALUE]…`.

The same command on the same workdir resumes. The workdir gets config.json, metrics.jsonl, tensorboard/, checkpoints/,
adapter/ (the best step's) and eval.json. Exit codes: 0 done, 2 bad input, 1 anything else.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from flora_jax.config import (
    check_config,
    fields,
    generator_settings,
    names,
    read_config,
    weights_source,
)
from flora_jax.data import get_task
from flora_jax.errors import UserError, expand_path, near_misses, run_command, writing
from flora_jax.evaluation.run import check_prompts, evaluate_tasks
from flora_jax.evaluation.task_data import Settings, TaskData, is_generated, load_task_data
from flora_jax.files import keep_programs, make_cache, read_json, write_result
from flora_jax.interop.adapter_files import save_adapter
from flora_jax.models.adapted import Adapted
from flora_jax.models.loading import base_name
from flora_jax.training.cluster import join, together
from flora_jax.training.loop import check_run, train
from flora_jax.training.report import say


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains, writes `adapter/` and `eval.json`, and returns the latter's contents. Raises as `train` does."""
    workdir = Path(expand_path(workdir))
    check_config(config)
    config = join(config)
    tasks, settings = together(lambda: _check(config, workdir))
    result = train(config, workdir)
    prepared, summary = result.run, dict(result.summary)
    if jax.process_index() != 0:
        return summary
    trained_on = {
        "tasks": prepared.inputs.account["tasks"],
        "prompts": sorted(prepared.inputs.prompts),
    }
    with writing(str(workdir / "adapter"), "make room, and the same command writes it"):
        save_adapter(
            workdir / "adapter",
            result.trained,
            prepared.model_config,
            prepared.adapter_config,
            base_model=base_name(weights_source(config)),
            fingerprint=prepared.fingerprint,
            trained_on=trained_on,
        )
    # The scores of a run that was finished before stay until there are new ones.
    path = workdir / "eval.json"
    try:
        before = read_json(path) if path.exists() else {}
    except UserError:  # damaged, and about to be written anew
        before = {}
    if {k: v for k, v in before.items() if k != "evaluation"} != json.loads(json.dumps(summary)):
        write_result(path, summary, str(path))
    say(f"step {summary['step']} is the best; its adapter is in {workdir / 'adapter'}")
    if tasks:
        adapted = Adapted(
            config=prepared.model_config,
            base=result.variables["params"],
            tokenizer=prepared.tokenizer,
            fingerprint=prepared.fingerprint,
            adapter_config=prepared.adapter_config,
            adapter=result.variables.get("adapter"),
        )
        summary["evaluation"] = evaluate_tasks(tasks, adapted, settings)
        write_result(path, summary, str(path))
    return summary


def _check(config: ml_collections.ConfigDict, workdir: Path) -> tuple[list[TaskData], Settings]:
    """Checks all but what training itself does; the tasks to score, and how they are scored."""
    setup = check_run(config, workdir)  # before its data is prepared and kept
    scored = [get_task(name, generator_settings(config)) for name in names(config.eval.tasks)]
    # Choices are scored as plain text.
    plain = not all(is_generated(task, config.eval.protocol) for task in scored)
    style = "plain" if plain else config.data.prompt_style
    if style != config.data.prompt_style and any(task.metric != "choice" for task in scored):
        raise UserError(
            f"config.eval.tasks={config.eval.tasks!r}: protocol lm_eval scores choices as plain text, and "
            f"would ask the others so, too, not in config.data.prompt_style={config.data.prompt_style!r}; "
            "name tasks of one kind, and score the others with flora_jax.evaluate"
        )
    generated = [task.name for task in scored if is_generated(task, config.eval.protocol)]
    if (tensor := setup.mesh.shape["tensor"]) > 1 and generated:
        raise UserError(
            f"config.mesh.tensor={tensor}: answers are generated without tensor parallelism, and "
            f"config.eval.tasks has {generated[0]!r}; use config.mesh.fsdp, or leave it out and score the "
            "adapter with flora_jax.evaluate"
        )
    make_cache(config.data.cache_dir)
    settings = Settings(
        protocol=config.eval.protocol,
        prompt_style=style,
        published_faults=config.eval.published_faults,
        batch_size=config.eval.batch_size,
        max_length=min(config.eval.max_length, setup.model_config.max_position_embeddings),
        max_new_tokens=config.eval.max_new_tokens,
    )
    tasks = names(config.eval.tasks) and load_task_data(
        names(config.eval.tasks),
        config.data.dir,
        settings,
        limit=config.eval.limit,
        generator=generator_settings(config),
        cache_dir=config.data.cache_dir,
    )
    if tasks:
        check_prompts(tasks, setup.model_config, setup.tokenizer, settings)
    return tasks, settings


def parse(argv: list[str]) -> tuple[ml_collections.ConfigDict, str]:
    """The configuration and the workdir of a command line. Raises UserError for whatever is wrong with it."""
    first, known = flags.FlagValues(), flags.FlagValues()
    path = flags.DEFINE_string("config", None, "A file of configs/.", flag_values=first)
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run; made if absent, resumed if it holds this run.",
        flag_values=known,
    )
    flags.DEFINE_bool(
        "help", False, "Show this text.", short_name="h", flag_values=known, allow_overwrite=False
    )
    config = None
    try:
        for values in (first, known):
            # flags may stand after an argument that is none, which is then named below
            values.set_gnu_getopt()
        rest = first(argv, known_only=True)
        if path.value is not None:
            config = read_config(path.value)
            _check_names(rest, list(fields(config)))
            config_flags.DEFINE_config_dict("config", config, flag_values=known, sys_argv=rest)
        rest = known(rest)
    except flags.Error as error:
        raise UserError(f"{error}; fields are listed in flora_jax/config.py") from None
    if known.help:
        print(__doc__, "--config FILE", "--config.FIELD=VALUE", known.get_help(), sep="\n")
        sys.exit(0)
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; fields are set as --config.FIELD=VALUE")
    for flag in (path, workdir):
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing")
    return config, workdir.value


def _check_names(argv: list[str], known: list[str]) -> None:
    for argument in argv[1:]:
        if (found := re.match(r"--?(?:no)?config\.([^=]*)", argument)) and found[1] not in known:
            raise UserError(f"config.{found[1]} is no field; {near_misses(found[1], known)}")


def main(argv: list[str]) -> None:
    """The command."""
    config, workdir = parse(argv)
    check_config(config)
    keep_programs()
    run(config, workdir)


if __name__ == "__main__":
    run_command(main)
