"""Measures everything on a GPU within some minutes, the most valuable first.

    python -m experiments.gpu_report --minutes 9 --out experiments/results/gpu/NAME
    python -m experiments.gpu_report --minutes 4 --device cpu --preset tiny --out runs/rehearsal

A cell is one measurement in a process of its own, with a time limit of its own. It writes its JSON
when it ends, in a folder named after the device. The same command resumes the report, on another
machine with `--resume OUT/*.tar`; finished cells are not repeated, and those that crashed or hung
are tried again last. Results and logs are packed into OUT/report.tar; compiled programs and XLA's
choice of kernels, which are kept in OUT/cache, into OUT/cache-1.tar and on, of 15 MB each. Weights
are random: no network, no data and no files are needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.flags import Flags, parse
from experiments.gpu_cells import IN_GRAPH, IN_KERNELS, NO_MERGER
from flora_jax.errors import Stopped, UserError, check_writable, run_command
from flora_jax.files import read_json, write_json
from flora_jax.models.config import DECODE_ROWS, LlamaConfig

SCHEMA_VERSION = 1
RESULT = "report.json"
PACKED = "report.tar"
CACHE = "cache"
_PART = 15e6  # bytes of a part of the packed cache
_CLOSING = 15  # seconds kept for the table and the tar
_LEAST = 8  # seconds; with fewer left no cell is begun
_GRACE = 5  # seconds between asking a cell to end and killing it


@dataclasses.dataclass(frozen=True)
class Cell:
    """name: of its files; command: after `python -m`, without --out; limit: seconds."""

    name: str
    command: tuple[str, ...]
    limit: int


@dataclasses.dataclass(frozen=True)
class Scale:
    """How many cells there are, and how large: on a GPU, or to rehearse on a CPU."""

    presets: tuple[str, ...]
    methods: tuple[str, ...]  # of every table of latencies
    others: tuple[str, ...]  # of the first table alone
    profiled: tuple[str, ...]
    torch: tuple[str, ...]  # ours is timed before and after the first
    dtype: str
    rank: int
    prompt_length: int
    new_tokens: int
    rounds: int
    rows: int
    length: int
    settings: tuple[tuple[int, int], ...]  # batch size and prompt length of the wider table
    banks: tuple[tuple[int, ...], int]  # adapters, batch size
    large: tuple[
        str, ...
    ]  # architectures for our kernels alone; without any there are none of these
    patience: float  # factor of the cells' limits, which are for a GPU


GPU = Scale(
    presets=("llama3.2-1b", "llama3.2-3b"),
    methods=("base", "lora", "ffba", "ffba_qg_add", "zflora"),
    others=(
        *(f"{method}{IN_KERNELS}" for method in ("base", "pf_lora", "ffba", "zflora")),
        *("fpa", "pf_lora", "lora_7", "base_7", "ffa", f"lora{NO_MERGER}", f"base{IN_GRAPH}"),
    ),
    profiled=("base", "lora", "ffba", f"base{IN_KERNELS}", f"ffba{IN_KERNELS}"),
    torch=("peft", "bare", "ffba", "zflora"),
    dtype="bfloat16",
    rank=32,
    prompt_length=128,
    new_tokens=129,
    rounds=10,
    rows=8,
    length=1024,
    settings=((8, 512), (32, 512), (8, 2048), (32, 2048), (1, 512), (1, 2048)),
    banks=((1, 4, 16), 32),
    large=("llama3.1-8b",),
    patience=1.0,
)
# A rehearsal has cells of every kind but those of our kernels, which a CPU does not run.
CPU = Scale(
    presets=("tiny",),
    methods=("base", "lora", "ffba"),
    others=("lora_7", f"lora{NO_MERGER}", f"base{IN_GRAPH}"),
    profiled=("ffba",),
    torch=("peft", "ffba"),
    dtype="float32",
    rank=8,
    prompt_length=8,
    new_tokens=5,
    rounds=2,
    rows=2,
    length=64,
    settings=((2, 16),),
    banks=((1, 2), 2),
    large=(),
    patience=0.25,
)


def _flags(**values: Any) -> tuple[str, ...]:
    return tuple(word for name, value in values.items() for word in (f"--{name}", str(value)))


def _measure(
    scale: Scale, kind: str, preset: str, method: str, setting: tuple[int, int], limit: int
) -> Cell:
    """A cell of one way of serving. kind: latency, profile or torch_latency; setting: batch size
    and prompt length."""
    batch, prompt = setting
    where = f"-b{batch}-p{prompt}" if kind.endswith("latency") else ""
    module = "peers" if kind.startswith("torch") else "cells"
    flags = _flags(preset=preset, method=method, dtype=scale.dtype, rank=scale.rank)
    flags += _flags(rounds=scale.rounds, batch_size=batch, prompt_length=prompt)
    flags += _flags(new_tokens=scale.new_tokens)
    command = (f"experiments.gpu_{module}", kind.removeprefix("torch_"), *flags)
    return Cell(f"{kind}-{preset}-{method}{where}", command, limit)


def _train(scale: Scale, method: str, torch: bool = False) -> Cell:
    module = "cells"
    name = "train"
    if torch:
        module = "peers"
        name = "torch_train"
    preset = scale.presets[0]
    flags = _flags(preset=preset, method=method, dtype=scale.dtype, rank=scale.rank)
    flags += _flags(rounds=scale.rounds, rows=scale.rows, length=scale.length)
    return Cell(f"{name}-{preset}-{method}", (f"experiments.gpu_{module}", "train", *flags), 240)


def _others(scale: Scale, results: Path) -> list[Cell]:
    """The other cells of the first architecture: the launch plan, the bank of adapters, the switch
    between two, the quantised base; banks and codes in our kernels."""
    first = scale.presets[0]
    sizes = _flags(dtype=scale.dtype, rank=scale.rank)
    plan = ("experiments.gpu_cells", "plan", *_flags(preset=first), *sizes)
    plain = (*_flags(model="random", preset=first), *sizes, *_flags(rounds=scale.rounds))
    adapters, batch = scale.banks
    few = _flags(prompt_length=scale.prompt_length, new_tokens=scale.new_tokens)
    banks = [
        (f"bank-{first}-{count}", ("experiments.bank", *plain, *few, *_flags(adapters=count)))
        for count in adapters
    ]
    rows = _flags(batch_size=batch)
    turn = _flags(turn_tokens=scale.new_tokens - 1)  # as a latency cell
    quantised = ("experiments.quantized_latency", *plain, *few, *turn, *_flags(batch_sizes=1))
    out = [
        Cell(f"plan-{first}", (*plan, *_flags(results=results)), 240),
        *(Cell(name, (*bank, *rows), 180) for name, bank in banks),
        Cell(f"switching-{first}", ("experiments.switching", *plain), 180),
        Cell(f"quantized-{first}", quantised, 240),
    ]
    if scale.large:
        ours = _flags(decode_kernels="layer")
        most = _flags(batch_size=DECODE_ROWS)
        out += [
            *(Cell(f"{name}{IN_KERNELS}", (*bank, *most, *ours), 180) for name, bank in banks),
            Cell(f"quantized-{first}{IN_KERNELS}", (*quantised, *ours), 240),
        ]
    return out


def _alone(scale: Scale, preset: str, limit: int) -> list[Cell]:
    """An architecture's cells at batch 1, those of the table first."""
    parts = (("latency", scale.methods), ("profile", scale.profiled), ("latency", scale.others))
    return [
        _measure(scale, kind, preset, method, (1, scale.prompt_length), limit)
        for kind, methods in parts
        for method in methods
    ]


