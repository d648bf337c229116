"""Every weight, declared once: its axes, its shape and its initial value; and the one comparison of
trees.

Axis letters: L layers, V vocabulary, D model, Q query heads x head width, K key/value heads x head
width, H head width, F inner width of the MLP, R adapter channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flora_jax.adapters.config import AdapterConfig, has_adapter
from flora_jax.adapters.layouts import Layout, Widths
from flora_jax.adapters.methods import BLOCKS, PRODUCTS
from flora_jax.errors import UserError, require

Initializer = Callable[[jax.Array, Sequence[int], Any], jax.Array]
Shapes = Mapping[str, tuple[int, ...]]
Tree = dict[str, Any]  # leaves under nested names

# Input and output axis of each projection.
AXES: dict[str, tuple[str, str]] = {
    "q": ("D", "Q"),
    "k": ("D", "K"),
    "v": ("D", "K"),
    "o": ("Q", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "down": ("F", "D"),
}

_STDDEV = 0.02  # of a random base: HF's initializer_range
_DRAWN_AT_ONCE = 2**22  # values


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One weight. axes: a letter each; init: `(key, shape, dtype)` to its initial value."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: Initializer


def normal(stddev: float) -> Initializer:
    """Normal values, as flax's initialiser of that name draws them, but large arrays row block by
    row block, each from a key of its own: XLA's CPU compiler holds three times the size of what it
    draws at once."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        least = -(-math.prod(shape) // _DRAWN_AT_ONCE)
        blocks = next(n for n in range(max(least, 1), shape[0] + 1) if shape[0] % n == 0)

        def draw(key: jax.Array) -> jax.Array:
            return stddev * jax.random.normal(key, (shape[0] // blocks, *shape[1:]), dtype)

        if blocks == 1:
            return draw(key)
        return jax.lax.map(draw, jax.random.split(key, blocks)).reshape(shape)

    return init


def _over_rows(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / math.sqrt(shape[0])


def _uniform(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


_zeros = nn.initializers.zeros_init()
_ones = nn.initializers.ones_init()


def product_leaves(widths: Widths, product: str, use_bias: bool) -> dict[str, Leaf]:
    """Leaves of one layer's `product` in the base, kernels `[d_in, d_out]` and biases `[d_out]`."""
    leaves = {}
    for name in PRODUCTS[product]:
        axes = AXES[name]
        leaves[f"{name}_kernel"] = Leaf(axes, widths[name], normal(_STDDEV))
        if use_bias:
            leaves[f"{name}_bias"] = Leaf(axes[1:], widths[name][1:], _zeros)
    return leaves


def base_leaves(config: Any) -> dict[str, Leaf]:
    """Leaves of the base's whole tree by path, those of `layers/…` with L in front. config: a
    LlamaConfig."""
    sizes = config.sizes

    def leaf(axes: str, init: Initializer) -> Leaf:
        letters = tuple(axes.split())
        return Leaf(letters, tuple(sizes[letter] for letter in letters), init)

    leaves = {"embed_tokens/embedding": leaf("V D", normal(_STDDEV))}
    if not config.tie_word_embeddings:
        leaves["lm_head/kernel"] = leaf("D V", normal(_STDDEV))
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        leaves[f"layers/{name}/scale"] = leaf("L H", _ones)
    for block, products in BLOCKS.items():
        leaves[f"layers/{block}_norm/scale"] = leaf("L D", _ones)
        for product in products:
            has_bias = product in config.biases
            for name, one in product_leaves(config.widths, product, has_bias).items():
                path = f"layers/{block}/{product}/{name}"
                leaves[path] = Leaf(("L", *one.axes), (sizes["L"], *one.shape), one.init)
    leaves["final_norm/scale"] = leaf("D", _ones)
    return leaves


def adapter_leaves(adapter: AdapterConfig, product: str, widths: Widths) -> dict[str, Leaf]:
    """Leaves of one layer's `product` in the adapter.

    `A [d_in, R_f]`, its pieces in the slot's order, and `<projection>_B [rows, d_out]`. Initial
    values, which make step 0 the base's (our choice; LoRA's is PEFT's): with B zero, A ~
    U(−1/√d_in, 1/√d_in); with A zero, B ~ N(0, 1/√rows).
    """
    slot = adapter.slots[product]
    first = PRODUCTS[product][0]
    leaves: dict[str, Leaf] = {}
    if slot.forward:
        shape = (widths[first][0], adapter.rank * len(slot.forward))
        init = _zeros if adapter.zero_init == "A" else _uniform
        leaves["A"] = Leaf((AXES[first][0], "R"), shape, init)
    init = _zeros if adapter.zero_init == "B" else _over_rows
    for rows, names in ((adapter.rank, slot.matrix), (slot.backward_rank, slot.backward)):
        for name in names:
            leaves[f"{name}_B"] = Leaf(("R", AXES[name][1]), (rows, widths[name][1]), init)
    return leaves


def init_adapter(rng: jax.Array, config: Any, adapter_config: AdapterConfig) -> dict[str, Any]:
    """The adapter's initial variables, float32, leaves stacked `[L, …]`; `{}` for fft.

    Each layer draws from a key of its own, so no fan is ever computed on a stacked shape. The base
    is not touched. `config` needs `widths` and `num_hidden_layers` only. Raises UserError where the
    rank does not fit.
    """
    adapter_config.check(config.widths)
    layers: dict[str, Any] = {}
    keys = iter(jax.random.split(rng, 64))
    for block, products in BLOCKS.items():
        for product in products:
            for name, leaf in adapter_leaves(adapter_config, product, config.widths).items():
                slot = adapter_config.slots[product]
                skipped = slot.skips_last if name == "A" else slot.skips_first
                each = jax.random.split(next(keys), config.num_hidden_layers - skipped)
                layers.setdefault(block, {}).setdefault(product, {})[name] = _draw_each(leaf, each)
    return {"layers": layers} if layers else {}


def _draw_each(leaf: Leaf, keys: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: leaf.init(key, leaf.shape, jnp.float32))(keys)


def abstract_adapter(config: Any, adapter_config: AdapterConfig) -> dict[str, Any]:
    """The tree of `init_adapter` as shapes and dtypes; nothing is allocated."""
    return jax.eval_shape(lambda: init_adapter(jax.random.key(0), config, adapter_config))


def pad_layers(layers: dict[str, Any], adapter_config: AdapterConfig) -> dict[str, Any]:
    """Stacked adapter leaves with zeros for the layer that has none, rows B of the first and
    columns A of the last, so that every leaf is `[L, …]`."""

    def pad(product: str, leaf: str, value: jax.Array) -> jax.Array:
        slot = adapter_config.slots[product]
        zeros = jnp.zeros_like(value, shape=(1, *value.shape[1:]))
        if leaf == "A":
            return jnp.concatenate([value, zeros]) if slot.skips_last else value
        return jnp.concatenate([zeros, value]) if slot.skips_first else value

    return {
        block: {
            product: {leaf: pad(product, leaf, value) for leaf, value in leaves.items()}
            for product, leaves in products.items()
        }
        for block, products in layers.items()
    }


# -------------------------------------------------------------------------------------------- paths


def paths(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree by path, such as `layers/mlp/down/down_B`."""
    return flatten_dict(variables, sep="/")


def tree(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `paths`."""
    return unflatten_dict(leaves, sep="/")


# ------------------------------------------------------------------------------------------- checks


def shapes_of(tree: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every leaf."""
    return {path: tuple(leaf.shape) for path, leaf in sorted(paths(tree or {}).items())}


def check_tree(
    found: Shapes, expected: Shapes, say: Callable[[str, Any, Any], str], *, partly: bool = False
) -> None:
    """The one comparison of trees, by path and shape. Raises UserError for the first leaf that is
    absent (unless a part is enough), of another shape, or extra.

    say: makes the message from the path, the shape found and the shape expected, either of which
    may be None.
    """
    for path, shape in expected.items():
        there = found.get(path)
        if there != shape and not (partly and there is None):
            raise UserError(say(path, there, shape))
    for path, there in found.items():
        if path not in expected:
            raise UserError(say(path, there, None))


def _says(leaf: str, what: str, remedy: str = "") -> Callable[[str, Any, Any], str]:
    def say(path: str, there: Any, wanted: Any) -> str:
        expected = wanted or "none of that name"
        return f"{leaf} {path!r} is {there or 'absent'}, but {what} has {expected}{remedy}"

    return say


def check_adapter(adapter: Mapping[str, Any], config: Any, adapter_config: AdapterConfig) -> None:
    """Raises UserError unless `adapter` has the very leaves and shapes, `[L, …]`, that the
    configuration gives (flax ignores extra ones silently)."""
    expected = shapes_of(abstract_adapter(config, adapter_config))
    what = f"{adapter_config.method} at rank {adapter_config.rank} on this model"
    check_tree(shapes_of(adapter), expected, _says("adapter leaf", what))


def check_base(base: Mapping[str, Any], config: Any) -> None:
    """Raises UserError unless the layers of `base`, in the split layout, are those of the
    configuration: indexing clamps and broadcasting repeats, so that a base of another depth would
    be served silently."""
    leaves = sorted(base_leaves(config).items())
    expected = {path: leaf.shape for path, leaf in leaves if path.startswith("layers/")}
    found = shapes_of({"layers": base.get("layers", {})})
    remedy = "; is it another model's, or fused already?"
    check_tree(found, expected, _says("base leaf", "this configuration", remedy))


def check_fused(
    fused: Mapping[str, Any], config: Any, adapter_config: AdapterConfig | None
) -> Layout:
    """The layout of a fused tree. Raises UserError unless its products and adapters are those of
    the configuration."""
    layout = Layout.of(fused)
    require(
        layout.kind == "fused", f"this is no fused tree but a {layout.kind} one; `fuse` makes one"
    )
    wanted = adapter_config.rank if has_adapter(adapter_config) else 0
    require(
        layout.rank == wanted,
        f"the fused tree holds {_held(layout.rank)}, but adapter_config is of {_held(wanted)}",
    )
    expected = {}
    for block, products in BLOCKS.items():
        for product in products:
            shapes = layout.fused_shapes(
                config.widths, adapter_config, product, product in config.biases
            )
            for i in range(config.num_hidden_layers):
                path = f"layers/{i}/{block}/{product}"
                expected |= {f"{path}/{name}": shape for name, shape in shapes.items()}
    leaves = shapes_of({"layers": fused.get("layers", {})})
    found = {path: shape for path, shape in leaves.items() if path.split("/")[2] in BLOCKS}
    method = (
        f"{adapter_config.method} at rank {layout.rank}" if layout.adapters else "the bare base"
    )
    check_tree(found, expected, _says("fused leaf", method))
    return layout


def _held(rank: int) -> str:
    return f"an adapter of rank {rank}" if rank else "no adapter"
