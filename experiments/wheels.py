"""Collects wheels of the packages that a machine without a registry lacks.

    make wheels

Run it with the Python version of that machine. It follows what setup.py asks for package by
package. What the machine has, at whatever version, is left out, and so is what that needs: a copy
on the PYTHONPATH would come before the machine's own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("demo",)
# A machine for JAX on a GPU: jax with its plugin, flax and theirs, transformers, PEFT and torch,
# plotting, pytest.
HAVE = """
absl-py accelerate chex click einops equinox etils filelock flatbuffers flax fsspec huggingface-hub
humanize hypothesis jax jax-cuda13-pjrt jax-cuda13-plugin jaxlib jinja2 matplotlib ml-dtypes msgpack
numpy optax orbax-checkpoint packaging pandas peft pillow protobuf psutil pyarrow pytest
pytest-timeout pytest-xdist pyyaml regex requests rich safetensors scipy sentencepiece setuptools
sympy tabulate tensorboard tensorstore tokenizers toolz torch tqdm transformers treescope
typing-extensions wrapt zipp
"""

Packages = Mapping[str, Mapping[str, Any]]  # metadata by canonical name


def needs(
    packages: Packages, roots: Iterable[Requirement], without: set[str] = frozenset()
) -> set[str]:
    """The canonical names of `roots` and of all they need, except those in `without` and what only
    these need."""
    seen = set()
    waiting = list(roots)
    while waiting:
        root = waiting.pop()
        name = canonicalize_name(root.name)
        if name in without or (name, *root.extras) in seen:
            continue
        seen.add((name, *root.extras))
        for text in packages[name].get("requires_dist", []):
            need = Requirement(text)
            if need.marker is None or any(
                need.marker.evaluate({"extra": e}) for e in ("", *root.extras)
            ):
                waiting.append(need)
    return {name for name, *_ in seen}


def missing(packages: Packages, root: Requirement, have: Iterable[str]) -> set[str]:
    """What `root` needs, without itself, on a machine that has `have` and what these need."""
    have = {canonicalize_name(name) for name in have}
    present = needs(packages, [Requirement(name) for name in have & packages.keys()])
    return needs(packages, [root], present) - {canonicalize_name(root.name)}


def read_have(lines: Iterable[str]) -> list[str]:
    """The names in what `pip freeze` prints."""
    names = [line.partition("==")[0].partition(" @ ")[0].strip() for line in lines]
    return [name for name in names if name and not name.startswith(("#", "-"))]


def pip(*words: str) -> str:
    """What a pip command prints. Exits with its code if it fails."""
    command = [sys.executable, "-m", "pip", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # pip has said why
        sys.exit(done.returncode)
    return done.stdout


def resolve() -> Packages:
    """The metadata of this project and of all it needs, at versions that go together."""
    flags = ("--quiet", "--dry-run", "--ignore-installed", "--report", "-")
    report = json.loads(pip("install", *flags, f".[{','.join(EXTRAS)}]"))
    found = [item["metadata"] for item in report["install"]]
    return {canonicalize_name(metadata["name"]): metadata for metadata in found}


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.wheels", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, default="wheels", help="the folder for the wheels; new or empty"
    )
    parser.add_argument(
        "--have", type=Path, help="what the machine has, as `pip freeze` prints it there"
    )
    args = parser.parse_args(argv[1:])
    args.out = args.out.expanduser()
    args.have = args.have and args.have.expanduser()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty; remove it first")
    if args.have is not None and not args.have.is_file():
        parser.error(f"--have {args.have} is no file")
    have = read_have(HAVE.split() if args.have is None else args.have.read_text().splitlines())
    packages = resolve()
    root = Requirement(f"flora_jax[{','.join(EXTRAS)}]")
    chosen = sorted(missing(packages, root, have))
    exact = [f"{name}=={packages[name]['version']}" for name in chosen]
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(args.out), *exact)
    size = sum(path.stat().st_size for path in args.out.glob("*.whl"))
    print(f"{args.out}: {len(exact)} wheels, {size / 1e6:.0f} MB: {' '.join(exact)}")


if __name__ == "__main__":
    main(sys.argv)
