"""What experiments share: loading the model, writing results, comparing configurations, and the
errors and differences in tables."""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from flora_jax.analysis.results import About
from flora_jax.config import get_config
from flora_jax.data import data_hash, get_task
from flora_jax.errors import UserError, check_writable
from flora_jax.files import write_json
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import init_base
from flora_jax.models.loading import load_pretrained

# Fields of a training configuration that change numbers by rounding alone.
_NO_NUMBERS = frozenset(
    {
        "data.dir",
        "data.cache_dir",
        "model.remat",
        "train.log_every",
        "train.save_every",
        "train.keep",
        "train.chunk_tokens",
        "eval.batch_size",
    }
)


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The fields in which a recorded configuration differs from what is asked, as `field=value (now
    value)`; empty if in none.

    Fields of _NO_NUMBERS do not count. A field that is younger than the record had its default.
    """
    before = _fields(get_config().to_dict()) | _fields(found)
    differ = []
    for field, value in _fields(asked).items():
        recorded = before.get(field, "absent")
        if field not in _NO_NUMBERS and recorded != value:
            differ.append(f"{field}={recorded!r} (now {value!r})")
    return ", ".join(differ)


def _fields(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values by field, as JSON has them."""
    return flatten_dict(json.loads(json.dumps(tree)), sep=".")


def check_data(hashes: Mapping[str, str], data_dir: str | None, path: Path) -> None:
    """Raises UserError if the records of the result at `path` are not those in `data_dir`. hashes:
    the result's, by TASK/SPLIT."""
    for name, digest in hashes.items():
        task, slash, split = name.rpartition("/")
        if slash and data_hash(get_task(task), split, data_dir) != digest:
            raise UserError(
                f"{path} is of other records of {name} than --data_dir has; name another --out"
            )


def load_model(args: argparse.Namespace) -> tuple[LlamaConfig, dict[str, Any]]:
    """`(config, base)` that the flags of `flags.MODEL` name, split layout. Raises UserError if
    there is no such model, or OUT cannot be written."""
    if args.out:
        check_writable(beside(args.out, ".json"), "--out")
    if args.model != "random":
        return load_pretrained(args.model, args.dtype)
    if not args.preset:
        raise UserError("--model random needs --preset")
    config = LlamaConfig.preset(args.preset)
    return config, init_base(jax.random.key(0), config, args.dtype)


def check_generation(args: argparse.Namespace) -> None:
    """Raises UserError for --new_tokens, --rounds or --prompt_length that are too small."""
    if args.new_tokens < 2 or args.rounds < 1 or args.prompt_length < 1:
        raise UserError("--new_tokens must be at least 2, --rounds and --prompt_length at least 1")


def beside(out: Path, suffix: str) -> Path:
    """OUT with the suffix: after its whole name, which may have dots, or in place of a `.json`.
    Raises UserError for a path without a name."""
    if not out.name:
        raise UserError(f"--out {out} must end in a name")
    return out.with_name(out.name.removesuffix(".json") + suffix)


@contextlib.contextmanager
def stored(place: Path) -> Iterator[None]:
    """Raises UserError if earlier results, in `place`, lack what the block reads from them."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{place} holds results that are damaged or of another version "
            f"({type(error).__name__}: {error}); move it away, or name another --out"
        ) from error


def write_result(args: argparse.Namespace, about: About, text: str, **fields: Any) -> None:
    """Prints the text; with --out also writes OUT.md, and OUT.json with the arguments and
    fields."""
    print(text)
    if args.out:
        result = {
            "schema_version": 1,
            "provenance": about,
            "arguments": {**vars(args), "out": str(args.out)},
            **fields,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside(args.out, ".json"), result)
        beside(args.out, ".md").write_text(text)


# scipy.stats.bootstrap (paired, percentile) draws the same items, but its intervals differ from the
# stored ones in the last digits, and it draws anew for every two methods.
_SEED_OF_BOOTSTRAP = 0
_RESAMPLES = 10_000


@functools.cache
def _drawn(items: int) -> np.ndarray:
    """`[resamples, items]`: how often each item is in a sample of as many, drawn with
    replacement."""
    drawn = np.random.default_rng(_SEED_OF_BOOTSTRAP).integers(0, items, (_RESAMPLES, items))
    places = drawn + items * np.arange(_RESAMPLES)[:, None]
    counts = np.bincount(places.ravel(), minlength=_RESAMPLES * items)
    return counts.reshape(_RESAMPLES, items).astype(float)


def paired_bootstrap(
    ours: np.ndarray, theirs: np.ndarray, sizes: np.ndarray | None = None
) -> tuple[float, float, float]:
    """The difference of two scores of the same items, and its 95 % interval (low, high) over items
    drawn with replacement.

    ours, theirs `[n]`: by item. A score is their mean, or with sizes `[n]` their sum over the sum
    of sizes.
    """
    if sizes is None:
        sizes = np.ones(len(ours))
    difference = ours - theirs
    counts = _drawn(len(difference))
    low, high = np.quantile(counts @ difference / (counts @ sizes), [0.025, 0.975])
    return float(difference.sum() / sizes.sum()), float(low), float(high)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of at least two values; None of fewer."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def spread(seeds: Sequence[float], over_items: float | None) -> dict[str, Any]:
    """The standard error of a mean over seeds (of a single seed: `over_items`), and which of the
    two it is."""
    if len(seeds) == 1:
        return {"stderr": over_items, "stderr_over": "items"}
    return {"stderr": standard_error(seeds), "stderr_over": "seeds"}


def with_error(mean: float, error: float | None) -> str:
    """A table's cell: the mean, and its error if there is one."""
    if error is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {error:.3f}"


def write_csv(path: Path, table: Sequence[dict[str, Any]]) -> None:
    """Writes rows, which may have different columns."""
    columns = dict.fromkeys(column for row in table for column in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(table)
