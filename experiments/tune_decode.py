"""Finds the fastest block sizes of a decode step's products on this GPU.

    python -m experiments.tune_decode --preset llama3.2-1b --out DIR/blocks --table TABLE

For each product of a layer, with an adapter riding in it, and for the logits: first columns of a
program and rows of a tile, then tiles on their way at once, then warps, each with the best of what
was tried before. A program runs the product over arrays that the cache cannot hold, one after
another. Candidates take turns with the default, and must give what it gives. Those that are faster
once more in the end go into TABLE, which is read where it stands as
flora_jax/models/decode_blocks.json. Without a GPU kernels are interpreted: that shows that the
command works, nothing of speed, and makes no table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.flags import Flags, parse
from experiments.gpu_cells import device_rates
from experiments.report import beside, stored
from flora_jax.adapters import AdapterConfig, Scaled, gpu_layout
from flora_jax.analysis.results import about_process, header, percent, table
from flora_jax.errors import check_writable, positive_integers, require, run_command
from flora_jax.files import keep_programs, write_json
from flora_jax.models.config import DECODE_ROWS, LlamaConfig
from flora_jax.models.decode_blocks import Blocks, Shape, default_blocks, read_table, replaced
from flora_jax.models.decode_layer import FEW_PARTS
from flora_jax.models.decode_product import (
    Behind,
    Columns,
    Gated,
    Normed,
    Parts,
    Term,
    decode_product,
)

FLAGS: Flags = {
    "--preset": dict(default="llama3.2-1b"),
    "--rank": dict(type=int, default=32, help="of the ffba that rides"),
    "--batch_sizes": dict(default="1,8,16", help="one row, up to 8 and up to 16 have entries"),
    "--quantization": dict(choices=("none", "int8", "fp8"), default="none"),
    "--straight": dict(action="store_true", help="arrays that are not transposed"),
    "--minutes": dict(type=float, default=6.0, help="begins no product after so many"),
    "--out": dict(type=Path, required=True, help="write OUT.json and OUT.md"),
    "--table": dict(help="a table, in which entries of these shapes are replaced"),
}
_DTYPES = {"none": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
_COLUMNS = (16, 32, 64)
_TILES = (4096, 8192, 16384)  # bytes
_STAGES = (2, 3, 4, 5, 6)
_WARPS = (1, 2, 4, 8)
_ALIKE = 0.02  # so far, as a share of the largest, a product may be from the default's
_GAIN = 0.97  # of the default's time: what is not below it is no entry
_BYTES = 2**28  # of the arrays that take turns
_SECONDS = 2e-2  # that a program runs, so that starting it is no part of its time
_ROUNDS = 5

Step = Callable[..., jax.Array]  # (x, array, blocks) to the product


@dataclasses.dataclass(frozen=True)
class Task:
    """A product to find blocks for: `step` computes it of an x of the width `reads`, and `then` the
    next x of both."""

    name: str
    shape: Shape
    reads: int
    step: Step
    then: Callable[[jax.Array, jax.Array], jax.Array] = lambda x, y: y

    @property
    def bytes(self) -> int:
        """Of its array."""
        return self.shape.d_in * self.shape.d_out * jnp.dtype(self.shape.dtype).itemsize


def tasks(args: argparse.Namespace, batch: int) -> Iterator[Task]:
    """The products of a layer with ffba in it, and the logits."""
    config = LlamaConfig.preset(args.preset)
    adapter = AdapterConfig("ffba", args.rank)
    coded = args.quantization != "none"
    layout = dataclasses.replace(gpu_layout(coded), adapters=1, rank=args.rank)
    D, F = config.hidden_size, config.intermediate_size
    draw = functools.partial(jax.random.normal, jax.random.key(0), dtype=jnp.bfloat16)
    product = functools.partial(decode_product, interpret=jax.default_backend() != "gpu")
    term = functools.partial(Term, transposed=not args.straight)
    tied = config.tie_word_embeddings

    def task(name: str, step: Step, added: bool = False) -> Task:
        d_in, d_out = layout.fused_shape(config.widths, adapter, name)
        dtype = jnp.dtype(_DTYPES[args.quantization]).name
        shape = Shape(batch, d_in, d_out, dtype, not args.straight, added=added)
        return Task(name, shape, d_out, functools.partial(step, d_out))

    def read(d_out: int, x: jax.Array, kernel: Any, blocks: Blocks) -> jax.Array:
        normed = Normed(Columns(x, 0, D), scale, D, 1e-5)
        return product([term(normed, kernel)], d_out, blocks=blocks)

    def write(name: str, what: Any, z: Columns) -> Step:
        rows = config.widths[name][0]

        def step(d_out: int, x: jax.Array, kernel: Any, blocks: Blocks) -> jax.Array:
            terms = [term(what, kernel), term(z, kernel, row=rows)]
            return product(terms, d_out, Behind(residual=x), blocks=blocks)

        return step

    def logits(x: jax.Array, kernel: jax.Array, blocks: Blocks) -> jax.Array:
        terms = [Term(x, kernel, transposed=tied)]
        return product(terms, config.vocab_size, dtype=jnp.float32, blocks=blocks)

    def back(name: str) -> int:
        return adapter.slots[name].backward_rank

    scale = draw((D,))
    heads = config.widths["o"][0]
    z = Columns(draw((batch, back("o"))), 0, back("o"))
    N = config.num_attention_heads
    # The most that o reads: a serving program must not need more shared memory.
    attended = Columns(draw((batch, heads)), 0, heads)
    if batch == 1:
        sums, peaks, totals = (
            jnp.abs(draw((FEW_PARTS, 1, N, *more)).astype(jnp.float32))
            for more in ((heads // N,), (), ())
        )
        attended = Parts(sums, peaks, totals, jnp.bfloat16)
    y = draw((batch, 2 * F + max(2 * args.rank, back("down"))))
    gate_add, up_add = (Columns(y, 2 * F + i * args.rank, args.rank) for i in range(2))
    yield task("qkv", read)
    yield task("o", write("o", attended, z), added=batch == 1)
    yield task("gate_up", read)
    gated = Gated(y, F, gate_add, up_add)
    yield task("down", write("down", gated, Columns(y, 2 * F, back("down"))), added=True)
    shape = Shape(batch, D, config.vocab_size, "bfloat16", tied)
    yield Task("logits", shape, D, logits, lambda x, y: (x + y[:, :D]).astype(x.dtype))


class Trials:
    """Timed programs of a task, by their blocks; None for what cannot be compiled or run, or gives
    something else than the default."""

    def __init__(self, task: Task, pool: ThreadPoolExecutor):
        self.task = task
        self.pool = pool
        self.on_gpu = jax.default_backend() == "gpu"
        count = math.ceil(_BYTES / task.bytes) if self.on_gpu else 1
        self.kernels = [_array(task.shape, seed) for seed in range(count)]
        self.x = jax.random.normal(jax.random.key(9), (task.shape.batch, task.reads), jnp.bfloat16)
        self.default = default_blocks(task.shape)
        self.loops = 1
        self.expected: np.ndarray | None = None
        self.programs: dict[Blocks, Any] = {}
        self._add([self.default])
        require(
            self.programs[self.default] is not None,
            f"{task.name}: the default {self.default} does not run here",
        )
        if self.on_gpu:
            self.loops = max(1, math.ceil(_SECONDS / self._seconds(self.default)))
            self.programs.clear()
            self._add([self.default])

    def _add(self, blocks: Sequence[Blocks]) -> None:
        """The programs of blocks that have not been tried yet."""
        new = [one for one in dict.fromkeys(blocks) if one not in self.programs]
        compiled = self.pool.map(self._program, new)
        self.programs |= {
            one: self._checked(one, program) for one, program in zip(new, compiled, strict=True)
        }

    def _program(self, blocks: Blocks) -> Any:
        step = jax.jit(functools.partial(self.task.step, blocks=blocks))

        def run(x: jax.Array, kernels: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
            def body(_: int, x: jax.Array) -> jax.Array:
                for kernel in kernels:
                    x = self.task.then(x, step(x, kernel))
                return x

            return step(x, kernels[0]), jax.lax.fori_loop(0, self.loops, body, x)

        # A block size that the compiler refuses, as for its shared memory, is no candidate.
        return self._tried(blocks, lambda: jax.jit(run).lower(self.x, self.kernels).compile())

    def _checked(self, blocks: Blocks, program: Any) -> Any:
        """The program, if its product is what the default's is."""
        if program is None:
            return None
        run = self._tried(blocks, lambda: program(self.x, self.kernels)[0].astype(jnp.float32))
        if run is None:
            return None
        found = np.asarray(run)
        if self.expected is None:
            self.expected = found
        if np.abs(found - self.expected).max() <= _ALIKE * np.abs(self.expected).max():
            return program
        print(f"{self.task.name}: {blocks}: another result than the default's")
        return None

    def _tried(self, blocks: Blocks, attempt: Callable[[], Any]) -> Any:
        try:
            return jax.block_until_ready(attempt())
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            print(f"{self.task.name}: {blocks}: {str(error).splitlines()[0][:120]}")
            return None

    def _seconds(self, blocks: Blocks) -> float:
        """A run's."""
        start = time.perf_counter()
        jax.block_until_ready(self.programs[blocks](self.x, self.kernels))
        return time.perf_counter() - start

    def times(self, blocks: Sequence[Blocks]) -> dict[Blocks, float]:
        """Seconds of one product by its blocks, those of the default among them, medians of
        interleaved rounds."""
        blocks = list(dict.fromkeys([self.default, *blocks]))
        self._add(blocks)
        blocks = [one for one in blocks if self.programs[one] is not None]
        rounds = [{one: self._seconds(one) for one in blocks} for _ in range(_ROUNDS)]
        products = 1 + self.loops * len(self.kernels)
        return {one: statistics.median(found[one] for found in rounds) / products for one in blocks}

    def best(self) -> tuple[Blocks, float, float]:
        """The fastest blocks, their seconds and the default's, from a last trial of the two."""
        itemsize = jnp.dtype(self.task.shape.dtype).itemsize
        best = self.default
        stages = [
            [{"columns": n, "rows": t // n // itemsize} for n in _COLUMNS for t in _TILES],
            [{"stages": n} for n in _STAGES],
            [{"warps": n} for n in _WARPS],
        ]
        for changes in stages:
            found = self.times([best, *(best._replace(**change) for change in changes)])
            best = min(found, key=found.get)
        found = self.times([best])
        return best, found[best], found[self.default]


def _array(shape: Shape, seed: int) -> jax.Array | Scaled:
    """A random array of a product; of codes, with scales that keep its values small."""
    size = (shape.d_out, shape.d_in) if shape.transposed else (shape.d_in, shape.d_out)
    drawn = jax.random.normal(jax.random.key(seed), size, jnp.bfloat16)
    if shape.dtype == "bfloat16":
        return drawn * shape.d_in**-0.5
    codes = (drawn * 30).astype(shape.dtype)
    scale = jnp.full(shape.d_out, shape.d_in**-0.5 / 30)
    return Scaled(codes, scale, jnp.ones(shape.d_in), shape.transposed)


def tune(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each product and batch size."""
    begun = time.monotonic()
    batches = positive_integers("--batch_sizes", args.batch_sizes)
    todo = [task for batch in batches for task in tasks(args, batch)]
    with ThreadPoolExecutor() as pool:
        for task in tqdm(todo, disable=None):
            if time.monotonic() - begun > 60 * args.minutes:
                print(f"--minutes {args.minutes:g} are over before {task.name}")
                return
            best, seconds, default = Trials(task, pool).best()
            yield {
                "name": task.name,
                **task.shape._asdict(),
                **best._asdict(),
                "us": 1e6 * seconds,
                "default_us": 1e6 * default,
                "gb_per_s": task.bytes / seconds / 1e9,
            }


def entries(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as entries of a table."""
    device = jax.devices()[0].device_kind
    fields = (*Shape._fields, *Blocks._fields)
    return [{"device": device, **{field: row[field] for field in fields}} for row in rows]


def faster(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are worth an entry."""
    return [row for row in rows if row["us"] <= _GAIN * row["default_us"]]


def markdown(rows: Sequence[dict[str, Any]], copied: float, about: dict[str, Any]) -> str:
    """The table of what was found. copied: the device's copy rate, GB/s."""
    heads = ["product", "batch", "array", "columns, rows, stages, warps", "µs", "of the default's"]
    lines = [
        [
            row["name"],
            str(row["batch"]),
            f"{row['d_in']} × {row['d_out']} {row['dtype']}",
            ", ".join(str(row[field]) for field in Blocks._fields),
            f"{row['us']:.2f}",
            f"{row['us'] / row['default_us']:.3f}",
            percent(row["gb_per_s"] / copied),
        ]
        for row in rows
    ]
    title = header("Block sizes of a decode step's products", about)
    return "\n".join([title, *table([*heads, "of the copy rate"], lines)]) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.tune_decode", __doc__, FLAGS)
    most = max(positive_integers("--batch_sizes", args.batch_sizes))
    require(most <= DECODE_ROWS, f"--batch_sizes {most}: our products take up to {DECODE_ROWS}")
    require(args.minutes > 0, f"--minutes {args.minutes:g} must be more than 0")
    require(
        not args.table or jax.default_backend() == "gpu",
        f"--table {args.table}: there is no GPU here to measure",
    )
    check_writable(beside(args.out, ".json"), "--out")
    file = Path(args.table or "")
    old: list[dict[str, Any]] = []
    if args.table:
        check_writable(file, "--table")
        with stored(file):
            old = replaced(read_table(file), [], [])
    keep_programs()
    about = about_process()
    copied = device_rates()["copy_gb_per_s"]
    rows: list[dict[str, Any]] = []
    for row in tune(args):
        rows.append(row)
        text = markdown(rows, copied, about)
        write_json(
            beside(args.out, ".json"),
            {"provenance": about, "copy_gb_per_s": copied, "rows": rows},
        )
        beside(args.out, ".md").write_text(text)
        if args.table:
            write_json(file, replaced(old, entries(rows), entries(faster(rows))))
    print(text)


if __name__ == "__main__":
    run_command(main)
