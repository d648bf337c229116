"""The flags of an experiment as a table: name -> arguments of `add_argument`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_jax.errors import CommandParser
from flora_jax.models.config import DECODE_KERNELS, DTYPES

Flags = Mapping[str, Mapping[str, Any]]

MODEL: Flags = {
    "--model": dict(default="smollm2-135m-instruct", help="what load_pretrained takes, or random"),
    "--preset": dict(help="architecture of --model random"),
    "--method": dict(default="ffba"),
    "--rank": dict(type=int, default=32),
    "--dtype": dict(choices=DTYPES, default="float32"),
    "--out": dict(type=Path, help="write OUT.json and OUT.md"),
}
KERNELS: Flags = {
    "--decode_kernels": dict(choices=DECODE_KERNELS, help="kernels of ours, which only a GPU runs"),
}


def parse(argv: list[str], prog: str, doc: str, flags: Flags) -> argparse.Namespace:
    """Parses the flags of a script. doc: its docstring, whose first paragraph --help shows. Raises
    UserError for bad flags."""
    parser = CommandParser(prog=prog, description=doc.partition("\n\n")[0])
    for name, settings in flags.items():
        parser.add_argument(name, **settings)
    return parser.parse_args(argv[1:])
