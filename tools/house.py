"""Counts what makes code hard to read: long functions, many decisions, dense lines.

python tools/house.py [FOLDER or FILE …]           (default: flora_jax)
python tools/house.py --limits flora_jax           what is over a limit; exit code 1 if anything is
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

LONG = 60  # lines of a function, without its decorators
DENSE = 15  # decisions of a function
WIDE = 100  # columns
CONDITIONALS = 15  # conditional expressions a thousand lines
PAIRS = 5  # tuple assignments a thousand lines
_ONCE = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.IfExp, ast.ExceptHandler, ast.match_case)


@dataclasses.dataclass(frozen=True)
class Function:
    """An outermost function or method: where it stands, its lines and its decisions."""

    place: str
    lines: int
    decisions: int


@dataclasses.dataclass(frozen=True)
class Module:
    """A file of Python, read."""

    name: str
    lines: Sequence[str]
    tree: ast.Module

    @classmethod
    def read(cls, path: Path) -> Module:
        text = path.read_text(encoding="utf-8")
        return cls(str(path), text.splitlines(), ast.parse(text))


def decisions(node: ast.AST) -> int:
    """The decisions in a function, those of functions inside it included.

    A boolean operator of n parts decides n - 1 times, a comprehension once for each `for` and `if`.
    """
    count = 0
    for part in ast.walk(node):
        if isinstance(part, _ONCE):
            count += 1
        elif isinstance(part, ast.BoolOp):
            count += len(part.values) - 1
        elif isinstance(part, ast.comprehension):
            count += 1 + len(part.ifs)
    return count


def functions(tree: ast.AST, where: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Outermost functions and methods, by name."""
    for part in ast.iter_child_nodes(tree):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            yield where + part.name, part
        else:
            inside = f"{where}{part.name}." if isinstance(part, ast.ClassDef) else where
            yield from functions(part, inside)


def pairs_assigned(tree: ast.AST) -> int:
    """Assignments `a, b = x, y`; a swap of names is none."""
    return sum(map(_pairs, ast.walk(tree)))


def _pairs(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    given = sorted(map(ast.unparse, node.value.elts))
    names = [target.elts for target in node.targets if isinstance(target, ast.Tuple)]
    return any(sorted(map(ast.unparse, several)) != given for several in names)


def conditionals(tree: ast.AST) -> int:
    """Conditional expressions, `x if y else z`."""
    return sum(isinstance(node, ast.IfExp) for node in ast.walk(tree))


def measured(modules: Sequence[Module]) -> list[Function]:
    """The functions of all modules."""
    return [
        Function(f"{module.name}: {name}", node.end_lineno - node.lineno + 1, decisions(node))
        for module in modules
        for name, node in functions(module.tree)
    ]


def wide_lines(modules: Sequence[Module]) -> list[str]:
    """`file:line` of each line that is too wide."""
    return [
        f"{module.name}:{number}"
        for module in modules
        for number, line in enumerate(module.lines, 1)
        if len(line) > WIDE
    ]


def print_counts(modules: Sequence[Module]) -> None:
    """The counts of all modules together, and the longest and densest functions."""
    every = measured(modules)
    lines = [line for module in modules for line in module.lines]
    nodes = [node for module in modules for node in ast.walk(module.tree)]
    counts = {
        "files": len(modules),
        "lines": len(lines),
        "statements": sum(isinstance(node, ast.stmt) for node in nodes),
        f"functions over {LONG} lines": sum(one.lines > LONG for one in every),
        f"functions over {DENSE} decisions": sum(one.decisions > DENSE for one in every),
        "conditional expressions a thousand lines": f"{_rate(modules, conditionals):.1f}",
        "tuple assignments a thousand lines": f"{_rate(modules, pairs_assigned):.1f}",
        f"lines over {WIDE} columns": len(wide_lines(modules)),
        "fmt: skip": sum("fmt: skip" in line for line in lines),
        "noqa": sum("noqa" in line for line in lines),
    }
    for what, count in counts.items():
        print(f"{count:>8}  {what}")
    for what in ("lines", "decisions"):
        for one in sorted(every, key=lambda one: -getattr(one, what))[:8]:
            print(f"{getattr(one, what):>8}  {what}: {one.place}")


def _rate(modules: Sequence[Module], count: Callable[[ast.AST], int]) -> float:
    """What a tree counts, a thousand lines."""
    lines = sum(len(module.lines) for module in modules)
    return 1000 * sum(count(module.tree) for module in modules) / max(lines, 1)


def over_limits(modules: Sequence[Module]) -> list[str]:
    """A line for each function, line and count that is over its limit."""
    missed = []
    for one in measured(modules):
        if one.lines > LONG:
            missed.append(f"{one.place} has {one.lines} lines; at most {LONG}")
        if one.decisions > DENSE:
            missed.append(f"{one.place} has {one.decisions} decisions; at most {DENSE}")
    missed += [f"{place} is over {WIDE} columns" for place in wide_lines(modules)]
    for what, count, most in (
        ("conditional expressions", conditionals, CONDITIONALS),
        ("tuple assignments", pairs_assigned, PAIRS),
    ):
        if (rate := _rate(modules, count)) > most:
            missed.append(f"{rate:.1f} {what} a thousand lines; at most {most}")
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the counts of the Python files; returns the exit code."""
    parser = argparse.ArgumentParser(description="Counts what makes code hard to read.")
    parser.add_argument("places", nargs="*", default=["flora_jax"], help="folders and files")
    parser.add_argument("--limits", action="store_true", help="what is over a limit; 1 if any is")
    flags = parser.parse_args(arguments)
    modules = [Module.read(path) for place in flags.places for path in _files(Path(place))]
    if not flags.limits:
        print_counts(modules)
        return 0
    missed = over_limits(modules)
    print("\n".join(missed) or "within all limits")
    return 1 if missed else 0


def _files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


if __name__ == "__main__":
    raise SystemExit(main())
