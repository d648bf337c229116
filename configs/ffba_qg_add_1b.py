"""FFBA (QG-Add), the paper's favourite: repeat-and-add on q and gate alone; on
Llama-3.2-1B-Instruct.

    python -m flora_jax.train --config configs/ffba_qg_add_1b.py --workdir runs/ffba_qg_add_1b --config.data.dir=DIR

Trains 20,971,520 parameters in the start table. The rate is the method's own, found on
SmolLM2-135M; on this model it is a starting point.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-1b", "ffba_qg_add")
    config.adapter.rank = 64
    return config
