"""Time and memory of exporting a run at a model's full shapes, with random weights.

    python -m experiments.export_memory --preset llama3.2-1b --out experiments/results/export_memory

Trains lora and ffba for one step, then exports each format in a process of its own. Memory is the
growth of anonymous memory from before the base is made to the peak; it stands beside the bytes of
the base and its largest tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from experiments.flags import Flags, parse
from experiments.process import answer, memory
from flora_jax.errors import check_writable, run_command
from flora_jax.models.config import DTYPES, LlamaConfig

CASES = (("lora", "merged"), ("lora", "peft"), ("ffba", "transformers"))

FLAGS: Flags = {
    "--preset": dict(default="llama3.2-1b"),
    "--dtype": dict(choices=DTYPES, default="float32"),
    "--out": dict(type=Path, help="write OUT.json and OUT.md"),
    # workdir, format and directory of an export in this process
    "--measure": dict(nargs=3, help=argparse.SUPPRESS),
}


def measure(workdir: str, form: str, out: str) -> dict[str, float]:
    """Seconds and growth of memory (bytes) of one export, loading the base included. Call it alone
    in a process."""
    from flora_jax.training.trained import export_run

    # A tiny export first: imports and set-up, the same for every size, are not measured.
    with tempfile.TemporaryDirectory() as folder:
        _train("tiny", Path(workdir).name, "float32", Path(folder) / "run")
        export_run(Path(folder) / "run", form, Path(folder) / "out")
    done = threading.Event()
    start = memory("RssAnon")
    peak = 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    clock = time.perf_counter()
    export_run(Path(workdir), form, Path(out))
    seconds = time.perf_counter() - clock
    done.set()
    watcher.join()
    return {"seconds": seconds, "growth": peak - start}


def _train(preset: str, method: str, dtype: str, workdir: Path) -> None:
    fields = {
        "model.preset": preset,
        "model.weights": "random",
        "model.param_dtype": dtype,
        "adapter.method": method,
        "adapter.rank": 32,
        "train.steps": 1,
        "train.batch_size": 1,
        "train.eval_every": 0,
        "optim.learning_rate": 1e-2,
    }
    flags = ["--config", "configs/tiny.py", "--workdir", str(workdir)]
    flags += [f"--config.{field}={value}" for field, value in fields.items()]
    subprocess.run(
        [sys.executable, "-m", "flora_jax.train", *flags], check=True, stdout=subprocess.DEVNULL
    )


def export_alone(folder: str, method: str, form: str) -> dict[str, Any]:
    """`measure` of the run in FOLDER/METHOD, in a process of its own."""
    flags = ["--measure", f"{folder}/{method}", form, f"{folder}/{method}-{form}"]
    return {"method": method, "format": form, **answer("experiments.export_memory", flags)}


def markdown(
    args: argparse.Namespace, about: dict[str, Any], base: int, largest: int, results: Any
) -> str:
    """The table. base, largest: bytes of the base and of its largest tensor."""
    from flora_jax.analysis.results import header, table

    rows = [
        [
            one["method"],
            one["format"],
            f"{one['growth'] / 1e9:.2f}",
            f"{one['growth'] / (base + largest):.3f}",
            f"{one['seconds']:.0f}",
        ]
        for one in results
    ]
    lines = [
        header("Memory and time of an export", about),
        f"{args.preset}, random weights, {args.dtype}: the base is {base / 1e9:.2f} GB, its "
        f"largest tensor {largest / 1e9:.2f} GB. Growth of anonymous memory from before the "
        "base is made to the peak.\n",
        *table(["method", "format", "growth GB", "of base + largest tensor", "seconds"], rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.export_memory", __doc__, FLAGS)
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    # Not above: the processes whose memory is measured do without them.
    from experiments.report import beside, write_result
    from flora_jax.analysis.results import about_process
    from flora_jax.models.hf import hf_shapes

    config = LlamaConfig.preset(args.preset)
    if args.out:
        check_writable(beside(args.out, ".json"), "--out")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for method in dict.fromkeys(method for method, _ in CASES):
            _train(args.preset, method, args.dtype, Path(folder) / method)
            print(f"{method} trained", file=sys.stderr)
        for method, form in CASES:
            results.append(export_alone(folder, method, form))
            print(results[-1], file=sys.stderr)
    width = 2 if args.dtype == "bfloat16" else 4
    tensors = [width * math.prod(shape) for shape in hf_shapes(config).values()]
    base = sum(tensors)
    largest = max(tensors)
    about = about_process("safetensors")
    text = markdown(args, about, base, largest, results)
    write_result(args, about, text, base_bytes=base, largest_bytes=largest, results=results)


if __name__ == "__main__":
    run_command(main)
