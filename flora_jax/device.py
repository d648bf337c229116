"""What the package runs on: devices as JAX has to have them, and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import platform

import jax

from flora_jax.errors import UserError, require


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


def versions(*packages: str) -> dict[str, str]:
    """Those of Python and of the packages that are named."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}
