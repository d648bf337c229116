"""From the split layout to the fused one and back, by pure functions of variable trees.

A fused product is `[W | A1 … AN]` or `[W ; B1 … BN]` for a bank of N adapters, N = 1 as a rule.
d_in, d_out are the base's rows and columns, R_f forward channels and R_b backward channels of one
adapter.

    layers/<i>/<block>/<product>/kernel [d_in (+ N R_b + fill), d_out (+ N R_f)], bias [d_out]
    layers/<i>/<block>/<product>/<projection>_B [N r, width]     lora and pf_lora alone
    layers/<i>/<block>_norm/scale                                as wide as the stream

Transposed, all of these but the bias and the norms are, and the kernel is called `weight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.config import AdapterConfig, has_adapter
from flora_jax.adapters.forms import folded
from flora_jax.adapters.layouts import FUSED, Layout
from flora_jax.adapters.leaves import Tree, check_adapter, check_base, check_fused, pad_layers
from flora_jax.adapters.methods import BLOCKS, PRODUCTS
from flora_jax.adapters.quantized import Quantized, Scaled, join
from flora_jax.errors import UserError, require

# The norms of a layer that act on the stream.
STREAM_NORMS = tuple(f"{block}_norm" for block in BLOCKS)


# The fused stream carries zflora's channels at this factor, and the rows B undo it. So small they
# do not count in a norm over the whole stream, which XLA compiles to one kernel, as the base's; a
# norm over a part of the stream takes two. A power of two rounds nothing.
_CARRIED = 2.0**-12


def _factor(side: str, adapter_config: AdapterConfig) -> float:
    """What a side's leaves are multiplied by in the fused layout. The scale s goes into the side
    that the method's row starts at zero: A for ffa and ffba*, B for the others."""
    row = adapter_config.row
    factor = 1.0
    if row.zero == side:
        factor = adapter_config.scale
    if row.writes == "stream":
        factor *= {"A": _CARRIED, "B": 1 / _CARRIED}[side]
    return factor


def _scaled(leaf: jax.Array, side: str, adapter_config: AdapterConfig) -> jax.Array:
    return leaf * _factor(side, adapter_config)


def _unscaled(leaf: jax.Array, side: str, adapter_config: AdapterConfig) -> jax.Array:
    return (leaf / _factor(side, adapter_config)).astype(jnp.float32)


def parts_of(adapter: Tree, config: Any, adapter_config: AdapterConfig) -> Tree:
    """A stacked adapter as what goes into the fused arrays, by block and product: `columns`
    [L, d_in, R_f], `rows` [L, R_b, d_out], `<projection>_B` [L, r, width], the scale included. A
    host can hold hundreds of these; `write_adapter` writes them. Raises UserError for an adapter of
    another configuration."""
    check_adapter(adapter, config, adapter_config)
    out: Tree = {}
    for block, products in pad_layers(adapter["layers"], adapter_config).items():
        for product, leaves in products.items():
            slot = adapter_config.slots[product]
            parts = out.setdefault(block, {}).setdefault(product, {})
            if slot.forward:
                parts["columns"] = _scaled(leaves["A"], "A", adapter_config)
            if slot.backward:
                rows = jnp.concatenate([leaves[f"{p}_B"] for p in slot.backward], axis=-1)
                parts["rows"] = _scaled(rows, "B", adapter_config)
            for p in slot.matrix:
                parts[f"{p}_B"] = _scaled(leaves[f"{p}_B"], "B", adapter_config)
    return out


def adapter_of(parts: Tree, config: Any, adapter_config: AdapterConfig) -> Tree:
    """The inverse of `parts_of`: the stacked adapter, float32; {} where there are no parts."""
    layers: Tree = {}
    for block, products in parts.items():
        for product, own in products.items():
            slot = adapter_config.slots[product]
            leaves = {}
            if slot.forward:
                columns = own["columns"][: len(own["columns"]) - slot.skips_last]
                leaves["A"] = _unscaled(columns, "A", adapter_config)
            for p in slot.matrix:
                leaves[f"{p}_B"] = _unscaled(own[f"{p}_B"], "B", adapter_config)
            edge = 0
            for p in slot.backward:
                width = config.widths[p][1]
                rows = own["rows"][int(slot.skips_first) :, :, edge : edge + width]
                leaves[f"{p}_B"] = _unscaled(rows, "B", adapter_config)
                edge += width
            if leaves:
                layers.setdefault(block, {})[product] = leaves
    return {"layers": layers} if layers else {}


