"""Scores a model, with or without an adapter, on benchmark tasks; the result goes to stdout and to
a JSON file.

python -m flora_jax.evaluate --model smollm2-135m-instruct --tasks ARC-Easy,piqa --data_dir DIR
"""

from __future__ import annotations

from flora_jax.commands import (
    DTYPE,
    MODEL,
    QUANTIZATION,
    RESULT,
    about_model,
    asked_model,
    read_flags,
    write_out,
)
from flora_jax.errors import run_command

FLAGS = {
    **MODEL,
    "tasks": dict(
        required=True,
        help="comma-separated task names, paths ending in .jsonl or .parquet, or hub:ORG/NAME",
    ),
    "data_dir": dict(
        help="folder with one folder a task, or tfds or tfds:DIR; generated and Hub tasks: none"
    ),
    "protocol": dict(default="lm_eval", help="lm_eval (default) or llm_adapters"),
    "prompt_style": dict(default="plain", help="plain (default), chat or llm_adapters"),
    "published_faults": dict(action="store_true", help="those of llm_adapters' published scripts"),
    "num_fewshot": dict(type=int, default=0, help="solved training examples before each question"),
    "generator": dict(default="", help="of generated tasks, FIELD=NUMBER,… such as max_terms=2"),
    "limit": dict(type=int, help="score the first N test examples of each task; default all"),
    "batch_size": dict(type=int, default=16),
    "max_length": dict(type=int, default=1024, help="tokens of prompt and answer together"),
    "max_new_tokens": dict(
        type=int,
        help="of a generated answer; default the task's own number, "
        "and for a file of your own at least its longest answer's",
    ),
    **DTYPE,
    **QUANTIZATION,
    "seed": dict(type=int, default=0, help="draws the few-shot examples"),
    "allow_contaminated": dict(
        action="store_true",
        help="score a test though over 1 %% of it was trained on; the result has the share",
    ),
    **RESULT,
}


def main(argv: list[str]) -> None:
    """The command."""
    args = read_flags("flora_jax.evaluate", __doc__, FLAGS, argv)
    # After the arguments are read: these imports take seconds.
    from flora_jax.evaluation.request import read_request
    from flora_jax.evaluation.run import describe, evaluate_tasks
    from flora_jax.evaluation.task_data import check_seen
    from flora_jax.files import keep_programs
    from flora_jax.interop.adapter_files import load_adapted, read_trained_on

    request = read_request(args)
    trained_on = read_trained_on(args.adapter) if args.adapter else None
    seen = check_seen(request.tasks, trained_on, args.allow_contaminated)
    keep_programs()
    model = load_adapted(*asked_model(args))
    about = about_model(args, model.fingerprint) | request.about | {"share_of_test_in_train": seen}
    result = evaluate_tasks(request.tasks, model, request.settings, about=about)
    write_out(args, result)
    for name, scores in result["tasks"].items():
        print(f"{name:16} {describe(scores)}  n {scores['n']}")


if __name__ == "__main__":
    run_command(main)
