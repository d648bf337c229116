"""Counts what makes code hard to read: long functions, many decisions, dense lines.

python tools/house.py [FOLDER …]           (default: flora_jax)
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

LONG = 60  # lines of a function
WIDE = 100  # columns
# A boolean operator of n parts decides n - 1 times, a comprehension once for each `for` and `if`.
_ONCE = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.match_case)


def decisions(node: ast.AST) -> int:
    """The decisions in a function, those of functions inside it included."""
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
    count = 0
    for part in ast.walk(tree):
        if not isinstance(part, ast.Assign) or not isinstance(part.value, ast.Tuple):
            continue
        if isinstance(part.targets[0], ast.Tuple):
            names = sorted(ast.unparse(one) for one in part.targets[0].elts)
            count += names != sorted(ast.unparse(one) for one in part.value.elts)
    return count


def main(folders: list[str]) -> None:
    """Prints the counts of all Python files below the folders."""
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.py"))]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    lines = [line for text in texts.values() for line in text.splitlines()]
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    every = [
        (f"{file}: {name}", function)
        for file, tree in trees.items()
        for name, function in functions(tree)
    ]
    long = {name: f.end_lineno - f.lineno + 1 for name, f in every}
    dense = {name: decisions(f) for name, f in every}
    thousands = len(lines) / 1000
    conditional = sum(isinstance(node, ast.IfExp) for node in nodes)
    paired = sum(map(pairs_assigned, trees.values()))
    counts = {
        "files": len(files),
        "lines": len(lines),
        "statements": sum(isinstance(node, ast.stmt) for node in nodes),
        f"functions over {LONG} lines": sum(n > LONG for n in long.values()),
        "functions over 15 decisions": sum(n > 15 for n in dense.values()),
        "conditional expressions a thousand lines": f"{conditional / thousands:.1f}",
        "tuple assignments a thousand lines": f"{paired / thousands:.1f}",
        f"lines over {WIDE} columns": sum(len(line) > WIDE for line in lines),
        "fmt: skip": sum("fmt: skip" in line for line in lines),
        "noqa": sum("noqa" in line for line in lines),
    }
    for what, count in counts.items():
        print(f"{count:>8}  {what}")
    for what, found in (("lines", long), ("decisions", dense)):
        for name in sorted(found, key=found.get, reverse=True)[:8]:
            print(f"{found[name]:>8}  {what}: {name}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["flora_jax"])
