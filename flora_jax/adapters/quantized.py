"""Weights in 8 or 4 bits: how they are made, what they stand for, and products with them.

    int8   round(w / scale), a scale a column, which is an output channel
    fp8    the same as float8_e4m3fn
    nf4    the nearest of 16 quantiles of a normal distribution (QLoRA, arXiv 2305.14314), a scale a
           block of 64 rows of a column; the scales are in 8 bits too, with a range for each column

The base's kernels alone are quantised; embedding, norms, biases and head are as they were. Codes
and scales are made by qwix and turned back by it. Its QArray has no place for a scale in 8 bits,
nor for a factor a row; two classes of ours hold these: `Quantized` is a leaf of the split layout,
`Scaled` one of the fused layout. Axes as in layer.py, L layers in front where they are stacked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.leaves import Tree, base_leaves, paths, tree
from flora_jax.errors import require, require_known

# What qwix calls them, and the largest code.
_TYPES: Mapping[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "nf4": "nf4"}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
QUANTIZATIONS = ("none", *_TYPES)
NOT_QUANTIZED: Mapping[str, Any] = {"format": "none", "error": 0.0}
_HALVINGS = 12  # factors tried for a row
BLOCK = 64  # rows of nf4 that share a scale


@flax.struct.dataclass
class Quantized:
    """A kernel `[…, d_in, d_out]` of the base.

    codes: `[…, d_in, d_out]`, of nf4 uint8 `[…, d_in / 2, d_out]`, an even row in the low half of a
    byte. scale: float32 `[…, 1, d_out]`, of nf4 int8 `[…, d_in / 64, d_out]`; span: of nf4 alone,
    float32 `[…, 2, d_out]`, the step and the middle of those. sums: uint32 `[…, 2]`, which identify
    the float kernel; error: float32 `[…]`, the root mean square of the rounding errors over that of
    the kernel. format: a name of QUANTIZATIONS.
    """

    codes: Any
    scale: Any
    span: Any
    sums: Any
    error: Any
    format: str = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        *front, rows, columns = self.codes.shape
        if self.format == "nf4":
            rows *= 2
        return (*front, rows, columns)

    def __getitem__(self, layer: Any) -> Quantized:
        """One layer's, or those of a slice of them."""
        return jax.tree.map(lambda leaf: leaf[layer], self)


def is_quantized(path: str) -> bool:
    """Whether a quantised base has this leaf as codes: the kernels of its layers."""
    return path.startswith("layers/") and path.endswith("_kernel")


def check_quantization(quantization: str, config: Any) -> None:
    """Raises UserError for an unknown format, and for one that a base of this configuration cannot
    be had in."""
    leaves = base_leaves(config).items()
    _check_format(
        quantization, {path: leaf.shape[-2] for path, leaf in leaves if is_quantized(path)}
    )


def _check_format(quantization: str, rows: Mapping[str, int]) -> None:
    """rows: d_in of the kernels, by path."""
    require_known(quantization, QUANTIZATIONS, f"quantization={quantization!r}")
    for path, n in rows.items():
        require(
            quantization != "nf4" or n % BLOCK == 0,
            f"quantization={quantization!r} has a scale a block of {BLOCK} rows, and the {n} rows "
            f"of {path} are no multiple of it; use int8 or fp8",
        )


