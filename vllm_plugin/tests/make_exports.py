"""Tiny exports of every method and what our own model answers, for the tests that run in vLLM.

    python vllm_plugin/tests/make_exports.py --out exports

JAX and vLLM live in different environments, so that the tests read files:

    exports/base/          the base, a plain Llama
    exports/<method>/      the base with an adapter, `--format transformers`, float32
    exports/bank/<name>/   an adapter alone, `--format vllm`
    exports/expected.json  {name: {"prompts": [[id, …], …], "tokens": …, "logprobs": …, "leads": …}}
    exports/bank/expected.json
    exports/peft/          a LoRA as PEFT itself writes one, over exports/base
    exports/from_peft/     the same, `--format transformers`

tokens: what Generator continues each prompt with, greedily; logprobs: of these tokens; leads: by
how much each is better than the next best. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from flora_jax.adapters import METHODS, AdapterConfig, abstract_adapter
from flora_jax.inference.generator import Generator
from flora_jax.interop.exports import export, export_pair
from flora_jax.interop.formats import Trained
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import Llama, abstract_base
from flora_jax.models.tokenizer import load_tokenizer

Tree = dict[str, Any]

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # the least that vLLM's attention takes on a CPU
    tie_word_embeddings=True,
    max_position_embeddings=512,
)
SIZES = {"rank": 8, "alpha": 16.0}
ADAPTERS = {name: AdapterConfig(name, **SIZES) for name in METHODS if METHODS[name].reads}
ADAPTERS["fpa_gelu"] = AdapterConfig("fpa", activation="gelu", **SIZES)
# For banks of ranks up to 8; the last is too large for them. Its scale and rank differ from the
# others', so that what fills it up is seen.
BANK = {
    "ffba_0": AdapterConfig("ffba", 8, 16.0),
    "ffba_1": AdapterConfig("ffba", 4, 4.0),
    "ffba_2": AdapterConfig("ffba", 8, 8.0, targets=("q", "k", "v", "o")),
    "ffba_3": AdapterConfig("ffba", 2, 8.0),
    "ffba_qg_add_0": AdapterConfig("ffba_qg_add", 8, 16.0),
    "ffba_qd_add_0": AdapterConfig("ffba_qd_add", 8, 16.0),
    "ffba_qd_add_1": AdapterConfig("ffba_qd_add", 4, 16.0),
    "fpa_0": AdapterConfig("fpa", 8, 16.0),
    "fpa_1": AdapterConfig("fpa", 3, 3.0),
    "large": AdapterConfig("ffba", 16, 16.0),
}
LENGTHS = (5, 17, 40)  # of the prompts
NEW_TOKENS = 16
# The best token leads by so much that rounding elsewhere does not change it.
MARGIN = 5e-4


def random_tree(shapes: Tree, seed: int, std: float) -> Tree:
    """Every leaf random, so that no part of it is silent; scales of norms around one."""
    rng = np.random.default_rng(seed)
    leaves = {
        path: jnp.asarray(path.endswith("scale") + std * rng.normal(size=x.shape), jnp.float32)
        for path, x in flatten_dict(shapes, sep="/").items()
    }
    return unflatten_dict(leaves, sep="/")


def random_adapter(name: str, shapes: Tree, seed: int) -> Tree:
    """An adapter, whatever it is called."""
    return random_tree(shapes, seed, std=0.05)


def prompts() -> list[list[int]]:
    """Ids of the whole vocabulary, one list for each of LENGTHS."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in LENGTHS]


def expected(
    config: LlamaConfig,
    base: Tree,
    adapter: Tree | None,
    adapter_config: AdapterConfig | None,
    asked: Sequence[Sequence[int]],
) -> Tree:
    """An entry of expected.json."""
    config = dataclasses.replace(config, eos_token_id=())  # every row as long as the others
    adapters = None if adapter is None else {"adapter": adapter}
    generator = Generator(config, base, adapters, adapter_config, max_length=64, batch_size=3)
    tokens = [row.tokens for row in generator.generate(asked, NEW_TOKENS)]
    rows = [[*prompt, *own] for prompt, own in zip(asked, tokens, strict=True)]
    padded = jnp.asarray([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    variables = {"params": base, **({} if adapter is None else {"adapter": adapter})}
    logits = jax.jit(Llama(config, adapter_config).apply)(variables, padded)
    entry: Tree = {"prompts": asked, "tokens": tokens, "logprobs": [], "leads": []}
    for row, prompt, own in zip(jax.nn.log_softmax(logits), asked, tokens, strict=True):
        start = len(prompt) - 1
        own_row = np.asarray(row)[start : start + NEW_TOKENS]
        assert own_row.argmax(-1).tolist() == own
        best = np.sort(own_row, axis=-1)
        entry["logprobs"].append(best[:, -1].tolist())
        entry["leads"].append((best[:, -1] - best[:, -2]).tolist())
    return entry


def write_base(trained: Trained, directory: Path, dtype: str = "float32") -> None:
    """The base as an HF directory."""
    directory.mkdir()
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), trained.base)
    tensors = dict(to_hf_tensors(trained.config, base))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**trained.config.to_hf(), "dtype": dtype, "torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config))
    trained.tokenizer.save_pretrained(directory)


def write_all(
    trained: Trained,
    adapters: dict[str, AdapterConfig],
    out: Path,
    form: str,
    seed: int,
    bare: Tree,
    draw: Callable[[str, Tree, int], Tree] = random_adapter,
    dtype: str = "float32",
) -> None:
    """An export of each adapter, and expected.json. bare: the base's entry there; draw: an adapter
    by its name, from its shapes and a seed."""
    out.mkdir(exist_ok=True)
    answers = {"base": bare}
    for name, adapter_config in adapters.items():
        shapes = abstract_adapter(trained.config, adapter_config)
        lead = 0.0
        while lead < MARGIN:
            seed += 1
            adapter = draw(name, shapes, seed)
            answer = expected(
                trained.config, trained.base, adapter, adapter_config, bare["prompts"]
            )
            lead = np.min(answer["leads"])
        own = dataclasses.replace(trained, adapter_config=adapter_config, adapter=adapter)
        export(own, out / name, form, dtype=dtype)
        answers[name] = answer
        moved = np.abs(np.subtract(answer["logprobs"], bare["logprobs"])).max()
        assert moved > 100 * MARGIN, f"{name} answers as the base does"
    (out / "expected.json").write_text(json.dumps(answers))


def write_peft(out: Path) -> None:
    """A LoRA that PEFT made and wrote, and our export of it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights="gaussian")
    model = get_peft_model(base, made)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(out / "peft")
    export_pair(str(out / "base"), out / "peft", "transformers", out / "from_peft")


def main(out: Path) -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compiling
    out.mkdir(parents=True)
    # Wider than initial weights, which give every token nearly the same logit.
    base = random_tree(abstract_base(CONFIG), seed=1, std=0.16)
    trained = Trained(
        config=CONFIG,
        base=base,
        tokenizer=load_tokenizer("tiny"),
        base_model="base",
        fingerprint=base_fingerprint(base),
    )
    write_base(trained, out / "base")
    bare = expected(CONFIG, base, None, None, prompts())
    write_all(trained, ADAPTERS, out, "transformers", 1, bare)
    write_all(trained, BANK, out / "bank", "vllm", 100, bare)
    write_peft(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a directory that is not there yet")
    main(parser.parse_args().out)
