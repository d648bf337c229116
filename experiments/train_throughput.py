"""Training speed and memory of our methods beside PEFT's LoRA (transformers, torch).

    python -m experiments.train_throughput --out experiments/results/train_throughput

All have the same weights, batch, length and optimizer. PEFT and our methods take a step each in
every round, in one process, and ratios are taken round by round: what slows the machine for a while
slows all of them. Peak memory is taken in a process of its own for each. `--dtypes
float32,bfloat16` adds rows in bfloat16: ours over a base in it, PEFT's over one and by autocast.
Needs the extra `test` (torch, peft).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.flags import Flags, parse
from experiments.process import answer, memory
from experiments.stepping import Batch, make_batch, stepper, time_steps
from flora_jax.errors import UserError, check_writable, require, run_command

MODEL = "smollm2-135m-instruct"
_VOCABULARY = 49152  # of MODEL
# Equal budgets of about 5.5 M parameters.
RANKS = {"lora": 18, "ffba": 32, "ffba_qg_add": 32, "fpa": 80}
LOSSES = ("all tokens", "answers alone")  # what the loss counts
PEFT = "peft lora"
AUTOCAST = "peft lora, autocast"
_HALF = ", bfloat16"  # behind the name of what has a base in it

FLAGS: Flags = {
    "--rows": dict(type=int, default=4),
    "--length": dict(type=int, default=256),
    "--rounds": dict(type=int, default=8),
    "--answers": dict(
        type=float, default=0.1, help="share of counted targets in the second comparison"
    ),
    "--dtypes": dict(default="float32", help="float32, or float32,bfloat16"),
    "--out": dict(type=Path, help="write OUT.json and OUT.md"),
    "--memory": dict(help=argparse.SUPPRESS),  # one name, measured in this process
}


def names(dtypes: str) -> list[str]:
    """The rows of the table. Raises UserError for other dtypes."""
    rows = [PEFT, *RANKS]
    if dtypes == "float32":
        return rows
    require(
        dtypes == "float32,bfloat16",
        f"--dtypes={dtypes!r} must be float32, or float32,bfloat16",
    )
    return [*rows, AUTOCAST, *(row + _HALF for row in rows)]


def make_stepper(name: str, weights: tuple[Any, Any] | None = None) -> Callable[[Batch], float]:
    """A function that does one optimizer step of a row and returns the loss. weights: the
    configuration and the float32 base, where they are loaded already."""
    import jax
    import jax.numpy as jnp

    from flora_jax.models.loading import load_pretrained

    config, base = weights or load_pretrained(MODEL)
    method = name.removesuffix(_HALF)
    if method in (PEFT, AUTOCAST):
        return peft_stepper(config, base, name)
    if name != method:
        base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    return jax_stepper(config, base, method)


def jax_stepper(config: Any, base: Any, method: str) -> Callable[[Batch], float]:
    """A step of ours in the base's dtype."""
    import jax
    import optax

    from flora_jax.adapters import AdapterConfig, init_adapter
    from flora_jax.config import get_config
    from flora_jax.models.llama import Llama

    dtype = base["embed_tokens"]["embedding"].dtype
    remat = get_config("smollm2-135m", method).model.remat
    adapter_config = AdapterConfig(method, RANKS[method])
    trainable = {"adapter": init_adapter(jax.random.key(0), config, adapter_config)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    model = Llama(config, adapter_config, dtype=dtype, param_dtype=dtype, remat=remat)
    return stepper(model, optimizer, trainable, {"params": base}, seed=1)


def peft_stepper(config: Any, base: Any, name: str) -> Callable[[Batch], float]:
    """The same step by transformers + PEFT's LoRA on all seven projections, eager torch."""
    import peft
    import torch
    import transformers

    from flora_jax.analysis.peer import PROJECTIONS
    from flora_jax.models.hf import to_hf_tensors

    hf = {k: v for k, v in config.to_hf().items() if k not in ("model_type", "architectures")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf))
    state = {name: torch.tensor(value) for name, value in to_hf_tensors(config, base)}
    model.load_state_dict(state, strict=False)
    del state, base
    if name.endswith(_HALF):
        model = model.to(torch.bfloat16)
    rank = RANKS["lora"]
    # its adapters are float32 over either base
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS)
    )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def one(batch: Batch) -> float:
        targets = np.where(batch["loss_weights"] > 0, batch["targets"], -100)
        # transformers shifts labels itself.
        labels = np.concatenate([np.full((len(targets), 1), -100), targets], axis=1)[:, :-1]
        with torch.autocast("cpu", torch.bfloat16, enabled=name == AUTOCAST):
            out = model(
                input_ids=torch.tensor(batch["tokens"], dtype=torch.long),
                labels=torch.tensor(labels),
            )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.loss.item()

    return one


