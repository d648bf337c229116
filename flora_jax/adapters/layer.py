"""FusedDense: one of a layer's products, with the adapter that rides in it.

B, T as everywhere; R_f forward channels (pieces of `rank` side by side), R_b backward channels.

On one shape, `ffba` at rank 8 in the attention block of a model with D = 96, Q = 96, K * H = 32:

    qkv:  x [B, T, 96]  ->  q [B, T, 96] += rep(zq), k [B, T, 32] += rep(zk), v [B, T, 32] += rep(zv)
          z = s · x A,  A [96, 24],  z = (zq | zk | zv) [B, T, 24]
    o:    attn [B, T, 96], z [B, T, 24]  ->  attn · W + z · B,  B [24, 96]

In the `split` layout (training) base kernels live in the collection `params` under the paths they have without an
adapter, the adapter's leaves in the collection `adapter` beside them. In the `fused` layout (serving; layouts.py makes
it) one array does both, in `params`:

    qkv:  kernel [96, 96 + 32 + 32 + 24] = [Wq | Wk | Wv | s · A]     x · kernel = (q | k | v | z)
    o:    kernel [96 + 24, 96] = [W ; B]                              (attn | z) · kernel

or, where a target reads them faster so, all of a product's arrays transposed, `weight` in place of `kernel`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name

from flora_jax.adapters.config import ACTIVATIONS, AdapterConfig, Slot
from flora_jax.adapters.methods import BLOCKS, PRODUCTS
from flora_jax.errors import UserError

Array = jax.Array
Initializer = Callable[[Array, Sequence[int], Any], Array]

# the name under which jax.checkpoint knows what a FusedDense gives, adapter and all
SAVED = "product"

_DRAWN_AT_ONCE = 2**22  # values
_COPIES = 64  # operands of one concatenation
# weights that one token's product has at the most where XLA for a GPU makes a sum of it
_SUMMED = 10**7
_FEW_ROWS = 128  # up to which `(W xᵀ)ᵀ` is not slower than `x Wᵀ` on a CPU


def normal(stddev: float) -> Initializer:
    """Normal values, as flax's initialiser of that name draws them, but large arrays row block by row block, each from
    a key of its own: XLA's CPU compiler holds three times the size of what it draws at once."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        least = -(-math.prod(shape) // _DRAWN_AT_ONCE)
        blocks = (
            next(n for n in range(least, shape[0] + 1) if shape[0] % n == 0) if least > 1 else 1
        )

        def draw(key):
            return stddev * jax.random.normal(key, (shape[0] // blocks, *shape[1:]), dtype)

        return (
            draw(key)
            if blocks == 1
            else jax.lax.map(draw, jax.random.split(key, blocks)).reshape(shape)
        )

    return init


def repeat_and_add(y: Array, z: Array) -> Array:
    """`y + rep(z)`: z `[..., r]` tiled along the last axis to y's width n (r divides n), then added to y `[..., n]`.

    On a CPU z is tiled by concatenating it, which copies whole runs: the loops that XLA makes there of a broadcast
    along an inner axis, and of all that it fuses with it, take 5 times as long. Elsewhere no copy is made.
    """
    return _repeat_and_add(y, z, z.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _repeat_and_add(y: Array, z: Array, rank: int) -> Array:
    return jax.lax.platform_dependent(y, z, cpu=_add_copies, default=_add_broadcast)


def _add_broadcast(y: Array, z: Array) -> Array:
    return (y.reshape(*y.shape[:-1], -1, z.shape[-1]) + z[..., None, :]).reshape(y.shape)


def _add_copies(y: Array, z: Array) -> Array:
    while (missing := y.shape[-1] // z.shape[-1]) > 1:
        times = next((n for n in range(min(missing, _COPIES), 1, -1) if missing % n == 0), missing)
        # The barrier keeps the copying out of the loops over y.
        z = jax.lax.optimization_barrier(jnp.concatenate([z] * times, axis=-1))
    return y + z


def _repeat_and_add_forward(y: Array, z: Array, rank: int) -> tuple[Array, None]:
    return _repeat_and_add(y, z, rank), None


def _repeat_and_add_backward(rank: int, _: None, cotangent: Array) -> tuple[Array, Array]:
    return cotangent, cotangent.reshape(*cotangent.shape[:-1], -1, rank).sum(-2)


_repeat_and_add.defvjp(_repeat_and_add_forward, _repeat_and_add_backward)


def keep_own(y: Array, start: int, width: int, select: Array) -> Array:
    """y `[B, T, C]` with zeros in those of the N blocks of `width` channels from `start` on that `select` `[B, N]` does
    not choose; channels before them are kept."""
    before = jnp.ones((*select.shape[:-1], start), bool)
    after = y.shape[-1] - start - width * select.shape[-1]
    chosen = [
        before,
        jnp.repeat(select, width, axis=-1),
        jnp.ones((*select.shape[:-1], after), bool),
    ]
    return jnp.where(jnp.concatenate(chosen, axis=-1)[:, None, :], y, 0)


def _is_sum(x: Array, weights: int) -> bool:
    """Whether XLA for a GPU turns a product of x with so many weights into a sum of the rows' products."""
    return x.size == x.shape[-1] and weights <= _SUMMED


def multiply(x: Array, kernel: Array) -> Array:
    """`x W` in x's dtype, x `[..., d_in]`, kernel `[d_in, d_out]`; where XLA for a GPU makes a sum of it, in float32.

    In bfloat16 XLA would round each product of the sum and, with some numbers of rows, write them all out before it
    adds them up: a tenth of the bytes that a Llama-3.2-1B moves at batch 1 (experiments/results/launches_tried.md).
    """
    dtype = jnp.float32 if _is_sum(x, kernel.size) else None
    return jnp.matmul(x, kernel, preferred_element_type=dtype).astype(x.dtype)


def multiply_transposed(x: Array, weight: Array, dtype: Any = None) -> Array:
    """`x Wᵀ` in `dtype` (default x's), x `[..., d_in]`, weight `[d_out, d_in]`; for few rows computed as `(W xᵀ)ᵀ`.

    With the weight on the left XLA's CPU products read it at the speed of memory for any small batch; on the right they
    are a third slower at batch 1 and 2 to 3 times at batch 8. The barrier keeps XLA from turning the product round.
    With the hundreds of rows of a prefill it is not reading that takes the time, and the transposing only costs.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > _FEW_ROWS:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
    y = jnp.matmul(weight, rows.T, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], weight.shape[0])


@jax.custom_vjp
def expand(z: Array, B: Array) -> Array:
    """`z B`, z `[..., r]` and B `[r, d_out]`. Its own gradient, since the automatic one contracts the output's wide
    cotangent as the left operand, which XLA transposes in memory first: it was a fifth of a LoRA step on a CPU."""
    return z @ B


def _expand_forward(z: Array, B: Array) -> tuple[Array, tuple[Array, Array]]:
    return z @ B, (z, B)


def _expand_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    z, B = saved
    rows = tuple(range(z.ndim - 1))
    return cotangent @ B.T, jax.lax.dot_general(z, cotangent, ((rows, rows), ((), ())))


expand.defvjp(_expand_forward, _expand_backward)


def adapter_leaves(
    adapter: AdapterConfig, product: str, widths: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[tuple[int, ...], Initializer]]:
    """Shape and initialiser of each adapter leaf of one layer's `product`; the only place they are declared.

    `A [d_in, R_f]`, its pieces in the slot's order, and `<projection>_B [rows, d_out]`. Initial values, which
    make step 0 the base's (our choice; LoRA's is PEFT's): with B zero, A ~ U(−1/√d_in, 1/√d_in); with A zero,
    B ~ N(0, 1/√rows).
    """
    slot, rank, zero = adapter.slots[product], adapter.rank, adapter.zero_init
    d_in = widths[PRODUCTS[product][0]][0]

    def uniform(key: Array, shape: Sequence[int], dtype: Any) -> Array:
        bound = 1 / math.sqrt(d_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def over_rows(key: Array, shape: Sequence[int], dtype: Any) -> Array:
        return jax.random.normal(key, shape, dtype) / math.sqrt(shape[0])

    zeros = nn.initializers.zeros_init()
    leaves: dict[str, tuple[tuple[int, ...], Initializer]] = {}
    if slot.forward:
        leaves["A"] = ((d_in, rank * len(slot.forward)), zeros if zero == "A" else uniform)
    for rows, names in ((rank, slot.matrix), (slot.backward_rank, slot.backward)):
        for name in names:
            leaves[f"{name}_B"] = ((rows, widths[name][1]), zeros if zero == "B" else over_rows)
    return leaves


class FusedDense(nn.Module):
    """`x [..., D_in]` and, where rows B ride, `z [..., R_b]` to `(ys, z_out)`.

    ys: one array per projection of the product, `[..., d_out]`. z_out: `act(x A)`, `[..., R_f]`, or None, scaled by s
    (in the fused layout: where s is in A). Arithmetic is in x's dtype; leaves are cast where they are used.

    Fused, with `select` `[B, N]` bool, the arrays hold a bank of N adapters side by side: z is N times as wide, and of
    each row only the channels of its own adapter are kept. zflora's product reads the stream `[x | z]` as one x, rows B
    and all, and writes it as one y.

    Attributes: product, a name of PRODUCTS; widths, (d_in, d_out) by projection; adapter, None for the bare base;
    use_bias, whether the base projections have one; param_dtype of the base; fused, which layout the leaves have.
    """

    product: str
    widths: Mapping[str, tuple[int, int]]
    adapter: AdapterConfig | None = None
    use_bias: bool = False
    param_dtype: Any = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        z: Array | None = None,
        *,
        select: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[list[Array], Array | None]:
        if self.fused:
            return self._fused(x, z, select)
        ys, z_out = self._split(x, z, deterministic)
        return checkpoint_name(ys, SAVED), z_out

    def _split(
        self, x: Array, z: Array | None, deterministic: bool
    ) -> tuple[list[Array], Array | None]:
        """The product over base kernels and adapter leaves apart."""
        names = PRODUCTS[self.product]
        ys = []
        for name in names:
            y = x @ self.param(
                f"{name}_kernel", normal(0.02), self.widths[name], self.param_dtype
            ).astype(x.dtype)
            if self.use_bias:
                bias = self.param(
                    f"{name}_bias",
                    nn.initializers.zeros_init(),
                    self.widths[name][1:],
                    self.param_dtype,
                )
                y = y + bias.astype(x.dtype)
            ys.append(y)
        if self.adapter is None:
            return ys, None

        adapter, slot = self.adapter, self.adapter.slots[self.product]
        leaves = {
            leaf: self._leaf(leaf, shape, init).astype(x.dtype)
            for leaf, (shape, init) in adapter_leaves(adapter, self.product, self.widths).items()
        }
        z_out, own = None, {}
        if slot.forward:
            read = nn.Dropout(adapter.dropout, rng_collection="dropout")(
                x, deterministic=deterministic
            )
            z_out = checkpoint_name(
                adapter.scale * ACTIVATIONS[adapter.activation](read @ leaves["A"]), SAVED
            )
            own = dict(zip(slot.forward, jnp.split(z_out, len(slot.forward), axis=-1), strict=True))
        for i, name in enumerate(names):
            if name in slot.matrix:
                ys[i] = ys[i] + expand(own[name], leaves[f"{name}_B"])
            if name in slot.backward:
                ys[i] = ys[i] + expand(z, leaves[f"{name}_B"])
            if name in slot.repeat:
                piece = (
                    own[name] if name in own else z.reshape(*z.shape[:-1], -1, adapter.rank).sum(-2)
                )
                ys[i] = repeat_and_add(ys[i], piece)
        return ys, z_out

    def _fused(
        self, x: Array, z: Array | None, select: Array | None
    ) -> tuple[list[Array], Array | None]:
        """The product over the leaves of layouts.py: `kernel` with what rides in it, or, for the baselines of a
        measurement, `<projection>_kernel`, `<piece>_A` and `<projection>_B` apart."""
        names, adapter = PRODUCTS[self.product], self.adapter
        slot = Slot() if adapter is None else adapter.slots[self.product]
        leaves = {name: leaf.astype(x.dtype) for name, leaf in self.variables["params"].items()}
        transposed = any(name.endswith("weight") for name in leaves)
        times, suffix = (multiply_transposed, "weight") if transposed else (multiply, "kernel")
        edges = np.cumsum([self.widths[name][1] for name in names])
        riding, apart = None, any(f"{piece}_A" in leaves for piece in slot.forward)
        if suffix in leaves:
            inputs = [x] if z is None or not slot.backward or f"{names[0]}_B" in leaves else [x, z]
            rows = sum(part.shape[-1] for part in inputs)
            shapes = {
                name: leaf.shape[::-1] if transposed else leaf.shape
                for name, leaf in leaves.items()
            }
            self._check_shapes(shapes, suffix, rows, 0 if apart else len(slot.forward), select)
            kernel, (filled, columns) = leaves[suffix], shapes[suffix]
            if filled > rows and not transposed and _is_sum(x, rows * columns):
                # GEMMs want rows in blocks; a sum over more rows might be written out
                kernel = kernel[:rows]
            elif filled > rows:
                inputs.append(jnp.zeros((*x.shape[:-1], filled - rows), x.dtype))
            y = times(jnp.concatenate(inputs, axis=-1) if len(inputs) > 1 else x, kernel)
            if slot.forward and adapter.row.writes == "stream":
                if "bias" in leaves:
                    y = y + jnp.pad(leaves["bias"], (0, y.shape[-1] - edges[-1]))
                return [y if select is None else keep_own(y, edges[-1], adapter.rank, select)], None
            *ys, riding = jnp.split(y, edges, axis=-1)
        else:
            ys = [times(x, leaves[f"{name}_{suffix}"]) for name in names]
        if "bias" in leaves:
            ys = [
                y + bias for y, bias in zip(ys, jnp.split(leaves["bias"], edges[:-1]), strict=True)
            ]
        z_out, own = None, {}
        if slot.forward:
            if apart:
                riding = jnp.concatenate(
                    [times(x, leaves[f"{piece}_A"]) for piece in slot.forward], axis=-1
                )
            z_out = ACTIVATIONS[adapter.activation](riding)
            if select is not None:
                z_out = keep_own(z_out, 0, adapter.rank * len(slot.forward), select)
            pieces = z_out.reshape(*x.shape[:-1], -1, len(slot.forward), adapter.rank)
            own = {name: pieces[..., i, :] for i, name in enumerate(slot.forward)}
        for i, name in enumerate(names):
            if name in slot.matrix:
                ys[i] = ys[i] + times(own[name].reshape(*x.shape[:-1], -1), leaves[f"{name}_B"])
            elif f"{name}_B" in leaves:
                ys[i] = ys[i] + times(z, leaves[f"{name}_B"])
            if name in slot.repeat:
                piece = own[name] if name in own else z.reshape(*z.shape[:-1], -1, adapter.rank)
                ys[i] = repeat_and_add(ys[i], piece.sum(-2))
        return ys, z_out

    def _check_shapes(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        kernel: str,
        rows: int,
        pieces: int,
        select: Array | None,
    ) -> None:
        """Raises UserError unless the fused kernel has `rows`, the columns of `pieces` pieces a place, and its B's."""
        adapter, places = self.adapter, 1 if select is None else select.shape[-1]
        names = PRODUCTS[self.product]
        d_in, columns = self.widths[names[0]][0], sum(self.widths[name][1] for name in names)
        slot, stream = Slot(), False
        if adapter is not None:
            slot, stream = adapter.slots[self.product], adapter.row.writes == "stream"
            columns += places * pieces * adapter.rank
        expected = {kernel: (max(rows, d_in), columns)}
        expected |= {f"{p}_B": (places * adapter.rank, self.widths[p][1]) for p in slot.matrix}
        for leaf, shape in expected.items():
            found = shapes.get(leaf, "absent")
            # Rows B, and a stream, may be filled up with zeros.
            fills = leaf == kernel and (
                (slot.backward and rows > d_in, False) if not stream else (False, pieces > 0)
            )
            fits = found != "absent" and all(
                n == wanted or (may and n > wanted)
                for n, wanted, may in zip(found, shape, fills or (False, False), strict=True)
            )
            if not fits:
                what = (
                    "the bare base"
                    if adapter is None
                    else f"{adapter.method} at rank {adapter.rank}, {places=},"
                )
                raise UserError(
                    f"fused {leaf} of {self.product!r} is {found}, but {what} has {shape} there"
                )

    def _leaf(self, name: str, shape: tuple[int, ...], init: Initializer) -> Array:
        value = self.variable(
            "adapter", name, lambda: init(self.make_rng("params"), shape, jnp.float32)
        ).value
        if value.shape != shape:
            raise UserError(
                f"adapter leaf {self.name}/{name} has shape {value.shape}, expected {shape}"
            )
        return value


def init_adapter(rng: Array, config: Any, adapter_config: AdapterConfig) -> dict[str, Any]:
    """The adapter's initial variables, float32, leaves stacked `[L, …]`; `{}` for fft.

    Each layer draws from a key of its own, so no fan is ever computed on a stacked shape. The base is not touched.
    `config` needs `widths` and `num_hidden_layers` only. Raises UserError where the rank does not fit.
    """
    adapter_config.check(config.widths)
    layers: dict[str, Any] = {}
    keys = iter(jax.random.split(rng, 64))
    for block, products in BLOCKS.items():
        for product in products:
            for leaf, (shape, init) in adapter_leaves(
                adapter_config, product, config.widths
            ).items():
                skipped = adapter_config.slots[product].skips_first and leaf != "A"
                each = jax.random.split(next(keys), config.num_hidden_layers - skipped)
                value = jax.vmap(lambda key, init=init, shape=shape: init(key, shape, jnp.float32))(
                    each
                )
                layers.setdefault(block, {}).setdefault(product, {})[leaf] = value
    return {"layers": layers} if layers else {}


def abstract_adapter(config: Any, adapter_config: AdapterConfig) -> dict[str, Any]:
    """The tree of `init_adapter` as shapes and dtypes; nothing is allocated."""
    return jax.eval_shape(lambda: init_adapter(jax.random.key(0), config, adapter_config))


def check_adapter(adapter: Mapping[str, Any], config: Any, adapter_config: AdapterConfig) -> None:
    """Raises UserError unless `adapter` has the very leaves and shapes, `[L, …]`, that the configuration gives (flax
    would ignore extra ones without a word)."""

    def shapes(tree: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
        return {path: leaf.shape for path, leaf in flatten_dict(tree or {}, sep="/").items()}

    expected, found = shapes(abstract_adapter(config, adapter_config)), shapes(adapter)
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise UserError(
                f"adapter leaf {path!r} is {found.get(path, 'absent')}, but {adapter_config.method} at rank "
                f"{adapter_config.rank} on this model has {expected.get(path, 'none of that name')}"
            )


def check_base(base: Mapping[str, Any], config: Any) -> None:
    """Raises UserError unless the layers of `base`, in the split layout, are those of the configuration: indexing
    clamps and broadcasting repeats, so that a base of another depth would be served without a word."""
    L, layers = config.num_hidden_layers, base.get("layers", {})
    biases = {"attention": config.attention_bias, "mlp": config.mlp_bias}
    expected = {f"{block}_norm/scale": (L, config.hidden_size) for block in BLOCKS}
    for block, products in BLOCKS.items():
        for product in products:
            for name in PRODUCTS[product]:
                expected[f"{block}/{product}/{name}_kernel"] = (L, *config.widths[name])
                if biases[block]:
                    expected[f"{block}/{product}/{name}_bias"] = (L, config.widths[name][1])
    found = {path: leaf.shape for path, leaf in flatten_dict(layers, sep="/").items()}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise UserError(
                f"base leaf layers/{path} is {found.get(path, 'absent')}, but this configuration has "
                f"{expected.get(path, 'none of that name')}; is it another model's, or fused already?"
            )


def pad_first_layer(layers: dict[str, Any], adapter_config: AdapterConfig) -> dict[str, Any]:
    """Stacked adapter leaves with zero rows put in front where layer 0 has none, so that every leaf is `[L, …]`."""

    def pad(product: str, leaf: str, value: Array) -> Array:
        if not (adapter_config.slots[product].skips_first and leaf != "A"):
            return value
        return jnp.concatenate([jnp.zeros_like(value, shape=(1, *value.shape[1:])), value])

    return {
        block: {
            product: {leaf: pad(product, leaf, value) for leaf, value in leaves.items()}
            for product, leaves in products.items()
        }
        for block, products in layers.items()
    }
