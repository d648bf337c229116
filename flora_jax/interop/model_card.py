"""The README.md of an export: what it is, where it comes from, how it was made, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import ModelCardData

from flora_jax.errors import UserError
from flora_jax.interop.formats import Trained
from flora_jax.interop.vllm_adapter import max_lora_rank

_LOAD = {
    "merged": """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")""",
    "peft": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(\
AutoModelForCausalLM.from_pretrained("{where}"), "THIS_DIRECTORY")""",
    "transformers": """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")""",
    "vllm": """\
# vLLM with the plugin of flora_jax, vllm_plugin/ in its repository, beside it
vllm serve {where} --enable-lora --max-lora-rank {rank} \\
  --hf-overrides '{{"architectures": ["FloraLlamaForCausalLM"], "flora": "THIS_DIRECTORY"}}' \\
  --lora-modules NAME=THIS_DIRECTORY""",
}
# Of the formats that are not loaded with Python or with transformers.
_LANGUAGE = {"vllm": "bash"}
_LIBRARY = {"peft": "peft", "vllm": "vllm"}
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
) -> str:
    """The model card: Markdown with the hub's header.

    report: the export's; command: the command line, "" for an export from Python; versions: of
    packages, by name; summary: the run's `eval.json`, {} without one. Raises UserError for a
    summary that no run wrote.
    """
    logits = report["logits"]
    licence = trained.licence
    method = trained.adapter_config.method
    form = report["format"]
    header = ModelCardData(
        base_model=_hub_id(trained),
        license=licence.name,
        library_name=_LIBRARY.get(form, "transformers"),
        pipeline_tag="text-generation",
        tags=["flora_jax", method],
    )
    rows = [*_of_model(trained), *_of_making(report, command, versions, summary)]
    if "quantization" in report:
        rows.append(("quantization", describe_quantization(report["quantization"])))
    table = "\n".join(f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows)
    built = ""
    if licence.meta and licence.meta.built:
        built = f"**{licence.meta.built}**\n\n"
    where = "PATH_OF_THE_BASE"
    if not trained.quantised:  # the hub has the base in floats, not in these 4 bits
        where = _hub_id(trained) or where
    load = _LOAD[form].format(where=where, rank=max_lora_rank(trained.adapter_config))
    return f"""---
{header.to_yaml()}
---

# {licence.title(_name(trained))}, fine-tuned with {method}

{built}| | |
|---|---|
{table}

## Load

```{_LANGUAGE.get(form, "python")}
{load}
```

On a sample of {logits["sample_tokens"]} tokens, training moved the base's logits by up to \
{logits["moved_by_training"]:.3g}; those of this export lie within {logits["max_change"]:.2g} of \
what was trained.

{describe_run(summary)}"""


def describe_quantization(about: Mapping[str, Any]) -> str:
    """A sentence on the quantised base that an adapter was trained over, and on what another base
    changes."""
    made = (
        f"trained over an {about['format']} base, whose weights are {about['error']:.2%} from the "
        "floats"
    )
    if "requantized" in about:
        return f"{made}; quantised again, these move the logits by up to {about['requantized']:.3g}"
    return f"{made}; over the floats the logits move by up to {about['over_floats']:.3g}"


def _hub_id(trained: Trained) -> str | None:
    """The base's name on the hub; None for a path of this machine."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", trained.base_model):
        return trained.base_model
    return None


def _name(trained: Trained) -> str:
    """The base's name, without a path of this machine."""
    return _hub_id(trained) or Path(trained.base_model).name


def _of_model(trained: Trained) -> Iterator[tuple[str, Any]]:
    """Rows of the card's table: the base, and what was trained over it."""
    base = _name(trained)
    adapter = trained.adapter_config
    unstated = "not stated in its model card"
    if base == "random":
        unstated = ""
    if trained.quantised:
        base += f" ({trained.quantised})"
    yield "base model", base
    yield "licence of the base", trained.licence.name or unstated
    yield "method", f"`{adapter.method}` ({_PAPER.get(adapter.method, _FLORA)})"
    if trained.adapter:
        yield "rank", f"{adapter.rank}, scale {adapter.scale:g}" + " (rsLoRA)" * adapter.rslora
        yield "projections", ", ".join(adapter.targets)
    if adapter.add_to:
        yield "repeat-and-add on", ", ".join(adapter.add_to)
    count = sum(leaf.size for leaf in jax.tree.leaves((trained.adapter, trained.params)))
    total = sum(leaf.size for leaf in jax.tree.leaves((trained.base, trained.adapter)))
    yield "trained parameters", f"{count:,} of {total:,} ({100 * count / total:.3f} %)"


def _of_making(
    report: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    summary: Mapping[str, Any],
) -> Iterator[tuple[str, Any]]:
    """Rows of the card's table: how the export was made."""
    if "step" in summary:
        yield "step", summary["step"]
    yield "weights", report["dtype"]
    if command:
        yield "command", f"`{command}`"
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def describe_run(summary: Mapping[str, Any]) -> str:
    """The data and scores of an `eval.json` as Markdown.

    Raises UserError for one that no run wrote.
    """
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
            kept = f"- {counts['kept']:,} training examples"
            lines.insert(0, f"{kept}, {counts['loss_tokens']:,} tokens in the loss")
        parts.append("## Data\n\n" + "\n".join(lines) + "\n")
    scores = []
    if (losses := summary.get("validation_losses")) and str(summary.get("step")) in losses:
        line = f"- validation loss {losses[str(summary['step'])]:.4f}"
        if "0" in losses:
            line += f" ({losses['0']:.4f} before training)"
        scores.append(line)
    evaluation = summary.get("evaluation") or {}
    for task, result in evaluation.get("tasks", {}).items():
        where = f"{evaluation['protocol']}, {evaluation['split']}, n = {result['n']}"
        shown = [f"{kind} {result[kind]:.4f}" for kind in _SHOWN if kind in result]
        scores.append(f"- {task} ({where}): {', '.join(shown)}")
    if scores:
        parts.append("## Scores\n\n" + "\n".join(scores) + "\n")
    return "\n".join(parts)
