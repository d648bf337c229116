"""FFBA with repeat-and-add on q and down; on Llama-3.2-1B-Instruct.

    python -m flora_jax.train --config configs/ffba_qd_add_1b.py --workdir runs/ffba_qd_add_1b --config.data.dir=DIR

Trains 20,971,520 parameters in the start table. The rate is a first guess, tuned on no model yet.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-1b", "ffba_qd_add")
    config.adapter.rank = 64
    return config
