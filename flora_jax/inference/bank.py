"""The adapters in the fused arrays, and how they are switched.

One adapter is in the arrays at a time, and another is written over it in place. Several are laid
side by side once, as a bank. From then on a switch costs nothing, and every token reads the bytes
of all N adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import (
    AdapterConfig,
    Layout,
    Tree,
    check_adapter,
    fuse,
    has_adapter,
    make_room,
    parts_of,
    paths,
    widen,
    write_adapter,
)
from flora_jax.errors import UserError, near_misses, require
from flora_jax.models.config import LlamaConfig

_UNKNOWN = object()  # what a place holds until it is written, or if that was interrupted
_write = jax.jit(
    write_adapter, static_argnames=("config", "adapter_config", "layout"), donate_argnames="layers"
)


class Bank:
    """A base in fused arrays with some of its adapters.

    Args:
      config: the base's.
      base: its split tree.
      adapters: split trees by name.
      adapter_config: one for all adapters, or one for each by name. They may differ in rank and
        alpha alone; smaller ranks are widened.
      layout: of the fused arrays.

    params: the fused tree; places: the name of the adapter at each place, None for zeros;
    side_by_side: whether all adapters are in the arrays; adapter_config: of the widened adapters,
    None where there is nothing to write. Raises UserError for trees and configurations that do not
    fit together.
    """

    def __init__(
        self,
        config: LlamaConfig,
        base: Tree,
        adapters: Mapping[str, Tree],
        adapter_config: AdapterConfig | Mapping[str, AdapterConfig] | None,
        layout: Layout,
    ):
        configs = adapter_config
        if not isinstance(adapter_config, Mapping):
            configs = dict.fromkeys(adapters, adapter_config)
        self._config = config
        self.adapter_config = _shared_config(adapters, configs)
        self._parts = {
            name: _shared_parts(name, adapter, configs[name], self.adapter_config, config)
            for name, adapter in adapters.items()
        }
        self.params = fuse(base, None, config, None, layout)
        self.side_by_side = False
        if self.adapter_config is not None:
            self._make_room(1)
        self.places: list[Any] = [None]

    @property
    def names(self) -> list[str]:
        """The adapters, in the order given."""
        return list(self._parts)

    def check(self, name: str | None) -> None:
        """Raises UserError for a name that no adapter has; None is the bare base."""
        if name is not None and (not isinstance(name, str) or name not in self._parts):
            known = "none is"
            if self._parts:
                known = near_misses(str(name), self._parts)
            raise UserError(f"adapter {name!r} is not loaded; {known}")

    def arrange(self, names: Collection[str | None]) -> None:
        """Makes the arrays hold the adapters of `names`: writes a single one, and turns into a bank
        for several."""
        if self.side_by_side or self.adapter_config is None:
            return
        if len(names) > 1:
            self._make_room(len(self._parts))
            for place, name in enumerate(self._parts):
                self._put(place, name)
            self.side_by_side = True
        elif set(names) != set(self.places):
            if Layout.of(self.params).adapters > 1:  # a bank that was interrupted
                self._make_room(1)
            self._put(0, next(iter(names)))

    def _make_room(self, places: int) -> None:
        self.places = [_UNKNOWN] * places
        self.params = make_room(self.params, self._config, self.adapter_config, places)

    def _put(self, place: int, name: str | None) -> None:
        """Writes an adapter's columns and rows to a place; None: zeros."""
        self.places[place] = _UNKNOWN
        parts = self._parts.get(name)
        if parts is None:
            parts = jax.tree.map(np.zeros_like, next(iter(self._parts.values())))
        layout = Layout.of(self.params)
        layers = self.params["layers"]
        self.params["layers"] = _write(
            layers, parts, self._config, self.adapter_config, layout, jnp.int32(place)
        )
        self.places[place] = name

    def select(self, names: Sequence[str | None], rows: int) -> jax.Array | None:
        """Which adapter each row uses, `[rows, N]` bool; None without a bank.

        names: of the first rows' adapters; further rows use none.
        """
        if not self.side_by_side:
            return None
        select = np.zeros((rows, len(self.places)), bool)
        for row, name in enumerate(names):
            select[row] = [name is not None and name == place for place in self.places]
        return jnp.asarray(select)


def _shared_config(
    adapters: Mapping[str, Tree], configs: Mapping[str, AdapterConfig | None]
) -> AdapterConfig | None:
    """The configuration of the adapter with the largest rank, to which all are widened.

    None without adapters, and for fft, which trained the base itself.
    """
    if not adapters:
        return None
    for name in adapters:
        require(configs.get(name) is not None, f"adapter {name!r} needs its adapter_config")
    first = configs[next(iter(adapters))]
    for name in adapters:
        own = configs[name]
        require(
            _laid_out(own) == _laid_out(first),
            f"adapter {name!r} ({_described(own)}) is not laid out as the first is "
            f"({_described(first)}); adapters of one Generator are alike but for rank and alpha",
        )
    if not has_adapter(first):
        return None
    return max((configs[name] for name in adapters), key=lambda one: one.rank)


def _laid_out(one: AdapterConfig) -> tuple[Any, ...]:
    """The fields that decide where an adapter's values lie."""
    return one.row, one.targets, one.add_to, one.activation


def _described(one: AdapterConfig) -> str:
    return (
        f"{one.method}, targets={','.join(one.targets)}, add_to={','.join(one.add_to)}, "
        f"activation={one.activation}"
    )


def _shared_parts(
    name: str,
    adapter: Tree,
    own: AdapterConfig,
    shared: AdapterConfig | None,
    config: LlamaConfig,
) -> Tree:
    """The columns and rows that an adapter writes, widened to the shared rank, on the host."""
    if shared is None:
        return {}
    check_adapter(adapter, config, own)
    for path, leaf in paths(adapter).items():
        require(
            np.isfinite(leaf).all(),
            f"adapter {name!r}: leaf {path!r} holds a value that is not finite; train it anew",
        )
    if own.rank < shared.rank:
        adapter, own = widen(adapter, own, shared.rank)
    return jax.device_get(parts_of(adapter, config, own))
