"""jax's compiler plugins for CUDA: they compile for a GPU on a machine that has none."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util

from flora_jax.errors import require

_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
# Those read what jaxlib of another version does not write.
_VERSIONED = (*_PLUGINS, "jax-cuda12-pjrt", "jax-cuda13-pjrt")
# May be absent: ptxas may come from the PATH.
_ASSEMBLERS = ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")


def has_compiler() -> bool:
    """Whether jax's compiler plugin for CUDA 12 or 13 is installed."""
    plugins = importlib.util.find_spec("jax_plugins") is not None
    names = [f"jax_plugins.xla_cuda{major}" for major in (12, 13)]
    return plugins and any(importlib.util.find_spec(name) is not None for name in names)


def require_compiler() -> None:
    """Raises UserError unless jax's compiler plugin for CUDA is installed, of jax's version."""
    require(
        has_compiler(),
        "planning for a GPU needs jax's CUDA compiler, which is not installed (no GPU is "
        "needed): pip install -e '.[gpu-plan]' brings that of CUDA 12, '.[gpu-plan-cuda13]' "
        "that of CUDA 13",
    )
    ours = importlib.metadata.version("jaxlib")
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(name)
            require(
                found.split(".")[:2] == ours.split(".")[:2],
                f"{name} is {found} and jaxlib is {ours}, which does not fit: pip install "
                f"{name}=={ours}",
            )


def installed() -> tuple[str, ...]:
    """The names of the installed packages with which XLA compiles for CUDA."""
    found = []
    for name in (*_PLUGINS, *_ASSEMBLERS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.distribution(name).name)
    return tuple(found)
