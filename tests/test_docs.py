"""README and docs: their commands are commands, their pictures and tables are those of the code and
of the stored results, their links lead somewhere."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from documents import TEXTS, commands, python
from support import ROOT

from flora_jax.adapters import AdapterConfig
from flora_jax.analysis.variants import rank_for, trained_parameters
from flora_jax.commands import read_flags
from flora_jax.config_files import own_configs, read_command, read_config
from flora_jax.errors import CommandParser
from flora_jax.models.config import LlamaConfig
from tools import drawings
from tools import tables as stored_tables

COMMANDS = [
    command
    for command in commands()
    if (command.module or "").startswith(("flora_jax.", "experiments."))
]


@pytest.mark.parametrize(
    "command",
    [pytest.param(one, id=f"{one.page}: {' '.join(one.words)[:70]}") for one in COMMANDS],
)
def test_a_command_is_one(command):
    """Its flags and their values are those of its parser; test_docs_commands.py runs them."""
    name, flags = command.module, command.flags
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:  # torch, where there are no peers
        pytest.skip(str(error))
    if flags == []:
        return
    if name == "flora_jax.train":
        read_command(["train", *flags])
    elif name.startswith("flora_jax"):
        read_flags(name, module.__doc__, module.FLAGS, [name, *flags])
    elif hasattr(module, "FLAGS"):
        parser = CommandParser(prog=name)
        for flag, settings in module.FLAGS.items():
            parser.add_argument(flag, **settings)
        parser.parse_args(flags)


@pytest.mark.parametrize("page", TEXTS)
def test_its_code_is_short(page):
    assert all(code.count("\n") <= 15 for code in python(page))


def test_no_page_waits_for_a_table():
    for page, text in TEXTS.items():
        assert not re.search(r"^[A-Z]+_TABLE$", text, re.MULTILINE), page


def test_pictures_and_tables_are_of_today():
    for name, drawn in drawings.drawings().items():
        assert (drawings.FOLDER / name).read_text() == drawn, "python tools/drawings.py"
    assert drawings.with_results(TEXTS["README.md"]) == TEXTS["README.md"]


@pytest.mark.parametrize("page", TEXTS)
def test_its_tables_are_those_stored(page):
    assert stored_tables.with_tables(TEXTS[page]) == TEXTS[page], "python tools/tables.py"


def test_no_table_of_results_is_typed():
    """Every table of the page of results stands behind a comment that names its files."""
    text = TEXTS["docs/results.md"]
    assert len(re.findall(r"^\|---", text, re.MULTILINE)) == text.count("<!-- table\n") > 30


STORED = """
# Of a file

| method | loss | ms | ratio | s | ratio |
|---|---|---|---|---|---|
| b | 1.5 ± 0.2 | 7 | 2.0 [1, 3] | 8 | 3.0 [2, 4] |
| a | 2.5 ± 0.1 | 6 | 1.0 [0, 2] | 9 | 4.0 [3, 5] |

## Two of a name

| place | method | AB accuracy | C accuracy |
|---|---|---|---|
| x | a | 0.5 | 0.7 |
| x | b | 0.1 | 0.3 |
| y | b | 0.2 | 0.4 |
"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    (tmp_path / "one.md").write_text(STORED)
    records = [{"kernel": "a", "us": 12.3456, "rank": None}, {"kernel": "c", "us": 7, "rank": 2}]
    (tmp_path / "two.json").write_text(json.dumps({"kernels": records}))
    monkeypatch.setattr(stored_tables, "RESULTS", tmp_path)


@pytest.mark.parametrize(
    "asked, rows",
    [
        (
            ["one.md | loss | s, ratio"],
            ["method|loss|s, ratio", "b|1.5 ± 0.2|3.0 [2, 4]", "a|2.5 ± 0.1|4.0 [3, 5]"],
        ),
        (
            ["rows | | a as A | b", "one.md | value of loss as L", "| value of s, ratio"],
            ["|L|s, ratio", "A|2.5|4.0", "b|1.5|3.0"],
        ),
        (
            ["one.md # Two | method is b | * accuracy | mean of * accuracy as mean"],
            ["place|AB|C|mean", "x|0.1|0.3|0.200", "y|0.2|0.4|0.300"],
        ),
        (
            ["rows | k | a | c", "one.md | ms", "two.json # kernels"],
            ["k|ms|us|rank", "a|6|12.35|–", "c||7|2"],
        ),
    ],
)
def test_a_table_is_made_of_stored_ones(results, asked, rows):
    made = stored_tables.asked("\n".join(asked)).splitlines()
    assert ["|".join(stored_tables.cells(line)) for line in made if "---" not in line] == rows


@pytest.mark.parametrize(
    "asked, message",
    [
        ("one.md | lost", "no column 'lost', but loss, ms"),
        ("one.md # Three", "one.md # Three: no such table"),
        ("one.md # Two", "say which by NAME is CELL"),
        ("rows | | c\none.md", "no row 'c', but b, a"),
    ],
)
def test_a_table_that_is_not_stored_is_refused(results, asked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stored_tables.asked(asked)
    with pytest.raises(ValueError, match="an empty line"):
        stored_tables.with_tables("<!-- table\none.md\n-->\n| a |\n")


def test_a_page_keeps_what_stands_around_its_tables(results):
    page = "Before\n\n<!-- table\none.md | ms\n-->\n\n{}After | all\n"
    made = stored_tables.with_tables(page.format(""))
    table = "| method | ms |\n|---|---|\n| b | 7 |\n| a | 6 |\n\n"
    assert made == page.format(table) == stored_tables.with_tables(made)


@pytest.mark.parametrize(
    "name", [name for name in own_configs() if re.search("_[13]b$", name) and name[:3] != "fft"]
)
def test_a_configuration_is_at_equal_parameters_and_names_them(name):
    config = read_config(name)
    model = LlamaConfig.preset(config.model.preset)
    ffba = AdapterConfig("ffba", read_config(f"ffba_{name[-2:]}").adapter.rank)
    method = config.adapter.method
    assert config.adapter.rank == rank_for(method, model, trained_parameters(model, ffba))
    trained = trained_parameters(model, AdapterConfig(method, config.adapter.rank))
    assert f"\nTrains {trained:,} parameters" in own_configs()[name].read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert TEXTS["README.md"].count("\n") <= 150


@pytest.mark.parametrize("page", TEXTS)
def test_its_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        path, _, part = link.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_dir() or target.stat().st_size, link
        if part:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert part in slugs, link


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
