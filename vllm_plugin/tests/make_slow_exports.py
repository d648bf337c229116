"""What the slow tests in vLLM need beside the output of make_exports.py.

    python vllm_plugin/tests/make_slow_exports.py --out exports/slow

    exports/slow/float32/   SmolLM2-135M: base/, <method>/, bank/ and expected.json as
                            make_exports.py writes them
    exports/slow/bfloat16/  the same, base and adapters rounded to bfloat16
    exports/slow/heads/     the tiny model with one head of keys and values, fewer than two ranks
    exports/slow/<model_type>/  the tiny model with what sets such a base apart from a Llama

What is expected of bfloat16 our model computed in float32, from the rounded weights, so that all
that vLLM rounds is seen.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from make_exports import (
    BANK,
    CONFIG,
    SIZES,
    Tree,
    expected,
    prompts,
    random_tree,
    write_all,
    write_base,
)

from flora_jax.adapters import AdapterConfig
from flora_jax.interop.formats import Trained
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.llama import abstract_base
from flora_jax.models.loading import load_pretrained
from flora_jax.models.tokenizer import load_tokenizer

SMOLLM2 = "smollm2-135m-instruct"
TEXTS = (
    "The capital of France is",
    "Ann has 17 apples and gives 5 of them away. How many are left?",
    "Water boils at a lower temperature on a high mountain, because the pressure of the air is",
)
# One of each layout.
METHODS = {
    "float32": ("pf_lora", "fpa", "ffba", "ffba_qd_add", "zflora"),
    "bfloat16": ("pf_lora", "ffba", "zflora"),
    "heads": ("ffba", "ffba_qd_add", "zflora"),
    "architectures": ("ffba", "zflora"),
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {"biases": ("qkv",)},
    "qwen3": {"biases": ("qkv", "o"), "qk_norm": True},
    "mistral": {},
    "smollm3": {"no_rope_layers": (1,)},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_divisor": 2.0,
    },
}
# Larger ones turn SmolLM2's answers into noise; what rides in zflora's stream grows layer by layer.
STDS = {"pf_lora": 0.03, "fpa": 0.03, "zflora": 0.003, "others": 0.01}
IN_BANK = ("ffba_0", "ffba_1", "ffba_2")


def rounded(tree: Tree, dtype: str) -> Tree:
    """The same with every leaf rounded, in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), tree)


def write(
    trained: Trained,
    names: Sequence[str],
    out: Path,
    asked: Sequence[Sequence[int]],
    stds: Mapping[str, float],
    dtype: str = "float32",
) -> None:
    """A base, exports of methods over it, and a bank; stds: of their adapters' entries."""

    def draw(name: str, shapes: Tree, seed: int) -> Tree:
        return rounded(random_tree(shapes, seed, stds.get(name, stds["others"])), dtype)

    base = rounded(trained.base, dtype)
    trained = dataclasses.replace(trained, base=base, fingerprint=base_fingerprint(base))
    out.mkdir(parents=True)
    write_base(trained, out / "base", dtype)
    adapters = {name: AdapterConfig(name, **SIZES) for name in names}
    bare = expected(trained.config, base, None, None, asked)
    write_all(trained, adapters, out, "transformers", 1, bare, draw, dtype)
    bank = {name: BANK[name] for name in IN_BANK}
    write_all(trained, bank, out / "bank", "vllm", 100, bare, draw, dtype)


def main(out: Path) -> None:
    """The command."""
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compiling
    config, base = load_pretrained(SMOLLM2)
    parts = {"tokenizer": load_tokenizer(SMOLLM2), "base_model": SMOLLM2, "fingerprint": ""}
    trained = Trained(config=config, base=base, **parts)
    asked = [trained.tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    for dtype in ("float32", "bfloat16"):
        write(trained, METHODS[dtype], out / dtype, asked, STDS, dtype)
    write_tiny({"num_key_value_heads": 1}, METHODS["heads"], out / "heads")
    for model_type, differences in ARCHITECTURES.items():
        changes = {"model_type": model_type, **differences}
        write_tiny(changes, METHODS["architectures"], out / model_type)


def write_tiny(changes: Mapping[str, Any], names: Sequence[str], out: Path) -> None:
    """`write` of the tiny model with other fields."""
    config = dataclasses.replace(CONFIG, **changes)
    base = random_tree(abstract_base(config), seed=1, std=0.16)
    parts = {"tokenizer": load_tokenizer("tiny"), "base_model": "base", "fingerprint": ""}
    trained = Trained(config=config, base=base, **parts)
    write(trained, names, out, prompts(), {"others": 0.05})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a directory that is not there yet")
    main(parser.parse_args().out)