def cells(scale: Scale, results: Path) -> list[Cell]:
    """All cells, the most valuable first. results: the folder of this device."""
    first = scale.presets[0]
    alone = (1, scale.prompt_length)
    out = [
        Cell("device", ("experiments.gpu_cells", "device"), 60),
        Cell("tests", ("experiments.gpu_cells", "tests"), 240),
    ]
    small, *others = (
        _alone(scale, preset, 240 - 90 * (preset == first)) for preset in scale.presets
    )
    out += small
    # Of the larger ones the table, and what else there is of them at the end.
    out += [cell for one in others for cell in one[: len(scale.methods)]]
    # Ours once more after torch's first, to see whether the device has changed meanwhile.
    ours = _measure(scale, "latency", first, "ffba", alone, 150)
    again = dataclasses.replace(ours, name=ours.name.replace("ffba", "ffba_again"))
    theirs = [_measure(scale, "torch_latency", first, method, alone, 240) for method in scale.torch]
    out += [theirs[0], again, *theirs[1:]]
    out += [_train(scale, "lora"), _train(scale, "ffba"), _train(scale, "peft", torch=True)]
    plan, *last = _others(scale, results)
    out += [_train(scale, "fft"), plan]
    out += [
        _measure(scale, "latency", first, method, setting, 150)
        for setting in scale.settings
        for method in scale.methods
    ]
    out += last
    out += [cell for one in others for cell in one[len(scale.methods) :]]
    out += [
        _measure(scale, "latency", preset, method, alone, 400)
        for preset in scale.large
        for method in ("base", f"base{IN_KERNELS}", f"ffba{IN_KERNELS}")
    ]
    patient = [dataclasses.replace(cell, limit=round(scale.patience * cell.limit)) for cell in out]
    assert len({cell.name for cell in patient}) == len(patient)
    return patient


