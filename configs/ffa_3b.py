"""The fused forward adapter: repeat-and-add on every projection, no B; on Llama-3.2-3B-Instruct.

    python -m flora_jax.train --config configs/ffa_3b.py --workdir runs/ffa_3b --config.data.dir=DIR

Trains 47,710,208 parameters in the start table, -13.3 % of ffba's 55,050,240. The rate is the
method's own, found on SmolLM2-135M; on this model it is a starting point.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-3b", "ffa")
    config.adapter.rank = 64
    return config