def _refuse_tensor_parallel(base: Tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if mesh is not None and dict(mesh.shape).get("tensor", 1) > 1:
            raise UserError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} lies on a mesh with "
                "tensor="
                f"{mesh.shape['tensor']}: the fused layout has no tensor parallelism yet; gather "
                "the base on one device"
            )


def fuse(
    base: Tree,
    adapter: Tree | Sequence[Tree] | None,
    config: Any,
    adapter_config: AdapterConfig | None,
    layout: Layout = FUSED,
    **changes: Any,
) -> Tree:
    """The serving layout: `Llama(config, adapter_config).apply({"params": fused}, tokens)`. Forward
    adapters are columns and backward adapters rows of the base's arrays (FLoRA, arXiv 2511.00050;
    zflora: arXiv 2510.25784).

    base, adapter: trees in the split layout. A sequence of N adapters, all of `adapter_config`,
    makes a bank, for which `apply` needs `select`. `{}` or None, with `adapter_config` None or fft,
    makes the bare base with merged projections. Arrays are in the base's dtype; a quantised base
    (int8, fp8; nf4 as int8) gives codes, for the adapter's columns and rows too. layout: a fused
    one, such as `device_layout()`; changes: fields of it by name, `row_multiple=128`,
    `fold_adds=True` or `transposed=True`. The tree records its layout (`Layout.of`). `split` takes
    no tree that is quantised or has its adds folded. Raises UserError for trees that do not fit, a
    tensor-parallel base, and fold_adds of a quantised base or of a method without adds beside a
    path around the block.
    """
    layout = dataclasses.replace(layout, **changes)
    layers = dict(fused_layers(base, adapter, config, adapter_config, layout))
    adapters = _as_list(adapter)
    held = dataclasses.replace(
        layout, adapters=len(adapters), rank=adapter_config.rank if adapters else 0
    )
    return held.mark({**base, "layers": layers})


def _as_list(adapter: Tree | Sequence[Tree] | None) -> list[Tree]:
    if isinstance(adapter, Mapping):
        return [adapter] if adapter else []
    return list(adapter or [])


def fused_layers(
    base: Tree,
    adapter: Tree | Sequence[Tree] | None,
    config: Any,
    adapter_config: AdapterConfig | None,
    layout: Layout = FUSED,
    dtype: Any = None,
) -> Iterator[tuple[str, Tree]]:
    """The layers of `fuse`'s tree by number, each made when it is asked for; arguments and errors
    as there. dtype: of the arrays, default the base's. numpy arrays give numpy arrays, of which
    only the joined ones are copies; a quantised base gives jax arrays."""
    require(
        layout.kind == "fused",
        f"layout.kind={layout.kind!r}: fused arrays are made; pass FUSED or device_layout()",
    )
    _refuse_tensor_parallel(base)
    check_base(base, config)
    adapters = _as_list(adapter)
    _check_given(adapters, adapter_config)
    for one in adapters:
        check_adapter(one, config, adapter_config)
    kernel = base["layers"]["attention"]["qkv"]["q_kernel"]
    if dtype is None:
        floats = base["embed_tokens"]["embedding"] if isinstance(kernel, Quantized) else kernel
        dtype = floats.dtype
    if layout.fold_adds:
        require(
            not isinstance(kernel, Quantized),
            "fold_adds changes the base, and this one is quantised; serve it without",
        )
        require(
            len(adapters) == 1,
            f"fold_adds takes one adapter, {len(adapters)} were given: it changes the base",
        )
        base, adapters[0], adapter_config = folded(base, adapters[0], adapter_config)
    bank = [parts_of(one, config, adapter_config) for one in adapters]
    rank = adapter_config.rank if adapters else 0
    layout = dataclasses.replace(layout, adapters=len(adapters), rank=rank)

    def product(i: int, block: str, name: str) -> Tree:
        leaves = {path: leaf[i] for path, leaf in base["layers"][block][name].items()}
        parts = [of[block][name] for of in bank if name in of.get(block, {})]
        layer = [{path: leaf[i] for path, leaf in part.items()} for part in parts]
        shape = layout.fused_shape(config.widths, adapter_config, name)
        return layout.turned(_joined(leaves, layer, name, shape, dtype))

    return each_layer(base, config, product, layout.stream(config.hidden_size, adapter_config))


