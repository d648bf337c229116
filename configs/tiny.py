"""A model of random weights on built-in problems: seconds on a CPU, to see the whole machine run.

    python -m flora_jax.train --config configs/tiny.py --workdir runs/tiny

Expect the validation loss to fall from 5.8 to about 4.6; the answers stay wrong, since the frozen
base is random.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("tiny", "ffba_qg_add")
    config.model.weights = "random"
    config.adapter.rank = 16
    config.data.tasks = "chain_sum"
    config.data.max_length = 128
    config.data.generator.train = 500
    config.data.validation_size = 50
    config.train.steps = 50
    config.train.batch_size = 8
    config.train.eval_every = 25
    config.train.save_every = 25
    config.optim.learning_rate = 1e-2
    return config
