"""Every notebook runs from top to bottom at tiny settings, and the outputs in the repository are of a real run."""

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

from experiments.notebooks import NOTEBOOKS, execute  # noqa: E402

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
# What only a run at real settings prints: sizes of SmolLM2-135M and Llama-3.2-1B, or the command with its model.
REAL = {
    "quick_start": "134,515,008 parameters",
    "family": "20,971,520",
    "add_set": "5,529,600 parameters",
    "latency": "--model smollm2-135m-instruct",
    "export": "in_features=576",
}


def printed(notebook):
    return "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch, environment):
    if path.stem == "export":
        pytest.importorskip("torch")
        pytest.importorskip("peft")
    monkeypatch.setenv("FLORA_NOTEBOOK", "tiny")
    # of a kernel that compiles quickly and keeps its programs
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = execute(path)
    assert any(cell.get("outputs") for cell in notebook.cells)
    assert REAL[path.stem] not in printed(notebook)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole(path):
    """Each code cell ran, in order, none failed, and nothing of the machine it ran on is left."""
    notebook = nbformat.read(path, as_version=4)
    assert REAL[path.stem] in printed(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    text = path.read_text()
    assert "/home/" not in text and "/work/" not in text and "/root/" not in text
    assert path.stat().st_size < 1_000_000
    assert "the tests' settings" in text and "tiny" not in "".join(
        map(str, (c.outputs for c in cells))
    )
