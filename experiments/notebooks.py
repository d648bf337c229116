"""Runs the notebooks from top to bottom and writes their outputs into them.

    python -m experiments.notebooks      all of notebooks/; or name some: notebooks/family.ipynb

With FLORA_NOTEBOOK=tiny in the environment they run in seconds on random weights, as in the tests.
Needs the extra `test`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from flora_jax.errors import CommandParser, UserError, run_command

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"


def execute(path: Path) -> Any:
    """The notebook with the outputs of a fresh run in the repository's root; what a cell raises is
    raised."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran is no result
        # Progress and warnings are no results either, and neither is where the repository lies.
        cell.outputs = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
        for out in cell.outputs:
            if "text" in out:
                out["text"] = out["text"].replace(str(ROOT), ".")
        if cell.cell_type != "code":
            del cell["outputs"]
    return notebook


def main(argv: list[str]) -> None:
    """The command."""
    parser = CommandParser(
        prog="python -m experiments.notebooks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("paths", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb")))
    for path in parser.parse_args(argv[1:]).paths:
        if not path.is_file():
            raise UserError(f"{path}: there is no such notebook; notebooks/ has them")
        start = time.perf_counter()
        nbformat.write(execute(path), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
