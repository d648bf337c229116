"""The work of a GPU for one decode step, known without a GPU.

XLA compiles for a described device on a machine that has neither the device nor its driver. This
module reads two things off the compiled step: the launch list (each entry is one kernel, library
call or copy) and the optimised HLO (which launch waits for which, and what each reads and writes).
Nothing runs, so there are no times but the modelled ones of `modelled_ms`. The autotuner cannot run
either: on a device it picks Triton or cuBLAS product by product, and the two MODES bracket its
choice.

    ffba = AdapterConfig("ffba", 32)
    plan = plan_step("ffba", config, ffba, target="h100", mode="triton", batch=8)
    plan.launches, plan.chain, plan.copies["weights"]

Attention is planned as our own kernel or as XLA writes it. cuDNN's would need the device itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from flora_jax.adapters import AdapterConfig, abstract_adapter, gpu_layout
from flora_jax.analysis.targets import TARGETS
from flora_jax.analysis.variants import NO_DOT_MERGER, get_variant, serve, variants
from flora_jax.errors import require
from flora_jax.inference.decoding import last_logits
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import KVCache, abstract_base

# Compiler options, by the library that computes the products.
MODES = {"triton": {}, "cublas": {"xla_gpu_enable_triton_gemm": False}}

_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}
_DUMPS = {
    "sequence": "thunk_sequence",
    "after": "thunk_sequence_after_thunk_passes",
    "metadata": "thunk_metadata",
}
_COPYING = ("copy", "pad", "concatenate", "transpose")
# Kind of an argument -> its name in the planned step.
_ARGUMENTS = {"weights": "params", "cache": "cache"}
_PARTIAL = ("slice", "dynamic-slice", "gather")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    sizes: the bytes of each result; type: its text; operands: names; calls: the computation of a
    fusion, None for any other; root: whether it is the root of its computation.
    """

    name: str
    opcode: str
    sizes: tuple[int, ...]
    type: str
    operands: tuple[str, ...]
    calls: str | None
    root: bool

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)(?:,|$)")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")


def parse_hlo(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of an HLO module's text, each as its instructions by name in order, and the
    name of the entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], {})
            if head[1]:
                entry = head[2]
        elif current is not None and (match := _LINE.match(re.sub(r"/\*.*?\*/", "", line))):
            root, name, type_, opcode, operands = match.groups()
            sizes = tuple(
                _size(dtype, dims) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", type_)
            )
            calls = re.search(r"calls=%([\w.\-]+)", line)
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            if opcode == "parameter":
                names = (operands,)  # its number
            current[name] = Instruction(
                name, opcode, sizes, type_, names, calls and calls[1], bool(root)
            )
    return computations, entry


def _size(dtype: str, dims: str) -> int:
    bits = _ITEM_BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def parse_launches(sequence: str, metadata: str) -> list[tuple[str, str]]:
    """`(kind, HLO instruction)` of every launch in order, from XLA's dumped launch list and its
    metadata. Loops and command buffers contain launches and are not counted themselves."""
    found = re.findall(r'profile_annotation: "(.*?)"\s+thunk_id: (\d+)', metadata)
    names = {int(number): name for name, number in found}
    rows = re.findall(r"^( *)(\d+): (k\w+)", sequence, re.MULTILINE)
    return [
        (kind, names.get(int(number), ""))
        for (indent, number, kind), (following, *_) in zip(rows, [*rows[1:], ("",)], strict=True)
        if len(following) <= len(indent)
    ]


def longest_chain(entry: Mapping[str, Instruction], launches: Mapping[str, int]) -> int:
    """Launches that must wait for one another: the longest path through the entry computation, each
    instruction counted as often as it launches."""
    depth: dict[str, int] = {}
    for name, instruction in entry.items():
        depth[name] = launches.get(name, 0) + max(
            (depth.get(o, 0) for o in instruction.operands), default=0
        )
    return max(depth.values(), default=0)


