"""Memory of a training step over quantised bases, as XLA plans it for a GPU.

    python -m experiments.quantized_memory --out experiments/results/quantized/memory

The step is compiled and not run: that needs the extra `gpu-plan` and no GPU. arguments: base,
adapter, optimizer's state and batch; temporary: the most that the step holds beside them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from experiments.flags import Flags, parse
from flora_jax.errors import check_writable, run_command, split_names
from flora_jax.models.config import QUANTIZATIONS

FLAGS: Flags = {
    "--preset": dict(default="llama3.1-8b"),
    "--quantizations": dict(default=",".join(QUANTIZATIONS)),
    "--method": dict(default="ffba"),
    "--rank": dict(type=int, default=64),
    "--rows": dict(type=int, default=4),
    "--length": dict(type=int, default=1024),
    "--remat": dict(default="full"),
    "--target": dict(default="h100"),
    "--out": dict(type=Path, help="write OUT.json and OUT.md"),
}
_HEADS = ["base", "kernels GB", "arguments GB", "temporary GB", "both GB"]


def measure(args: Any, quantization: str) -> dict[str, float]:
    """The memory of one step, GB by name."""
    import jax
    import jax.numpy as jnp
    import optax

    from flora_jax.adapters import AdapterConfig, abstract_adapter, is_quantized, paths
    from flora_jax.analysis.launch_plan import compile_for
    from flora_jax.models.config import LlamaConfig
    from flora_jax.models.llama import Llama, abstract_base
    from flora_jax.training.step import TrainState, make_train_step

    config = LlamaConfig.preset(args.preset)
    adapter_config = AdapterConfig(args.method, args.rank)
    base = abstract_base(config, jnp.bfloat16, quantization)
    trainable = {"adapter": abstract_adapter(config, adapter_config)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    model = Llama(
        config, adapter_config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=args.remat
    )

    def step(params: Any, trained: Any, moments: Any, batch: Any) -> Any:
        state = TrainState(jnp.zeros((), jnp.int32), trained, moments, jax.random.key(0))
        new, metrics = make_train_step(model, optimizer)(state, {"params": params}, batch)
        return new.trainable, new.optimizer, metrics

    shape = (args.rows, args.length)
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    moments = jax.eval_shape(optimizer.init, trainable)
    compiled, _ = compile_for(args.target, step, base, trainable, moments, batch, donate=(1, 2))
    found = compiled.memory_analysis()
    parts = [leaf for path, leaf in paths(base).items() if is_quantized(path)]
    kernels = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(parts))
    arguments = found.argument_size_in_bytes
    temporary = found.temp_size_in_bytes
    sizes = {"kernels": kernels, "arguments": arguments, "temporary": temporary}
    sizes["both"] = arguments + temporary
    return {name: size / 1e9 for name, size in sizes.items()}


def markdown(args: Any, about: dict[str, Any], rows: dict[str, dict[str, float]]) -> str:
    """The table, one line for each quantisation."""
    from flora_jax.analysis.results import header, table

    title = f"Memory of a training step: {args.preset}, compiled for {args.target}"
    cells = [[name, *(f"{size:.2f}" for size in row.values())] for name, row in rows.items()]
    lines = [
        header(title, about),
        f"{args.method} at rank {args.rank}, {args.rows} rows of {args.length} tokens, remat "
        f"{args.remat}, bfloat16 beside what is quantised; none: kernels in bfloat16.\n",
        *table(_HEADS, cells),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.quantized_memory", __doc__, FLAGS)
    # Before jax is imported: a CUDA plugin beside it would otherwise look for a driver.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from experiments.report import beside
    from flora_jax.analysis import compilers
    from flora_jax.analysis.results import about_process
    from flora_jax.files import write_json

    compilers.require_compiler()
    if args.out:
        check_writable(beside(args.out, ".json"), "--out")
    rows = {name: measure(args, name) for name in split_names(args.quantizations)}
    about = about_process(*compilers.installed())
    text = markdown(args, about, rows)
    print(text)
    if args.out:
        write_json(beside(args.out, ".json"), {"provenance": about, "rows": rows})
        beside(args.out, ".md").write_text(text)


if __name__ == "__main__":
    run_command(main)
