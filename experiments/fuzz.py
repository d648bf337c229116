"""Spoilt files for every reader, by the thousand: each must be read right or refused in one line.

    python -m experiments.fuzz --count 1000 --out experiments/results/fuzz

Each seed draws faults (fuzz_faults.py) for a whole file, which is read in a process with limits. If
the reader accepts it, what was read must be right; if not, it must raise a UserError of one line.
Anything else is a failure, and so are a hang, a dead process, too much memory, and a file that
appears or changes outside the cache and the home folder. A failure is printed with its seed, and
`--reader NAME --first SEED --count 1` repeats it.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from experiments.flags import Flags, parse
from experiments.process import memory
from flora_jax.errors import UserError, check_writable, require_known, run_command

FLAGS: Flags = {
    "--reader": dict(help="one of fuzz_readers.READERS; default all"),
    "--first": dict(type=int, default=0, help="seed of the first"),
    "--count": dict(type=int, default=300, help="spoilt inputs a reader"),
    "--out": dict(type=Path, help="write OUT.json and OUT.md"),
    "--folder": dict(type=Path, help=argparse.SUPPRESS),  # of a process that reads
}
SECONDS = 10.0  # for one input
_DEAD = 300.0  # of silence, after which a process is killed; it begins by making whole files
MEGABYTES = 256  # for one input of at most 1 MB, over the peak of reading a whole one
_ADDRESSES = 12 * 2**30  # bytes of address space, so that no reader takes the machine with it
_answers_to = 1  # the file descriptor of `_say`
_SHOWN = 8  # failures of a reader that are printed
_LINES = 15  # of a failure's traceback
_COLUMNS = 200


# ----------------------------------------------------------------------- one reader, in a process


def read_all(args: Any) -> None:
    """Reads the inputs of one reader. For each it prints two lines of JSON: the seed and its faults
    before, what became of it after."""
    from experiments import fuzz_readers
    from experiments.fuzz_faults import spoil

    reader = fuzz_readers.READERS[args.reader]
    whole = args.folder / "whole"
    own = args.folder / "own"
    outside = args.folder / "outside" / "file"
    os.chdir(args.folder)
    _keep_stdout()
    if not whole.exists():
        reader.make(whole)
    fuzz_readers.copy(whole, own)
    if args.reader != "commands":
        reader.read(own)  # imports, compiles and caches at no input's cost
    signal.signal(signal.SIGALRM, _alarm)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    for seed in range(args.first, args.first + args.count):
        rng = random.Random(f"{args.reader} {seed}")
        fuzz_readers.copy(whole, own)
        paths = sorted({path for name in reader.spoiled for path in own.glob(name)})
        path = rng.choice([path for path in paths if path.is_file()])
        if args.reader == "commands":
            what = fuzz_readers.spoil_command(path, rng)
        else:
            what = spoil(path, outside, rng)
        _say({"seed": seed, "fault": f"{path.relative_to(own)}: {what}"})
        before = _listing(args.folder)
        _say(_outcome(reader, own) | _strays(args.folder, before))


def _keep_stdout() -> None:
    """Keeps stdout for `_say`; what others print goes to stderr."""
    global _answers_to
    _answers_to = os.dup(1)
    os.dup2(2, 1)


def _say(line: dict[str, Any]) -> None:
    os.write(_answers_to, (json.dumps(line) + "\n").encode())


class TooLong(BaseException):
    """Not an Exception, which a reader might catch."""


def _alarm(*_: object) -> None:
    raise TooLong(f"more than {SECONDS:.0f} seconds")


def _outcome(reader: Any, own: Path) -> dict[str, Any]:
    start = time.perf_counter()
    # What stays below the peak of an earlier input is not seen.
    peak = memory("VmHWM")
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader.read(own)
        found = {"became": "accepted"}
    except UserError as error:
        line = str(error)
        found = _refused("\n" not in line and len(line) < 2000, line)
    except SystemExit as error:
        found = _refused(error.code in (0, 2), str(error))
    except BaseException as error:
        found = {"became": "failed", "line": f"{type(error).__name__}: {error}"[:3000]}
        found["trace"] = traceback.format_exc()[-4000:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    found |= {"seconds": time.perf_counter() - start, "megabytes": (memory("VmHWM") - peak) / 1e6}
    if found["megabytes"] > MEGABYTES:
        found |= {"became": "failed", "line": f"{found['megabytes']:.0f} MB: {found.get('line')}"}
    return found


def _refused(right: bool, line: str) -> dict[str, Any]:
    became = "refused" if right else "failed"
    return {"became": became, "line": line[:3000]}


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but those of the cache and the home folder."""
    found = {}
    for place, _, names in os.walk(folder):
        if not place.startswith((f"{folder}/cache", f"{folder}/home")):
            for name in names:
                about = os.lstat(os.path.join(place, name))
                found[os.path.join(place, name)] = (about.st_size, about.st_mtime_ns)
    return found