def sums_of(values: jax.Array, start: Any = 0) -> jax.Array:
    """Two position-dependent sums of an array's bits in bfloat16, uint32 `[2]`; start: the place of
    its first value in the whole. Exact, and those of parts add up, however it is cut."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(values.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, values.shape, axis)
    mixed = (bits ^ ((place + start) * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(3266489917)
    return jnp.stack([mixed.sum(dtype=jnp.uint32), (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32)])


def quantize(kernel: jax.Array, quantization: str, start: Any = 0) -> Quantized:
    """A kernel `[d_in, d_out]` in the format of that name, computed in float32. start: uint32, the
    place of its first value among those of all layers. Whether it fits is checked by
    `check_quantization`."""
    import qwix  # takes a second, spared where nothing is quantised

    kernel = kernel.astype(jnp.float32)
    tiles = {0: BLOCK} if quantization == "nf4" else {}
    made = qwix.quantize(kernel, _TYPES[quantization], channelwise_axes=(1,), tiled_axes=tiles)
    codes = made.qvalue
    scale = made.scale
    span = None
    if quantization == "nf4":
        pairs = codes.astype(jnp.uint8).reshape(-1, 2, kernel.shape[1])
        codes = pairs[:, 0] | pairs[:, 1] << 4
        scale, span = _in_bytes(scale)
    out = Quantized(codes, scale, span, sums_of(kernel, start), jnp.zeros(()), quantization)
    change = jnp.square(dequantize(out) - kernel).mean()
    return out.replace(error=jnp.sqrt(change / jnp.maximum(jnp.square(kernel).mean(), 1e-30)))


def _in_bytes(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales as int8, and of each column the step and the middle that turn them back."""
    most = scale.max(0)
    least = scale.min(0)
    middle = (most + least) / 2
    step = jnp.maximum((most - least) / 254, 1e-30)
    return jnp.round((scale - middle) / step).astype(jnp.int8), jnp.stack([step, middle])


def dequantize(kernel: Quantized, dtype: Any = jnp.float32) -> jax.Array:
    """The kernel `[…, d_in, d_out]` that the codes stand for, computed in float32."""
    import qwix

    if kernel.format != "nf4":
        return qwix.dequantize(qwix.QArray(kernel.codes, kernel.scale)).astype(dtype)
    codes = jnp.stack([kernel.codes & 15, kernel.codes >> 4], axis=-2).reshape(kernel.shape)
    step = kernel.span[..., :1, :]
    scale = kernel.scale.astype(jnp.float32) * step + kernel.span[..., 1:, :]
    return qwix.dequantize(qwix.QArray(codes, scale, qtype="nf4")).astype(dtype)


@functools.partial(jax.jit, static_argnames="quantization")
def quantize_layers(kernels: jax.Array, quantization: str) -> Quantized:
    """Kernels `[L, d_in, d_out]`, one after another, as `quantize` does."""
    starts = jnp.arange(len(kernels), dtype=jnp.uint32) * jnp.uint32(kernels[0].size % 2**32)
    return jax.lax.map(lambda layer: quantize(layer[0], quantization, layer[1]), (kernels, starts))


def quantize_base(base: Tree, quantization: str) -> Tree:
    """A base in the split layout with its kernels in the format of that name. Raises UserError for
    an unknown format, kernels that it cannot hold, and a base that is quantised already."""
    leaves = paths(base)
    rows = {path: leaf.shape[-2] for path, leaf in leaves.items() if is_quantized(path)}
    _check_format(quantization, rows)
    if quantization == "none":
        return base
    there = quantization_format(base)
    require(there == "none", f"the base is in {there} already; quantise it from its floats")
    chosen = [path for path in leaves if is_quantized(path)]
    return tree(leaves | {path: quantize_layers(leaves[path], quantization) for path in chosen})


def dequantize_base(base: Tree) -> Tree:
    """The base that a quantised one stands for, its kernels in float32."""
    leaves = paths(base).items()
    return tree(
        {path: dequantize(leaf) if isinstance(leaf, Quantized) else leaf for path, leaf in leaves}
    )


def quantization_format(base: Tree) -> str:
    """The name in QUANTIZATIONS of what the kernels are kept in."""
    kernels = (leaf.format for leaf in paths(base).values() if isinstance(leaf, Quantized))
    return next(kernels, "none")


def served_format(quantization: str) -> str:
    """The format of the fused arrays: nf4, whose scales are not one a column, is served as int8."""
    return {"nf4": "int8"}.get(quantization, quantization)


