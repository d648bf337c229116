"""Runs the notebooks from top to bottom and writes their outputs into them.

    python -m experiments.notebooks      all of notebooks/; or name some: notebooks/family.ipynb

Each notebook begins with the same cell, which is written from here and installs flora_jax if it is
missing. One cell is tagged `parameters`, which is papermill's convention: `papermill -p steps 10
notebooks/quick_start.ipynb out.ipynb` runs a notebook with other values. Needs the extra `test`.
"""

from __future__ import annotations

import ast
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient

from experiments.flags import Flags, parse
from flora_jax.errors import UserError, require, require_known, run_command

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
FLAGS: Flags = {
    "paths": dict(nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb"))),
}
# The extras of setup.py that a notebook needs, unless "demo" will do.
EXTRAS = {"export": "demo,peers"}
SETUP = """\
# Installs flora_jax if it is missing: from the checkout around this notebook, or from REPOSITORY.
import importlib
import os
import shutil
import sys

REPOSITORY = "{repository}"  # such as https://github.com/OWNER/flora_jax
extras = "{extras}" + (",cuda12" if shutil.which("nvidia-smi") else "")
checkouts = [os.path.abspath(d) for d in (".", "..") if os.path.isfile(f"{{d}}/flora_jax/train.py")]

try:
    importlib.import_module("flora_jax.models.llama")
except ImportError as missing:
    if checkouts:
        %pip install -q -e "{{checkouts[0]}}[{{extras}}]"
        sys.path.insert(0, checkouts[0])  # this kernel began before the installation
    elif REPOSITORY:
        %pip install -q "flora_jax[{{extras}}] @ git+{{REPOSITORY}}"
    else:
        raise ImportError(
            "flora_jax is not installed, and this notebook does not lie in a checkout of it. "
            "Set REPOSITORY above to the address of its repository, or pip install its wheel."
        ) from missing

import jax

import flora_jax

print(flora_jax.__name__, "with jax", jax.__version__, "on", jax.devices()[0].device_kind)"""


def setup_cell(path: Path) -> str:
    """The source of a notebook's first code cell. It installs from the `repo_url` of mkdocs.yml,
    which is unset until the repository has an address."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return SETUP.format(
        repository=settings.get("repo_url") or "", extras=EXTRAS.get(path.stem, "demo")
    )


def find_parameters(notebook: Any) -> tuple[int, dict[str, Any]]:
    """The place of the cell tagged `parameters`, and the values it assigns by name.

    Raises UserError unless there is one such cell, with plain assignments alone.
    """
    tagged = [
        place
        for place, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    require(len(tagged) == 1, f"{len(tagged)} cells are tagged 'parameters'; tag one")
    values = {}
    for statement in ast.parse(notebook.cells[tagged[0]].source).body:
        try:
            name = statement.targets[0].id
            values[name] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            raise UserError(
                f"the cell tagged 'parameters' has {ast.unparse(statement)!r}; it may only have "
                "NAME = VALUE"
            ) from None
    return tagged[0], values


def inject(notebook: Any, parameters: Mapping[str, Any]) -> None:
    """Adds a cell with other values after the one tagged `parameters`, as papermill does. Raises
    UserError for a name that is not among its own."""
    place, known = find_parameters(notebook)
    for name in parameters:
        require_known(name, known, f"parameter {name!r}")
    lines = ["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(place + 1, cell)


def execute(path: Path, parameters: Mapping[str, Any] | None = None) -> Any:
    """The notebook with the outputs of a fresh run in the repository's root.

    parameters: values in place of its own. Raises what a cell raises, and UserError for a parameter
    that it does not have.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source = setup_cell(path)
    if parameters:
        inject(notebook, parameters)
    NotebookClient(
        notebook,
        timeout=3600,
        resources={"metadata": {"path": str(ROOT)}},
        record_timing=False,  # when each cell ran is no result
        coalesce_streams=True,
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        # Progress and warnings are no results either, nor is the repository's path.
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        for out in cell.outputs:
            if "text" in out:
                out["text"] = out["text"].replace(str(ROOT), ".")
    return notebook


def main(argv: list[str]) -> None:
    """The command."""
    for path in parse(argv, "python -m experiments.notebooks", __doc__, FLAGS).paths:
        if not path.is_file():
            raise UserError(f"{path}: there is no such notebook; notebooks/ has them")
        start = time.perf_counter()
        nbformat.write(execute(path), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
