"""Ordered path rules: what trains, decays, at which rate, on which mesh axes. First match wins.

A path is the leaf's place among the variables, such as `params/layers/attention/qkv/q_kernel` or
`adapter/layers/mlp/down/down_B`; a rule is a regular expression that must match the whole of it. A
path that no rule covers, and a rule that decides nothing, are errors: both are how misspelt names
hide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from flora_jax.adapters import Tree, paths, tree
from flora_jax.errors import UserError, near_misses, require

T = TypeVar("T")


def decide(
    rules: Sequence[tuple[str, T]], names: Sequence[str], what: str, default: T | None = None
) -> dict[str, T]:
    """The value of the first rule that matches each path, by path.

    Where no rule matches it is the default, if one is given. Raises UserError on an uncovered path
    or an idle rule.
    """
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{what}: {pattern!r} is not a regular expression: {error}") from None
    decided, used = {}, set()
    for name in names:
        for i, (pattern, value) in enumerate(rules):
            if re.fullmatch(pattern, name):
                decided[name] = value
                used.add(i)
                break
        else:
            require(default is not None, f"{what}: no rule covers {name!r}")
            decided[name] = default
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise UserError(
                f"{what}: rule {pattern!r} decides no leaf; {near_misses(pattern, names)}"
            )
    return decided


def partition(variables: Mapping[str, Any], trains: Mapping[str, bool]) -> tuple[Tree, Tree]:
    """`(trainable, frozen)`: the variables split by `trains`, a decision for every path."""
    leaves = paths(variables)
    return (
        tree({name: leaf for name, leaf in leaves.items() if trains[name]}),
        tree({name: leaf for name, leaf in leaves.items() if not trains[name]}),
    )


def combine(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Tree:
    """The inverse of `partition`."""
    return tree({**paths(frozen), **paths(trainable)})
