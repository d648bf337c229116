"""LoRA, the baseline; on Llama-3.2-1B-Instruct.

    python -m flora_jax.train --config configs/lora_1b.py --workdir runs/lora_1b --config.data.dir=DIR

Trains 21,135,360 parameters in the start table, +0.8 % of ffba's 20,971,520. The rate is the
method's own, found on SmolLM2-135M; on this model it is a starting point.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-1b", "lora")
    config.adapter.rank = 30
    return config
