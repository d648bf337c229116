"""`make demo`: FFBA (QG-Add) teaches SmolLM2-135M to add and subtract numbers of two digits, on a
CPU in minutes.

    python -m flora_jax.train --config configs/demo.py --workdir runs/demo

Expect the validation loss (of the answers' tokens) to fall from 3.26 to about 0.24; `python -m
experiments.demo` also scores the base before, with and without examples in its prompt, and the
adapter after (figures in README.md).
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("smollm2-135m", "ffba_qg_add")
    config.model.weights = "smollm2-135m-instruct"
    config.model.dtype = "auto"
    config.model.param_dtype = "auto"
    config.data.tasks = "chain_sum"
    config.data.generator.train = 8000
    config.data.generator.min_terms = 2
    config.data.generator.max_terms = 2
    config.data.max_length = 256
    config.data.validation_size = 100
    config.train.steps = 120
    config.train.batch_size = 4
    config.train.log_every = 5
    config.train.eval_every = 40
    config.train.save_every = 40
    config.optim.learning_rate = 1e-3
    config.eval.tasks = "chain_sum"
    config.eval.batch_size = 40
    return config
