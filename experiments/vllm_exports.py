"""Writes what vllm_latency serves: a base, and adapters over it in the formats that vLLM reads.

    python -m experiments.vllm_exports --model smollm2-135m-instruct --rank 16 --out runs/vllm

    OUT/base            a plain Llama
    OUT/merged          the base with a LoRA in its weights
    OUT/peft            that LoRA, for vLLM's own layers
    OUT/<method>        the base with an adapter, --format transformers
    OUT/bank/<i>        adapters of --method, --format vllm

Adapters are random, since only time is measured, with about as many parameters as --method has at
--rank. OUT/about.json has their ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save_file

from experiments.flags import MODEL, Flags, parse
from experiments.report import load_model
from flora_jax.adapters import AdapterConfig
from flora_jax.analysis.variants import random_adapter, rank_for, trained_parameters
from flora_jax.errors import UserError, run_command
from flora_jax.files import write_json
from flora_jax.interop.exports import export, trained_over
from flora_jax.interop.formats import Trained
from flora_jax.interop.vllm_adapter import max_lora_rank
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.tokenizer import load_tokenizer

FLAGS: Flags = {
    **MODEL,
    "--methods": dict(default="ffba,ffba_qg_add,fpa,pf_lora,zflora"),
    "--bank": dict(type=int, default=4, help="number of adapters for banks"),
    "--out": dict(type=Path, required=True, help="a directory that is not there yet"),
}


def write_base(trained: Trained, directory: Path) -> None:
    """The base as an HF directory."""
    directory.mkdir()
    tensors = dict(to_hf_tensors(trained.config, trained.base))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", {**trained.config.to_hf(), "torch_dtype": trained.dtype})
    trained.tokenizer.save_pretrained(directory)


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.vllm_exports", __doc__, FLAGS)
    if args.out.exists():
        raise UserError(f"--out {args.out} exists; name a new directory")
    config, base = load_model(args)
    parameters = trained_parameters(config, AdapterConfig(args.method, args.rank))
    tokenizer = load_tokenizer("tiny" if args.model == "random" else args.model)
    ranks: dict[str, int] = {}

    def drawn(method: str, seed: int) -> Trained:
        ranks[method] = rank_for(method, config, parameters)
        adapter_config = AdapterConfig(method, ranks[method])
        adapter = random_adapter(jax.random.key(seed), config, adapter_config)
        return trained_over(
            args.model,
            base,
            {"adapter": adapter, "params": {}},
            config=config,
            adapter_config=adapter_config,
            tokenizer=tokenizer,
        )

    args.out.mkdir(parents=True)
    lora = drawn("lora", 0)
    write_base(lora, args.out / "base")
    export(lora, args.out / "merged", "merged", dtype=args.dtype)
    export(lora, args.out / "peft", "peft", dtype=args.dtype)
    for method in args.methods.split(","):
        export(drawn(method, 1), args.out / method, "transformers", dtype=args.dtype)
    (args.out / "bank").mkdir()
    for i in range(args.bank):
        export(drawn(args.method, i), args.out / "bank" / str(i), "vllm", dtype=args.dtype)
    about: dict[str, Any] = {"parameters": parameters, "ranks": ranks}
    # vLLM's places for adapters have one of a few ranks.
    about["place"] = max_lora_rank(AdapterConfig(args.method, args.rank))
    about["lora_place"] = max_lora_rank(AdapterConfig("lora", ranks["lora"]))
    write_json(args.out / "about.json", about)
    print(f"{args.out}: ranks {ranks}, about {parameters:,} parameters each")


if __name__ == "__main__":
    run_command(main)