def measure_memory(name: str, batch: Batch) -> dict[str, float]:
    """Peak memory of two steps (GB), and seconds until the first is done. Call it alone in a
    process."""
    start = time.perf_counter()
    step = make_stepper(name)
    step(batch)
    first = time.perf_counter() - start
    step(batch)
    return {"peak_gb": memory("VmHWM") / 1e9, "first_step_s": first}


def compare(
    rows: Sequence[str], sizes: Mapping[str, int], answers: float
) -> dict[str, dict[str, Any]]:
    """By name of a row: tokens/s, and the ratio to PEFT's round by round."""
    from flora_jax.analysis.timing import paired_ratio
    from flora_jax.models.loading import load_pretrained

    weights = load_pretrained(MODEL)
    batch = make_batch(sizes["rows"], sizes["length"], weights[0].vocab_size, answers=answers)
    steps = {name: functools.partial(make_stepper(name, weights), batch) for name in rows}
    seconds = time_steps(steps, sizes["rounds"])
    result = {}
    for name, own in seconds.items():
        ratio = paired_ratio(seconds[PEFT], own)
        result[name] = {
            "tokens_per_second": sizes["rows"] * sizes["length"] / statistics.median(own),
            "ratio": ratio["median"],
            "ratio_quartiles": ratio["quartiles"],
        }
    return result


def measure_alone(name: str, rows: int, length: int) -> dict[str, float]:
    """`measure_memory` in a process of its own."""
    flags = ["--memory", name, "--rows", str(rows), "--length", str(length)]
    return answer("experiments.train_throughput", flags)


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, one line for each method."""
    from flora_jax.analysis.results import header, interval, table

    heads = ["", "rank", "all tokens in the loss", "ratio", "answers alone", "ratio"]
    heads += ["peak GB", "first step s"]
    rows = []
    for name in result["alone"]:
        cells = [name, str(RANKS.get(name.removesuffix(_HALF), RANKS["lora"]))]
        for loss in LOSSES:
            one = result[loss][name]
            ratio = interval(one["ratio"], *one["ratio_quartiles"], ".2f")
            cells += [f"{one['tokens_per_second']:.0f} tokens/s", ratio]
        alone = result["alone"][name]
        cells += [f"{alone['peak_gb']:.2f}", f"{alone['first_step_s']:.0f}"]
        rows.append(cells)
    lines = [
        header("Training speed beside PEFT", result["provenance"]),
        f"{MODEL}, float32 unless named otherwise, {result['rows']} rows of {result['length']} "
        f"tokens, about 5.5 M trained parameters each, {result['rounds']} interleaved rounds; "
        f"ratio: the time of {PEFT} over the row's, median [quartiles].\n",
        *table(heads, rows, blank=" "),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.train_throughput", __doc__, FLAGS)
    if min(args.rows, args.length, args.rounds) < 1 or not 0 < args.answers <= 1:
        raise UserError(
            "--rows, --length and --rounds must be at least 1, --answers above 0 and at most 1"
        )
    if args.memory:
        batch = make_batch(args.rows, args.length, _VOCABULARY)
        print(json.dumps(measure_memory(args.memory, batch)))
        return
    # Not above: the processes whose memory is measured do without them.
    import jax

    from experiments.report import beside
    from flora_jax.analysis.results import about_process
    from flora_jax.files import write_json

    if round(args.answers * args.length) < 2:  # PEFT's side drops the last target
        raise UserError(
            f"--answers {args.answers} of --length {args.length} leaves too few targets; raise one"
        )
    if jax.default_backend() != "cpu":
        raise UserError(
            "PEFT's side runs on the CPU: set JAX_PLATFORMS=cpu, or compare on a GPU by "
            "experiments.gpu_report --cells 'train*,torch_train*'"
        )
    if args.out:
        check_writable(beside(args.out, ".json"), "--out")
    rows = names(args.dtypes)
    sizes = {"rows": args.rows, "length": args.length, "rounds": args.rounds}
    result: dict[str, Any] = {"model": MODEL, **sizes}
    for loss, answers in zip(LOSSES, (1.0, args.answers), strict=True):
        result[loss] = compare(rows, sizes, answers)
    result["alone"] = {name: measure_alone(name, args.rows, args.length) for name in rows}
    result["provenance"] = about_process("torch", "transformers", "peft")
    text = markdown(result)
    print(text)
    if args.out:
        write_json(beside(args.out, ".json"), result)
        beside(args.out, ".md").write_text(text)


if __name__ == "__main__":
    run_command(main)
