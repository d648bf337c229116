"""From one layout of the weights to another, by pure functions of variable trees.

    split   base and adapter apart, leaves stacked [L, …]: what is trained
    fused   four arrays a layer, one set of leaves a layer: what is served (`fuse`, undone by `split`)
    apart   one set of leaves a layer, products apart: what a server without fused adapters runs, the baseline

A fused product is `[W | A1 … AN]` or `[W ; B1 … BN]` for a bank of N adapters, N = 1 as a rule. d_in, d_out are the
base's rows and columns, R_f forward channels and R_b backward channels of one adapter.

    layers/<i>/<block>/<product>/kernel [d_in (+ N R_b + fill), d_out (+ N R_f)], bias [d_out]
    layers/<i>/<block>/<product>/<projection>_B [N r, width]     lora and pf_lora alone
    riders [0, N, r]      holds nothing: its shape says what is in the arrays, which theirs does not (rank 16, or two
                          of rank 8?); folded [0], likewise, says that repeat-and-adds are folded into W

Transposed, all of these but the bias are, and the kernel is called `weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.config import AdapterConfig, Slot
from flora_jax.adapters.forms import folded
from flora_jax.adapters.layer import check_adapter, check_base, pad_first_layer
from flora_jax.adapters.methods import BLOCKS, PRODUCTS
from flora_jax.errors import UserError

Array = jax.Array
Tree = dict[str, Any]


def _riders(layers: Tree, adapter_config: AdapterConfig) -> Tree:
    """What of a stacked adapter goes into each product, by block and product: `columns` [L, d_in, R_f], `rows`
    [L, R_b, d_out], `<projection>_B` [L, r, width]. The scale is in the side that by the
    method's own row starts at zero: in A for ffa, ffba* and zflora, in B for the others."""

    def scaled(leaf, side):
        return leaf * (adapter_config.scale if adapter_config.row.zero == side else 1)

    out: Tree = {}
    for block, products in pad_first_layer(layers, adapter_config).items():
        for product, leaves in products.items():
            slot = adapter_config.slots[product]
            riders = out.setdefault(block, {}).setdefault(product, {})
            if slot.forward:
                riders["columns"] = scaled(leaves["A"], "A")
            if slot.backward:
                riders["rows"] = scaled(
                    jnp.concatenate([leaves[f"{p}_B"] for p in slot.backward], axis=-1), "B"
                )
            riders.update({f"{p}_B": scaled(leaves[f"{p}_B"], "B") for p in slot.matrix})
    return out


def _has_adapter(adapter_config: AdapterConfig | None) -> bool:
    return adapter_config is not None and adapter_config.row.reads is not None


def _extent(
    config: Any,
    adapter_config: AdapterConfig | None,
    product: str,
    places: int,
    row_multiple: int = 1,
) -> tuple[int, int]:
    """Rows and columns of a fused kernel with room for `places` adapters, filled up to the multiple."""
    names = PRODUCTS[product]
    rows, columns = config.widths[names[0]][0], sum(config.widths[name][1] for name in names)
    if not _has_adapter(adapter_config):
        return rows, columns
    slot, fill = adapter_config.slots[product], lambda n: -(-n // row_multiple) * row_multiple
    if adapter_config.row.writes == "stream":
        width = fill(config.hidden_size + places * adapter_config.rank)
        return (width, columns) if slot.backward else (rows, width)
    backward = places * slot.backward_rank
    return fill(
        rows + backward
    ) if backward else rows, columns + places * adapter_config.rank * len(slot.forward)


def _refuse_tensor_parallel(base: Tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if mesh is not None and dict(mesh.shape).get("tensor", 1) > 1:
            raise UserError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} lies on a mesh with tensor="
                f"{mesh.shape['tensor']}: the fused layout has no tensor parallelism yet; gather the base on one device"
            )


