"""What the package runs on: devices as JAX has to have them, what they are fast in, and the
versions of packages."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import jax

from flora_jax.errors import UserError, require

AMPERE = (8, 0)  # the first compute capability with bfloat16
ADA = (8, 9)  # the first with float8
_CPU = Path("/proc/cpuinfo")


def check_jax() -> None:
    """Raises UserError unless JAX computes in at most 32 bits, and has the devices that it is told
    to use.

    With 64 bits an adapter trains to other values, and a step takes twice the memory.
    """
    require(
        not jax.config.jax_enable_x64,
        "JAX_ENABLE_X64 (jax_enable_x64) is on, and flora_jax computes in 32 bits; unset it",
    )
    check_device()


def check_device() -> None:
    """Raises UserError where JAX is told to use devices that are not there."""
    try:
        jax.devices()
    # the latter for cuda where no plugin is installed
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        raise UserError(
            f"JAX_PLATFORMS={jax.config.jax_platforms or ''}: JAX finds no such device here "
            f"({reason or 'no plugin for it is installed'}); unset it, or "
            "set it to cpu, which is always there"
        ) from None


def capability() -> tuple[int, int] | None:
    """The compute capability of the NVIDIA GPU that JAX runs on; None on anything else."""
    text = str(getattr(jax.devices()[0], "compute_capability", ""))
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    return None if found is None else (int(found[1]), int(found[2]))


def fast_dtype() -> str:
    """The dtype that this device trains fastest in: bfloat16 on an NVIDIA GPU from Ampere on and on
    a CPU with avx512_bf16, else float32."""
    half = (capability() or (0, 0)) >= AMPERE
    if jax.default_backend() == "cpu" and _CPU.exists():
        half = "avx512_bf16" in _CPU.read_text().split()
    return "bfloat16" if half else "float32"


def versions(*packages: str) -> dict[str, str]:
    """Those of Python and of the packages that are named."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}
