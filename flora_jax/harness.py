"""Scores a model, with or without an adapter, on tasks of EleutherAI's lm-evaluation-harness (extra
`lm-eval`).

python -m flora_jax.harness --model smollm2-135m-instruct --tasks arc_easy,piqa --out result.json
"""

from __future__ import annotations

import importlib.util

from flora_jax.commands import (
    DTYPE,
    MODEL,
    QUANTIZATION,
    RESULT,
    about_model,
    asked_model,
    check_result,
    check_template,
    read_flags,
    write_out,
)
from flora_jax.errors import path_flag, require, run_command, split_names

FLAGS = {
    **MODEL,
    "tasks": dict(required=True, help="comma-separated names of harness tasks, groups or tags"),
    "include_path": dict(type=path_flag, help="folder of task files beside the harness's own"),
    "num_fewshot": dict(type=int, help="solved examples before a question; default the task's"),
    "limit": dict(type=int, help="score the first N documents of each task; default all"),
    "apply_chat_template": dict(action="store_true", help="ask in the tokenizer's chat template"),
    "batch_size": dict(type=int, default=16),
    "max_length": dict(type=int, help="tokens read at once; default the model's positions"),
    **DTYPE,
    **QUANTIZATION,
    **RESULT,
}


def main(argv: list[str]) -> None:
    """The command."""
    args = read_flags("flora_jax.harness", __doc__, FLAGS, argv)
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
        value = getattr(args, name)
        require(
            value is None or value >= least,
            f"--{name} {value} must be an integer, at least {least}",
        )
    check_result(args.out)
    check_template(args, args.apply_chat_template, "--apply_chat_template")
    require(
        importlib.util.find_spec("lm_eval") is not None,
        "the harness is not installed; pip install -e '.[lm-eval]'",
    )
    # After the arguments are read: these imports take seconds.
    from flora_jax.evaluation.harness import HarnessLM, evaluate_harness, load_harness_tasks, table
    from flora_jax.files import keep_programs
    from flora_jax.interop.adapter_files import load_adapted
    from flora_jax.models.loading import load_config

    load_config(args.model)  # before the harness reads its thousands of tasks
    tasks = load_harness_tasks(split_names(args.tasks), args.include_path)
    keep_programs()
    model = load_adapted(*asked_model(args))
    result = evaluate_harness(
        HarnessLM(model, batch_size=args.batch_size, max_length=args.max_length),
        tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        about=about_model(args, model.fingerprint),
    )
    write_out(args, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main)
