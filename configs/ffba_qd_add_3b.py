"""FFBA with repeat-and-add on q and down; on Llama-3.2-3B-Instruct.

    python -m flora_jax.train --config configs/ffba_qd_add_3b.py --workdir runs/ffba_qd_add_3b --config.data.dir=DIR

Trains 55,050,240 parameters in the start table. The rate is a first guess, tuned on no model yet.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-3b", "ffba_qd_add")
    config.adapter.rank = 64
    return config