def _check_given(adapters: list[Tree], adapter_config: AdapterConfig | None) -> None:
    require(
        not adapters or has_adapter(adapter_config),
        "an adapter was given without the adapter_config that it belongs to",
    )
    if has_adapter(adapter_config) and not adapters:
        raise UserError(
            f"adapter_config is of {adapter_config.method}, but no adapter was given; pass None "
            "for both"
        )


def _joined(
    leaves: Tree, parts: list[Tree], product: str, shape: tuple[int, int], dtype: Any
) -> Tree:
    """One layer's product as one array of `shape`, from the base's leaves and the parts of all
    adapters."""
    first = leaves[f"{PRODUCTS[product][0]}_kernel"]
    xp = np if isinstance(first, np.ndarray) else jnp
    if isinstance(first, Quantized):
        return _joined_quantized(leaves, parts, product, shape, dtype)
    leaves = {name: leaf.astype(dtype, copy=False) for name, leaf in leaves.items()}
    by_name = {
        name: [xp.asarray(part[name], dtype) for part in parts]
        for name in (parts[0] if parts else ())
    }
    kernel = xp.concatenate([leaves[f"{p}_kernel"] for p in PRODUCTS[product]], axis=-1)
    kernel = xp.concatenate([kernel, *by_name.pop("columns", ())], axis=-1)
    kernel = xp.concatenate([kernel, *by_name.pop("rows", ())], axis=0)
    out = {name: xp.concatenate(matrices, axis=0) for name, matrices in by_name.items()}
    out["kernel"] = _pad_to(kernel, shape)
    if f"{PRODUCTS[product][0]}_bias" in leaves:
        out["bias"] = xp.concatenate([leaves[f"{p}_bias"] for p in PRODUCTS[product]])
    return out


def _joined_quantized(
    leaves: Tree, parts: list[Tree], product: str, shape: tuple[int, int], dtype: Any
) -> Tree:
    """`_joined` for a quantised base: the adapter's columns and rows become codes, a B of its own
    and a bias stay floats."""
    kernel = join([leaves[f"{p}_kernel"] for p in PRODUCTS[product]])
    d_in, d_out = kernel.shape
    out = {"kernel": kernel.padded(*shape)}
    for name in parts[0] if parts else ():
        values = [part[name] for part in parts]
        if name == "columns":
            out["kernel"] = out["kernel"].with_columns(jnp.concatenate(values, axis=1), d_out)
        elif name == "rows":
            out["kernel"] = out["kernel"].with_rows(jnp.concatenate(values), d_in)
        else:
            out[name] = jnp.concatenate(values).astype(dtype)
    if f"{PRODUCTS[product][0]}_bias" in leaves:
        biases = [leaves[f"{p}_bias"] for p in PRODUCTS[product]]
        out["bias"] = jnp.concatenate(biases).astype(dtype)
    return out


def _pad_to(array: jax.Array | Scaled, shape: Sequence[int]) -> jax.Array | Scaled:
    """`array` with zeros behind it up to `shape`."""
    if array.shape == tuple(shape):
        return array
    if isinstance(array, Scaled):
        return array.padded(*shape)
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.pad(array, [(0, to - n) for n, to in zip(array.shape, shape, strict=True)])


def each_layer(
    base: Tree, config: Any, product: Callable[[int, str, str], Tree], stream: int
) -> Iterator[tuple[str, Tree]]:
    """Leaves of every layer by its number: `product(i, block, name)` of the four products, norms
    cut from the stack, those of the stream filled up to its width."""
    for i in range(config.num_hidden_layers):
        norms = {
            name: {"scale": _norm(name, leaf["scale"][i], config, stream)}
            for name, leaf in base["layers"].items()
            if name not in BLOCKS
        }
        blocks = {
            block: {name: product(i, block, name) for name in products}
            for block, products in BLOCKS.items()
        }
        yield str(i), {**norms, **blocks}


