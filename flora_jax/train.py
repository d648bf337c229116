"""Fine-tunes a Llama: `python -m flora_jax.train --config configs/ffba_1b.py --workdir DIR
[--config.FIELD=VALUE]…`.

The same command on the same workdir resumes. The workdir gets config.json, metrics.jsonl,
tensorboard/, checkpoints/, adapter/ (the best step's) and eval.json; `--profile N` adds JAX's
profile of N steps, profile/. Exit codes: 0 done, 2 bad input, 1 anything else.
"""

from __future__ import annotations

from flora_jax.config import check_config
from flora_jax.config_files import read_command
from flora_jax.errors import run_command
from flora_jax.files import keep_programs
from flora_jax.finetune import run
from flora_jax.training.measure import check_profile


def main(argv: list[str]) -> None:
    """The command."""
    config, workdir, profile = read_command(argv, __doc__)
    check_config(config)
    check_profile(profile, 0, config.train.steps)
    keep_programs()
    run(config, workdir, profile)


if __name__ == "__main__":
    run_command(main)
