"""The products that adapters are made of, in the forms that compilers read fastest.

B, T as everywhere; r channels a piece; d_in, d_out a product's input and output width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from flora_jax.adapters.quantized import Scaled, times_scale

_COPIES = 64  # operands of one concatenation
# Up to so many weights XLA for a GPU computes one token's product as a sum of rows.
_SUMMED = 10**7
# With fewer outputs than this, such a sum writes its products out in float32 before it adds them;
# from so many weights on, that costs.
_NARROW = 2048
_COUNTING = 2 * 10**5
_FEW_ROWS = 128  # up to here `(W xᵀ)ᵀ` is at least as fast as `x Wᵀ` on a CPU


def repeat_and_add(y: jax.Array, z: jax.Array) -> jax.Array:
    """`y + rep(z)`: z `[..., r]` tiled along the last axis to y's width n (r divides n), then added
    to y `[..., n]`.

    On a CPU z is tiled by concatenating it, which copies whole runs: the loops that XLA makes there
    of a broadcast along an inner axis, and of all that it fuses with it, take 5 times as long.
    Elsewhere no copy is made.
    """
    return _repeat_and_add(y, z, z.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _repeat_and_add(y: jax.Array, z: jax.Array, rank: int) -> jax.Array:
    return jax.lax.platform_dependent(y, z, cpu=_add_copies, default=_add_broadcast)


def _add_broadcast(y: jax.Array, z: jax.Array) -> jax.Array:
    return (y.reshape(*y.shape[:-1], -1, z.shape[-1]) + z[..., None, :]).reshape(y.shape)


def _add_copies(y: jax.Array, z: jax.Array) -> jax.Array:
    while (missing := y.shape[-1] // z.shape[-1]) > 1:
        times = next((n for n in range(min(missing, _COPIES), 1, -1) if missing % n == 0), missing)
        # The barrier keeps the copying out of the loops over y.
        z = jax.lax.optimization_barrier(jnp.concatenate([z] * times, axis=-1))
    return y + z


def _repeat_and_add_forward(y: jax.Array, z: jax.Array, rank: int) -> tuple[jax.Array, None]:
    return _repeat_and_add(y, z, rank), None


def _repeat_and_add_backward(
    rank: int, _: None, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return cotangent, cotangent.reshape(*cotangent.shape[:-1], -1, rank).sum(-2)


_repeat_and_add.defvjp(_repeat_and_add_forward, _repeat_and_add_backward)


def keep_own(y: jax.Array, start: int, width: int, select: jax.Array) -> jax.Array:
    """y `[B, T, C]` with zeros in those of the N blocks of `width` channels from `start` on that
    `select` `[B, N]` does not choose; channels before them are kept."""
    before = jnp.ones((*select.shape[:-1], start), bool)
    after = y.shape[-1] - start - width * select.shape[-1]
    chosen = [
        before,
        jnp.repeat(select, width, axis=-1),
        jnp.ones((*select.shape[:-1], after), bool),
    ]
    return jnp.where(jnp.concatenate(chosen, axis=-1)[:, None, :], y, 0)


def is_sum(x: jax.Array, rows: int, columns: int) -> bool:
    """Whether a product of x with so many weights becomes a sum of the rows' products on a GPU."""
    return _is_one_row(x) and rows * columns <= _SUMMED and not _doubled(x, rows, columns)


def _is_one_row(x: jax.Array) -> bool:
    return x.size == x.shape[-1]


def _doubled(x: jax.Array, rows: int, columns: int) -> bool:
    """Whether `multiply` passes one row twice, so that XLA for a GPU does not compute a sum: with
    few columns that would write out each product, four bytes for each weight's two."""
    counts = rows * columns > _COUNTING and columns < _NARROW
    return _is_one_row(x) and counts and x.dtype != jnp.float32


