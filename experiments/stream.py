"""How large zFLoRA's channels are, by layer and token, in the stream and as they are read.

    python -m experiments.stream --adapter runs/zflora/adapter --data_dir DIR \
        --out experiments/results/stream

The stream `[x | z]` is watched before each layer, over one text of DailyDialog++: rms(x), the
largest |z| of a token, and the largest |z / rms(x)|, which is what the products read. OUT.json has
all values, OUT.md their median and largest over tokens, and OUT.png draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.flags import Flags, parse
from experiments.report import beside
from flora_jax.adapters import AdapterConfig, init_adapter
from flora_jax.analysis.results import about_process, header, table
from flora_jax.data import data_hash, encode_prompt, get_task, load_examples
from flora_jax.errors import check_writable, run_command
from flora_jax.files import write_json
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.models.adapted import Adapted
from flora_jax.models.llama import KVCache, Layer

TASK = "dailydialogpp"
SIZES = ("rms(x)", "max z", "max z / rms(x)")

FLAGS: Flags = {
    "--model": dict(default="smollm2-135m-instruct", help="what load_pretrained takes"),
    "--adapter": dict(type=Path, help="of zflora; default: one as training starts from it"),
    "--rank": dict(type=int, default=32, help="of the default adapter"),
    "--data_dir": dict(required=True),
    "--example": dict(type=int, default=0, help="of the test set, from 0"),
    "--out": dict(type=Path, required=True, help="OUT.json, OUT.md and OUT.png are written"),
}


def sizes(adapted: Adapted, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """SIZES by name, `[L, T]` each, before each layer. tokens `[T]`."""
    found = []

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Layer) and context.method_name == "__call__":
            found.append(args[:2])
        return call(*args, **kwargs)

    # With a cache the layers are not scanned, so each is seen.
    cache = KVCache.empty(adapted.config, 1, len(tokens))
    with nn.intercept_methods(watch):
        adapted.model.apply(adapted.variables, jnp.asarray(tokens)[None], cache=cache)
    x = np.stack([np.asarray(x[0]) for x, _ in found])
    z = np.stack([np.asarray(z[0]) for _, z in found])
    rms = np.sqrt(np.square(x).mean(-1) + adapted.config.rms_norm_eps)
    largest = np.abs(z).max(-1)
    return dict(zip(SIZES, (rms, largest, largest / rms), strict=True))


def draw(found: dict[str, np.ndarray], words: list[str], path: Path) -> None:
    """Draws each of the sizes as a map of layers and tokens, all on one scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots(len(found), 1, sharex=True)
    scale = LogNorm(1e-2, 1e3)
    for axis, (name, values) in zip(axes, found.items(), strict=True):
        image = axis.imshow(np.maximum(values, 1e-2), norm=scale, aspect="auto", cmap="viridis")
        axis.set(ylabel="layer", title=name)
    axes[-1].set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.6)
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.stream", __doc__, FLAGS)
    check_writable(beside(args.out, ".json"), "--out")
    adapted = load_adapted(args.model, args.adapter and str(args.adapter))
    if args.adapter is None:
        adapted = started(adapted, args.rank)
    example = load_examples(get_task(TASK), "test", args.data_dir)[args.example]
    tokens = np.asarray(encode_prompt(example, adapted.tokenizer, "plain"))
    found = sizes(adapted, tokens)
    about = about_process()
    values = {name: value.tolist() for name, value in found.items()}
    digest = {f"{TASK}/test": data_hash(get_task(TASK), "test", args.data_dir)}
    write_json(beside(args.out, ".json"), {"sizes": values, "data": digest, "provenance": about})
    text = markdown(args, found, about)
    beside(args.out, ".md").write_text(text)
    words = [adapted.tokenizer.decode([token]) for token in tokens]
    draw(found, words, beside(args.out, ".png"))
    print(text)


def started(adapted: Adapted, rank: int) -> Adapted:
    """The base with an adapter of zflora as training starts from it."""
    config = AdapterConfig("zflora", rank)
    adapter = init_adapter(jax.random.key(0), adapted.config, config)
    return dataclasses.replace(adapted, adapter_config=config, adapter=adapter)


def markdown(args: argparse.Namespace, found: dict[str, np.ndarray], about: Any) -> str:
    """The table: the sizes of every fifth layer, and of the last."""
    layers = len(found[SIZES[0]])
    rows = []
    for layer in sorted({*range(0, layers, 5), layers - 1}):
        row = [str(layer)]
        for value in found.values():
            row += [f"{np.median(value[layer]):.2f}", f"{value[layer].max():.1f}"]
        rows.append(row)
    heads = ["layer", *(f"{name}, {what}" for name in found for what in ("median", "largest"))]
    lines = [
        header("What zFLoRA's channels hold", about),
        f"{args.model}, {len(found[SIZES[0]][0])} tokens of {TASK}; over tokens, in front of the "
        "layer.\n",
        *table(heads, rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
