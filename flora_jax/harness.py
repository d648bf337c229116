"""Scores a model, with or without an adapter, on tasks of EleutherAI's lm-evaluation-harness (extra `lm-eval`).

python -m flora_jax.harness --model smollm2-135m-instruct --tasks arc_easy,piqa --limit 200 --out result.json
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from flora_jax.errors import CommandParser, UserError, check_writable, path_flag, run_command
from flora_jax.models.config import DTYPES


def _parser() -> CommandParser:
    parser = CommandParser(prog="flora_jax.harness", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help="HF directory, hub id, .gguf file or preset name"
    )
    parser.add_argument("--adapter", type=path_flag, help="adapter directory")
    parser.add_argument(
        "--tasks", required=True, help="comma-separated names of harness tasks, groups or tags"
    )
    parser.add_argument(
        "--include_path", type=path_flag, help="folder of task files beside the harness's own"
    )
    parser.add_argument(
        "--num_fewshot",
        type=int,
        help="solved examples before each question; default the task's own",
    )
    parser.add_argument(
        "--limit", type=int, help="score the first N documents of each task; default all"
    )
    parser.add_argument(
        "--apply_chat_template", action="store_true", help="ask in the tokenizer's chat template"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--max_length", type=int, help="tokens read at once; default the model's positions"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--out", type=path_flag, help="result file, JSON")
    return parser


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv[1:])
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be an integer, at least {least}")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a directory; name a file")
    if args.out:
        check_writable(Path(args.out), "--out")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the harness is not installed; pip install -e '.[lm-eval]'")
    # After the arguments are read: these imports take seconds.
    from flora_jax.evaluation.harness import HarnessLM, evaluate_harness, load_harness_tasks, table
    from flora_jax.files import keep_programs, write_result
    from flora_jax.interop.adapter_files import load_adapted

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    tasks = load_harness_tasks(names, args.include_path)
    keep_programs()
    model = load_adapted(args.model, args.adapter, args.dtype)
    lm = HarnessLM(
        model.config,
        model.base,
        model.tokenizer,
        adapter=model.adapter,
        adapter_config=model.adapter_config,
        batch_size=args.batch_size,
        max_length=args.max_length,
    )
    result = evaluate_harness(
        lm,
        tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        about={"model": args.model, "adapter": args.adapter, "base_fingerprint": model.fingerprint},
    )
    if args.out:
        write_result(Path(args.out), result, f"--out {args.out}")
    print(table(result))


if __name__ == "__main__":
    run_command(main)