def fuse(
    base: Tree,
    adapter: Tree | Sequence[Tree] | None,
    config: Any,
    adapter_config: AdapterConfig | None,
    row_multiple: int = 1,
    fold_adds: bool = False,
    transposed: bool = False,
) -> Tree:
    """The serving layout: `Llama(config, adapter_config).apply({"params": fused}, tokens)`. Forward adapters are
    columns and backward adapters rows of the base's arrays (FLoRA, arXiv 2511.00050; zflora: arXiv 2510.25784).

    base, adapter: trees in the split layout; of a sequence of N adapters, all of `adapter_config`, a bank is made (then
    `apply` needs `select`). `{}` or None, with `adapter_config` None or fft: the bare base with merged projections.
    Arrays are in the base's dtype. row_multiple: products with rows B (for zflora: the whole stream) are filled up with
    zeros to a multiple of it; 128 or 256 keep a GPU's compiler from padding at run time, on a CPU it is wasted
    bandwidth. fold_adds (ffba*): repeat-and-adds are folded into W and B, so that ffba runs at fpa's operations; the
    tree says so itself, and `split` does not take it. transposed: `weight [d_out, d_in]` for `kernel [d_in, d_out]`,
    which a CPU reads faster (`multiply_transposed`). Raises UserError for trees that do not fit, a
    tensor-parallel base, and fold_adds of another method.
    """
    fused = {name: leaf for name, leaf in base.items() if name != "layers"}
    fused["layers"] = dict(
        fused_layers(base, adapter, config, adapter_config, row_multiple, fold_adds, transposed)
    )
    if adapter:
        fused["riders"] = _mark(
            fused, 1 if isinstance(adapter, Mapping) else len(adapter), adapter_config
        )
    return (
        {**fused, "folded": jnp.zeros(0, base["embed_tokens"]["embedding"].dtype)}
        if fold_adds
        else fused
    )


def _mark(fused: Tree, places: int, adapter_config: AdapterConfig) -> Array:
    return jnp.zeros((0, places, adapter_config.rank), fused["embed_tokens"]["embedding"].dtype)


def fused_layers(
    base: Tree,
    adapter: Tree | Sequence[Tree] | None,
    config: Any,
    adapter_config: AdapterConfig | None,
    row_multiple: int = 1,
    fold_adds: bool = False,
    transposed: bool = False,
    dtype: Any = None,
) -> Iterator[tuple[str, Tree]]:
    """The layers of `fuse`'s tree by number, each made when it is asked for; arguments and errors as there. dtype: of
    the arrays, default the base's. Of numpy arrays numpy arrays are made, with no copy but the joined ones."""
    _refuse_tensor_parallel(base)
    check_base(base, config)
    if row_multiple < 1:
        raise UserError(f"row_multiple={row_multiple} must be a positive integer")
    adapters = [adapter] if adapter and not isinstance(adapter, Sequence) else list(adapter or [])
    if adapters and not _has_adapter(adapter_config):
        raise UserError("an adapter was given without the adapter_config that it belongs to")
    if _has_adapter(adapter_config) and not adapters:
        raise UserError(
            f"adapter_config is of {adapter_config.method}, but no adapter was given; pass None for both"
        )
    for one in adapters:
        check_adapter(one, config, adapter_config)
    if fold_adds:
        if len(adapters) != 1:
            raise UserError(
                f"fold_adds takes one adapter, {len(adapters)} were given: it changes the base"
            )
        base, adapters[0], adapter_config = folded(base, adapters[0], adapter_config)
    banks = [_riders(one["layers"], adapter_config) for one in adapters]

    def product(i: int, block: str, name: str) -> Tree:
        leaves = {path: leaf[i] for path, leaf in base["layers"][block][name].items()}
        first = next(iter(leaves.values()))
        kind, xp = (
            first.dtype if dtype is None else dtype,
            np if isinstance(first, np.ndarray) else jnp,
        )
        leaves = {path: leaf.astype(kind, copy=False) for path, leaf in leaves.items()}
        riders = [
            {path: xp.asarray(leaf[i], kind) for path, leaf in bank[block][name].items()}
            for bank in banks
            if name in bank.get(block, {})
        ]
        kernel = xp.concatenate([leaves[f"{p}_kernel"] for p in PRODUCTS[name]], axis=-1)
        out: Tree = {}
        for path in riders[0] if riders else ():
            parts = [rider[path] for rider in riders]
            if path in ("columns", "rows"):
                kernel = xp.concatenate([kernel, *parts], axis=-1 if path == "columns" else 0)
            else:
                out[path] = xp.concatenate(parts, axis=0)
        out["kernel"] = _pad_to(
            kernel, _extent(config, adapter_config, name, len(adapters), row_multiple)
        )
        if f"{PRODUCTS[name][0]}_bias" in leaves:
            out["bias"] = xp.concatenate([leaves[f"{p}_bias"] for p in PRODUCTS[name]])
        return _turned(out) if transposed else out

    return _each_layer(
        base,
        config,
        product,
        _extent(config, adapter_config, "qkv", len(adapters), row_multiple)[0],
    )


