"""The cells of `experiments.gpu_report` that run in JAX, each in a process of its own.

    python -m experiments.gpu_cells latency --preset llama3.2-1b --method ffba --out ffba.json

Weights are random and made on the device; no network and no data are needed. A cell writes one JSON
object with its measurement, the device's name, the versions and its own command. The cells of torch
are in `experiments.gpu_peers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.flags import Flags, parse
from flora_jax.errors import UserError, check_writable, near_misses, run_command
from flora_jax.files import read_json, write_json
from flora_jax.models.config import LlamaConfig

SCHEMA_VERSION = 1
NO_MERGER = "_no_dot_merger"  # behind a method's name: timed without XLA's dot merger
IN_GRAPH = "_loop_in_graph"  # behind a method's name: the loop over tokens in a CUDA graph, too
IN_KERNELS = "_in_kernels"  # behind a method's name: all of a decode step's layers in our kernels
# By default XLA puts the launches of a step into graphs, but not the loop around them.
LOOP_IN_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,"
    "DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}


def device_rates() -> dict[str, float]:
    """The device's best rates: GB/s of a large copy (bytes read and bytes written) and TFLOP/s of a
    large bfloat16 product, medians of ten."""
    import jax
    import jax.numpy as jnp

    elements = 2**30  # 4 GiB
    width = 8192
    if jax.default_backend() == "cpu":
        elements = 2**26
        width = 512

    def seconds(function: Callable[..., Any], *arguments: Any) -> float:
        for _ in range(3):
            jax.block_until_ready(function(*arguments))
        taken = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    copied = jnp.arange(elements, dtype=jnp.float32)
    copying = seconds(jax.jit(lambda x: x + 1), copied)
    nbytes = copied.nbytes
    del copied
    a, b = (jax.random.normal(jax.random.key(i), (width, width), jnp.bfloat16) for i in range(2))
    multiplying = seconds(jax.jit(jnp.matmul), a, b)
    return {
        "copy_bytes": 2 * nbytes,
        "copy_gb_per_s": 2 * nbytes / copying / 1e9,
        "bf16_product": width,
        "bf16_tflop_per_s": 2 * width**3 / multiplying / 1e12,
    }


def device(args: argparse.Namespace) -> dict[str, Any]:
    """What nvidia-smi says of the device, and its best rates."""
    fields = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        driver = dict(zip(fields.split(","), said.splitlines()[0].split(", "), strict=False))
    except (OSError, subprocess.CalledProcessError):
        driver = {}
    return {"driver": driver, **device_rates()}


def tests(args: argparse.Namespace) -> dict[str, Any]:
    """`pytest -m gpu`: what passed, failed and was skipped, and why."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        flags = ["tests/test_gpu.py", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={file}"]
        flags.append("-vv")  # should it be stopped, the log says what has passed
        # Most of their time is compiling, on one core each. They share the device's memory.
        flags += ["-n", str(_test_processes()), "--dist", "worksteal"]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        start = time.perf_counter()
        # Failures are a result (1), and so is a selection without tests (5).
        command = [sys.executable, "-m", "pytest", *flags]
        done = subprocess.run(command, check=False, env=environment)
        if done.returncode not in (0, 1, 5):
            raise RuntimeError(f"pytest ended with {done.returncode}")
        cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    failed = {case.get("name"): _message(case) for case in cases if _message(case) is not None}
    skipped = sum(case.find("skipped") is not None for case in cases)
    slowest = sorted(cases, key=lambda case: -float(case.get("time")))[:5]
    return {
        "seconds": time.perf_counter() - start,
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failures": failed,
        "slowest": {case.get("name"): float(case.get("time")) for case in slowest},
    }