def _norm(name: str, scale: jax.Array, config: Any, stream: int) -> jax.Array:
    """A layer's norm scale for a stream of that width: ones stand behind the model's D channels.
    The norms of q and k, which are not on the stream, are returned as they are."""
    if name not in STREAM_NORMS:
        return scale
    D = config.hidden_size
    xp = np if isinstance(scale, np.ndarray) else jnp
    return xp.concatenate([scale[:D], xp.ones(stream - D, scale.dtype)])


def make_room(fused: Tree, config: Any, adapter_config: AdapterConfig, places: int) -> Tree:
    """The fused tree of the same base with zeros where `places` adapters of `adapter_config` will
    be written; an adapter that was in it is dropped. The base is copied layer by layer.
    Raises UserError for a tree whose adds were folded: they are in its base."""
    layout = Layout.of(fused)
    require(
        not layout.fold_adds,
        "the repeat-and-adds of this tree were folded into its base: make_room cannot take "
        "them out again",
    )
    bare = dataclasses.replace(layout, adapters=0, rank=0)
    roomy = dataclasses.replace(layout, adapters=places, rank=adapter_config.rank)
    stream = roomy.stream(config.hidden_size, adapter_config)
    dtype = fused["embed_tokens"]["embedding"].dtype

    def product(name: str, leaves: Tree) -> Tree:
        leaves = layout.turned(leaves)
        d_in, d_out = bare.fused_shape(config.widths, None, name)
        kernel = _base_part(leaves["kernel"], d_in, d_out)
        out = {"kernel": _pad_to(kernel, roomy.fused_shape(config.widths, adapter_config, name))}
        for p in adapter_config.slots[name].matrix:
            shape = (places * adapter_config.rank, config.widths[p][1])
            out[f"{p}_B"] = jnp.zeros(shape, dtype)
        if "bias" in leaves:
            out["bias"] = leaves["bias"]
        return layout.turned(out)

    def layer(leaves: Tree) -> Tree:
        norms = {
            name: {"scale": _norm(name, leaf["scale"], config, stream)}
            for name, leaf in leaves.items()
            if name not in BLOCKS
        }
        blocks = {
            block: {name: product(name, leaves[block][name]) for name in names}
            for block, names in BLOCKS.items()
        }
        return {**norms, **blocks}

    return roomy.mark({**fused, "layers": {i: layer(one) for i, one in fused["layers"].items()}})


def _base_part(kernel: jax.Array | Scaled, rows: int, columns: int) -> jax.Array | Scaled:
    """The base's part of a fused array."""
    if isinstance(kernel, Scaled):
        return kernel.corner(rows, columns).replace(factor=None)
    return kernel[:rows, :columns]


def split(
    fused: Tree, config: Any, adapter_config: AdapterConfig | None, place: int = 0
) -> tuple[Tree, Tree]:
    """`(base, adapter)` of a fused tree, stacked again; of a bank, the adapter at `place`.

    The base is bit-equal to what was fused; so is the adapter where s is a power of two (else
    within 2 ulp) and the base's dtype is the adapter's. Raises UserError for a tree whose adds were
    folded, of another configuration, or without such a place.
    """
    require(
        not Layout.of(fused).fold_adds,
        "the repeat-and-adds of this tree were folded into its base: split cannot take them "
        "out again",
    )
    layout = check_fused(fused, config, adapter_config)
    kernel = fused["layers"]["0"]["attention"]["qkv"][layout.matrix]
    require(
        not isinstance(kernel, Scaled),
        "split takes no quantised tree, in which the adapter has been rounded; keep the split one",
    )
    require(
        0 <= place < max(1, layout.adapters),
        f"place={place} must be from 0 to {layout.adapters - 1}: the tree has "
        f"{layout.adapters} adapters",
    )
    layers = [fused["layers"][str(i)] for i in range(config.num_hidden_layers)]
    D = config.hidden_size
    stacked: Tree = {
        name: {"scale": jnp.stack([_norm(name, one[name]["scale"], config, D) for one in layers])}
        for name in layers[0]
        if name not in BLOCKS
    }
    parts: Tree = {}
    for block, products in BLOCKS.items():
        for product in products:
            each = [layout.turned(layer[block][product]) for layer in layers]
            leaves = {path: jnp.stack([one[path] for one in each]) for path in each[0]}
            stacked.setdefault(block, {})[product] = _base_product(leaves, config, product)
            if layout.adapters:
                own = _own_parts(leaves, config, adapter_config, product, place)
                parts.setdefault(block, {})[product] = own
    adapter = adapter_of(parts, config, adapter_config)
    return {**Layout.unmarked(fused), "layers": stacked}, adapter