def served_bytes(base: Tree) -> int:
    """Bytes that the base takes as it is served, bare: of a quantised kernel one for each value."""
    return sum(
        math.prod(leaf.shape) if isinstance(leaf, Quantized) else leaf.size * leaf.dtype.itemsize
        for leaf in paths(base).values()
    )


def quantization_of(base: Tree) -> dict[str, Any]:
    """`format`, a name of QUANTIZATIONS, and `error`, the root mean square of the rounding errors
    over that of the kernels."""
    kernels = [leaf for leaf in paths(base).values() if isinstance(leaf, Quantized)]
    squares = [np.square(np.asarray(kernel.error, np.float64)).mean() for kernel in kernels]
    error = float(np.sqrt(np.mean(squares))) if kernels else 0.0
    return {"format": quantization_format(base), "error": error}


def times_scale(y: jax.Array, scale: jax.Array) -> jax.Array:
    """`y · scale` along the last axis in y's dtype, multiplied in float32."""
    return (y * scale).astype(y.dtype)


# ----------------------------------------------------------------------------------------- training


@jax.custom_vjp
def multiply_quantized(x: jax.Array, kernel: Quantized) -> jax.Array:
    """`x W` in x's dtype, x `[…, d_in]`, scales in float32. The kernel is frozen: it has no
    gradient, and what it stands for is computed again in the backward pass, so that no float copy
    of it outlives its product."""
    return _multiply(x, kernel)


def _multiply(x: jax.Array, kernel: Quantized) -> jax.Array:
    if kernel.format == "nf4":
        return x @ dequantize(kernel, x.dtype)
    # A scale a column multiplies the output: fewer multiplications, and codes are exact in
    # bfloat16, while scaled ones are not.
    return times_scale(x @ kernel.codes.astype(x.dtype), kernel.scale.squeeze(-2))


def _multiply_forward(x: jax.Array, kernel: Quantized) -> tuple[jax.Array, Quantized]:
    return _multiply(x, kernel), kernel


def _multiply_backward(kernel: Quantized, cotangent: jax.Array) -> tuple[jax.Array, Quantized]:
    if kernel.format == "nf4":
        back = cotangent @ dequantize(kernel, cotangent.dtype).T
    else:
        scaled = times_scale(cotangent, kernel.scale.squeeze(-2))
        back = scaled @ kernel.codes.astype(cotangent.dtype).T
    return back, jax.tree.map(_no_gradient, kernel)


