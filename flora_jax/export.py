"""Writes a trained model as what others load: a plain Llama, a PEFT LoRA, a transformers model of
its own, or an adapter for vLLM.

python -m flora_jax.export --workdir runs/demo --format transformers --out exported
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flora_jax.commands import read_flags, stopped_by_signals
from flora_jax.errors import check_writable, path_flag, require, run_command
from flora_jax.models.config import DTYPES

FLAGS = {
    "workdir": dict(type=path_flag, help="of a run of flora_jax.train"),
    "step": dict(type=int, help="a step that the run kept; default the best on validation"),
    "model": dict(help="in place of --workdir: HF directory, hub id, .gguf file or preset name …"),
    "adapter": dict(
        type=path_flag, help="… and the adapter directory that belongs to it, ours or a PEFT LoRA"
    ),
    "format": dict(
        required=True, dest="form", help="merged, peft, transformers or vllm: docs/export.md"
    ),
    "dtype": dict(
        choices=DTYPES,
        help="of the weights written; default the run's "
        "model.param_dtype, for peft, vllm and --model float32",
    ),
    "out": dict(required=True, type=Path, help="new directory"),
    "push": dict(metavar="ORG/NAME", help="say what an upload to the Hugging Face hub would be …"),
    "confirm": dict(action="store_true", help="… and do it, to a private repository if it is new"),
    "overwrite": dict(action="store_true", help="replace an earlier export"),
}


def main(argv: list[str]) -> None:
    """The command."""
    args = read_flags("flora_jax.export", __doc__, FLAGS, argv)
    _check(args)
    # After the arguments are read: these imports take seconds.
    from flora_jax.analysis.results import command_line
    from flora_jax.files import keep_programs
    from flora_jax.interop.exports import check_directory, describe_report, export_pair
    from flora_jax.interop.push import check_push, push
    from flora_jax.training.trained import export_run

    if args.push:
        check_push(args.push, args.confirm)
    check_directory(args.out, args.overwrite)
    check_writable(args.out, "--out")
    keep_programs()
    command = command_line("flora_jax.export", argv[1:])
    how = {"dtype": args.dtype, "overwrite": args.overwrite, "command": command}
    with stopped_by_signals("stopped by a signal; nothing was written"):
        if args.workdir:
            report = export_run(args.workdir, args.form, args.out, step=args.step, **how)
        else:
            report = export_pair(args.model, args.adapter, args.form, args.out, **how)
    print(describe_report(report, args.out))
    if args.push:
        print(push(args.out, args.push, args.confirm))


def _check(args: argparse.Namespace) -> None:
    require(
        bool(args.workdir) != bool(args.model), "give either --workdir, or --model with --adapter"
    )
    require(
        not (args.workdir and args.adapter), "--adapter goes with --model; a --workdir has its own"
    )
    require(not args.model or args.adapter, "--model needs --adapter")
    require(not args.model or args.step is None, "--step goes with --workdir")
    require(not args.confirm or args.push, "--confirm goes with --push")


if __name__ == "__main__":
    run_command(main)
