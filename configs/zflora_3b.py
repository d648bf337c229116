"""zFLoRA: extra channels in the residual stream; on Llama-3.2-3B-Instruct.

    python -m flora_jax.train --config configs/zflora_3b.py --workdir runs/zflora_3b --config.data.dir=DIR

Trains 55,155,712 parameters in the start table, +0.2 % of ffba's 55,050,240. The rate is the
method's own, found on SmolLM2-135M; on this model it is a starting point.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-3b", "zflora")
    config.adapter.rank = 61
    return config