def _no_gradient(leaf: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


multiply_quantized.defvjp(_multiply_forward, _multiply_backward)


# ------------------------------------------------------------------------------------------ serving


@flax.struct.dataclass
class Scaled:
    """A fused array `[rows, columns]` that stands for `factor · codes · scale`.

    codes: int8 or float8_e4m3fn, transposed where the layout is; scale: float32 `[columns]`;
    factor: float32 `[rows]`, None where all are the base's. These have the factor 1, so that the
    base's codes and scales are what they are without an adapter. The adapter's columns have scales
    of their own; its rows, whose columns have the base's scales, are brought to their range by
    factors, powers of two.
    """

    codes: Any
    scale: Any
    factor: Any
    transposed: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return self.codes.shape

    @property
    def T(self) -> Scaled:
        """The same, stored the other way."""
        return self.replace(codes=self.codes.T, transposed=not self.transposed)

    @property
    def plain(self) -> Scaled:
        """The same, not transposed."""
        if self.transposed:
            return self.T
        return self

    def _as_stored(self, plain: Scaled) -> Scaled:
        """`plain`, stored as this one is."""
        if self.transposed:
            return plain.T
        return plain

    def astype(self, dtype: Any) -> Scaled:
        """Itself: codes are cast where they are used."""
        return self

    def corner(self, rows: int, columns: int) -> Scaled:
        """The first rows and columns."""
        plain = self.plain
        factor = plain.factor
        if factor is not None:
            factor = factor[:rows]
        codes = plain.codes[:rows, :columns]
        return self._as_stored(
            plain.replace(codes=codes, scale=plain.scale[:columns], factor=factor)
        )

    def padded(self, rows: int, columns: int) -> Scaled:
        """With zeros behind it, up to so many rows and columns."""
        plain = self.plain
        there = plain.codes.shape
        below = (0, rows - there[0])
        right = (0, columns - there[1])
        factor = plain.factor
        if factor is None and rows > there[0]:
            factor = jnp.ones(there[0], jnp.float32)
        if factor is not None:
            factor = jnp.pad(factor, below, constant_values=1)
        codes = jnp.pad(plain.codes, (below, right))
        return self._as_stored(
            plain.replace(codes=codes, scale=jnp.pad(plain.scale, right), factor=factor)
        )

    def with_columns(self, values: jax.Array, start: Any) -> Scaled:
        """With these values `[rows, n]` as columns from `start` on, each in a scale of its own."""
        largest = jnp.abs(values).max(0)
        scale = jnp.where(largest > 0, largest / _LARGEST[self.format], 1)
        return self._with(values / scale, (0, start)).replace(
            scale=jax.lax.dynamic_update_slice(self.scale, scale, (start,))
        )

    def with_rows(self, values: jax.Array, start: Any) -> Scaled:
        """With these values `[n, columns]` as rows from `start` on, each brought to the range of
        the columns by the power of two that gives the least squared rounding error. Where a
        column's scale is far below the others', its value is cut off."""
        scale = self.scale[: values.shape[1]]
        step = jnp.where(scale > 0, scale, 1)
        largest = jnp.abs(values / step).max(1)
        room = _LARGEST[self.format] / jnp.where(largest > 0, largest, _LARGEST[self.format])
        whole = jnp.exp2(-jnp.floor(jnp.log2(room)))  # at which nothing is cut off

        def lost(factor: jax.Array) -> jax.Array:
            unit = factor[:, None] * step
            kept = self._codes(values / unit).astype(jnp.float32) * unit
            return jnp.square(kept - values).sum(1)

        factors = whole * jnp.exp2(-jnp.arange(_HALVINGS, dtype=jnp.float32))[:, None]
        best = jnp.argmin(jax.lax.map(lost, factors), axis=0)
        factor = jnp.take_along_axis(factors, best[None], axis=0)[0]
        return self._with(values / (factor[:, None] * step), (start, 0)).replace(
            factor=jax.lax.dynamic_update_slice(self.factor, factor, (start,))
        )

    @property
    def format(self) -> str:
        """The name of the codes' format."""
        return next(name for name, kind in _TYPES.items() if kind == self.codes.dtype)

    def _codes(self, values: jax.Array) -> jax.Array:
        """The nearest codes of values that are already scaled."""
        if self.format == "int8":
            values = jnp.round(values)
        codes = jnp.clip(values, -_LARGEST[self.format], _LARGEST[self.format])
        return codes.astype(self.codes.dtype)

    def _with(self, values: jax.Array, start: tuple[Any, Any]) -> Scaled:
        """With the codes of already scaled values from the row and column of `start` on."""
        codes = self._codes(values)
        if self.transposed:
            codes = codes.T
            start = start[::-1]
        return self.replace(codes=jax.lax.dynamic_update_slice(self.codes, codes, start))


def join(kernels: list[jax.Array] | list[Quantized]) -> jax.Array | Scaled:
    """One layer's kernels `[d_in, d_out]` side by side, as they are served. nf4, whose scales are
    not a column's, becomes int8."""
    if not isinstance(kernels[0], Quantized):
        return jnp.concatenate(kernels, axis=-1)
    each = [_in_columns(kernel) for kernel in kernels]
    codes = jnp.concatenate([kernel.codes for kernel in each], axis=1)
    scale = jnp.concatenate([kernel.scale[0] for kernel in each])
    return Scaled(codes, scale, None)


def _in_columns(kernel: Quantized) -> Quantized:
    served = served_format(kernel.format)
    if served == kernel.format:
        return kernel
    return quantize(dequantize(kernel), served)