def _test_processes() -> int:
    """One for every two cores, for there are threads of XLA's beside; at most 8 on one device."""
    return min(8, max(1, len(os.sched_getaffinity(0)) // 2))


def _message(case: ElementTree.Element) -> str | None:
    """Why a test failed; None of one that did not."""
    found = [one for kind in ("failure", "error") for one in case.findall(kind)]
    return found[0].get("message", "")[:500] if found else None


def _variant(args: argparse.Namespace) -> tuple[str, dict[str, Any], str | None]:
    """The way of serving that --method names, XLA's options for it, and its decode kernels."""
    from flora_jax.analysis.variants import NO_DOT_MERGER

    endings = {
        NO_MERGER: (NO_DOT_MERGER, None),
        IN_GRAPH: (LOOP_IN_GRAPH, None),
        IN_KERNELS: ({}, "layer"),
    }
    for ending, (options, kernels) in endings.items():
        if args.method.endswith(ending):
            return args.method.removesuffix(ending), options, kernels
    return args.method, {}, None


def _of_eights(adapter_config: Any) -> Any:
    """The adapter with its rank rounded up to one whose repeat-and-adds our kernels read fast, so
    at somewhat more than equal parameters."""
    return dataclasses.replace(adapter_config, rank=-(-adapter_config.rank // 8) * 8)


def _served(
    args: argparse.Namespace, ways: Sequence[tuple[str, str | None]]
) -> tuple[LlamaConfig, dict[tuple[str, str | None], Any]]:
    """The architecture, and `(model, params, size)` of ways of serving it: names and decode
    kernels."""
    import jax

    from flora_jax.analysis import comparison
    from flora_jax.models.llama import abstract_base, init_base

    config = LlamaConfig.preset(args.preset)
    names = dict.fromkeys(name for name, _ in ways)
    configs = comparison.adapter_configs(list(names), config, args.rank, equal_parameters=True)
    if args.method.endswith(IN_KERNELS):
        configs = {name: one and _of_eights(one) for name, one in configs.items()}
    sizes = comparison.sizes(config, abstract_base(config, args.dtype), configs)
    base = init_base(jax.random.key(0), config, args.dtype)
    built = {}
    for name, kernels in ways:
        model, params = comparison.build(name, base, config, configs[name], kernels)
        built[name, kernels] = model, jax.block_until_ready(params), sizes[name]
    return config, built


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """TTFT and TPOT of one way of serving, the merged base in every round, milliseconds."""
    from flora_jax.analysis.timing import Contestant, Setting, compile_programs, interleave

    name, options, kernels = _variant(args)
    ways = {"base": ("base", None), "own": (name, kernels)}
    config, built = _served(args, list(dict.fromkeys(ways.values())))
    setting = Setting(args.prompt_length, args.batch_size, args.new_tokens)
    prompts = setting.prompts(config)
    contestants: dict[str, Contestant] = {}
    compiled: dict[str, Any] = {}
    for who, way in ways.items():
        model, params, _ = built[way]
        if who == "own" and args.method == "base":
            programs = compiled["base"]
        else:
            extra = options if who == "own" else {}
            programs = compile_programs(model, params, setting, options=extra)
        compiled[who] = programs
        contestants[who] = Contestant(programs, params, prompts, prefills=args.rounds + 1)
        contestants[who].warm_up()
        contestants[who]()  # not counted: the clocks rise
    rounds = list(interleave(contestants, args.rounds))

    def ms(who, i):
        return [1e3 * one[who][i] for one in rounds]

    size = built[ways["own"]][2]
    return {
        "method": args.method,
        "rank": size.rank,
        "parameters": size.parameters,
        "prompt_length": args.prompt_length,
        "batch_size": args.batch_size,
        "new_tokens": args.new_tokens,
        "tpot_ms": ms("own", 1),
        "base_tpot_ms": ms("base", 1),
        "ttft_ms": ms("own", 0),
        "base_ttft_ms": ms("base", 0),
        "bytes": size.read_bytes / built[ways["base"]][2].read_bytes,
        "read_bytes": size.read_bytes,
        "compile_seconds": {who: one.compile_seconds for who, one in compiled.items()},
        "compile_cached": {who: one.cached for who, one in compiled.items()},
        "xla_options": options,
    }


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """The time of one decode step by kernel, and whether XLA ran it in CUDA graphs."""
    from flora_jax.analysis import kernel_profile
    from flora_jax.analysis.timing import Setting, compile_programs

    name, options, kernels = _variant(args)
    config, built = _served(args, [(name, kernels)])
    model, params, size = built[name, kernels]
    setting = Setting(args.prompt_length, args.batch_size, args.new_tokens)
    prompts = setting.prompts(config)
    steps = args.new_tokens - 2
    found = {}
    for graphs in (False, True):
        extra = options | (kernel_profile.GRAPHS_TOO if graphs else {})
        programs = compile_programs(model, params, setting, options=extra)
        programs.run(params, prompts)
        state, _ = programs.start(params, prompts)
        state, _ = programs.go_on(params, state, 2)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            with kernel_profile.traced(Path(folder)):
                _, tpot = programs.go_on(params, state, args.new_tokens)
            found[graphs] = {"seconds": time.perf_counter() - start, "tpot_ms": 1e3 * tpot}
            if graphs:
                found[graphs]["graph_launches"] = (
                    kernel_profile.graph_launches(Path(folder)) / steps
                )
            else:
                events = kernel_profile.device_events(Path(folder))
    summary = kernel_profile.summarise(events, steps, config.num_hidden_layers)
    print(kernel_profile.table(summary))
    return {
        "method": args.method,
        "rank": size.rank,
        "prompt_length": args.prompt_length,
        "batch_size": args.batch_size,
        "read_bytes": size.read_bytes,
        "profiled_tpot_ms": found[False]["tpot_ms"],
        "graphs_tpot_ms": found[True]["tpot_ms"],
        "graph_launches_a_step": found[True]["graph_launches"],
        **summary,
    }


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps on packed rows: tokens/s, peak memory, share of the device's product rate."""
    import jax

    from experiments.stepping import make_batch
    from flora_jax.analysis import comparison

    config = LlamaConfig.preset(args.preset)
    adapter_config = None
    if args.method != "fft":
        found = comparison.adapter_configs([args.method], config, args.rank, equal_parameters=True)
        adapter_config = found[args.method]
    batch = make_batch(args.rows, args.length, config.vocab_size, segments=4)
    step = _stepper(args, config, adapter_config)
    taken = []
    losses = []
    start = time.perf_counter()
    for _ in range(3 + args.rounds):
        begin = time.perf_counter()
        losses.append(step(batch))
        taken.append(time.perf_counter() - begin)
    tokens = args.rows * args.length
    seconds = statistics.median(taken[3:])
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    # Forward, backward to the activations, and, if all weights train, backward to these.
    passes = 2 if adapter_config else 3
    flops = 2 * passes * matmul_parameters(config)
    rate = device_rates()["bf16_tflop_per_s"]
    return {
        "method": args.method,
        "rank": adapter_config and adapter_config.rank,
        "rows": args.rows,
        "length": args.length,
        "remat": args.remat,
        "first_step_seconds": taken[0],
        "step_seconds": taken[3:],
        "tokens_per_second": tokens / seconds,
        "losses": losses,
        "peak_gb": None if memory is None else memory / 1e9,
        "flops_per_token": flops,
        "bf16_tflop_per_s": rate,
        "share_of_product_rate": flops * tokens / seconds / 1e12 / rate,
        "seconds": time.perf_counter() - start,
    }


def _stepper(args: argparse.Namespace, config: Any, adapter_config: Any) -> Callable[[Any], float]:
    """A function that does one step of an adapter, or of all weights (adapter_config None). What
    trains is float32, as in flora_jax.train."""
    import jax
    import jax.numpy as jnp
    import optax

    from experiments.stepping import stepper
    from flora_jax.adapters import init_adapter
    from flora_jax.models.llama import Llama, init_base

    dtype = jnp.dtype(args.dtype)
    if adapter_config:
        frozen = {"params": init_base(jax.random.key(0), config, dtype)}
        trainable = {"adapter": init_adapter(jax.random.key(1), config, adapter_config)}
    else:
        frozen = {}
        trainable = {"params": init_base(jax.random.key(0), config, jnp.float32)}
    model = Llama(config, adapter_config, dtype=dtype, param_dtype=dtype, remat=args.remat)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    chunk = args.rows * args.length if jax.default_backend() == "cpu" else 4096
    return stepper(model, optimizer, trainable, frozen, seed=2, chunk_tokens=chunk)


def matmul_parameters(config: Any) -> int:
    """The size of the matrices that every token is multiplied with, the unembedding included."""
    layer = sum(d_in * d_out for d_in, d_out in config.widths.values())
    return config.num_hidden_layers * layer + config.hidden_size * config.vocab_size


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Launches a layer as XLA plans them without the device, and as the profiles counted them."""
    from flora_jax.adapters import AdapterConfig
    from flora_jax.analysis.compilers import require_compiler
    from flora_jax.analysis.launch_plan import MODES, plan_model
    from flora_jax.analysis.targets import TARGETS
    from flora_jax.analysis.variants import get_variant

    if args.target not in TARGETS:
        raise UserError(f"--target {args.target!r} is unknown; {near_misses(args.target, TARGETS)}")
    config = LlamaConfig.preset(args.preset)
    real = {}
    for file in sorted(args.results.glob(f"profile-{args.preset}-*.json")):
        one = read_json(file)
        real[one["method"]] = one
    try:
        require_compiler()
    except UserError as error:
        return {"left_out": str(error), "rows": []}
    rows = []
    for name in args.methods.split(","):
        method = get_variant(name).method
        rank = real.get(name, {}).get("rank") or args.rank
        adapter_config = None if method is None else AdapterConfig(method, rank)
        for mode in MODES:
            settings = {"target": args.target, "mode": mode, "batch": args.batch_size}
            layer = plan_model(name, config, adapter_config, dtype=args.dtype, **settings)["layer"]
            planned = f"planned, {mode}"
            rows.append({"method": name, "mode": planned, "launches_a_layer": layer["launches"]})
        if name in real:
            # The few launches outside the layers are counted as theirs.
            launches = real[name]["events"] / real[name]["layers"]
            rows.append({"method": name, "mode": "measured", "launches_a_layer": launches})
    return {"target": args.target, "batch_size": args.batch_size, "rows": rows}


CELLS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "device": device,
    "tests": tests,
    "latency": latency,
    "profile": profile,
    "train": train,
    "plan": plan,
}


FLAGS: Flags = {
    "--preset": dict(default="llama3.2-1b", help="architecture"),
    "--method": dict(default="base", help="way of serving, or method to train"),
    "--methods": dict(default="base,lora,ffba", help="of plan, comma-separated"),
    "--rank": dict(type=int, default=32, help="of ffba; others at equal parameters"),
    "--dtype": dict(default="bfloat16"),
    "--prompt_length": dict(type=int, default=128),
    "--batch_size": dict(type=int, default=1),
    "--new_tokens": dict(type=int, default=129),
    "--rounds": dict(type=int, default=10),
    "--rows": dict(type=int, default=8, help="of a training batch"),
    "--length": dict(type=int, default=1024, help="of a training row"),
    "--remat": dict(default="products"),
    "--target": dict(default="h100", help="of plan"),
    "--results": dict(type=Path, help="of plan: folder with the profiles"),
    "--out": dict(type=Path, required=True, help="the JSON file"),
}


def write(
    args: argparse.Namespace,
    module: str,
    argv: list[str],
    result: dict[str, Any],
    packages: tuple[str, ...] = (),
) -> None:
    """Writes the cell's file: the result, and where and with what it was measured."""
    from flora_jax.analysis.results import provenance

    words = [word.replace(str(args.out), args.out.name) for word in argv]
    about = provenance(module, words, packages)
    common = {
        "schema_version": SCHEMA_VERSION,
        "cell": args.cell,
        "device": about["device"],
        "preset": args.preset,
        "dtype": args.dtype,
        "versions": about["versions"],
        "command": about["command"],
        "date": about["date"],
        "commit": about["commit"],
    }
    write_json(args.out, common | result)


def run_cell(
    cells: dict[str, Callable[[argparse.Namespace], dict[str, Any]]],
    module: str,
    what: str,
    argv: list[str],
    packages: tuple[str, ...] = (),
) -> None:
    """Parses the flags, measures the cell and writes its file. what: a docstring, for --help."""
    cell = dict(help=" or ".join(cells))
    args = parse([module, *argv], f"python -m {module}", what, {"cell": cell, **FLAGS})
    if args.cell not in cells:
        raise UserError(f"cell {args.cell!r} is unknown; {near_misses(args.cell, cells)}")
    for flag in ("rank", "prompt_length", "batch_size", "rounds", "rows", "length"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} must be a positive integer")
    if args.new_tokens < 4:
        raise UserError(f"--new_tokens {args.new_tokens} must be at least 4")
    check_writable(args.out, "--out")
    write(args, module, argv, cells[args.cell](args), packages)


def main(argv: list[str]) -> None:
    """The command."""
    if argv[1:2] == ["plan"]:
        # Or XLA would plan for the device that is here.
        os.environ["JAX_PLATFORMS"] = "cpu"
    run_cell(CELLS, "experiments.gpu_cells", __doc__, argv[1:])


if __name__ == "__main__":
    run_command(main)
