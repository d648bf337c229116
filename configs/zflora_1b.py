"""zFLoRA: extra channels in the residual stream; on Llama-3.2-1B-Instruct.

    python -m flora_jax.train --config configs/zflora_1b.py --workdir runs/zflora_1b --config.data.dir=DIR

Trains 20,874,240 parameters in the start table, -0.5 % of ffba's 20,971,520. The rate is the
method's own, found on SmolLM2-135M; on this model it is a starting point.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-1b", "zflora")
    config.adapter.rank = 45
    return config
