"""The cells of `experiments.gpu_report` that run in torch: transformers, PEFT, our exports.

    python -m experiments.gpu_peers latency --preset llama3.2-1b --method peft --out peft.json

Models have random weights, made on the device; our methods run in the code of their exports. Each
is timed eager and compiled with CUDA graphs, as `generate` compiles it: `mode="reduce-overhead"`
over a cache of fixed size. torch's profiler counts the graphs that were launched. JAX stays on the
CPU here, so that torch has the device to itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from experiments.gpu_cells import matmul_parameters, run_cell
from flora_jax.errors import UserError, run_command
from flora_jax.models.config import LlamaConfig

PACKAGES = ("torch", "transformers", "peft")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _named() -> dict[str, str]:
    """The name of torch's GPU, in place of the CPU that JAX reports."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"device": torch.cuda.get_device_name(0)}


def build(method: str, preset: str, rank: int, dtype: str) -> tuple[Any, int | None]:
    """A model of random weights on the device, and its adapter's rank, at equal parameters.

    method: "bare" is transformers' Llama, "peft" the same with PEFT's LoRA; any other is ours, in
    the code of its export.
    """
    import torch

    from flora_jax.analysis.comparison import adapter_configs

    config = LlamaConfig.preset(preset)
    adapter_config = None
    if method != "bare":
        ours = "lora" if method == "peft" else method
        adapter_config = adapter_configs([ours], config, rank, equal_parameters=True)[ours]
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(_device()):
            model = _model(method, config, adapter_config)
    finally:
        torch.set_default_dtype(before)
    return model.to(_device(), getattr(torch, dtype)), adapter_config and adapter_config.rank


def _model(method: str, config: Any, adapter_config: Any) -> Any:
    import transformers

    if method not in ("bare", "peft"):
        from flora_jax.interop.formats import base_config, remote_config
        from flora_jax.interop.remote_code import configuration_flora_llama as configuration
        from flora_jax.interop.remote_code import modeling_flora_llama as modeling

        fields = {**base_config(config), **remote_config(adapter_config)}
        return modeling.FloraLlamaForCausalLM(configuration.FloraLlamaConfig.from_dict(fields))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config.to_hf()))
    if method == "bare":
        return model
    import peft

    from flora_jax.analysis.peer import PROJECTIONS

    rank = adapter_config.rank
    lora = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=PROJECTIONS, init_lora_weights=False
    )
    return peft.get_peft_model(model, lora)


def _compiled(model: Any) -> tuple[Any, str]:
    """The compiled decode step, and how it was compiled. A CPU only rehearses, without compiler."""
    import torch

    torch._dynamo.config.recompile_limit = 64
    if _device() == "cpu":
        return torch.compile(model, backend="eager", dynamic=False), "backend=eager"
    return torch.compile(model, mode="reduce-overhead", dynamic=False), "mode=reduce-overhead"


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """TTFT and TPOT of one model, eager and compiled in turns, milliseconds."""
    import torch
    import transformers

    from flora_jax.analysis.peer import time_torch
    from flora_jax.analysis.timing import Setting, interleave

    model, rank = build(args.method, args.preset, args.rank, args.dtype)
    model = model.eval()
    setting = Setting(args.prompt_length, args.batch_size, args.new_tokens)
    prompts = setting.prompts(LlamaConfig.preset(args.preset))
    step, how = _compiled(model)
    slots = args.prompt_length + args.new_tokens
    static = transformers.StaticCache(config=model.config, max_cache_len=slots)
    filled = False

    def eager(new_tokens: int = args.new_tokens) -> tuple[float, float]:
        cache = transformers.DynamicCache(config=model.config)
        return time_torch(model, prompts, new_tokens, cache)

    def compiled(new_tokens: int = args.new_tokens) -> tuple[float, float]:
        nonlocal filled
        if filled:
            with torch.inference_mode():  # as it was filled
                static.reset()
        filled = True
        return time_torch(model, prompts, new_tokens, static, step)

    start = time.perf_counter()
    eager(4)
    for _ in range(3):  # compiled, recorded, replayed
        compiled(4)
    warm = time.perf_counter() - start
    rounds = list(interleave({"eager": eager, "compiled": compiled}, args.rounds))

    def ms(who, i):
        return [1e3 * one[who][i] for one in rounds]

    return {
        **_named(),
        "method": args.method,
        "rank": rank,
        "prompt_length": args.prompt_length,
        "batch_size": args.batch_size,
        "new_tokens": args.new_tokens,
        "tpot_ms": ms("compiled", 1),
        "eager_tpot_ms": ms("eager", 1),
        "ttft_ms": ms("compiled", 0),
        "eager_ttft_ms": ms("eager", 0),
        "compiled_by": how,
        "graph_launches_a_step": _graph_launches(compiled),
        "warm_up_seconds": warm,
    }


