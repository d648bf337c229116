"""Compares our model with lm-evaluation-harness's torch model on the same weights and questions.

    python -m experiments.harness_peer MODEL --data_dir DIR

MODEL is a GGUF file or an HF directory, which transformers reads for torch. `arc_easy` is the
harness's own task over the first test questions of DIR; `gsm8k` asks `Question: … Answer:` for
greedy text and takes the last number. Prints both scores, and how far the log-likelihoods differ or
how many answers are equal. Needs the extra `test` (torch, lm-eval).
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from experiments.flags import Flags, parse
from flora_jax.data import get_task, load_examples
from flora_jax.errors import run_command
from flora_jax.evaluation.harness import HarnessLM
from flora_jax.interop.adapter_files import load_adapted

FLAGS: Flags = {
    "model": dict(type=Path, help="a .gguf file or an HF directory"),
    "--data_dir": dict(required=True),
    "--tasks": dict(default="arc_easy,gsm8k"),
    "--limit": dict(type=int, default=50),
    "--new_tokens": dict(type=int, default=96),
}
_SETTINGS = {"batch_size": 8, "max_length": 512}


def arc_easy(args: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The harness's task and its questions."""
    path = Path(lm_eval.tasks.__file__).parent / "arc/arc_easy.yaml"
    examples = load_examples(get_task("ARC-Easy"), "test", args.data_dir)[: args.limit]
    records = []
    for one in examples:
        letters = "ABCDE"[: len(one.choices)]
        choices = {"text": list(one.choices), "label": list(letters)}
        records.append(
            {"question": one.question, "choices": choices, "answerKey": letters[one.gold]}
        )
    return yaml.safe_load(path.read_text()), records


def gsm8k(args: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A task of greedy answers and its questions."""
    examples = load_examples(get_task("gsm8k"), "test", args.data_dir)[: args.limit]
    records = [{"question": one.question, "answer": one.answer} for one in examples]
    until = {"until": ["Question:", "\n\n"], "max_gen_toks": args.new_tokens, "do_sample": False}
    number = {
        "function": "regex",
        "group_select": -1,
        "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)",
    }
    task = {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": until,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "flexible", "filter": [number, {"function": "take_first"}]}],
        "metadata": {"version": 0},
    }
    return task, records


TASKS = {"arc_easy": arc_easy, "gsm8k": gsm8k}


def write(folder: Path, name: str, args: Any) -> str:
    """Writes a task and its records into a folder. Returns the task's name there."""
    task, records = TASKS[name](args)
    own = f"peer_{name}"
    (folder / f"{own}.jsonl").write_text("\n".join(map(json.dumps, records)))
    files = {"data_files": {"test": str(folder / f"{own}.jsonl")}, "cache_dir": str(folder)}
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    (folder / f"{own}.yaml").write_text(yaml.safe_dump({**task, "task": own, **source, **splits}))
    return own


def load(path: Path) -> dict[str, Any]:
    """Our model and the harness's."""
    from transformers import AutoModelForCausalLM

    adapted = load_adapted(str(path), None)
    folder = path
    options = {}
    if path.suffix == ".gguf":
        folder = path.parent
        options = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options).eval()
    theirs = HFLM(pretrained=model, tokenizer=adapted.tokenizer, device="cpu", **_SETTINGS)
    return {"ours": HarnessLM(adapted, **_SETTINGS), "torch": theirs}


def compare(found: Mapping[str, Sequence[Any]]) -> str:
    """How far the answers differ: texts, or `(log-likelihood, greedy)` of each choice."""
    ours = found["ours"]
    theirs = found["torch"]
    if isinstance(ours[0][0], str):
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        return f"{equal} of {len(ours)} answers are equal"
    apart = [
        abs(a[0] - b[0])
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return f"log-likelihoods differ by at most {max(apart):.2e}"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.harness_peer", __doc__, FLAGS)
    models = load(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        manager = functools.partial(TaskManager, include_path=temporary, include_defaults=False)
        for name in args.tasks.split(","):
            own = write(Path(temporary), name, args)
            answers = {}
            for side, model in models.items():
                result = simple_evaluate(
                    model=model,
                    tasks=[own],
                    task_manager=manager(),
                    log_samples=True,
                    bootstrap_iters=0,
                )
                found = result["results"][own]
                scores = {k: float(v) for k, v in found.items() if "," in k and "stderr" not in k}
                samples = sorted(result["samples"][own], key=lambda one: one["doc_id"])
                answers[side] = [one["filtered_resps"] for one in samples]
                print(name, side, scores, flush=True)
            print(name, compare(answers))


if __name__ == "__main__":
    run_command(main)
