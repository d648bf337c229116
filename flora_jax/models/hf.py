"""HF tensors and the leaves of the base parameter tree: one table, read in both directions.

HF stores a projection as `[out, in]`, one tensor a layer. Our kernels are `[in, out]`, and the
leaves of the layers are stacked on axis 0. So `model.layers.0 … 29.mlp.up_proj.weight`, 30 tensors
of `[1536, 576]`, are the one leaf `layers/mlp/gate_up/up_kernel [30, 576, 1536]`. Nothing else is
reordered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flora_jax.adapters import (
    Quantized,
    base_leaves,
    check_quantization,
    check_tree,
    is_quantized,
    paths,
    quantization_format,
    quantize,
    shapes_of,
    tree,
)
from flora_jax.errors import UserError, near_misses, require
from flora_jax.models.config import LlamaConfig


class Row(NamedTuple):
    """One leaf: its path here and its HF name (`{}` is the layer)."""

    path: str
    hf_name: str

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf_name

    @property
    def transposed(self) -> bool:
        return self.path.endswith("kernel")

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the HF tensors of a leaf of this shape."""
        if self.stacked:
            shape = shape[1:]
        if self.transposed:
            shape = shape[::-1]
        return shape


# lm_head is read early: the last tensors come when memory is nearly full.
HF_TABLE = tuple(Row(*row) for row in (
    ("embed_tokens/embedding",          "model.embed_tokens.weight"),
    ("lm_head/kernel",                  "lm_head.weight"),
    ("layers/attention_norm/scale",     "model.layers.{}.input_layernorm.weight"),
    ("layers/attention/qkv/q_kernel",   "model.layers.{}.self_attn.q_proj.weight"),
    ("layers/attention/qkv/k_kernel",   "model.layers.{}.self_attn.k_proj.weight"),
    ("layers/attention/qkv/v_kernel",   "model.layers.{}.self_attn.v_proj.weight"),
    ("layers/attention/o/o_kernel",     "model.layers.{}.self_attn.o_proj.weight"),
    ("layers/q_norm/scale",             "model.layers.{}.self_attn.q_norm.weight"),
    ("layers/k_norm/scale",             "model.layers.{}.self_attn.k_norm.weight"),
    ("layers/attention/qkv/q_bias",     "model.layers.{}.self_attn.q_proj.bias"),
    ("layers/attention/qkv/k_bias",     "model.layers.{}.self_attn.k_proj.bias"),
    ("layers/attention/qkv/v_bias",     "model.layers.{}.self_attn.v_proj.bias"),
    ("layers/attention/o/o_bias",       "model.layers.{}.self_attn.o_proj.bias"),
    ("layers/mlp_norm/scale",           "model.layers.{}.post_attention_layernorm.weight"),
    ("layers/mlp/gate_up/gate_kernel",  "model.layers.{}.mlp.gate_proj.weight"),
    ("layers/mlp/gate_up/up_kernel",    "model.layers.{}.mlp.up_proj.weight"),
    ("layers/mlp/down/down_kernel",     "model.layers.{}.mlp.down_proj.weight"),
    ("layers/mlp/gate_up/gate_bias",    "model.layers.{}.mlp.gate_proj.bias"),
    ("layers/mlp/gate_up/up_bias",      "model.layers.{}.mlp.up_proj.bias"),
    ("layers/mlp/down/down_bias",       "model.layers.{}.mlp.down_proj.bias"),
    ("final_norm/scale",                "model.norm.weight"),
))  # fmt: skip

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"

# Of floats of two bytes: numpy has no fast isfinite for them.
_EXPONENT_BITS = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}

# Rows of an HF tensor copied at a time: few, to save memory and to keep a transpose in cache.
_BLOCK_ROWS = 64


class Tensor(Protocol):
    """An HF tensor, read slice by slice: an array, or one in a file."""

    shape: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


def _rows(config: LlamaConfig) -> dict[str, Row]:
    """The rows of the table that `config` has, by path."""
    leaves = base_leaves(config)
    return {row.path: row for row in HF_TABLE if row.path in leaves}


