"""What tests of several rooms use: constants, random trees."""

import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flora_jax.adapters import abstract_adapter
from flora_jax.analysis.compilers import has_compiler
from flora_jax.data import encode_each
from flora_jax.data.sources import open_records
from flora_jax.models import decode_attention, decode_layer
from flora_jax.training.measure import MEASURED

ROOT = Path(__file__).parents[1]
PLANS = has_compiler()  # an extra gpu-plan is installed
# The values are the same, and compiling is what takes the time.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def random_adapter(config, adapter_config, seed, std=0.1):
    """Every leaf random, so that no part of the adapter is silent."""
    shapes = abstract_adapter(config, adapter_config)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(
        [std * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def load_records(*where):
    """`open_records`, all of them at once."""
    return list(open_records(*where))


def encode_all(examples, tokenizer, **how):
    """`encode_each`, with what it keeps in a list."""
    kept = []
    return kept, encode_each(examples, len(examples), tokenizer, kept.append, **how)


def encode(example, tokenizer, **how):
    """Of one example that fits."""
    [[encoded], _] = encode_all([example], tokenizer, **how)
    return encoded


def interpret_decode_kernels(monkeypatch):
    """Our kernels of a decode step run on this machine, interpreted."""
    kernels = (
        (decode_attention, "decode_attention"),
        (decode_layer, "DecodeLayer"),
        (decode_layer, "decode_logits"),
    )
    for module, name in kernels:
        interpreted = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, interpreted)
    monkeypatch.setattr("flora_jax.inference.generator.kernel_runs", lambda config: True)


def spread(base):
    """Initial weights give every token nearly the same logit; wider ones make the best token a
    clear one."""
    return jax.tree.map(lambda x: x * 8.0 if x.ndim > 2 else x, base)


def silent_pieces(variables, rank):
    """The parts of a tree that are zero throughout, by path: of stacked leaves each layer, and of
    an adapter's leaves each piece of `rank` channels, columns of A and rows of B."""
    silent = []
    for path, leaf in flatten_dict(variables, sep="/").items():
        for i, layer in enumerate(np.asarray(leaf) if "/layers/" in path else [np.asarray(leaf)]):
            count = (
                layer.shape[-1 if path.endswith("/A") else 0] // rank
                if path.startswith("adapter")
                else 1
            )
            pieces = np.split(layer, count, axis=-1 if path.endswith("/A") else 0)
            silent += [
                f"{path}[{i}], piece {n}" for n, piece in enumerate(pieces) if not piece.any()
            ]
    return silent


def computed_lines(workdir):
    """The lines of metrics.jsonl without what differs from run to run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def numbers(workdir):
    """What a run computed: the lines of metrics.jsonl, and the files of its adapter and result."""
    lines = computed_lines(workdir)
    adapter = {file.name: file.read_bytes() for file in (workdir / "adapter").iterdir()}
    return lines, adapter, json.loads((workdir / "eval.json").read_text())


def packed(*rows):
    """Segment ids `[B, T]` of rows given by the lengths of their segments, padding at the end."""
    longest = max(map(sum, rows))
    filled = [[*row, longest - sum(row)] for row in rows]
    ids = [np.repeat([*range(1, len(row)), 0], row) for row in filled]
    return jnp.asarray(np.stack(ids), jnp.int32)


def largest(program):
    """Elements of the largest array that a compiled program names."""
    program = re.sub(r'"(?:[^"\\]|\\.)*"', "", program)  # kernels stand there as text
    found = re.findall(r"\w+\[([\d,]+)\]", program)
    return max(math.prod(int(n) for n in dims.split(",")) for dims in found)
