"""Scores a model, with or without an adapter, on benchmark tasks; the result goes to stdout and to
a JSON file.

python -m flora_jax.evaluate --model smollm2-135m-instruct --tasks ARC-Easy,piqa --data_dir DIR
"""

from __future__ import annotations

from pathlib import Path

from flora_jax.commands import DTYPE, MODEL, QUANTIZATION, RESULT, read_flags
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
    "published_faults": dict(
        action="store_true", help="llm_adapters with the faults of its published scripts"
    ),
    "num_fewshot": dict(type=int, default=0, help="solved training examples before each question"),
    "generator": dict(default="", help="of generated tasks, FIELD=NUMBER,… such as max_terms=2"),
    "limit": dict(type=int, help="score the first N test examples of each task; default all"),
    "batch_size": dict(type=int, default=16),
    "max_length": dict(
        type=int, default=1024, help="tokens of prompt and generated answer together"
    ),
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
    from flora_jax.adapters import served_format
    from flora_jax.evaluation.request import read_request
    from flora_jax.evaluation.run import describe, evaluate_tasks
    from flora_jax.evaluation.task_data import check_seen
    from flora_jax.files import keep_programs, write_result
    from flora_jax.interop.adapter_files import load_adapted, read_trained_on

    request = read_request(args)
    trained_on = None
    if args.adapter:
        trained_on = read_trained_on(args.adapter)
    seen = check_seen(request.tasks, trained_on, args.allow_contaminated)
    keep_programs()
    model = load_adapted(
        args.model, args.adapter, args.dtype, args.quantization, args.template_arguments
    )
    about = {
        "model": args.model,
        "adapter": args.adapter,
        "base_fingerprint": model.fingerprint,
        "quantization": args.quantization,
        "generated_in": served_format(args.quantization),
        "template_arguments": args.template_arguments,
        "seed": args.seed,
        "limit": args.limit,
        "generator": request.generator,
        "share_of_test_in_train": seen,
    }
    result = evaluate_tasks(request.tasks, model, request.settings, about=about)
    if args.out:
        write_result(Path(args.out), result, f"--out {args.out}")
    for name, scores in result["tasks"].items():
        print(f"{name:16} {describe(scores)}  n {scores['n']}")


if __name__ == "__main__":
    run_command(main)
