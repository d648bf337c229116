"""The parallel adapter of He et al. (2022): the function and parameters of fpa; on
Llama-3.2-3B-Instruct.

    python -m flora_jax.train --config configs/parallel_3b.py --workdir runs/parallel_3b --config.data.dir=DIR

Trains 55,050,240 parameters in the start table, as many as ffba at rank 64. The rate is the
method's own, found on SmolLM2-135M; on this model it is a starting point.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-3b", "parallel")
    config.adapter.rank = 160
    return config
