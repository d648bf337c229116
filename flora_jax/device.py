"""What JAX has to be set to before anything is computed."""

from __future__ import annotations

import jax

from flora_jax.errors import UserError


def check_jax() -> None:
    """Raises UserError unless JAX computes in at most 32 bits, and has the devices that it is told to use.

    With 64 bits an adapter trains to other values, and a step takes twice the memory.
    """
    if jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64 (jax_enable_x64) is on, and flora_jax computes in 32 bits; unset it")
    try:
        jax.devices()
    except RuntimeError as error:
        asked = jax.config.jax_platforms
        reason = f"JAX finds no such devices here ({str(error).rstrip('.')})"
        raise UserError(f"JAX_PLATFORMS={asked}: {reason}; unset it, or set it to cpu") from None
