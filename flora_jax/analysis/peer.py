"""The peer that is timed beside our models: transformers with PEFT's unmerged LoRA, on the same
weights.

torch, transformers and peft are imported here alone, and only with --peer (extra `peers`). The peer
runs in two ways: "peft", eager with a cache that grows, and "peft_compiled", `torch.compile` of the
decode step over a cache of fixed size, as `generate` does it.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flora_jax.analysis.timing import Seconds, Setting
from flora_jax.errors import require
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors

PACKAGES = ("torch", "transformers", "peft")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def absent() -> list[str]:
    """The packages of the peer that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def check_peer() -> None:
    """Raises UserError unless the peer can run here."""
    missing = absent()
    require(
        not missing,
        f"--peer peft needs {' and '.join(missing)}; pip install -e '.[peers]' brings them",
    )
    if jax.default_backend() == "gpu":
        import torch

        require(
            torch.cuda.is_available(),
            f"--peer peft: JAX runs on the GPU, but torch {torch.__version__} sees none; "
            "install torch with CUDA, or run both on the CPU with JAX_PLATFORMS=cpu",
        )


class Peer:
    """LoRA of `rank` on all seven projections of `base` (split layout, leaves of any array type),
    in the base's dtype."""

    def __init__(self, config: LlamaConfig, base: Mapping[str, Any], rank: int):
        import peft
        import torch

        self._torch = torch
        model = torch_llama(config, base)
        device, dtype = model.device, model.dtype
        lora = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=PROJECTIONS, init_lora_weights=False
        )
        with warnings.catch_warnings():
            # peft uses a name that transformers has changed.
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(model, lora)
        self.model = model.to(device, dtype).eval()
        self.parameters = sum(p.numel() for n, p in self.model.named_parameters() if "lora_" in n)
        # A shape beyond the compiled ones is an error, not a quiet return to eager.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self._compiled = torch.compile(self.model, dynamic=False)
        self.not_compiled: str | None = None
        self._caches: dict[Setting, Any] = {}

    def ways(self, setting: Setting, prompts: np.ndarray) -> dict[str, Callable[[], Seconds]]:
        """The ways to time at a setting, by name, warmed up.

        If torch cannot compile the decode step, "peft_compiled" is left out and `not_compiled` says
        why.
        """
        self.run(setting, prompts, new_tokens=2)
        ways = {"peft": functools.partial(self.run, setting, prompts)}
        try:
            # Twice: the step after a prompt and later ones may compile apart.
            self.run(setting, prompts, new_tokens=4, compiled=True)
            self.run(setting, prompts, new_tokens=4, compiled=True)
        except (
            self._torch._dynamo.exc.TorchDynamoException,
            self._torch._inductor.exc.InductorError,
        ) as error:
            self.not_compiled = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            ways["peft_compiled"] = functools.partial(self.run, setting, prompts, compiled=True)
        return ways

    def run(
        self,
        setting: Setting,
        prompts: np.ndarray,
        new_tokens: int | None = None,
        compiled: bool = False,
    ) -> Seconds:
        """Times one greedy generation after `prompts` `[B, prompt_length]`: TTFT and TPOT in
        seconds."""
        step = self.model
        if compiled:
            step = self._compiled
        cache = self._cache(setting, compiled)
        return time_torch(self.model, prompts, new_tokens or setting.new_tokens, cache, step)

    def _cache(self, setting: Setting, compiled: bool) -> Any:
        import transformers

        if not compiled:
            return transformers.DynamicCache(config=self.model.config)
        # A compiled step keeps the arrays of its cache, so there is one cache for each setting.
        if setting not in self._caches:
            self._caches[setting] = transformers.StaticCache(
                config=self.model.config, max_cache_len=setting.prompt_length + setting.new_tokens
            )
        else:
            with self._torch.inference_mode():  # as when the cache was filled
                self._caches[setting].reset()
        return self._caches[setting]


def torch_llama(config: LlamaConfig, base: Mapping[str, Any]) -> Any:
    """transformers' own model of `base` (split layout, leaves of any array type), in the base's
    dtype, on JAX's device."""
    import torch
    import transformers

    dtype = getattr(torch, str(base["embed_tokens"]["embedding"].dtype))
    fields = {k: v for k, v in config.to_hf().items() if k != "architectures"}
    about = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(about).to(dtype)
    with torch.no_grad():
        # One at a time: there is never a second copy of all weights.
        for name, value in to_hf_tensors(config, base):
            if value.dtype.itemsize == 2:  # torch reads no bfloat16 of numpy's
                value = value.view(np.uint16)
            model.get_parameter(name).copy_(torch.tensor(value).view(dtype))
    return model.to({"gpu": "cuda"}.get(jax.default_backend(), "cpu")).eval()


def time_torch(
    model: Any, prompts: np.ndarray, new_tokens: int, cache: Any, step: Any = None
) -> Seconds:
    """TTFT and TPOT in seconds of a causal model of transformers, greedy.

    prompts: ids `[B, prompt_length]`; cache: an empty one of the model's kind; step: computes each
    token after the first, by default the model.
    """
    import torch
    import transformers

    # Versions of transformers differ in the argument's name.
    argument = "past_key_values"
    if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters:
        argument = "cache"
    kept = {argument: cache}
    device = next(model.parameters()).device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def choose(model: Any, ids: Any) -> Any:
        logits = model(input_ids=ids, **kept, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    if step is None:
        step = model
    with torch.inference_mode():
        ids = torch.tensor(prompts, dtype=torch.long, device=device)
        wait()
        start = time.perf_counter()
        ids = choose(model, ids)
        wait()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            ids = choose(step, ids)
        wait()
        end = time.perf_counter()
    return first - start, (end - first) / (new_tokens - 1)
