"""Partially fused LoRA: LoRA's function and parameters, served with its A's fused; on
Llama-3.2-3B-Instruct.

    python -m flora_jax.train --config configs/pf_lora_3b.py --workdir runs/pf_lora_3b --config.data.dir=DIR

Trains 54,706,176 parameters in the start table, -0.6 % of ffba's 55,050,240. The rate is the
method's own, found on SmolLM2-135M; on this model it is a starting point.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-3b", "pf_lora")
    config.adapter.rank = 36
    return config