def _hf_names(row: Row, config: LlamaConfig) -> list[str]:
    if not row.stacked:
        return [row.hf_name]
    return [row.hf_name.format(l) for l in range(config.num_hidden_layers)]


def leaf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every leaf of the base tree; those of `layers/…` begin with L."""
    leaves = base_leaves(config)
    return {path: leaves[path].shape for path in _rows(config)}


def hf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> HF shape (`[out, in]`) of every tensor of a checkpoint of this architecture."""
    shapes = leaf_shapes(config)
    return {
        name: row.hf_shape(shapes[path])
        for path, row in _rows(config).items()
        for name in _hf_names(row, config)
    }


def check_hf_tensors(
    config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raises UserError unless the tensors (HF name -> shape) are exactly those of `config`.

    Stored rotary frequencies, and a stored lm_head of a tied model, are redundant and pass. source:
    the name of the checkpoint in errors.
    """
    expected = hf_shapes(config)
    found = {name: tuple(shape) for name, shape in shapes.items()}
    for name in shapes:
        if name not in expected and (name.endswith("rotary_emb.inv_freq") or name == _HEAD):
            del found[name]

    def say(name: str, there: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> str:
        if there is None:
            return f"{source}: tensor {name!r} is missing; {near_misses(name, shapes)}"
        if wanted is None:
            return (
                f"{source}: unexpected tensor {name!r}; only unquantised Llama checkpoints without "
                "adapters are read"
            )
        return (
            f"{source}: tensor {name!r} has shape {list(there)}, the configuration asks for "
            f"{list(wanted)}"
        )

    check_tree(found, expected, say)


def settle_tying(
    config: LlamaConfig, tensors: Mapping[str, Tensor]
) -> tuple[LlamaConfig, Mapping[str, Tensor]]:
    """The configuration and tensors of a checkpoint, tied as transformers 5 ties them.

    A model that says it is tied is not, if it is stored with an lm_head other than its embedding.
    If only the lm_head is stored, it is the embedding, too.
    """
    head = tensors.get(_HEAD)
    embedding = tensors.get(_EMBEDDING)
    if not config.tie_word_embeddings or head is None:
        return config, tensors
    if embedding is None:
        return config, {**tensors, _EMBEDDING: head}
    return dataclasses.replace(config, tie_word_embeddings=_equal(head, embedding)), tensors


def _equal(a: Tensor, b: Tensor) -> bool:
    if tuple(a.shape) != tuple(b.shape):
        return False

    def block(tensor: Tensor, start: int) -> np.ndarray:
        return tensor[(slice(start, start + _BLOCK_ROWS),)].astype(np.float32, copy=False)

    starts = range(0, a.shape[0], _BLOCK_ROWS)
    return all(np.array_equal(block(a, start), block(b, start)) for start in starts)


def from_hf_tensors(
    config: LlamaConfig,
    tensors: Mapping[str, Tensor],
    dtype: Any = jnp.float32,
    *,
    shardings: Any = None,
    source: str = "checkpoint",
    quantization: str = "none",
) -> dict[str, Any]:
    """The base parameter tree (flax `params`) from HF tensors, e.g. `{name: np.ndarray}`.

    Args:
      config: the architecture; `tensors` must be exactly its tensors, in HF orientation.
      tensors: HF name -> Tensor; read leaf by leaf, block by block, and only the parts that local
        devices hold.
      dtype: of every leaf: float32, bfloat16 or float16.
      shardings: a tree of `jax.sharding.Sharding` like the result, or a function path -> Sharding
        (path as `layers/attention/qkv/q_kernel`); None puts everything, uncommitted, on the default
        device.
      source: the name that errors give to the checkpoint.
      quantization: a name of QUANTIZATIONS; the kernels of the layers are quantised as they are
        read, one tensor after another.

    Returns the nested dict of jax arrays. Raises UserError before it allocates anything, and while
    it reads for a value that is not finite or that `dtype` cannot hold.
    """
    check_hf_tensors(config, {name: tensor.shape for name, tensor in tensors.items()}, source)
    dtype = _float_dtype(dtype)
    check_quantization(quantization, config)
    if quantization != "none":
        _host()
    shapes = leaf_shapes(config)
    rows = _rows(config)
    sharding_of = _sharding_lookup(shardings, shapes)
    leaves = {}
    for path, shape in shapes.items():

        def read(
            index: tuple[slice, ...], row: Row = rows[path], shape: tuple[int, ...] = shape
        ) -> np.ndarray:
            names = _hf_names(row, config)
            part = tuple(range(n)[s] for n, s in zip(shape, index, strict=True))
            return _read(names, tensors, row, part, dtype, source)

        sharding = sharding_of(path)
        if quantization != "none" and is_quantized(path):
            names = _hf_names(rows[path], config)
            kernels = _read_quantized(names, tensors, rows[path], shape, quantization, source)
            leaves[path] = _place_parts(kernels, sharding)
        elif sharding is None:
            leaves[path] = jax.device_put(read((slice(None),) * len(shape)))
        else:
            leaves[path] = jax.make_array_from_callback(shape, sharding, read)
    return tree(leaves)


def hf_names(config: LlamaConfig) -> dict[str, list[str]]:
    """Path -> the HF names of a leaf's tensors, layer by layer."""
    return {path: _hf_names(row, config) for path, row in _rows(config).items()}


def to_hf_tensors(
    config: LlamaConfig, params: Mapping[str, Any], only: Callable[[str], bool] = lambda path: True
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields `(HF name, array)` for every tensor, `[out, in]`, contiguous, in the dtype of its
    leaf.

    The values are bit-equal to those that `from_hf_tensors` read in the same dtype. only: selects
    leaves, by path. Raises UserError if `params` is quantised or not the tree of `config`.
    """
    check_tree(shapes_of(params), leaf_shapes(config), _says_leaf)
    leaves = paths(dict(params))
    there = quantization_format(params)
    require(there == "none", f"the base is in {there}; HF tensors are those of `dequantize_base`")
    for path, row in _rows(config).items():
        if not only(path):
            continue
        leaf = np.asarray(leaves[path])
        if not row.stacked:
            leaf = leaf[None]
        for name, value in zip(_hf_names(row, config), leaf, strict=True):
            if row.transposed:
                value = value.T
            yield name, np.ascontiguousarray(value)


def _says_leaf(path: str, there: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> str:
    leaf = f"parameter tree: leaf {path!r}"
    if there is None:
        return f"{leaf} is missing"
    if wanted is None:
        return f"{leaf} is not part of this model"
    return f"{leaf} has shape {list(there)}, not {list(wanted)}"


def _float_dtype(dtype: Any) -> np.dtype:
    known = ("float32", "bfloat16", "float16")
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise UserError(f"dtype={dtype!r} is unknown; {near_misses(str(dtype), known)}") from None
    if found.name not in known:
        near = near_misses(found.name, known)
        raise UserError(f"dtype={found.name!r} is not for parameters; {near}")
    return found


def _sharding_lookup(
    shardings: Any, shapes: Mapping[str, Any]
) -> Callable[[str], jax.sharding.Sharding | None]:
    if shardings is None or callable(shardings):
        return shardings or (lambda path: None)
    flat = paths(shardings)
    for path in shapes.keys() - flat.keys():
        raise UserError(f"shardings: {path!r} is missing")
    for path in flat.keys() - shapes.keys():
        raise UserError(f"shardings: {path!r} is no leaf of this model")
    return flat.__getitem__


def _read(
    names: list[str],
    tensors: Mapping[str, Tensor],
    row: Row,
    index: tuple[range, ...],
    dtype: np.dtype,
    source: str,
) -> np.ndarray:
    """The part `index` of one leaf, read from the HF tensors `names` into one buffer."""
    if not row.stacked:
        return _read_layers(names, tensors, row, (range(1), *index), dtype, source)[0]
    return _read_layers(names, tensors, row, index, dtype, source)


def _read_layers(
    names: list[str],
    tensors: Mapping[str, Tensor],
    row: Row,
    index: tuple[range, ...],
    dtype: np.dtype,
    source: str,
) -> np.ndarray:
    """`_read` of a stacked leaf; index: layers, then the axes of a layer."""
    buffer = _aligned_empty(tuple(map(len, index)), dtype)
    layers, *axes = index
    if row.transposed:
        axes.reverse()
    for out, layer in zip(buffer, layers, strict=True):
        if row.transposed:
            out = out.T  # a view in HF orientation
        _read_tensor(out, tensors[names[layer]], axes, names[layer], source)
    return buffer


def _read_quantized(
    names: list[str],
    tensors: Mapping[str, Tensor],
    row: Row,
    shape: tuple[int, ...],
    quantization: str,
    source: str,
) -> Quantized:
    """A leaf `[L, d_in, d_out]` in codes, on the host.

    Only one tensor's floats are in memory at a time. A CPU quantises whatever the device is, so
    that the codes are the same everywhere.
    """
    each = []
    with jax.default_device(_host()):
        for i in range(shape[0]):
            index = (range(i, i + 1), *map(range, shape[1:]))
            kernel = _read(names, tensors, row, index, np.dtype(np.float32), source)[0]
            start = np.uint32(i * kernel.size % 2**32)
            each.append(jax.device_get(_quantize(kernel, quantization, start)))
    return jax.tree.map(lambda *layers: np.stack(layers), *each)


def _host() -> jax.Device:
    """JAX's CPU device. Raises UserError where JAX is set to use none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            f"JAX_PLATFORMS={jax.config.jax_platforms}: weights are quantised on the CPU; add cpu "
            "at its end, as in cuda,cpu"
        ) from None


_quantize = jax.jit(quantize, static_argnames="quantization")


def _place_parts(kernels: Quantized, sharding: jax.sharding.Sharding | None) -> Quantized:
    """Puts the parts of a quantised leaf on devices, sharded like the leaf along the axes that they
    have."""
    if sharding is None:
        return jax.device_put(kernels)

    def place(part: np.ndarray) -> jax.Array:
        where = _of_part(sharding, part.shape)
        return jax.make_array_from_callback(part.shape, where, lambda index: part[index])

    return jax.tree.map(place, kernels)


def _of_part(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding of a part of this shape, from its leaf's."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    if len(shape) != 3:
        return NamedSharding(mesh, P())

    def kept(size: int, names: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        """The mesh axes of an axis, None where their devices do not divide it."""
        each = names or ()
        if isinstance(each, str):
            each = (each,)
        if size % math.prod(mesh.shape[name] for name in each):
            return None
        return names

    return NamedSharding(mesh, P(*map(kept, shape, sharding.spec)))


def _read_tensor(
    out: np.ndarray, tensor: Tensor, index: Sequence[range], name: str, source: str
) -> None:
    """Reads the part `index` of one HF tensor into `out`, block by block.

    Raises UserError for a value that is not finite in `out`.
    """
    rows, *columns = index
    columns = [slice(c.start, c.stop) for c in columns]
    for start in range(rows.start, rows.stop, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows.stop)
        block = out[start - rows.start : stop - rows.start]
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, by name
            found = tensor[(slice(start, stop), *columns)]
            block[...] = found
        if not all_finite(block):
            _refuse_values(found, out.dtype, getattr(tensor, "file", source), name)


def all_finite(values: np.ndarray) -> bool:
    """Whether no value of a float array is NaN or an infinity, whose exponents have all bits
    set."""
    bits = _EXPONENT_BITS.get(values.dtype.name)
    if bits is None:
        return bool(np.isfinite(values).all())
    return not ((values.view(bits.dtype) & bits) == bits).any()


def _refuse_values(found: np.ndarray, dtype: np.dtype, file: str, name: str) -> NoReturn:
    require(
        np.isfinite(found.astype(np.float64)).all(),
        f"{file}: tensor {name!r} holds a value that is not finite (NaN or infinity); download "
        "the checkpoint again, or take an earlier one of its training",
    )
    largest = np.abs(found.astype(np.float64)).max()
    raise UserError(
        f"{file}: tensor {name!r} holds {largest:.4g}, which {dtype.name} cannot hold"
        + "; load it in float32" * (dtype.name != "float32")
    )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose memory starts on a 64-byte boundary.

    A CPU device takes such an array over and would copy any other, which takes twice the memory.
    Nothing writes to it once JAX has it.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