def moved_bytes(
    instruction: Instruction,
    entry: Mapping[str, Instruction],
    computations: Mapping[str, Mapping[str, Instruction]],
) -> int:
    """Bytes that one launch reads and writes.

    An array that a fusion slices or looks up counts by the part it takes, and one that is updated
    in place by the update. A library call's workspace is not counted.
    """
    operands = [entry[name].bytes for name in instruction.operands if name in entry]
    if instruction.calls is None:
        return sum(operands) + instruction.sizes[0]
    body = computations[instruction.calls]
    read = 0
    for inner in body.values():
        if inner.opcode == "parameter":
            read += min(operands[int(inner.operands[0])], _read(inner.name, body))
    return read + sum(_written(root, body) for root in _roots(body))


def _read(name: str, body: Mapping[str, Instruction]) -> int:
    """Bytes of `name` that the instructions of a fusion read."""
    total = 0
    for user in body.values():
        if name not in user.operands:
            continue
        if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        if user.opcode == "bitcast":
            total += _read(user.name, body)
        elif user.opcode in _PARTIAL and user.operands[0] == name:
            total += user.bytes
        else:
            return body[name].bytes
    return total


def _roots(body: Mapping[str, Instruction]) -> list[Instruction]:
    root = next(one for one in body.values() if one.root)
    if root.opcode == "tuple":
        return [body[name] for name in root.operands]
    return [root]


