"""Times each method beside the merged base: time to first token (TTFT) and time per output token (TPOT).

    python -m flora_jax.latency --model smollm2-135m-instruct --methods base,lora,ffba --out DIR
    python -m flora_jax.latency --model random --preset llama3.2-1b --peer peft --out DIR

DIR gets `latency.json`, `latency.md`, and the figure as `latency.png` and `latency.pdf`, complete for the methods done
so far after each of them. Runs on whatever device JAX sees. Compiled programs are kept in the cache folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_jax.errors import (
    CommandParser,
    UserError,
    check_writable,
    positive_integers,
    run_command,
)
from flora_jax.files import keep_programs, read_json, write_result
from flora_jax.models.config import DTYPES, LlamaConfig

if TYPE_CHECKING:
    from flora_jax.analysis.timing import Setting

SCHEMA_VERSION = 1
METHODS = (
    "base,base_7,lora,lora_7,lora_merged,pf_lora,ffa,fpa,ffba,ffba_folded,ffba_qg_add,ffba_qg_add_folded,"
    "zflora"
)
RESULT = "latency.json"


def _parser() -> CommandParser:
    parser = CommandParser(prog="flora_jax.latency", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="random", help="HF directory, hub id, .gguf file, preset name, or random"
    )
    parser.add_argument("--preset", help="architecture of --model random")
    parser.add_argument(
        "--methods", default=METHODS, help="comma-separated ways of serving; default %(default)s"
    )
    parser.add_argument("--prompt_lengths", default="128,512", help="tokens, comma-separated")
    parser.add_argument("--batch_sizes", default="1,8", help="comma-separated")
    parser.add_argument(
        "--rank", type=int, default=32, help="of ffba, or with --no-equal_parameters of all methods"
    )
    parser.add_argument(
        "--equal_parameters",
        action=BooleanOptionalAction,
        default=True,
        help="each method at the rank nearest to ffba's parameters",
    )
    parser.add_argument(
        "--new_tokens", type=int, default=33, help="the first belongs to TTFT, the others to TPOT"
    )
    parser.add_argument("--dtype", default="float32", help=" or ".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--prefill_rounds", type=int, help="rounds that read the prompts anew; default all of them"
    )
    parser.add_argument(
        "--turn_tokens",
        type=int,
        help="tokens that a model decodes before the next one's turn, few on a machine in other use; "
        "not with --peer; default all of a round's",
    )
    parser.add_argument(
        "--peer",
        choices=("peft",),
        help="time transformers + PEFT's unmerged LoRA in the same rounds",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="new or empty directory, or one of this very command",
    )
    return parser


def _check(args: Namespace) -> tuple[LlamaConfig, list[str], list[Setting], dict[str, Any]]:
    """The architecture, variants, settings, and the arguments as the result records them. Nothing is compiled yet."""
    import jax
    import jax.numpy as jnp

    from flora_jax.analysis.timing import Setting
    from flora_jax.errors import near_misses
    from flora_jax.inference.decoding import bucket
    from flora_jax.inference.generator import check_fits
    from flora_jax.models.llama import abstract_base
    from flora_jax.models.loading import load_config

    for flag, least in (("rank", 1), ("rounds", 1), ("new_tokens", 2)):
        if getattr(args, flag) < least:
            raise UserError(
                f"--{flag} {getattr(args, flag)} must be an integer of at least {least}"
            )
    if args.prefill_rounds is not None and not 1 <= args.prefill_rounds <= args.rounds:
        raise UserError(
            f"--prefill_rounds {args.prefill_rounds} must be from 1 to --rounds {args.rounds}"
        )
    if args.turn_tokens is not None and not 1 <= args.turn_tokens < args.new_tokens:
        raise UserError(
            f"--turn_tokens {args.turn_tokens} must be from 1 to {args.new_tokens - 1}, one less than "
            "--new_tokens"
        )
    if args.turn_tokens is not None and args.peer:
        raise UserError(
            f"--turn_tokens {args.turn_tokens} does not go with --peer {args.peer}, which generates "
            "without a pause; leave one out"
        )
    if args.dtype not in DTYPES:
        raise UserError(f"--dtype {args.dtype!r} is unknown; {near_misses(args.dtype, DTYPES)}")
    methods = list(dict.fromkeys(name.strip() for name in args.methods.split(",") if name.strip()))
    if not methods:
        raise UserError("--methods is empty; give names, comma-separated")
    settings = [
        Setting(length, batch, args.new_tokens)
        for batch in positive_integers("--batch_sizes", args.batch_sizes)
        for length in positive_integers("--prompt_lengths", args.prompt_lengths)
    ]
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    _check_out(args.out, arguments)
    if args.model == "random" and not args.preset:
        raise UserError(
            "--model random needs --preset, the architecture to fill with random weights"
        )
    preset = LlamaConfig.preset(args.preset) if args.preset else None
    config = preset if args.model == "random" else load_config(args.model)

    def sizes(c):
        return (
            c.widths,
            c.num_hidden_layers,
            c.num_attention_heads,
            c.vocab_size,
            c.tie_word_embeddings,
        )

    if preset and sizes(preset) != sizes(config):
        raise UserError(
            f"--preset {args.preset} is another architecture than that of --model {args.model}; leave it "
            "out, it is for --model random"
        )
    longest = max(setting.prompt_length for setting in settings)
    if longest + args.new_tokens > config.max_position_embeddings:
        raise UserError(
            f"--prompt_lengths {longest} with --new_tokens {args.new_tokens} are more than the model's "
            f"max_position_embeddings={config.max_position_embeddings}; lower one"
        )
    weights = (
        sum(leaf.size for leaf in jax.tree.leaves(abstract_base(config)))
        * jnp.dtype(args.dtype).itemsize
    )
    for setting in settings:
        check_fits(
            config,
            setting.batch_size,
            bucket(setting.prompt_length) + args.new_tokens,
            weights,
            args.dtype,
        )
    return config, methods, settings, arguments


def _check_out(out: Path, arguments: dict[str, Any]) -> None:
    """Refuses a directory that holds anything but what the same command wrote there."""
    check_writable(out / RESULT, "--out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / RESULT).exists():
        raise UserError(
            f"--out {out} is not empty and has no {RESULT}; name a new or empty directory"
        )
    before = read_json(out / RESULT).get("arguments") or {}
    # results older than that flag have no such argument
    if {"turn_tokens": None} | before != arguments:
        raise UserError(
            f"--out {out} holds the result of another command; name a new or empty directory"
        )


def _write(result: dict[str, Any], out: Path) -> None:
    from flora_jax.analysis.latency_report import markdown, plot

    write_result(out / RESULT, result, f"--out {out}")
    (out / "latency.md").write_text(markdown(result), encoding="utf-8")
    for suffix in ("png", "pdf"):
        plot(result, out / f"latency.{suffix}")


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv[1:])
    if args.peer:
        # Set before JAX starts, which would otherwise take three quarters of a GPU for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    from tqdm import tqdm

    from flora_jax.analysis import comparison
    from flora_jax.analysis.provenance import provenance
    from flora_jax.analysis.timing import read_bandwidth
    from flora_jax.device import check_jax
    from flora_jax.models.llama import abstract_base, init_base
    from flora_jax.models.loading import load_pretrained

    check_jax()
    config, methods, settings, arguments = _check(args)
    configs = comparison.adapter_configs(methods, config, args.rank, args.equal_parameters)
    packages: tuple[str, ...] = ()
    if args.peer:
        from flora_jax.analysis.peer import PACKAGES, Peer, check_peer

        check_peer()
        packages = PACKAGES
    keep_programs()
    sizes = comparison.sizes(config, abstract_base(config, args.dtype), configs)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance("flora_jax.latency", argv[1:], packages),
        "arguments": arguments,
        "bandwidth": read_bandwidth(),
        "left_out": {},
        "rows": [],
    }

    def say(line):
        return tqdm.write(line, file=sys.stderr)

    say(f"{result['provenance']['device']} reads {result['bandwidth']['gb_per_s']:.1f} GB/s")
    for name, adapter in configs.items():
        if adapter is not None:
            say(f"{name}: rank {adapter.rank}, {sizes[name].parameters:,} parameters")

    total = (
        len(configs)
        * len(settings)
        * args.rounds
        * comparison.turns(args.new_tokens, args.turn_tokens)
    )
    start, measurements = time.perf_counter(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=total, unit="turn", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar,
    ):
        base = (
            init_base(jax.random.key(0), config, args.dtype)
            if args.model == "random"
            else load_pretrained(args.model, args.dtype)[1]
        )
        base, peer = comparison.on_disk(base, Path(folder)), None
        if args.peer:
            rank = comparison.lora_rank(config, args.rank, args.equal_parameters)
            peer = Peer(config, base, rank)
            extra = peer.parameters * jax.numpy.dtype(args.dtype).itemsize
            theirs = comparison.Size(
                rank, peer.parameters, sizes[comparison.REFERENCE].read_bytes + extra
            )
            sizes |= {"peft": theirs, "peft_compiled": theirs}
        prefills = args.rounds if args.prefill_rounds is None else args.prefill_rounds
        rounds = comparison.compare(
            config,
            base,
            configs,
            settings,
            args.rounds,
            prefills,
            peer,
            args.turn_tokens,
            bar.update,
        )
        for one in rounds:
            measurements.append(one)
            if peer and peer.not_compiled:
                result["left_out"]["peft_compiled"] = peer.not_compiled
            result["rows"] = comparison.table(measurements, sizes, result["bandwidth"]["gb_per_s"])
            row = comparison.table([one], sizes, result["bandwidth"]["gb_per_s"])[0]
            left = (time.perf_counter() - start) * (
                len(configs) * len(settings) / len(measurements) - 1
            )
            say(
                f"{one.name}, prompt {one.setting.prompt_length}, batch {one.setting.batch_size}: TTFT "
                f"{1e3 * row['ttft']['median']:.1f} ms, TPOT {1e3 * row['tpot']['median']:.2f} ms, "
                f"{row['tpot_ratio']['median']:.3f} of the base's; {tqdm.format_interval(left)} left"
            )
            if one.setting == settings[-1]:
                _write(result, args.out)
    print((args.out / "latency.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_command(main)
