"""Plans a decode step for GPUs that need not be there: launches, GEMMs, bytes and copies by method.

    python -m flora_jax.launches --preset llama3.2-1b --methods base,lora,ffba --targets h100,a100 --out DIR

Needs the extra `gpu-plan` or `gpu-plan-cuda13`: compiler plugins, no GPU and no driver. Compiles for minutes: two
programs a row.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from flora_jax.errors import (
    CommandParser,
    UserError,
    check_writable,
    near_misses,
    path_flag,
    positive_integers,
    run_command,
)
from flora_jax.files import write_result
from flora_jax.models.config import DTYPES, LlamaConfig

_METHODS = "base,base_7,lora,pf_lora,fpa,ffba,ffba_qg_add,ffba_qg_add_folded,zflora"
_ATTENTION = {"kernel": "one Pallas kernel and the sum over its parts", "xla": "as XLA writes it"}
_COLUMNS = ("launches", "gemms", "products", "chain")


def _parser() -> CommandParser:
    parser = CommandParser(prog="flora_jax.launches", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama3.2-1b", help="model preset")
    parser.add_argument("--methods", default=_METHODS, help=f"comma-separated; default {_METHODS}")
    parser.add_argument("--targets", default="h100,a100", help="comma-separated GPUs")
    parser.add_argument(
        "--modes", default="triton,cublas", help="who computes the products, comma-separated"
    )
    parser.add_argument(
        "--attention", choices=tuple(_ATTENTION), default="kernel", help="a step's attention"
    )
    parser.add_argument("--batch_sizes", default="1,8", help="comma-separated")
    parser.add_argument(
        "--adapters", default="1", help="adapters in the bank, comma-separated; above 1 with a mask"
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--cache_length", type=int, default=1024, help="slots of the key/value cache"
    )
    parser.add_argument(
        "--row_multiple",
        type=int,
        default=128,
        help="rows of products with B's are filled up to it",
    )
    parser.add_argument(
        "--launch_us", type=float, default=2.0, help="of the time model: cost of a dependent launch"
    )
    parser.add_argument(
        "--out",
        type=path_flag,
        help="folder for launches.json and launches.md; default: the table is printed only",
    )
    return parser


def _names(flag: str, text: str, known: Any) -> list[str]:
    items = list(dict.fromkeys(item.strip() for item in text.split(",")))
    for item in items:
        if item not in known:
            raise UserError(f"{flag} {item!r} is unknown; {near_misses(item, known)}")
    return items


def has_compiler() -> bool:
    """Whether jax's compiler plugin for CUDA 12 or 13 is installed."""
    plugins = importlib.util.find_spec("jax_plugins") is not None
    names = [f"jax_plugins.xla_cuda{major}" for major in (12, 13)]
    return plugins and any(importlib.util.find_spec(name) is not None for name in names)


def require_compiler() -> None:
    """Raises UserError unless jax's compiler plugin for CUDA is installed."""
    if not has_compiler():
        raise UserError(
            "planning for a GPU needs jax's CUDA compiler, which is not installed (no GPU is needed): "
            "pip install -e '.[gpu-plan]' brings that of CUDA 12, '.[gpu-plan-cuda13]' that of CUDA 13"
        )


def _compilers() -> tuple[str, ...]:
    """The installed packages that XLA compiles for CUDA with."""
    found = []
    plugins = ("jax-cuda12-plugin", "jax-cuda13-plugin")
    for name in (*plugins, "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"):
        # ptxas may be from the PATH
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.distribution(name).name)
    return tuple(found)


def _key(row: dict[str, Any]) -> str:
    return f"{row['target']}, {row['mode']}, batch {row['batch']}"


