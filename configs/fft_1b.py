"""Full fine-tuning, the reference; on Llama-3.2-1B-Instruct.

    python -m flora_jax.train --config configs/fft_1b.py --workdir runs/fft_1b --config.data.dir=DIR

Trains every parameter, in float32 with float32 moments: about 16 bytes a parameter. The rate is a
third of what was best on SmolLM2-135M.
"""

from flora_jax.config import get_config as base_config


def get_config():
    config = base_config("llama3.2-1b", "fft")
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