def _base_product(leaves: Tree, config: Any, product: str) -> Tree:
    """The base's leaves of a product `[L, …]` out of its fused ones."""
    out = {}
    edge = 0
    for name in PRODUCTS[product]:
        d_in, width = config.widths[name]
        out[f"{name}_kernel"] = leaves["kernel"][:, :d_in, edge : edge + width]
        if "bias" in leaves:
            out[f"{name}_bias"] = leaves["bias"][:, edge : edge + width]
        edge += width
    return out


def _own_parts(
    leaves: Tree, config: Any, adapter_config: AdapterConfig, product: str, place: int
) -> Tree:
    """The parts `[L, …]` of the adapter at `place`, as `parts_of` has them, out of a product's
    fused leaves."""
    slot = adapter_config.slots[product]
    names = PRODUCTS[product]
    d_in = config.widths[names[0]][0]
    d_out = sum(config.widths[name][1] for name in names)

    def own(start: int, channels: int) -> slice:
        return slice(start + place * channels, start + (place + 1) * channels)

    r = adapter_config.rank
    parts = {f"{p}_B": leaves[f"{p}_B"][:, own(0, r)] for p in slot.matrix}
    if slot.forward:
        parts["columns"] = leaves["kernel"][:, :d_in, own(d_out, r * len(slot.forward))]
    if slot.backward:
        parts["rows"] = leaves["kernel"][:, own(d_in, slot.backward_rank), :d_out]
    return parts


def write_adapter(
    layers: Tree,
    parts: Tree,
    config: Any,
    adapter_config: AdapterConfig,
    layout: Layout,
    place: jax.Array,
) -> Tree:
    """The `layers` of a fused tree in this layout, with an adapter's `parts` (from `parts_of`)
    written at `place` of the bank, scalar int32.

    Only the adapter's columns and rows are written (`dynamic_update_slice`: in place where the
    argument is donated).
    """
    out = jax.tree.map(lambda leaf: leaf, layers)
    for block, products in parts.items():
        for product, leaves in products.items():
            d_in = config.widths[PRODUCTS[product][0]][0]
            d_out = sum(config.widths[name][1] for name in PRODUCTS[product])
            for i in range(config.num_hidden_layers):
                there = out[str(i)][block][product]
                for path, leaf in leaves.items():
                    _write_part(there, layout, path, leaf[i], (d_in, d_out), place)
    return out


def _write_part(
    leaves: Tree,
    layout: Layout,
    path: str,
    value: jax.Array,
    edges: tuple[int, int],
    place: jax.Array,
) -> None:
    """Writes one part of an adapter into a product's fused leaves: columns and rows behind the
    base's `edges` (d_in, d_out) in its array, a B in its own."""
    d_in, d_out = edges
    name = path
    start = (place * value.shape[0], 0)
    if path == "columns":
        name = layout.matrix
        start = (0, d_out + place * value.shape[1])
    if path == "rows":
        name = layout.matrix
        start = (d_in + place * value.shape[0], 0)
    if isinstance(leaves[name], Scaled):
        row, column = start
        if path == "columns":
            leaves[name] = leaves[name].with_columns(value, column)
        else:
            leaves[name] = leaves[name].with_rows(value, row)
        return
    value = value.astype(leaves[name].dtype)
    if layout.transposed:
        value, start = value.T, start[::-1]
    leaves[name] = jax.lax.dynamic_update_slice(leaves[name], value, start)
