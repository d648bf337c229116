"""Ordered path rules, of which the first match wins: they decide which leaves train and decay, at
which rate, and on which mesh axes.

A path is the leaf's place among the variables, such as `params/layers/attention/qkv/q_kernel` or
`adapter/layers/mlp/down/down_B`. A rule is a regular expression that must match the whole path. A
path that no rule covers and a rule that decides nothing are errors, since misspelt names cause
both.
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
    """Path -> the value of the first rule that matches it, or `default`.

    names: the paths; what: the name of the rules in errors. Raises UserError for a path that no
    rule covers where there is no default, for an idle rule, and for one that is no regular
    expression.
    """
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{what}: {pattern!r} is not a regular expression: {error}") from None
    decided = {}
    used = set()
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
    """`(trainable, frozen)`: the variables split by `trains`, path -> whether the leaf trains."""
    leaves = paths(variables)
    return (
        tree({name: leaf for name, leaf in leaves.items() if trains[name]}),
        tree({name: leaf for name, leaf in leaves.items() if not trains[name]}),
    )


def combine(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Tree:
    """The inverse of `partition`."""
    return tree({**paths(frozen), **paths(trainable)})
