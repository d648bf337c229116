"""The demo: fine-tunes SmolLM2-135M on arithmetic with FFBA (QG-Add), and shows what changed.

    python -m experiments.demo --workdir runs/demo        (make demo)

Prints the accuracy on 200 unseen problems of the base (zero-shot, and with 4 worked examples in its
prompt) and of the adapted model, with the same wording, decoding and answer extraction. Then both
answer one problem. The same command resumes a run that was stopped.
"""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

from experiments.flags import parse
from flora_jax.config import generator_settings
from flora_jax.errors import run_command
from flora_jax.evaluation.run import evaluate_tasks
from flora_jax.evaluation.task_data import Settings, load_task_data
from flora_jax.inference.generator import Generator
from flora_jax.interop.adapter_files import load_adapter
from flora_jax.models.adapted import Adapted
from flora_jax.models.loading import load_pretrained
from flora_jax.models.tokenizer import load_tokenizer
from flora_jax.train import run

CONFIG = Path(__file__).parent.parent / "configs" / "demo.py"


def answer(generator: Generator, prompt: str) -> None:
    """Prints a problem, and what the base and the adapted model say to it."""
    print(f"\n{prompt}")
    for name, adapter in (("base", None), ("base + adapter", "adapter")):
        generator.use(adapter)
        print(f"  {name:16} {generator.generate([prompt], 32)[0].text.strip()!r}")


def main(argv: list[str]) -> None:
    """The command."""
    flags = {"--workdir": dict(type=Path, default="runs/demo")}
    workdir = parse(argv, "python -m experiments.demo", __doc__, flags).workdir
    config = runpy.run_path(str(CONFIG))["get_config"]()
    start = time.perf_counter()

    model_config, base = load_pretrained(config.model.weights)
    tokenizer = load_tokenizer(config.model.weights)
    bare = Adapted(config=model_config, base=base, tokenizer=tokenizer)
    settings = Settings(
        protocol=config.eval.protocol,
        prompt_style=config.data.prompt_style,
        batch_size=config.eval.batch_size,
    )

    def score_base(shots: int) -> dict[str, Any]:
        tasks = load_task_data(
            [config.data.tasks],
            None,
            settings,
            limit=config.eval.limit,
            num_fewshot=shots,
            generator=generator_settings(config),
        )
        scored = evaluate_tasks(tasks, bare, settings)
        return scored["tasks"][config.data.tasks]

    limit = config.eval.limit
    print(f"Scoring the base on {limit} unseen problems, with no and with 4 examples …", flush=True)
    before = score_base(0)
    few_shot = score_base(4)
    print("Fine-tuning …", flush=True)
    after = run(config, workdir)["evaluation"]["tasks"][config.data.tasks]
    adapter_config, trained = load_adapter(workdir / "adapter", model_config)

    print(f"\naccuracy on {after['n']} unseen problems (± one standard error)")
    for name, result in (
        ("base", before),
        ("base, 4 examples", few_shot),
        (f"base + {adapter_config.method}", after),
    ):
        print(f"  {name:20} {100 * result['accuracy']:5.1f} % ± {100 * result['stderr']:.1f}")
    generator = Generator(
        model_config,
        base,
        {"adapter": trained["adapter"]},
        adapter_config,
        tokenizer,
        max_length=128,
        batch_size=1,
    )
    answer(generator, after["prompt"])
    minutes = (time.perf_counter() - start) / 60
    print(f"\nthe adapter is in {workdir / 'adapter'}; {minutes:.1f} minutes in all")


if __name__ == "__main__":
    run_command(main)