def multiply(x: jax.Array, kernel: jax.Array | Scaled) -> jax.Array:
    """`x W` in x's dtype, x `[..., d_in]`, kernel `[d_in, d_out]`; where XLA for a GPU makes a sum
    of it, in float32.

    In bfloat16 XLA would round each product of the sum and, with some numbers of rows, write them
    all out before it adds them up: a tenth of the bytes that a Llama-3.2-1B moves at batch 1
    (experiments/results/launches_tried.md).
    """
    if isinstance(kernel, Scaled):
        return _multiply_scaled(multiply, x, kernel)
    if _doubled(x, *kernel.shape):
        rows = jnp.broadcast_to(x.reshape(1, -1), (2, x.size))
        return jnp.matmul(rows, kernel)[0].reshape(*x.shape[:-1], -1)
    dtype = jnp.float32 if is_sum(x, *kernel.shape) else None
    return jnp.matmul(x, kernel, preferred_element_type=dtype).astype(x.dtype)


def _multiply_scaled(
    times: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: Scaled
) -> jax.Array:
    """`((x · factor) codes) · scale` in x's dtype, the product by `times`."""
    if kernel.factor is not None:
        x = x * kernel.factor.astype(x.dtype)
    y = times(x, kernel.codes.astype(x.dtype))
    return times_scale(y, kernel.scale)


def multiply_transposed(x: jax.Array, weight: jax.Array | Scaled, dtype: Any = None) -> jax.Array:
    """`x Wᵀ` in `dtype` (default x's), x `[..., d_in]`, weight `[d_out, d_in]`; on a CPU for few
    rows computed as `(W xᵀ)ᵀ`.

    With the weight on the left XLA's CPU products read it at the speed of memory for any small
    batch; on the right they are a third slower at batch 1 and 2 to 3 times at batch 8. The barrier
    keeps XLA from turning the product round. The hundreds of rows of a prefill are bound by
    arithmetic, and there the transposing would only cost.
    """
    if isinstance(weight, Scaled):
        return _multiply_scaled(multiply_transposed, x, weight)

    def plain(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)

    def turned(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        y = jnp.matmul(weight, rows.T, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], weight.shape[0])

    if x.size > _FEW_ROWS * x.shape[-1]:
        return plain(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=turned, default=plain)


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x W` in x's dtype, x `[..., d_in]`, kernel `[d_in, d_out]` of the same dtype: what training
    multiplies by.

    Its own gradient, for two reasons on a CPU. The automatic one contracts the output's wide
    cotangent as the left operand, which XLA transposes in memory first: it was a fifth of a LoRA
    step. And a bfloat16 product is fast only where it gives float32, which is then rounded: 350 to
    390 GFLOP/s with avx512_bf16, where one that gives bfloat16 has 100 to 170, and float32 180 to
    200.
    """
    return _project(x, kernel)


@jax.custom_vjp
def _project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _contract(x, kernel, (x.ndim - 1,), (0,))


def _contract(
    a: jax.Array, b: jax.Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]
) -> jax.Array:
    """The product over these axes in a's dtype."""
    numbers = ((axes_a, axes_b), ((), ()))
    product = functools.partial(jax.lax.dot_general, dimension_numbers=numbers)
    return rounded_on_cpu(product, a, b, a.dtype)


def rounded_on_cpu(
    product: Callable[..., jax.Array], a: jax.Array, b: jax.Array, dtype: Any
) -> jax.Array:
    """`product(a, b, preferred_element_type=…)` in `dtype`; in a program for a CPU it gives float32
    and is rounded, for the speed that `project` tells of."""

    def wide(a: jax.Array, b: jax.Array) -> jax.Array:
        return product(a, b, preferred_element_type=jnp.float32).astype(dtype)

    plain = functools.partial(product, preferred_element_type=dtype)
    if dtype == jnp.float32:
        return plain(a, b)
    return jax.lax.platform_dependent(a, b, cpu=wide, default=plain)


def _project_forward(x: Any, kernel: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    """Keeps what the gradients that are asked for need: none for a frozen kernel."""
    saved = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return _project(x.value, kernel.value), saved


def _project_backward(
    saved: tuple[Any, Any], cotangent: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    x, kernel = saved
    of_x = None
    of_kernel = None
    if isinstance(cotangent, SymbolicZero):
        return None, None
    last = cotangent.ndim - 1
    rows = tuple(range(last))
    if kernel is not None:
        of_x = _contract(cotangent, kernel, (last,), (1,))
    if x is not None:
        of_kernel = _contract(x, cotangent, rows, rows)
    return of_x, of_kernel


_project.defvjp(_project_forward, _project_backward, symbolic_zeros=True)