def _written(root: Instruction, body: Mapping[str, Instruction]) -> int:
    while root.opcode == "bitcast":
        root = body[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return body[root.operands[1]].bytes
    return root.bytes


def large_copies(
    computations: Mapping[str, Mapping[str, Instruction]],
    entry: str,
    launched: Iterable[str],
    products: Iterable[str],
    threshold: int,
) -> dict[str, list[str]]:
    """Copies of at least `threshold` bytes, as `opcode type`, by what they are made from:
    "weights", "cache" or "activations".

    Copies are copies, pads, concatenates and transposes, inside fusions too, and any other result
    that a launch makes of weights or the cache and writes out, unless it is one of the `products`
    (such as `x · W` spelt out before it is summed).
    """
    out: dict[str, list[str]] = {"weights": [], "cache": [], "activations": []}
    body = computations[entry]
    launched = set(launched)
    products = set(products)
    made_of: dict[str, set[str]] = {}
    for name, one in body.items():
        if one.opcode == "parameter":
            made_of[name] = {
                kind for kind, argument in _ARGUMENTS.items() if name.startswith(argument)
            }
            continue
        # Small operands do not count: every activation is made of weights in the end.
        reads = set().union(
            *(made_of[o] for o in one.operands if o in body and body[o].bytes >= threshold // 2)
        )
        made_of[name] = reads
        if name in products:
            made_of[name] = set()  # the result is an activation
        if name in launched:
            kind = next((kind for kind in _ARGUMENTS if kind in reads), "activations")
            exempt = name in products or kind == "activations"
            out[kind] += _large(one, computations, threshold, exempt)
    return out


def _large(
    one: Instruction,
    computations: Mapping[str, Mapping[str, Instruction]],
    threshold: int,
    exempt: bool,
) -> list[str]:
    """The large copies of one launch; its own result counts if it is a copy or not exempt."""
    if one.calls is None:
        large = one.bytes >= threshold and (
            one.opcode in _COPYING or not (exempt or one.opcode == "custom-call")
        )
        if large:
            return [f"{one.opcode} {one.type}"]
        return []
    inside = []
    todo = [one.calls]
    while todo:
        for inner in computations[todo.pop()].values():
            if inner.calls:
                todo.append(inner.calls)
            if inner.opcode in _COPYING and inner.bytes >= threshold:
                inside.append(inner)
    body = computations[one.calls]
    if not inside and not exempt:
        inside = [root for root in _roots(body) if _written(root, body) >= threshold]
    return [f"{inner.opcode} {inner.type}" for inner in inside]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The counts of one compiled decode step.

    launches: everything enqueued; gemms: launches that the compiler itself calls a GEMM; products:
    launches that read a matrix of weights, whatever the compiler calls them (at batch 1 some are
    sums); chain: launches that must wait for one another; moved: bytes read and written; copies: as
    in `large_copies`; temporary: bytes of temporary memory; graphs: CUDA graphs that launches are
    recorded in; in_graphs: launches recorded in them.
    """

    launches: int
    gemms: int
    products: int
    chain: int
    moved: int
    copies: dict[str, list[str]]
    temporary: int
    graphs: int
    in_graphs: int


@functools.cache
def _device(target: str) -> Any:
    return topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[target].description, topology="1x1x1"
    ).devices[0]


def compile_for(
    target: str,
    function: Any,
    *arguments: Any,
    options: Mapping[str, Any] | None = None,
    donate: tuple[int, ...] = (),
) -> tuple[Any, dict[str, str]]:
    """Compiles `function` for a target from the shapes and dtypes of its arguments.

    options: XLA's, by name; donate: the numbers of donated arguments. Returns the compiled object
    and the compiler's dumped texts: "sequence" (launches), "after" (the same, recorded in graphs)
    and "metadata".
    """
    # An argument without the device's sharding would silently compile for this machine's CPU.
    device = _device(target)
    sharding = SingleDeviceSharding(device)
    # A Pallas kernel is lowered for the device of the mesh around it, not for its arguments'.
    kind = AbstractDevice(device.device_kind, TARGETS[target].cores, "gpu")
    mesh = AbstractMesh((), (), abstract_device=kind)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        with use_abstract_mesh(mesh):
            lowered = jax.jit(function, donate_argnums=donate).lower(*shapes)
        compiled = lowered.compile({**dump, **(options or {})})

        def text(name):
            return "".join(path.read_text() for path in Path(folder).glob(f"*{name}.txt"))

        texts = {name: text(file) for name, file in _DUMPS.items()}
    return compiled, texts


def read_plan(compiled: Any, texts: Mapping[str, str], threshold: int) -> Plan:
    """The Plan of a compiled function; its weights are called `params` and its cache `cache`.

    texts: from `compile_for`; threshold: in bytes, as in `large_copies`.
    """
    launches = parse_launches(texts["sequence"], texts["metadata"])
    computations, entry = parse_hlo(compiled.as_text())
    body = computations[entry]
    counts = Counter(name for _, name in launches)
    gemms = [
        name
        for kind, name in launches
        if re.search(r"Cublas|kGemm|kCuDnn", kind) or "gemm_fusion" in name
    ]
    matrices = {
        n
        for n, one in body.items()
        if n.startswith("params") and re.match(r"\w+\[\d+,\d+\]", one.type)
    }
    for name, one in body.items():
        if one.opcode == "bitcast" and one.operands[0] in matrices:
            matrices.add(name)
    return Plan(
        launches=len(launches),
        gemms=len(gemms),
        products=sum(bool(matrices.intersection(body[name].operands)) for _, name in launches),
        chain=longest_chain(body, counts),
        moved=sum(moved_bytes(body[name], body, computations) for name in counts),
        copies=large_copies(computations, entry, counts, gemms, threshold),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        graphs=len(re.findall("kCommandBuffer", texts["after"])),
        in_graphs=len(re.findall(r"^ +\d+: k", texts["after"], re.MULTILINE)),
    )


def smallest_kernel(config: LlamaConfig, dtype: Any, quantization: str = "none") -> int:
    """Bytes of the base's smallest kernel; a copy of this size or more is as large as a weight."""
    each = jnp.dtype(dtype).itemsize
    if quantization != "none":
        each = 1
    return min(d_in * d_out for d_in, d_out in config.widths.values()) * each


def check_bank(name: str, adapters: int) -> None:
    """Raises UserError for several adapters in a variant that holds only one."""
    banks = [n for n, v in variants().items() if v.method and v.kind == "fused" and not v.fold_adds]
    require(
        adapters <= 1 or name in banks or get_variant(name).method is None,
        f"{name} cannot hold a bank of {adapters} adapters; {', '.join(banks)} can",
    )


def _bank(
    config: LlamaConfig, adapter_config: AdapterConfig, adapters: int, batch: int
) -> tuple[Any, jax.ShapeDtypeStruct | None]:
    """The shapes of an adapter or of a bank, and those of the mask that selects in a bank."""
    adapter = abstract_adapter(config, adapter_config)
    if adapters == 1:
        return adapter, None
    return [adapter] * adapters, jax.ShapeDtypeStruct((batch, adapters), jnp.bool_)


def plan_step(
    name: str,
    config: LlamaConfig,
    adapter_config: AdapterConfig | None,
    *,
    target: str,
    mode: str,
    batch: int,
    dtype: Any = jnp.bfloat16,
    quantization: str = "none",
    cache_length: int = 1024,
    row_multiple: int | None = None,
    adapters: int = 1,
    dot_merger: bool = True,
    decode_kernels: str = "attention",
) -> Plan:
    """The plan of one greedy decode step of a variant: a new token for each of `batch` rows over a
    cache of `cache_length` slots, updated in place.

    row_multiple: None for the one that is served; adapters: in the bank, with the mask that selects
    among them; decode_kernels: as in `Llama`. Raises UserError for a
    bank of a variant that cannot be one.
    """
    check_bank(name, adapters)
    base = abstract_base(config, dtype, quantization)
    adapter = select = None
    if get_variant(name).method is not None:
        adapter, select = _bank(config, adapter_config, adapters, batch)
    lies = gpu_layout(quantization != "none", decode_kernels == "layer")
    if row_multiple is not None:
        lies = dataclasses.replace(lies, row_multiple=row_multiple)
    model = None

    def layout(base: Any, adapter: Any) -> Any:
        nonlocal model
        model, params = serve(name, base, config, adapter_config, adapter, lies, decode_kernels)
        return params

    params = jax.eval_shape(layout, base, adapter)
    cache = jax.eval_shape(lambda: KVCache.empty(config, batch, cache_length, dtype))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)

    def step(
        params: Any, tokens: jax.Array, cache: KVCache, select: jax.Array | None
    ) -> tuple[jax.Array, KVCache]:
        real = jnp.ones(tokens.shape, bool)
        logits, cache = model.apply(
            {"params": params}, tokens, real, cache, select, method=last_logits
        )
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    options = MODES[mode]
    if not dot_merger:
        options = options | NO_DOT_MERGER
    compiled, texts = compile_for(
        target, step, params, tokens, cache, select, options=options, donate=(2,)
    )
    return read_plan(compiled, texts, smallest_kernel(config, dtype, quantization))


_PLANNED = (2, 4)  # layers: their difference is free of the first and the last layer's cost


def plan_model(
    name: str, config: LlamaConfig, adapter_config: AdapterConfig | None, **settings: Any
) -> dict[str, Any]:
    """A row of the table: one layer's share and the whole model's step, from `plan_step` at two
    depths.

    settings: of `plan_step`. `layer` and `step` hold launches, gemms, products, chain, moved and
    the numbers of weight_copies, cache_copies and activation_copies; a step of all L layers is
    extrapolated. Temporary bytes, graphs and copies are the deeper plan's.
    """
    shallow, deep = (
        plan_step(
            name, dataclasses.replace(config, num_hidden_layers=n), adapter_config, **settings
        )
        for n in _PLANNED
    )

    def counts(plan: Plan) -> dict[str, int]:
        copies = {
            f"{kind.removesuffix('s')}_copies": len(found) for kind, found in plan.copies.items()
        }
        return {
            key: getattr(plan, key) for key in ("launches", "gemms", "products", "chain", "moved")
        } | copies

    few, many = map(counts, (shallow, deep))
    layer = {key: (many[key] - few[key]) / (_PLANNED[1] - _PLANNED[0]) for key in few}
    step = {key: few[key] + (config.num_hidden_layers - _PLANNED[0]) * layer[key] for key in few}
    copies = {kind: dict(Counter(found)) for kind, found in deep.copies.items() if found}
    return {
        "layer": layer,
        "step": step,
        "copies": copies,
        "temporary": deep.temporary,
        "graphs": deep.graphs,
        "in_graphs": deep.in_graphs / deep.launches,
    }


def modelled_ms(moved: float, chain: float, bandwidth: float, launch_us: float) -> float:
    """A model, no measurement: milliseconds to move `moved` bytes at the full `bandwidth` (bytes a
    second), plus `launch_us` microseconds for every launch of the `chain`."""
    return 1e3 * moved / bandwidth + 1e-3 * launch_us * chain
