"""The counts of tools/house.py, on a source short enough to count by hand."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SOURCE = '''
"""A module."""

a, b = 1, 2  # a pair
a, b = b, a  # a swap
a, b = pair()  # one value, taken apart
a, (b, c) = 1, (2, 3)  # a pair
a = 1, 2


def plain(x):
    return x


class Thing:
    def decide(self, xs, y):
        """if, for, while"""
        if y and xs or not y:  # 1 + 1 + 1
            for x in xs:  # 1
                y = x if x else y  # 1
        elif y:  # 1
            while y:  # 1
                y -= 1

        def inner(z):
            return [v for v in z if v for w in v]  # 3

        try:
            return inner(xs)
        except (ValueError, TypeError):  # 1
            return None
        except KeyError:  # 1
            match y:
                case 1:  # 1
                    return {k: v for k, v in xs}  # 1
                case _:  # 1
                    return 0


async def over(xs):
    async for x in xs:  # 1
        print(x if x else 0, 1 if x else 2)  # 2
'''


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules["house"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["house"]


@pytest.fixture(scope="module")
def tree():
    return ast.parse(SOURCE)


def test_decisions(house, tree):
    found = {name: house.decisions(node) for name, node in house.functions(tree)}
    assert found == {"plain": 0, "Thing.decide": 15, "over": 3}


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("a and b", 1),
        ("a and b and c", 2),
        ("a and (b or c)", 2),
        ("x if a else y if b else z", 2),
        ("[x for x in y]", 1),
        ("{x for x in y if x if not x}", 3),
        ("sum(x for x in y)", 1),
        ("lambda x: x or y", 1),
        ("not a", 0),
        ("a < b < c", 0),
    ],
)
def test_decisions_of_expressions(house, expression, expected):
    assert house.decisions(ast.parse(expression)) == expected


def test_tuple_assignments(house, tree):
    assert house.pairs_assigned(tree) == 2
    assert house.pairs_assigned(ast.parse("x = a, b = c, d")) == 1
    assert house.pairs_assigned(ast.parse("a.x, b[0] = b[0], a.x")) == 0
    assert house.pairs_assigned(ast.parse("a, *b = c")) == 0


def test_conditional_expressions(house, tree):
    assert house.conditionals(tree) == 3


def test_counts_are_printed(house, tmp_path, capsys):
    (tmp_path / "code.py").write_text(SOURCE + "# " + "x" * 99 + "\n", encoding="utf-8")
    (tmp_path / "other.txt").write_text("if x: pass\n", encoding="utf-8")
    assert house.main([str(tmp_path)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    counts = {what: count for count, what in lines}
    number = len(SOURCE.splitlines()) + 1
    assert counts["files"] == "1" and counts["lines"] == str(number)
    assert counts["lines over 100 columns"] == "1"
    assert counts["functions over 15 decisions"] == counts["functions over 60 lines"] == "0"
    assert counts["conditional expressions a thousand lines"] == f"{3000 / number:.1f}"
    assert counts["tuple assignments a thousand lines"] == f"{2000 / number:.1f}"
    assert counts[f"decisions: {tmp_path / 'code.py'}: Thing.decide"] == "15"


PLAIN = "x = 1\n" * 1000


@pytest.mark.parametrize(
    "added, missed",
    [
        ("", ""),
        ("def f(x):\n" + "    x = 1\n" * 59, ""),
        ("def f(x):\n" + "    x = 1\n" * 60, "f has 61 lines; at most 60"),
        ("@g\n@h\ndef f(x):\n" + "    x = 1\n" * 59, ""),
        ("def f(x):\n" + "    if x: pass\n" * 15, ""),
        ("def f(x):\n" + "    if x: pass\n" * 16, "f has 16 decisions; at most 15"),
        ("#" * 100 + "\n", ""),
        ("#" * 101 + "\n", ":1001 is over 100 columns"),
        ("x = 1 if x else 2\n" * 15, ""),
        ("x = 1 if x else 2\n" * 16, "15.7 conditional expressions a thousand lines; at most 15"),
        ("x, y = 1, 2\n" * 5, ""),
        ("x, y = 1, 2\n" * 6, "6.0 tuple assignments a thousand lines; at most 5"),
    ],
)
def test_limits(house, tmp_path, capsys, added, missed):
    path = tmp_path / "code.py"
    path.write_text(PLAIN + added, encoding="utf-8")
    assert house.main(["--limits", str(path)]) == (1 if missed else 0)
    printed = capsys.readouterr().out.splitlines()
    if missed:
        assert len(printed) == 1 and printed[0].endswith(missed)
    else:
        assert printed == ["within all limits"]


def test_the_package_can_be_counted(house, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert house.main([]) == 0
    assert "noqa" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["flora_jax", "experiments"])
def test_the_house_is_within_its_limits(house, monkeypatch, capsys, folder):
    monkeypatch.chdir(ROOT)
    assert house.main(["--limits", folder]) == 0, capsys.readouterr().out


# Each may import those behind it.
FLOORS = [
    {"train", "evaluate", "generate", "export", "harness", "latency", "launches"},
    {"finetune"},
    {"training", "evaluation", "analysis"},
    {"interop", "inference"},
    {"commands", "config_files"},
    {"config"},
    {"models", "data"},
    {"adapters"},
    {"tokens", "files", "device", "progress"},
    {"errors"},
]


@pytest.mark.parametrize("command", sorted(FLOORS[0]))
def test_a_command_only_parses_calls_and_prints(command):
    assert len((ROOT / f"flora_jax/{command}.py").read_text().splitlines()) <= 80


def imported(path):
    """The modules of the package that a file imports, for types as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flora_jax."):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_downwards():
    floor_of = {name: i for i, names in enumerate(FLOORS) for name in names}
    files = [p for p in (ROOT / "flora_jax").rglob("*.py") if p.parent.name != "remote_code"]
    seen = set()
    for path in files:
        room = path.relative_to(ROOT / "flora_jax").parts[0].removesuffix(".py")
        for module in imported(path) if room != "__init__" else ():
            below = module.split(".")[1]
            seen.add((room, below))
            assert room == below or floor_of[room] < floor_of[below], f"{path} imports {module}"
    assert len(seen) > 50


def test_no_modules_import_each_other():
    """Within a room either."""
    package = ROOT / "flora_jax"
    graph = {}
    for path in package.rglob("*.py"):
        name = ".".join(["flora_jax", *path.relative_to(package).with_suffix("").parts])
        graph[name] = set(imported(path))
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])
