"""What tests/training/test_sharding.py runs in processes of their own, where XLA is told how many
devices there are.

    python tests/training/sharded_runs.py meshes FOLDER lora-8x1x1,fft-2x2x2 these runs, a method on
    a mesh python tests/training/sharded_runs.py others FOLDER a run on two meshes, weights,
    attention

FOLDER/METHOD.json is a configuration; bytes and the like go to FOLDER as JSON.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax.adapters import AdapterConfig, is_quantized
from flora_jax.models.attention import attend
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import abstract_base
from flora_jax.models.loading import load_pretrained
from flora_jax.train import run
from flora_jax.training import loop
from flora_jax.training.rules import paths
from flora_jax.training.sharding import AXES, make_mesh, shardings


def meshes(folder: Path, names: list[str]) -> None:
    """Runs, and writes by leaf the bytes on one device and in all to FOLDER/RUN/held.json."""
    held = {}
    prepare = loop.prepare

    def measured(config, workdir):
        made = prepare(config, workdir)
        device = jax.devices()[-1]
        held[workdir] = {
            kind: {
                path: [
                    sum(
                        s.data.nbytes
                        for part in jax.tree.leaves(leaf)
                        for s in part.addressable_shards
                        if s.device == device
                    ),
                    sum(part.nbytes for part in jax.tree.leaves(leaf)),
                ]
                for path, leaf in paths(tree).items()
            }
            for kind, tree in (("frozen", made.frozen), ("trainable", made.state.trainable))
        }
        moments = [leaf for leaf in jax.tree.leaves(made.state.optimizer) if leaf.ndim]
        here = sum(
            s.data.nbytes for leaf in moments for s in leaf.addressable_shards if s.device == device
        )
        held[workdir]["moments"] = [here, sum(leaf.nbytes for leaf in moments)]
        return made

    loop.prepare = measured
    for name in names:
        method, mesh = name.split("-")
        run(config_of(folder / f"{method}.json", tuple(map(int, mesh.split("x")))), folder / name)
        (folder / name / "held.json").write_text(json.dumps(held[folder / name]))


def resumed(folder: Path) -> None:
    """The run of lora on 1x8x1, put back to its checkpoint in the middle, ends on another mesh."""
    shutil.copytree(folder / "lora-1x8x1", folder / "lora-resumed")
    shutil.rmtree(folder / "lora-resumed/checkpoints/10")
    run(config_of(folder / "lora.json", (2, 2, 2)), folder / "lora-resumed")


def loaded(folder: Path) -> None:
    """Weights read straight into shards: which leaves differ from those read whole, and what one
    device has."""
    model = LlamaConfig.preset("tiny")
    mesh = make_mesh(config_of(folder / "fft.json", (1, 8, 1)))
    placed = shardings({"params": abstract_base(model)}, mesh, model, AdapterConfig("fft", 1))
    _, sharded = load_pretrained(str(folder / "model"), shardings=placed["params"])
    _, whole = load_pretrained(str(folder / "model"))
    whole = paths(whole)
    result = {
        "differ": [
            path for path, leaf in paths(sharded).items() if not np.array_equal(leaf, whole[path])
        ],
        "devices": {
            path: [len(leaf.sharding.device_set), leaf.addressable_shards[0].data.size, leaf.size]
            for path, leaf in paths(sharded).items()
        },
    }
    (folder / "loaded.json").write_text(json.dumps(result))


def quantised(folder: Path) -> None:
    """The same of kernels that are quantised as they are read: by part of each leaf."""
    model = LlamaConfig.preset("tiny")
    mesh = make_mesh(config_of(folder / "fft.json", (1, 4, 2)))
    placed = shardings({"params": abstract_base(model)}, mesh, model, AdapterConfig("fft", 1))
    _, sharded = load_pretrained(
        str(folder / "model"), shardings=placed["params"], quantization="int8"
    )
    _, whole = load_pretrained(str(folder / "model"), quantization="int8")
    result = {}
    for path, leaf in paths(sharded).items():
        if is_quantized(path):
            for part in ("codes", "scale", "sums", "error"):
                here, there = getattr(leaf, part), getattr(paths(whole)[path], part)
                result[f"{path} {part}"] = [
                    bool((np.asarray(here) == np.asarray(there)).all()),
                    here.addressable_shards[0].data.size / here.size,
                ]
    (folder / "quantised.json").write_text(json.dumps(result))


def attention(folder: Path) -> None:
    """The all-gathers in the compiled gradient of attention, rows over data and fsdp, heads over
    tensor."""
    mesh = make_mesh(config_of(folder / "fft.json", (2, 2, 2)))
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor", None))
    q, k, v = (
        jax.ShapeDtypeStruct((4, 128, heads, 16), np.float32, sharding=place) for heads in (8, 4, 4)
    )
    gradient = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v, None).sum(), argnums=(0, 1, 2)))
    program = gradient.lower(q, k, v).compile().as_text()
    (folder / "attention.json").write_text(json.dumps(program.count(" all-gather(")))


def config_of(path: Path, sizes: tuple[int, ...]) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(json.loads(path.read_text()))
    config.mesh = dict(zip(AXES, sizes, strict=True))
    return config


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "meshes":
        meshes(where, sys.argv[3].split(","))
    else:
        attention(where)
        resumed(where)
        loaded(where)
        quantised(where)