def _strays(folder: Path, before: dict[str, tuple[int, int]]) -> dict[str, Any]:
    after = _listing(folder)
    changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    if not changed:
        return {}
    return {"became": "failed", "line": f"wrote {', '.join(sorted(changed))}"[:500]}


# ---------------------------------------------------------------------------------- all of them


def inputs(name: str, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Yields each input with what became of it. A process that dies is started anew."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "outside").mkdir()
        (folder / "outside" / "file").write_text("{}")
        (folder / "home").mkdir()
        shutil.copytree("configs", folder / "configs")
        places = {"HOME": str(folder / "home"), "FLORA_CACHE": str(folder / "cache")}
        environment = {**os.environ, **places, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
        seed = first
        while seed < first + count:
            command = [sys.executable, "-m", "experiments.fuzz", "--reader", name, "--folder"]
            command += [str(folder), "--first", str(seed), "--count", str(first + count - seed)]
            with open(folder / "home" / "stderr", "w+") as log:
                process = subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=log, bufsize=0
                )
                any_read = False
                try:
                    for one in _answers(process):
                        any_read = True
                        seed = one["seed"] + 1
                        if one["became"] == "dead":
                            one["trace"] = _end_of(log)
                        yield one
                finally:  # also if the caller wants no more
                    process.kill()
                    process.wait()
                if not any_read:
                    raise RuntimeError(f"{name}: the whole files cannot be read\n{_end_of(log)}")


def _answers(process: subprocess.Popen) -> Iterator[dict[str, Any]]:
    """Yields each input with what became of it, until the process ends."""
    asked: dict[str, Any] = {}
    while line := _line(process):
        found = json.loads(line)
        if "became" in found:
            yield asked | found
            asked = {}
        else:
            asked = found
    process.kill()
    process.wait()
    if asked:
        yield asked | {"became": "dead", "line": f"exit {process.returncode}", "seconds": _DEAD}


def _end_of(log: TextIO) -> str:
    log.seek(0)
    return log.read()[-3000:]


def _line(process: subprocess.Popen) -> str:
    """The next line; an empty one at the end, or after _DEAD seconds without a byte.

    It is read by the byte, since `select` does not see what waits in a buffer.
    """
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], _DEAD)
        byte = os.read(process.stdout.fileno(), 1) if ready else b""
        if not byte:
            return ""
        line += byte
    return line.decode()


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of what became of a reader's inputs, and the largest costs."""
    became = collections.Counter(one["became"] for one in rows)
    return {
        "inputs": len(rows),
        "accepted": became["accepted"],
        "refused": became["refused"],
        "failed": len(rows) - became["accepted"] - became["refused"],
        "longest s": round(max(one["seconds"] for one in rows), 2),
        "most MB": round(max(one.get("megabytes", 0) for one in rows)),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def markdown(about: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """The table, one line for each reader."""
    from flora_jax.analysis.results import header, table

    heads = list(next(iter(found.values())))
    rows = [[name, *(str(one[head]) for head in heads)] for name, one in found.items()]
    total = ["all"]
    for head in heads:
        most = max if head in ("longest s", "most MB", "date") else sum
        total.append(str(most(one[head] for one in found.values())))
    lines = [header("Spoilt inputs", about), *table(["reader", *heads], [*rows, total])]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.fuzz", __doc__, FLAGS)
    if args.folder:
        read_all(args)
        return
    from experiments.fuzz_readers import READERS
    from experiments.report import beside
    from flora_jax.analysis.results import about_process
    from flora_jax.files import read_json, write_json

    if args.reader:
        require_known(args.reader, READERS, f"--reader {args.reader!r}")
    if args.out:
        check_writable(beside(args.out, ".json"), "--out")
    about = about_process("transformers", "tokenizers", "safetensors", "gguf")
    found: dict[str, dict[str, Any]] = {}
    if args.reader and args.out and beside(args.out, ".json").exists():
        found = read_json(beside(args.out, ".json"))["readers"]  # all but this one's line stay
    for name in [args.reader] if args.reader else READERS:
        rows = list(tqdm(inputs(name, args.first, args.count), name, args.count, disable=None))
        wrong = [one for one in rows if one["became"] not in ("accepted", "refused")]
        for one in wrong[:_SHOWN]:
            print(f"{name}, seed {one['seed']}: {one['fault']}\n  {one['line'][:_COLUMNS]}")
            for line in one.get("trace", "").splitlines()[-_LINES:]:
                print("  " + line[:_COLUMNS])
        print(f"{name}: {len(rows)} inputs, {len(wrong)} failed", flush=True)
        found[name] = summary(rows)
        if args.out:
            write_json(beside(args.out, ".json"), {"provenance": about, "readers": found})
            beside(args.out, ".md").write_text(markdown(about, found))
    print(markdown(about, found))


if __name__ == "__main__":
    run_command(main)
