"""The fused parallel adapter: one low-rank path around each block; on Llama-3.2-1B-Instruct.

    python -m flora_jax.train --config configs/fpa_1b.py --workdir runs/fpa_1b --config.data.dir=DIR

Trains 20,971,520 parameters in the start table, as many as ffba at rank 64. The rate is the
method's own, found on SmolLM2-135M; on this model it is a starting point.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-1b", "fpa")
    config.adapter.rank = 160
    return config
