"""The README.md of an export: what it is, where it comes from, how it was made, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import ModelCardData

from flora_jax.errors import UserError
from flora_jax.interop.formats import Trained

_LOAD = {
    "merged": """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")""",
    "peft": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{where}"), "THIS_DIRECTORY")""",
    "transformers": """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")""",
}
_SHOWN = ("accuracy", "accuracy_norm", "rouge1", "rouge2", "rougeL", "rougeLsum")
_PAPER = {
    "zflora": "zFLoRA, [arXiv 2510.25784](https://arxiv.org/abs/2510.25784)",
    "lora": "LoRA, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685)",
    "fft": "full fine-tuning",
}
_FLORA = "FLoRA, [arXiv 2511.00050](https://arxiv.org/abs/2511.00050)"


def model_card(
    trained: Trained,
    report: Mapping[str, Any],
    *,
    command: str,
    versions: Mapping[str, str],
    summary: Mapping[str, Any],
    quantised: str = "",
) -> str:
    """Markdown with the hub's header. report: of the export; command: "" for an export from Python; summary: of the
    run, as `eval.json` has it, {} if there is none; quantised: what the base's weights were before they were floats."""
    adapter, logits = trained.adapter_config, report["logits"]
    licence = trained.licence.name
    published = re.fullmatch(r"[\w.-]+/[\w.-]+", trained.base_model) is not None
    # no path of this machine
    base = trained.base_model if published else Path(trained.base_model).name
    header = ModelCardData(
        base_model=trained.base_model if published else None,
        license=licence,
        library_name="peft" if report["format"] == "peft" else "transformers",
        pipeline_tag="text-generation",
        tags=["flora_jax", adapter.method],
    )
    count = sum(leaf.size for leaf in jax.tree.leaves((trained.adapter, trained.params)))
    total = sum(leaf.size for leaf in jax.tree.leaves((trained.base, trained.adapter)))
    rows = [
        ("base model", f"{base} ({quantised})" if quantised else base),
        (
            "licence of the base",
            licence or ("" if base == "random" else "not stated in its model card"),
        ),
        ("method", f"`{adapter.method}` ({_PAPER.get(adapter.method, _FLORA)})"),
    ]
    if trained.adapter:
        scale = f"scale {adapter.scale:g}{' (rsLoRA)' if adapter.rslora else ''}"
        rows += [("rank", f"{adapter.rank}, {scale}"), ("projections", ", ".join(adapter.targets))]
    if adapter.add_to:
        rows.append(("repeat-and-add on", ", ".join(adapter.add_to)))
    rows.append(("trained parameters", f"{count:,} of {total:,} ({100 * count / total:.3f} %)"))
    if "step" in summary:
        rows.append(("step", summary["step"]))
    rows.append(("weights", report["dtype"]))
    if command:
        rows.append(("command", f"`{command}`"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    meta = trained.licence.meta
    built = f"**{meta.built}**\n\n" if meta and meta.built else ""
    table = "\n".join(f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows)
    load = _LOAD[report["format"]].format(
        where=base if published and not quantised else "PATH_OF_THE_BASE"
    )
    return f"""---
{header.to_yaml()}
---

# {trained.licence.title(base)}, fine-tuned with {adapter.method}

{built}| | |
|---|---|
{table}

## Load

```python
{load}
```

On a sample of {logits["sample_tokens"]} tokens, training moved the base's logits by up to \
{logits["moved_by_training"]:.3g}; those of this export lie within {logits["max_change"]:.2g} of what was trained.

{describe_run(summary)}"""


def describe_run(summary: Mapping[str, Any]) -> str:
    """Data and scores of an `eval.json`, as Markdown. Raises UserError where it is not as a run wrote it."""
    try:
        return _results(summary)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"eval.json is not as a run wrote it ({reason}); remove it to go without"
        ) from None


def _results(summary: Mapping[str, Any]) -> str:
    parts = []
    if data := summary.get("data"):
        lines = [f"- {name}: sha256 `{digest}`" for name, digest in data.get("sha256", {}).items()]
        counts = data.get("train", {})
        if "kept" in counts:
            lines.insert(
                0,
                f"- {counts['kept']:,} training examples, {counts['loss_tokens']:,} tokens in the loss",
            )
        parts.append("## Data\n\n" + "\n".join(lines) + "\n")
    scores = []
    if (losses := summary.get("validation_losses")) and str(summary.get("step")) in losses:
        scores.append(
            f"- validation loss {losses[str(summary['step'])]:.4f}"
            + (f" ({losses['0']:.4f} before training)" if "0" in losses else "")
        )
    evaluation = summary.get("evaluation") or {}
    for task, result in evaluation.get("tasks", {}).items():
        where = f"{evaluation['protocol']}, {evaluation['split']}, n = {result['n']}"
        shown = [f"{kind} {result[kind]:.4f}" for kind in _SHOWN if kind in result]
        scores.append(f"- {task} ({where}): {', '.join(shown)}")
    if scores:
        parts.append("## Scores\n\n" + "\n".join(scores) + "\n")
    return "\n".join(parts)