def _shown(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def table(result: dict[str, Any]) -> str:
    """The Markdown of a result: launches (GEMMs) a layer of every method by target, mode and batch, then every row."""
    rows, about, settings = result["rows"], result["provenance"], result["settings"]
    keys, labels = (
        list(dict.fromkeys(map(_key, rows))),
        list(dict.fromkeys(row["label"] for row in rows)),
    )
    cells = {(row["label"], _key(row)): row["layer"] for row in rows}
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# Launch plan of one decode step: {settings['preset']}\n",
        f"`{about['command']}`  ",
        f"{versions}; {about['date']}\n",
        "Compiled for the device, not run on it: no autotuning (triton and cublas bracket it). Attention: "
        f"{_ATTENTION[settings['attention']]}. {settings['dtype']}, rank {settings['rank']}, "
        f"{settings['cache_length']} cache slots, rows filled up to multiples of "
        f"{settings['row_multiple']}. One layer's share is (4 layers − 2 layers) / 2; a step of all "
        f"{settings['num_hidden_layers']} layers is extrapolated from it.\n",
        "## Launches a layer (GEMMs a layer)\n",
        "| | " + " | ".join(keys) + " |",
        "|---|" + "---|" * len(keys),
    ]
    for label in labels:
        shares = [cells.get((label, key)) for key in keys]
        texts = [
            f"{_shown(share['launches'])} ({_shown(share['gemms'])})" if share else "–"
            for share in shares
        ]
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    lines += [
        "\n## A step\n",
        "Products: launches that read a matrix of weights. Chain: launches on the longest dependent path. Copies: "
        "copies, pads, concatenates, transposes and products spelt out, of at least "
        f"{result['smallest_kernel'] / 1e6:.1f} MB, the smallest base kernel, made of weights / cache / activations. "
        "Model: no measurement, but bytes over the device's bandwidth and "
        f"{settings['launch_us']:g} µs for every launch of the chain.\n",
        "| | method | launches | GEMMs | products | chain | MB moved | copies | temporary MB | graphs | model ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        step = row["step"]
        counts = " | ".join(_shown(step[key]) for key in _COLUMNS)
        copies = " / ".join(
            _shown(step[f"{kind}_copies"]) for kind in ("weight", "cache", "activation")
        )
        lines.append(
            f"| {_key(row)} | {row['label']} | {counts} | {step['moved'] / 1e6:.0f} | {copies} | "
            f"{row['temporary'] / 1e6:.0f} | {row['graphs']} | {row['model_ms']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv[1:])
    # Before jax is imported: a CUDA plugin beside it would otherwise look for a driver.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from tqdm import tqdm

    from flora_jax.adapters import AdapterConfig
    from flora_jax.analysis.launch_plan import (
        MODES,
        TARGETS,
        check_bank,
        modelled_ms,
        plan_model,
        smallest_kernel,
    )
    from flora_jax.analysis.provenance import provenance
    from flora_jax.analysis.variants import get_variant
    from flora_jax.device import check_jax

    check_jax()
    config = LlamaConfig.preset(args.preset)
    targets, modes = (
        _names("--targets", args.targets, TARGETS),
        _names("--modes", args.modes, MODES),
    )
    batches = positive_integers("--batch_sizes", args.batch_sizes)
    banks = positive_integers("--adapters", args.adapters)
    for flag in ("cache_length", "row_multiple"):
        positive_integers(f"--{flag}", str(getattr(args, flag)))
    if not args.launch_us >= 0:
        raise UserError(f"--launch_us {args.launch_us} must be zero or more microseconds")
    methods = []  # (label, variant, its AdapterConfig, dot merger)
    for name in dict.fromkeys(item.strip() for item in args.methods.split(",")):
        variant = get_variant(name)
        adapter_config = None
        if variant.method is not None:
            adapter_config = AdapterConfig(variant.method, args.rank)
            adapter_config.check(config.widths)
        for adapters in banks:
            check_bank(name, adapters)
        methods.append((name, name, adapter_config, True))
        if adapter_config is not None and variant.kind == "unmerged":
            methods.append((f"{name}, dot merger off", name, adapter_config, False))
    if args.out:
        check_writable(Path(args.out) / "launches.json", "--out")
    require_compiler()
    about = provenance("flora_jax.launches", argv[1:], _compilers())

    settings = {key: value for key, value in vars(args).items() if key != "out"}
    cells = [
        (target, mode, batch, adapters if method[2] is not None else 1, *method)
        for target in targets
        for mode in modes
        for batch in batches
        for adapters in banks
        for method in methods
        if adapters == banks[0] or method[2] is not None  # the bare base holds no bank
    ]
    rows = []
    progress = tqdm(cells, desc="plan", disable=not sys.stderr.isatty())
    for target, mode, batch, adapters, label, name, adapter_config, dot_merger in progress:
        row = plan_model(
            name,
            config,
            adapter_config,
            target=target,
            mode=mode,
            batch=batch,
            adapters=adapters,
            dot_merger=dot_merger,
            dtype=args.dtype,
            cache_length=args.cache_length,
            row_multiple=args.row_multiple,
            attention=args.attention,
        )
        label += f", bank of {adapters}" if adapters > 1 else ""
        ms = modelled_ms(
            row["step"]["moved"], row["step"]["chain"], TARGETS[target].bandwidth, args.launch_us
        )
        rows.append(
            {
                "target": target,
                "mode": mode,
                "batch": batch,
                "adapters": adapters,
                "label": label,
                "method": name,
                "dot_merger": dot_merger,
                **row,
                "model_ms": ms,
            }
        )
        counts = [_shown(row["layer"][key]) for key in ("launches", "gemms", "weight_copies")]
        line = "{} launches ({} GEMMs) a layer, {} weight copies".format(*counts)
        tqdm.write(f"{_key(rows[-1]):24} {label:28} {line}", file=sys.stderr)
    result = {
        "schema_version": 1,
        "provenance": about,
        "settings": settings | {"num_hidden_layers": config.num_hidden_layers},
        "smallest_kernel": smallest_kernel(config, args.dtype),
        "rows": rows,
    }
    if args.out:
        write_result(Path(args.out) / "launches.json", result, f"--out {args.out}")
        (Path(args.out) / "launches.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    run_command(main)