def _turned(leaves: Tree) -> Tree:
    """A product's leaves transposed, `kernel` to `weight` or back."""
    swap = {"kernel": "weight", "weight": "kernel"}

    def name(path: str) -> str:
        *piece, kind = path.split("_")
        return "_".join([*piece, swap.get(kind, kind)])

    return {name(path): leaf if path == "bias" else leaf.T for path, leaf in leaves.items()}


def _pad_to(array: Array, shape: Sequence[int]) -> Array:
    """`array` with zeros behind it up to `shape`."""
    if array.shape == tuple(shape):
        return array
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.pad(array, [(0, to - n) for n, to in zip(array.shape, shape, strict=True)])


def make_room(
    fused: Tree, config: Any, adapter_config: AdapterConfig, places: int, row_multiple: int = 1
) -> Tree:
    """The fused tree of the same base with zeros where `places` adapters of `adapter_config` will be written; whatever
    adapter was in it is dropped. What was there is copied layer by layer. Raises UserError for a tree whose adds were
    folded: they are in its base."""
    if "folded" in fused:
        raise UserError(
            "the repeat-and-adds of this tree were folded into its base: make_room cannot take them out "
            "again"
        )

    def product(name: str, leaves: Tree) -> Tree:
        transposed, (d_in, d_out) = "weight" in leaves, _extent(config, None, name, 0)
        leaves = _turned(leaves) if transposed else leaves
        kernel = leaves["kernel"][:d_in, :d_out]
        out = {
            "kernel": _pad_to(kernel, _extent(config, adapter_config, name, places, row_multiple))
        }
        for p in adapter_config.slots[name].matrix:
            out[f"{p}_B"] = jnp.zeros(
                (places * adapter_config.rank, config.widths[p][1]), kernel.dtype
            )
        out |= {"bias": leaves["bias"]} if "bias" in leaves else {}
        return _turned(out) if transposed else out

    stream = _extent(config, adapter_config, "qkv", places, row_multiple)[0]
    layers = {
        i: {
            **{
                name: {"scale": _pad_to(leaf["scale"][: config.hidden_size], (stream,))}
                for name, leaf in layer.items()
                if name not in BLOCKS
            },
            **{
                block: {name: product(name, layer[block][name]) for name in names}
                for block, names in BLOCKS.items()
            },
        }
        for i, layer in fused["layers"].items()
    }
    return {**fused, "layers": layers, "riders": _mark(fused, places, adapter_config)}


def _each_layer(base: Tree, config: Any, product: Any, stream: int) -> Iterator[tuple[str, Tree]]:
    """Leaves of every layer by its number: `product(i, block, name)` of the four products, norms cut from the stack and
    filled up to the width of the stream that they act on."""
    for i in range(config.num_hidden_layers):
        norms = {
            name: {"scale": _pad_to(leaf["scale"][i], (stream,))}
            for name, leaf in base["layers"].items()
            if name not in BLOCKS
        }
        blocks = {
            block: {name: product(i, block, name) for name in products}
            for block, products in BLOCKS.items()
        }
        yield str(i), {**norms, **blocks}


def device_layout() -> dict[str, Any]:
    """The arguments of `fuse` with which this device's compiler reads the arrays fastest and copies none of them: rows
    in blocks on a GPU, transposed arrays on a CPU."""
    backend = jax.default_backend()
    return {"row_multiple": 128 if backend == "gpu" else 1, "transposed": backend == "cpu"}


