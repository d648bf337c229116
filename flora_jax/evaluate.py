"""Scores a model, with or without an adapter, on benchmark tasks; the result goes to stdout and to a JSON file.

    python -m flora_jax.evaluate --model smollm2-135m-instruct --tasks ARC-Easy,piqa --data_dir DIR --limit 200
"""

from __future__ import annotations

from pathlib import Path

from flora_jax.errors import CommandParser, UserError, check_writable, path_flag, run_command
from flora_jax.models.config import DTYPES


def _parser() -> CommandParser:
    parser = CommandParser(prog="flora_jax.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="HF directory, hub id, .gguf file or preset name")
    parser.add_argument("--adapter", type=path_flag, help="adapter directory")
    parser.add_argument("--tasks", required=True, help="comma-separated task names, or a path ending in .jsonl")
    parser.add_argument("--data_dir", help="folder with one folder a task, or tfds or tfds:DIR; generated tasks: none")
    parser.add_argument("--protocol", default="lm_eval", help="lm_eval (default) or llm_adapters")
    parser.add_argument("--prompt_style", default="plain", help="plain (default), chat or llm_adapters")
    parser.add_argument(
        "--published_faults", action="store_true", help="llm_adapters with the faults of its published scripts"
    )
    parser.add_argument("--num_fewshot", type=int, default=0, help="solved training examples before each question")
    parser.add_argument("--generator", default="", help="of generated tasks, FIELD=NUMBER,… such as max_terms=2")
    parser.add_argument("--limit", type=int, help="score the first N test examples of each task; default all")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of prompt and generated answer together")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0, help="draws the few-shot examples")
    parser.add_argument("--allow_contaminated", action="store_true",
                        help="score a test though over 1 %% of it was trained on; the result has the share")
    parser.add_argument("--out", type=path_flag, help="result file, JSON")
    return parser


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv[1:])
    # After the arguments are read: these imports take seconds.
    from flora_jax.data.tasks import get_task
    from flora_jax.evaluation.run import check_seen, describe, evaluate_tasks, load_task_data
    from flora_jax.files import keep_programs, write_result
    from flora_jax.interop.adapter_files import load_adapted, read_trained_on

    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size} must be a positive integer")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a directory; name a file")
    if args.out:
        check_writable(Path(args.out), "--out")
    generator = {}
    for pair in args.generator.split(",") if args.generator else []:
        field, _, number = pair.partition("=")
        if not number.strip().isdecimal():
            raise UserError(f"--generator {pair!r} is not FIELD=NUMBER")
        generator[field.strip()] = int(number)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if generator and not any(get_task(name, generator).generator for name in names):
        raise UserError(f"--generator {args.generator} has no effect: --tasks {args.tasks} names no generated task")
    tasks = load_task_data(
        names, args.data_dir, protocol=args.protocol, prompt_style=args.prompt_style,
        published_faults=args.published_faults, limit=args.limit, num_fewshot=args.num_fewshot, seed=args.seed,
        generator=generator)  # fmt: skip
    seen = check_seen(tasks, read_trained_on(args.adapter) if args.adapter else None, args.allow_contaminated)
    keep_programs()
    model = load_adapted(args.model, args.adapter, args.dtype)
    result = evaluate_tasks(
        tasks, model.config, model.base, model.tokenizer, adapter=model.adapter, adapter_config=model.adapter_config,
        protocol=args.protocol, prompt_style=args.prompt_style, published_faults=args.published_faults,
        batch_size=args.batch_size, max_length=args.max_length,
        about={"model": args.model, "adapter": args.adapter, "base_fingerprint": model.fingerprint, "seed": args.seed,
               "limit": args.limit, "generator": generator, "share_of_test_in_train": seen})  # fmt: skip
    if args.out:
        write_result(Path(args.out), result, f"--out {args.out}")
    for name, scores in result["tasks"].items():
        print(f"{name:16} {describe(scores)}  n {scores['n']}")


if __name__ == "__main__":
    run_command(main)
