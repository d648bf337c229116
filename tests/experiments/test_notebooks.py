"""Every notebook runs from top to bottom at tiny settings, and the outputs in the repository are of
a real run."""

import subprocess
import sys

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

from experiments import notebooks  # noqa: E402
from experiments.notebooks import NOTEBOOKS, execute, find_parameters, setup_cell  # noqa: E402
from flora_jax.errors import UserError  # noqa: E402

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
# Of what has a `model`, that is a tiny one in a folder; what has a `workdir` or an `out` gets one,
# too.
TINY = {
    "quick_start": {
        "rank": 8,
        "steps": 2,
        "batch_size": 4,
        "training_problems": 60,
        "test_problems": 7,
    },
    "family": {"preset": "tiny", "rank": 8, "methods": ["lora", "ffba_qg_add"]},
    "add_set": {"ablations": ["add_qg"], "rank": 8, "steps": 4, "training_problems": 60},
    "latency": {
        "methods": "base,ffba",
        "rank": 8,
        "prompt_length": 16,
        "new_tokens": 4,
        "rounds": 2,
        "prefill_rounds": 1,
        "turn_tokens": 2,
    },
    "export": {"steps": 2, "training_examples": 60},
}
# What only a run at real settings prints: sizes of SmolLM2-135M and Llama-3.2-1B, or its
# parameters.
REAL = {
    "quick_start": "134,515,008 parameters",
    "family": "20,971,520",
    "add_set": "5,529,600",
    "latency": "2,764,800",
    "export": "in_features=576",
}


def printed(notebook):
    return "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, hf_directory):
    return str(hf_directory(tmp_path_factory.mktemp("notebooks") / "model"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch, environment, tiny_model, tmp_path):
    if path.stem == "export":
        pytest.importorskip("torch")
        pytest.importorskip("peft")
    # of a kernel that compiles quickly and keeps its programs
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, known = find_parameters(nbformat.read(path, as_version=4))
    places = {"model": tiny_model, "workdir": str(tmp_path / "run"), "out": str(tmp_path / "out")}
    places = {name: value for name, value in places.items() if name in known}
    notebook = execute(path, {**TINY[path.stem], **places})
    assert any(cell.get("outputs") for cell in notebook.cells)
    assert REAL[path.stem] not in printed(notebook)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_one_cell_has_the_parameters(path):
    """As papermill has it: plain assignments, in the second code cell, and none injected."""
    notebook = nbformat.read(path, as_version=4)
    place, known = find_parameters(notebook)
    assert notebook.cells[place] is code(notebook)[1]
    assert set(TINY[path.stem]) <= set(known)
    assert "injected-parameters" not in path.read_text()
    # nothing else decides what runs
    assert not [cell for cell in code(notebook)[1:] if "environ" in cell.source]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole(path):
    """Each code cell ran, in order, none failed, and nothing of the machine it ran on is left."""
    notebook = nbformat.read(path, as_version=4)
    assert REAL[path.stem] in printed(notebook)
    cells = code(notebook)
    assert cells[0].source == setup_cell(path), "python -m experiments.notebooks"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    text = path.read_text()
    assert not [word for word in ("/home/", "/work/", "/root/", "/tmp/") if word in text]
    assert path.stat().st_size < 1_000_000


def cells_of(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[1].metadata["tags"] = ["parameters"]
    return nbformat.v4.new_notebook(cells=cells)


def test_parameters_are_injected(tmp_path, monkeypatch):
    """The other values hold in all cells after the one with the parameters, and in none before."""
    monkeypatch.setattr(notebooks, "setup_cell", lambda path: "print('begins')")
    path = tmp_path / "one.ipynb"
    nbformat.write(cells_of("", "steps = 40\nnames = ['a']", "print(steps, names)"), path)
    notebook = execute(path, {"names": ["b", "c"]})
    assert [cell.source for cell in notebook.cells][2] == "# Parameters\nnames = ['b', 'c']"
    assert notebook.cells[2].metadata.tags == ["injected-parameters"]
    assert [out.text for cell in notebook.cells for out in cell.outputs] == [
        "begins\n",
        "40 ['b', 'c']\n",
    ]
    with pytest.raises(UserError, match=r"parameter 'step' is unknown; did you mean 'steps'\?"):
        execute(path, {"step": 1})


@pytest.mark.parametrize(
    "line", ["steps = 2 * 20", "import os", "a, b = 1, 2", "if True: steps = 1"]
)
def test_a_parameter_is_a_plain_assignment(line):
    with pytest.raises(UserError, match="NAME = VALUE"):
        find_parameters(cells_of("", line))


def test_one_cell_is_tagged():
    with pytest.raises(UserError, match="0 cells are tagged 'parameters'; tag one"):
        find_parameters(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("")]))


def test_what_is_missing_is_said(tmp_path):
    """Outside a checkout, where flora_jax is not installed and the repository has no address."""
    lines = setup_cell(PATHS[0]).splitlines()
    address = next(i for i, line in enumerate(lines) if line.startswith("REPOSITORY ="))
    lines[address] = 'REPOSITORY = ""'
    program = "\n".join(line.replace("%pip", "pass  #") for line in lines)
    found = subprocess.run(
        # without site-packages, and with no folder but this one
        [sys.executable, "-I", "-S", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert "Set REPOSITORY above to the address" in found.stderr.splitlines()[-1]