def apart(
    base: Tree,
    adapter: Tree | None,
    config: Any,
    adapter_config: AdapterConfig | None,
    merged: bool = True,
    transposed: bool = False,
) -> Tree:
    """The baseline's layout: every A and B a product of its own, as PEFT and multi-LoRA servers run them, beside the
    base's four merged products or (`merged=False`) its seven. Served as `fuse`'s trees are; not for zflora, whose
    channels exist only in the fused stream."""
    check_base(base, config)
    if _has_adapter(adapter_config):
        if adapter_config.row.writes == "stream":
            raise UserError(f"{adapter_config.method} has no products apart; fuse it")
        check_adapter(adapter, config, adapter_config)
    riders = _riders(adapter["layers"], adapter_config) if _has_adapter(adapter_config) else {}

    def product(i: int, block: str, name: str) -> Tree:
        leaves = {path: leaf[i] for path, leaf in base["layers"][block][name].items()}
        dtype, names = next(iter(leaves.values())).dtype, PRODUCTS[name]
        kernels = {f"{p}_kernel": leaves[f"{p}_kernel"] for p in names}
        out = {"kernel": jnp.concatenate(list(kernels.values()), axis=-1)} if merged else kernels
        if f"{names[0]}_bias" in leaves:
            out["bias"] = jnp.concatenate([leaves[f"{p}_bias"] for p in names])
        for path, leaf in riders.get(block, {}).get(name, {}).items():
            slot, leaf = adapter_config.slots[name], leaf[i].astype(dtype)
            if path == "columns":
                pieces = jnp.split(leaf, len(slot.forward), axis=-1)
                out.update({f"{piece}_A": A for piece, A in zip(slot.forward, pieces, strict=True)})
            else:
                out[f"{slot.backward[0]}_B" if path == "rows" else path] = leaf
        return _turned(out) if transposed else out

    out = {name: leaf for name, leaf in base.items() if name != "layers"}
    return {**out, "layers": dict(_each_layer(base, config, product, config.hidden_size))}


def split(
    fused: Tree, config: Any, adapter_config: AdapterConfig | None, place: int = 0
) -> tuple[Tree, Tree]:
    """`(base, adapter)` of a fused tree, stacked again; of a bank, the adapter at `place`.

    The base is bit-equal to what was fused; so is the adapter where s is a power of two (else within 2 ulp) and the
    base's dtype is the adapter's. Raises UserError for a tree whose adds were folded, of another configuration, or
    without such a place.
    """
    if "folded" in fused:
        raise UserError(
            "the repeat-and-adds of this tree were folded into its base: split cannot take them out again"
        )
    places = check_fused(fused, config, adapter_config)
    if not 0 <= place < max(1, places):
        raise UserError(
            f"place={place} must be from 0 to {places - 1}: the tree has {places} adapters"
        )

    def scale(leaf, side):
        return (leaf / adapter_config.scale if adapter_config.row.zero == side else leaf).astype(
            jnp.float32
        )

    base: Tree = {name: leaf for name, leaf in fused.items() if name not in ("layers", "riders")}
    layers = [fused["layers"][str(i)] for i in range(config.num_hidden_layers)]
    base["layers"] = {
        name: {"scale": jnp.stack([layer[name]["scale"][: config.hidden_size] for layer in layers])}
        for name in layers[0]
        if name not in BLOCKS
    }
    adapter: Tree = {}
    for block, products in BLOCKS.items():
        for product in products:
            names, leaves = (
                PRODUCTS[product],
                base["layers"].setdefault(block, {}).setdefault(product, {}),
            )
            each = [layer[block][product] for layer in layers]
            each = [_turned(one) for one in each] if "weight" in each[0] else each
            stacked = {path: jnp.stack([one[path] for one in each]) for path in each[0]}
            d_in, edge = config.widths[names[0]][0], 0
            for name in names:
                width = config.widths[name][1]
                leaves[f"{name}_kernel"] = stacked["kernel"][:, :d_in, edge : edge + width]
                if "bias" in stacked:
                    leaves[f"{name}_bias"] = stacked["bias"][:, edge : edge + width]
                edge += width
            if not _has_adapter(adapter_config):
                continue
            slot, r, own = adapter_config.slots[product], adapter_config.rank, {}
            if slot.forward:
                n = r * len(slot.forward)
                own["A"] = scale(
                    stacked["kernel"][:, :d_in, edge + place * n : edge + (place + 1) * n], "A"
                )
            for name in slot.matrix:
                own[f"{name}_B"] = scale(stacked[f"{name}_B"][:, place * r : (place + 1) * r], "B")
            edge = 0
            for name in slot.backward:
                width, start = config.widths[name][1], d_in + place * slot.backward_rank
                rows = stacked["kernel"][
                    int(slot.skips_first) :, start : start + slot.backward_rank
                ]
                own[f"{name}_B"] = scale(rows[..., edge : edge + width], "B")
                edge += width
            if own:
                adapter.setdefault("layers", {}).setdefault(block, {})[product] = own
    return base, adapter