def _graph_launches(run: Callable[[int], Any]) -> float | None:
    """CUDA graphs launched a token, by torch's profiler; None where it fails."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if _device() == "cuda":
        activities.append(ProfilerActivity.CUDA)
    try:
        with profile(activities=activities) as found:
            run(6)
    except RuntimeError:
        return None
    launches = (e.count for e in found.key_averages() if e.key.startswith("cudaGraphLaunch"))
    return sum(launches) / 5  # the first token comes with the prompt


def train(args: argparse.Namespace) -> dict[str, Any]:
    """PEFT's LoRA in training, at the best of a few settings: rows of a batch, compiled or not."""
    config = LlamaConfig.preset(args.preset)
    settings = [(args.rows, False)]
    if _device() == "cuda":
        settings += [(2 * args.rows, False), (args.rows, True)]
    tried = []
    for rows, compiled in settings:
        model, rank = build("peft", args.preset, args.rank, args.dtype)
        found = _time_training(model, args, rows, compiled, config.vocab_size)
        del model
        tried.append({"rows": rows, "compiled": compiled, **found})
    fitting = [one for one in tried if "left_out" not in one]
    if not fitting:
        raise UserError(f"no setting ran: {tried[0]['left_out']}; make --rows or --length smaller")
    best = max(fitting, key=lambda one: one["tokens_per_second"])
    return {
        **_named(),
        "method": "peft",
        "rank": rank,
        "length": args.length,
        "flops_per_token": 4 * matmul_parameters(config),
        **best,
        "tried": tried,
    }


def _time_training(
    model: Any, args: argparse.Namespace, rows: int, compiled: bool, vocabulary: int
) -> dict[str, Any]:
    """Times and peak memory of steps on `rows` rows, or why there are none."""
    import torch

    on_gpu = _device() == "cuda"
    model = model.train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=on_gpu)
    run = torch.compile(model) if compiled else model
    tokens = torch.randint(0, vocabulary, (rows, args.length), device=_device())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        with torch.autocast(_device(), dtype=getattr(torch, args.dtype), enabled=on_gpu):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    taken = []
    try:
        for _ in range(3 + args.rounds):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    except RuntimeError as error:  # no memory, or the compiler's
        return {"left_out": str(error).strip().partition("\n")[0] or type(error).__name__}
    return {
        "first_step_seconds": taken[0],
        "step_seconds": taken[3:],
        "tokens_per_second": rows * args.length / statistics.median(taken[3:]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


CELLS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "latency": latency,
    "train": train,
}


def main(argv: list[str]) -> None:
    """The command."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from flora_jax.analysis.peer import absent

    missing = absent()
    if missing:
        raise UserError(f"cells of torch need {' and '.join(missing)}: pip install -e '.[peers]'")
    run_cell(CELLS, "experiments.gpu_peers", __doc__, argv[1:], PACKAGES)


if __name__ == "__main__":
    run_command(main)
