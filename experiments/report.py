"""What every result file carries: the command, the machine, the versions, the date."""

from __future__ import annotations

import sys
from typing import Any

from flora_jax.analysis.provenance import provenance as record


def provenance(*packages: str) -> dict[str, Any]:
    """Where and with what this process ran; `packages` are named beside jax and flax."""
    module = sys.modules["__main__"].__spec__
    return record(module.name if module else sys.argv[0], sys.argv[1:], packages)


def header(title: str, about: dict[str, Any]) -> str:
    """The Markdown that a results file begins with."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"# {title}\n\n`{about['command']}`  \n{about['device']}; {versions}; {about['date']}\n"
