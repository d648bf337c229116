"""The demo: fine-tune SmolLM2-135M on arithmetic with FFBA (QG-Add), and show what changed.

    python -m experiments.demo --workdir runs/demo        (make demo)

Prints the accuracy on 200 unseen problems of the base (zero-shot, and with 4 worked examples in its prompt) and of the
adapted model, all three in the same words, with the same decoding and answer extraction; one problem answered by both;
and where the adapter lies. Run again on the same workdir, it resumes.
"""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

from flora_jax.config import generator_settings
from flora_jax.errors import CommandParser, run_command
from flora_jax.evaluation.run import evaluate_tasks
from flora_jax.evaluation.task_data import Settings, load_task_data
from flora_jax.inference.generator import Generator
from flora_jax.interop.adapter_files import load_adapter
from flora_jax.models.adapted import Adapted
from flora_jax.models.loading import load_pretrained
from flora_jax.models.tokenizer import load_tokenizer
from flora_jax.train import run

CONFIG = Path(__file__).parent.parent / "configs" / "demo.py"


def main(argv: list[str]) -> None:
    """The command."""
    parser = CommandParser(prog="python -m experiments.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, default="runs/demo")
    workdir = parser.parse_args(argv[1:]).workdir
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

    print(
        f"Scoring the base on {config.eval.limit} unseen problems, with no and with 4 examples …",
        flush=True,
    )
    before, few_shot = score_base(0), score_base(4)
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
    print(f"\n{after['prompt']}")
    for name, adapter in (("base", None), ("base + adapter", "adapter")):
        generator.use(adapter)
        print(f"  {name:16} {generator.generate([after['prompt']], 32)[0].text.strip()!r}")
    print(
        f"\nthe adapter is in {workdir / 'adapter'}; {(time.perf_counter() - start) / 60:.1f} minutes in all"
    )


if __name__ == "__main__":
    run_command(main)