# ----------------------------------------------------------------------------------- running


def _end(process: subprocess.Popen) -> None:
    """Ends a cell and all processes that it has started."""
    for number, wait in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
            return


def run_cell(
    cell: Cell, results: Path, logs: Path, seconds: float, environment: Mapping[str, str]
) -> str:
    """Runs a cell for at most `seconds`. Returns "done", or what became of it; its output is in the
    logs."""
    out = results / f"{cell.name}.json"
    log = logs / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", *cell.command, "--out", str(out)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            _end(process)
    if code == 0 and out.is_file():
        return "done"
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    return f"ended with {code}: {''.join(last)[:200]}"


def run_cells(
    asked: Sequence[Cell],
    results: Path,
    logs: Path,
    deadline: float,
    environment: Mapping[str, str],
    before: Mapping[str, str],
) -> Iterator[tuple[Cell, str]]:
    """Yields each cell with what became of it. Finished cells are not run again, and those that
    failed `before` come last, as those of our kernels do once one of them failed. deadline: by
    `time.monotonic()`."""
    waiting = [cell for cell in asked if not (results / f"{cell.name}.json").is_file()]
    tried = [cell for cell in waiting if cell.name in before]
    fresh = [cell for cell in waiting if cell.name not in before]
    for cell in asked:
        if cell not in waiting:
            yield cell, "done"
    queue = [*fresh, *tried]
    while queue:
        cell = queue.pop(0)
        left = deadline - time.monotonic()
        if left < _LEAST:
            yield cell, "not begun"
            continue
        said = run_cell(cell, results, logs, min(cell.limit, left), environment)
        if said.startswith("stopped") and left < cell.limit:
            said = "out of time"  # no failure of its own
        elif said != "done" and IN_KERNELS in cell.name:
            queue.sort(key=lambda one: IN_KERNELS in one.name)
        yield cell, said


