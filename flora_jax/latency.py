"""Times each method beside the merged base: time to first token (TTFT) and time per output token
(TPOT).

    python -m flora_jax.latency --model smollm2-135m-instruct --methods base,lora,ffba --out DIR
    python -m flora_jax.latency --model random --preset llama3.2-1b --peer peft --out DIR

DIR gets `latency.json`, `latency.md`, and the figure as `latency.png` and `latency.pdf`, complete
for the methods done so far after each of them. Runs on whatever device JAX sees. Compiled programs
are kept in the cache folder.
"""

from __future__ import annotations

import os
from argparse import BooleanOptionalAction
from pathlib import Path

from flora_jax.commands import SERVED_QUANTIZATION, read_flags
from flora_jax.errors import run_command
from flora_jax.models.config import DTYPES

METHODS = (
    "base,base_7,lora,lora_7,lora_merged,pf_lora,ffa,fpa,ffba,ffba_folded,ffba_qg_add,"
    "ffba_qg_add_folded,zflora"
)
FLAGS = {
    "model": dict(
        default="random", help="HF directory, hub id, .gguf file, preset name, or random"
    ),
    "preset": dict(help="architecture of --model random"),
    "methods": dict(default=METHODS, help="comma-separated ways of serving; default %(default)s"),
    "prompt_lengths": dict(default="128,512", help="tokens, comma-separated"),
    "batch_sizes": dict(default="1,8", help="comma-separated"),
    "rank": dict(
        type=int, default=32, help="of ffba, or with --no-equal_parameters of all methods"
    ),
    "equal_parameters": dict(
        action=BooleanOptionalAction,
        default=True,
        help="each method at the rank nearest to ffba's parameters",
    ),
    "new_tokens": dict(type=int, default=33, help="the first belongs to TTFT, the others to TPOT"),
    "dtype": dict(default="float32", help=" or ".join(DTYPES)),
    **SERVED_QUANTIZATION,
    "rounds": dict(type=int, default=10),
    "prefill_rounds": dict(type=int, help="rounds that read the prompts anew; default all of them"),
    "turn_tokens": dict(
        type=int,
        help="tokens that a model decodes before the next one's turn, few on a machine in other "
        "use; not with --peer; default all of a round's",
    ),
    "peer": dict(
        choices=("peft",), help="time transformers + PEFT's unmerged LoRA in the same rounds"
    ),
    "out": dict(
        type=Path, required=True, help="new or empty directory, or one of this very command"
    ),
}


def main(argv: list[str]) -> None:
    """The command."""
    args = read_flags("flora_jax.latency", __doc__, FLAGS, argv)
    if args.peer:
        # Set before JAX starts, which would otherwise take three quarters of a GPU for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from flora_jax.analysis.latency_run import run

    print(run(args, argv[1:]))


if __name__ == "__main__":
    run_command(main)
