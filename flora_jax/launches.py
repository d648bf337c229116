"""Plans a decode step for GPUs that need not be there: launches, GEMMs, bytes and copies by method.

    python -m flora_jax.launches --preset llama3.2-1b --methods base,lora,ffba --targets h100,a100 \
        --out DIR

Needs the extra `gpu-plan` or `gpu-plan-cuda13`: compiler plugins, no GPU and no driver. Compiles
for minutes: two programs a row.
"""

from __future__ import annotations

import os

from flora_jax.commands import SERVED_QUANTIZATION, read_flags
from flora_jax.errors import path_flag, run_command
from flora_jax.models.config import DECODE_KERNELS, DTYPES

METHODS = "base,base_7,lora,pf_lora,fpa,ffba,ffba_qg_add,ffba_qg_add_folded,zflora"
FLAGS = {
    "preset": dict(default="llama3.2-1b", help="model preset"),
    "methods": dict(default=METHODS, help=f"comma-separated; default {METHODS}"),
    "targets": dict(default="h100,a100", help="comma-separated GPUs"),
    "modes": dict(default="triton,cublas", help="who computes the products, comma-separated"),
    "decode_kernels": dict(
        choices=DECODE_KERNELS, default="attention", help="what of a step our kernels compute"
    ),
    "batch_sizes": dict(default="1,8", help="comma-separated"),
    "adapters": dict(
        default="1", help="adapters in the bank, comma-separated; above 1 with a mask"
    ),
    "rank": dict(type=int, default=32),
    "dtype": dict(choices=DTYPES, default="bfloat16"),
    **SERVED_QUANTIZATION,
    "cache_length": dict(type=int, default=1024, help="slots of the key/value cache"),
    "row_multiple": dict(
        type=int,
        help="rows of products with B's are filled up to it; default what is served: 128, of a "
        "quantised base 256",
    ),
    "launch_us": dict(
        type=float, default=2.0, help="of the time model: cost of a dependent launch"
    ),
    "out": dict(
        type=path_flag,
        help="folder for launches.json and launches.md; default: the table is printed only",
    ),
}


def main(argv: list[str]) -> None:
    """The command."""
    args = read_flags("flora_jax.launches", __doc__, FLAGS, argv)
    # Before jax is imported: a CUDA plugin beside it would otherwise look for a driver.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from flora_jax.analysis.launch_run import run

    print(run(args, argv[1:]))


if __name__ == "__main__":
    run_command(main)