def environment(device: str, cache: Path) -> dict[str, str]:
    """The environment of a cell: where JAX, XLA and torch keep what they compiled and chose."""
    keep = {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # XLA's choice of kernels goes beside the programs.
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "xla_gpu_per_fusion_autotune_cache_dir",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    out = {**os.environ, **keep}
    if device == "cpu":
        out |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return out


def device_kind(device: str, environment: Mapping[str, str]) -> str:
    """The device's own name. Raises UserError if JAX has none of the kind that is asked for."""
    ask = "import jax; d = jax.devices()[0]; print(); print(d.platform, d.device_kind, sep='|')"
    done = subprocess.run(
        [sys.executable, "-c", ask], env=dict(environment), capture_output=True, text=True
    )
    last = "".join(done.stdout.splitlines()[-1:])
    platform, _, kind = last.partition("|")
    if done.returncode or platform != device:
        found = f"JAX finds {kind or 'none'}"
        raise UserError(f"--device {device}: {found}; --device cpu rehearses the report anywhere")
    return kind


# ------------------------------------------------------------------------------------- files


def pack(out: Path) -> Path:
    """Writes OUT/report.tar with results and logs."""
    own = [path for path in sorted(out.iterdir()) if path.suffix != ".tar" and path.name != CACHE]
    return _pack(out / PACKED, own)


def pack_cache(out: Path) -> list[Path]:
    """Writes OUT/cache-1.tar and on with what was compiled, in parts that can be carried."""
    parts: list[list[Path]] = []
    room = 0.0
    for path in sorted(file for file in (out / CACHE).rglob("*") if file.is_file()):
        room -= path.stat().st_size
        if room < 0:
            parts.append([])
            room = _PART - path.stat().st_size
        parts[-1].append(path)
    return [_pack(out / f"{CACHE}-{i}.tar", part) for i, part in enumerate(parts, 1)]


def _pack(target: Path, paths: Sequence[Path]) -> Path:
    """Writes a tar of what lies beside it, whole or not at all."""
    half = target.with_name(f".{target.stem}.unfinished.tar")
    with tarfile.open(half, "w") as tar:
        for path in paths:
            tar.add(path, arcname=path.relative_to(target.parent))
    return half.replace(target)


def unpack(files: Sequence[Path], out: Path) -> None:
    """Unpacks another start's tars into OUT, where existing files stay. Raises UserError for any
    other file, and if the report itself is not among them; nothing is unpacked then."""
    with contextlib.ExitStack() as opened:
        tars = []
        for file in files:
            try:
                tars.append(opened.enter_context(tarfile.open(file)))
            except (OSError, tarfile.TarError) as error:
                raise UserError(f"--resume {file} cannot be unpacked ({error})") from None
        given = f"--resume {' '.join(map(str, files))}"
        try:
            if not any(RESULT in tar.getnames() for tar in tars):
                raise UserError(f"{given} holds no {RESULT}; give a report's {PACKED}")
            for tar in tars:
                for member in tar.getmembers():
                    if not (out / member.name).exists():
                        tar.extract(member, out, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{given} cannot be unpacked ({error})") from None


FLAGS: Flags = {
    "--minutes": dict(type=float, required=True, help="for everything"),
    "--out": dict(type=Path, required=True, help="a directory: new, empty or of the same command"),
    "--resume": dict(type=Path, nargs="+", help="the tars of an earlier start"),
    "--device": dict(choices=("gpu", "cpu"), default="gpu"),
    "--preset": dict(help="one architecture in place of the device's own"),
    "--rank": dict(type=int, help="of ffba; others at equal parameters"),
    "--cells": dict(default="*", help="patterns of names, comma-separated"),
}


def _check(args: Namespace) -> tuple[Scale, dict[str, Any]]:
    """The scale, and the arguments that all starts of a report share."""
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes} must be a positive number")
    scale = GPU if args.device == "gpu" else CPU
    if args.preset:
        LlamaConfig.preset(args.preset)
        scale = dataclasses.replace(scale, presets=(args.preset,))
    if args.rank is not None:
        if args.rank < 1:
            raise UserError(f"--rank {args.rank} must be a positive integer")
        scale = dataclasses.replace(scale, rank=args.rank)
    return scale, {"presets": list(scale.presets), "rank": scale.rank}


def _open(args: Namespace, arguments: dict[str, Any]) -> dict[str, Any]:
    """The report in OUT, or an empty one. Raises UserError if OUT holds a report of other
    arguments, or other files and no report."""
    check_writable(args.out / RESULT, "--out")
    new = not args.out.exists() or not any(args.out.iterdir())
    if not new and not (args.out / RESULT).is_file():
        raise UserError(f"--out {args.out} is not empty and has no {RESULT}; name a new directory")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        unpack(args.resume, args.out)
    if not (args.out / RESULT).is_file():
        return {"schema_version": SCHEMA_VERSION, "arguments": arguments, "failed": {}}
    report = read_json(args.out / RESULT)
    if report.get("arguments") != arguments:
        raise UserError(
            f"--out {args.out} holds a report of {report.get('arguments')}, not {arguments}; name "
            "another directory"
        )
    return report


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Signals that would end this process raise Stopped instead, so that its cell ends, too."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}; the same command goes on")

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> None:
    """The command."""
    start = time.monotonic()
    args = parse(argv, "python -m experiments.gpu_report", __doc__, FLAGS)
    scale, arguments = _check(args)
    report = _open(args, arguments)
    around = environment(args.device, args.out.absolute() / CACHE)
    kind = device_kind(args.device, around)
    slug = re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
    results = args.out / slug
    logs = args.out / "logs" / slug
    results.mkdir(parents=True, exist_ok=True)
    patterns = args.cells.split(",")
    asked = [c for c in cells(scale, results) if any(fnmatch.fnmatch(c.name, p) for p in patterns)]
    if not asked:
        names = ", ".join(cell.name for cell in cells(scale, results))
        raise UserError(f"--cells {args.cells} is the name of none; known: {names}")
    deadline = start + 60 * args.minutes - _CLOSING
    failed = report["failed"].setdefault(slug, {})
    said: dict[str, str] = {}
    write_json(args.out / RESULT, report)
    try:
        with _stoppable():
            for cell, what in run_cells(asked, results, logs, deadline, around, dict(failed)):
                said[cell.name] = what
                if what == "done":
                    failed.pop(cell.name, None)
                elif what not in ("not begun", "out of time"):
                    failed[cell.name] = what
                write_json(args.out / RESULT, report)
                pack(args.out)
                left = (deadline - time.monotonic()) / 60
                counted = f"{len(said)} of {len(asked)}"
                line = f"{counted}  {cell.name}: {what}; {left:.1f} minutes left"
                print(line, file=sys.stderr, flush=True)
    finally:
        # Before the table, which may find something damaged.
        packed = [pack(args.out), *pack_cache(args.out)]
        # Late, as it imports JAX: cells have the device to themselves.
        from experiments.gpu_table import table

        text = table(results, {cell.name: said.get(cell.name, "not begun") for cell in asked})
        (results / "report.md").write_text(text, encoding="utf-8")
        pack(args.out)
        print(text)
        for file in packed:
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
