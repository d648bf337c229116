"""`make demo`: FFBA (QG-Add) teaches SmolLM2-135M two-digit arithmetic on a CPU, in minutes.

    python -m flora_jax.train --config configs/demo.py --workdir runs/demo

Expect the validation loss (of the answers' tokens) to fall from 3.3 to about 0.3; `python -m experiments.demo` also
scores the base before, with and without examples in its prompt, and the adapter after (figures in README.md).
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("smollm2-135m", "ffba_qg_add")
    config.model.weights = "smollm2-135m-instruct"
    config.data.tasks = "chain_sum"
    config.data.generator.train = 8000
    config.data.max_length = 256
    config.data.validation_size = 100
    config.train.steps = 150
    config.train.batch_size = 4
    config.train.log_every = 5
    config.train.eval_every = 50
    config.train.save_every = 50
    config.optim.learning_rate = 7e-4
    config.eval.tasks = "chain_sum"
    return config