def check_fused(fused: Tree, config: Any, adapter_config: AdapterConfig | None) -> int:
    """How many adapters a fused tree holds. Raises UserError unless they are of the configuration."""
    _, places, rank = fused["riders"].shape if "riders" in fused else (0, 0, None)
    wanted = adapter_config.rank if _has_adapter(adapter_config) else None
    if rank != wanted:

        def held(rank):
            return "no adapter" if rank is None else f"an adapter of rank {rank}"

        raise UserError(
            f"the fused tree holds {held(rank)}, but adapter_config is of {held(wanted)}"
        )
    method = f"{adapter_config.method} at rank {rank}" if places else "the bare base"
    for i in range(config.num_hidden_layers):
        for block, products in BLOCKS.items():
            for product in products:
                path = f"layers/{i}/{block}/{product}/kernel"
                leaves = fused.get("layers", {}).get(str(i), {}).get(block, {}).get(product, {})
                shape = leaves["kernel"].shape if "kernel" in leaves else None
                shape = leaves["weight"].shape[::-1] if "weight" in leaves else shape
                if shape is None:
                    raise UserError(f"{path} is absent: this is no fused tree; `fuse` makes one")
                slot = adapter_config.slots[product] if places else Slot()
                expected = _extent(config, adapter_config, product, places)
                # Rows B, and a stream, may be filled up with zeros.
                stream = places and adapter_config.row.writes == "stream"
                fills = (bool(slot.backward), bool(stream and slot.forward))
                fits = (
                    n == to or (may and n > to)
                    for n, to, may in zip(shape, expected, fills, strict=True)
                )
                if not all(fits):
                    raise UserError(f"{path} is {shape}, but {method} has {expected} there")
                matrices = {name.removesuffix("_B") for name in leaves if name.endswith("_B")}
                if matrices != set(slot.matrix):
                    there, wanted = (
                        ", ".join(sorted(names)) or "nothing" for names in (matrices, slot.matrix)
                    )
                    raise UserError(
                        f"{path} has B's beside it for {there}, but {method} for {wanted}"
                    )
    return places


def adapter_riders(adapter: Tree, config: Any, adapter_config: AdapterConfig) -> Tree:
    """What `write_adapter` writes, for every layer at once: small leaves `[L, …]` that a host can hold by the
    hundred. Raises UserError for an adapter of another configuration."""
    check_adapter(adapter, config, adapter_config)
    return _riders(adapter["layers"], adapter_config)


def write_adapter(
    fused_layers: Tree, riders: Tree, config: Any, adapter_config: AdapterConfig, place: Array
) -> Tree:
    """`fused_layers` (a fused tree's `layers`) with the adapter of `riders` at `place` of the bank, scalar int32.

    Only the adapter's columns and rows are written (`dynamic_update_slice`: in place where the argument is donated).
    """
    out = jax.tree.map(lambda leaf: leaf, fused_layers)
    for block, products in riders.items():
        for product, leaves in products.items():
            d_in = config.widths[PRODUCTS[product][0]][0]
            d_out = sum(config.widths[name][1] for name in PRODUCTS[product])
            for i in range(config.num_hidden_layers):
                there = out[str(i)][block][product]
                kernel = "weight" if "weight" in there else "kernel"
                for path, leaf in leaves.items():
                    target = kernel if path in ("columns", "rows") else path
                    value = leaf[i].astype(there[target].dtype)
                    start = {
                        "columns": (0, d_out + place * value.shape[1]),
                        "rows": (d_in + place * value.shape[0], 0),
                    }.get(path, (place * value.shape[0], 0))
                    if kernel == "weight":
                        value, start = value.T, start[::-1]
                    there[target] = jax.lax.dynamic_update_slice(there[target], value, start)
    return out
