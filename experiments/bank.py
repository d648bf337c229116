"""What a bank of adapters costs in time per token, each row of a batch using its own adapter.

    python -m experiments.bank --model random --preset llama3.2-1b --out experiments/results/bank

The TPOT of a bank of N adapters stands beside those of

    one adapter         for all rows
    separate batches    N batches of rows / N rows, one after another, as a server without a bank
                        runs them; switching between them is not counted
    gathered lora       a LoRA of equal parameters whose A and B are gathered for each row from a
                        stack of N, as multi-LoRA servers do

All are timed in the same rounds, and ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.flags import KERNELS, MODEL, Flags, parse
from experiments.report import check_generation, load_model, write_result
from flora_jax.adapters import AdapterConfig, device_layout, fuse
from flora_jax.analysis.comparison import on_disk
from flora_jax.analysis.results import about_process, header, spread, table
from flora_jax.analysis.timing import (
    Programs,
    Setting,
    compile_programs,
    interleave,
    paired_ratio,
    summary,
)
from flora_jax.analysis.unmerged import UnmergedDense, unmerge
from flora_jax.analysis.variants import random_adapter, rank_for, trained_parameters
from flora_jax.errors import UserError, run_command
from flora_jax.inference.decoding import bucket
from flora_jax.inference.generator import check_kernels
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import KVCache, Llama

Array = jax.Array
Tree = dict[str, Any]

FLAGS: Flags = {
    **MODEL,
    **KERNELS,
    "--adapters": dict(default="1,4,16"),
    "--batch_size": dict(type=int, default=8),
    "--prompt_length": dict(type=int, default=128),
    "--new_tokens": dict(type=int, default=33),
    "--rounds": dict(type=int, default=8),
}


def stack_lora(
    base: Tree, adapters: list[Tree], config: LlamaConfig, adapter_config: AdapterConfig
) -> tuple[Tree, Tree]:
    """The unmerged leaves by path: those that all rows share, and A and B stacked, `[N, …]`."""
    shared: Tree = {}
    stacks: list[Tree] = []
    transposed = device_layout().transposed
    for adapter in adapters:
        leaves = flatten_dict(unmerge(base, adapter, config, adapter_config, transposed=transposed))
        stacks.append(
            {path: leaf for path, leaf in leaves.items() if path[-1].endswith(("_A", "_B"))}
        )
        shared = shared or {
            path: jnp.asarray(leaf) for path, leaf in leaves.items() if path not in stacks[0]
        }
    return shared, {path: jnp.stack([one[path] for one in stacks]) for path in stacks[0]}


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def decode_gathered(
    model: Llama, shared: Tree, stacks: Tree, ids: Array, token: Array, cache: KVCache, steps: Array
) -> tuple[Array, KVCache]:
    """Decodes `steps` greedy tokens after `token` `[B]`, int32. Row b uses adapter `ids[b]`, whose
    A and B are gathered anew for every token.

    The step is written for one row and mapped; the base's products still take all rows at once.
    Logits are behind the mapping: a lone row's would be computed twice (`Llama.logits`).
    """
    B = len(token)
    first = {path: leaf[0] for path, leaf in stacks.items()}

    def by_row(leaves):
        return tuple(leaf.reshape(B, -1, *leaf.shape[1:]) for leaf in leaves)

    def together(leaves):
        return tuple(leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves)

    def row(
        own: Tree, token: Array, k: Any, v: Any, valid: Array, index: Array
    ) -> tuple[Array, Any, Any, Array]:
        variables = {"params": unflatten_dict({**shared, **own})}
        hidden, one = model.apply(
            variables,
            token[None, None],
            cache=KVCache(k, v, valid[None], index),
            method=Llama.hidden,
        )
        return hidden[0, 0], one.k, one.v, one.valid[0]

    rows = jax.vmap(row, (0, 0, 0, 0, 0, None))

    def body(_: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        token, cache = carry
        own = jax.tree.map(lambda leaf: leaf[ids], stacks)
        hidden, k, v, valid = rows(
            own, token, by_row(cache.k), by_row(cache.v), cache.valid, cache.index
        )
        variables = {"params": unflatten_dict({**shared, **first})}
        logits = model.apply(variables, hidden, method=Llama.logits)
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        return token, KVCache(together(k), together(v), valid, cache.index + 1)

    return jax.lax.fori_loop(0, steps, body, (token, cache))


def run_gathered(
    programs: Programs,
    served: Tree,
    prompts: Array,
    model: Llama,
    shared: Tree,
    stacks: Tree,
    ids: Array,
    new_tokens: int,
) -> float:
    """TPOT of `decode_gathered`, seconds. Prefill is not timed, and is that of `programs` with the
    tree `served`."""
    B, length = prompts.shape
    tokens = jnp.zeros((B, bucket(length)), jnp.int32).at[:, :length].set(prompts)
    logits, cache = programs.prefill(served, tokens, jnp.full(B, length, jnp.int32), None)
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    cache = programs.grow(cache)
    jax.block_until_ready((token, cache))
    start = time.perf_counter()
    jax.block_until_ready(
        decode_gathered(model, shared, stacks, ids, token, cache, jnp.int32(new_tokens - 1))
    )
    return (time.perf_counter() - start) / (new_tokens - 1)


def measure(
    base: Tree,
    config: LlamaConfig,
    setting: Setting,
    adapter_config: AdapterConfig,
    lora: AdapterConfig,
    count: int,
    rounds: int,
    decode_kernels: str | None = None,
) -> dict[str, Any]:
    """Times of a bank of `count` adapters and of what it stands beside. decode_kernels: of all but
    the gathered LoRA."""
    B = setting.batch_size
    layout = device_layout(in_kernels=decode_kernels == "layer")

    def draw(own):
        return [random_adapter(jax.random.key(i), config, own) for i in range(count)]

    adapters = draw(adapter_config)
    ids = jnp.arange(B) % count

    def on_device(tree):
        return jax.tree.map(jnp.asarray, tree)

    one = on_device(fuse(base, adapters[0], config, adapter_config, layout))
    bank = one
    select = None
    if count > 1:
        bank = on_device(fuse(base, adapters, config, adapter_config, layout))
        select = jax.nn.one_hot(ids, count, dtype=bool)
    shared, stacks = stack_lora(base, draw(lora), config, lora)
    batches = min(count, B)
    few = Setting(setting.prompt_length, B // batches, setting.new_tokens)

    model = Llama(config, adapter_config, decode_kernels=decode_kernels)
    prompts = setting.prompts(config)
    single = compile_programs(model, one, setting)
    few_rows = compile_programs(model, one, few)
    many = compile_programs(model, bank, setting, select)
    unmerged = Llama(config, lora, dense=UnmergedDense)
    given = (single, one, prompts, unmerged, shared, stacks, ids, setting.new_tokens)
    contestants = {
        "one adapter": lambda: single.run(one, prompts)[1],
        "bank": lambda: many.run(bank, prompts, select=select)[1],
        "separate batches": lambda: sum(
            few_rows.run(one, prompts[: few.batch_size])[1] for _ in range(batches)
        ),
        "gathered lora": functools.partial(run_gathered, *given),
    }
    for run in contestants.values():
        run()
    times = list(interleave(contestants, rounds))
    out: dict[str, Any] = {"adapters": count, "batches": batches}
    for name in contestants:
        out[name] = summary([t[name] for t in times]) | {"rounds": [t[name] for t in times]}
        if name != "bank":
            out[f"bank over {name}"] = paired_ratio(
                [t["bank"] for t in times], [t[name] for t in times]
            )
    return out


def check(args: argparse.Namespace) -> list[int]:
    """The numbers of adapters. Raises UserError for flags that do not go together."""
    counts = [int(n) if n.isdecimal() else 0 for n in args.adapters.split(",")]
    batch = args.batch_size
    if min(counts) < 1 or batch < 1 or any(batch % min(n, batch) for n in counts):
        raise UserError(
            f"--adapters {args.adapters}: give positive numbers, comma-separated, that divide "
            f"--batch_size {args.batch_size} or are larger"
        )
    check_generation(args)
    return counts


def markdown(
    args: argparse.Namespace,
    about: Tree,
    results: list[Tree],
    *,
    parameters: int,
    lora_rank: int,
    lora_parameters: int,
) -> str:
    """The table, one line for each number of adapters. parameters: of one of them."""
    heads = ["adapters", "bank", "one adapter", "ratio", "separate batches", "ratio"]
    heads += ["LoRA gathered by row", "ratio"]
    rows = []
    for one in results:
        cells = [str(one["adapters"]), f"{1e3 * one['bank']['median']:.2f}"]
        for name in ("one adapter", "separate batches", "gathered lora"):
            cells += [f"{1e3 * one[name]['median']:.2f}", spread(one[f"bank over {name}"])]
        rows.append(cells)
    lines = [
        header("A bank of adapters", about),
        f"{args.preset or args.model}, {args.dtype}, prompt {args.prompt_length}, batch "
        f"{args.batch_size}, {args.rounds} interleaved rounds; {args.method} at rank {args.rank} "
        f"({parameters:,} parameters an adapter), lora at rank {lora_rank} "
        f"({lora_parameters:,}). Times: TPOT in ms, a token for every row; ratios: the bank over "
        "each, in the same round; medians [quartiles].\n",
        *table(heads, rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.bank", __doc__, FLAGS)
    counts = check(args)
    config, base = load_model(args)
    if args.prompt_length + args.new_tokens > config.max_position_embeddings:
        raise UserError(
            f"--prompt_length {args.prompt_length} plus --new_tokens {args.new_tokens} is more "
            f"than the model's max_position_embeddings={config.max_position_embeddings}"
        )
    check_kernels(args.decode_kernels, config, "none")
    adapter_config = AdapterConfig(args.method, args.rank)
    adapter_config.check(config.widths)
    parameters = trained_parameters(config, adapter_config)
    lora = AdapterConfig("lora", rank_for("lora", config, parameters))
    setting = Setting(args.prompt_length, args.batch_size, args.new_tokens)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        base = on_disk(base, Path(folder))
        for n in counts:
            found = measure(
                base, config, setting, adapter_config, lora, n, args.rounds, args.decode_kernels
            )
            results.append(found)
            print(f"{n} adapters done", file=sys.stderr)
    about = about_process()
    text = markdown(
        args,
        about,
        results,
        parameters=parameters,
        lora_rank=lora.rank,
        lora_parameters=trained_parameters(config, lora),
    )
    write_result(args, about, text, parameters=parameters, lora_rank=lora.rank, results=results)


if __name__ == "__main__":
    run_command(main)
