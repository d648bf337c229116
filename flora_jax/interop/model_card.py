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
# Those of the other formats are Python and transformers.
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
    """Markdown with the hub's header. report: of the export; command: "" for an export from Python;
    summary: of the run, as `eval.json` has it, {} if there is none."""
    logits = report["logits"]
    licence = trained.licence
    method = trained.adapter_config.method
    form = report["format"]
    header = ModelCardData(
        base_model=trained.base_model if _is_published(trained) else None,
        license=licence.name,
        library_name=_LIBRARY.get(form, "transformers"),
        pipeline_tag="text-generation",
        tags=["flora_jax", method],
    )
    rows = [*_of_model(trained), *_of_making(report, command, versions, summary)]
    if "quantization" in report:
        rows.append(("quantization", describe_quantization(report["quantization"])))
    table = "\n".join(f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows)
    built = f"**{licence.meta.built}**\n\n" if licence.meta and licence.meta.built else ""
    at_hand = _is_published(trained) and not trained.quantised
    where = trained.base_model if at_hand else "PATH_OF_THE_BASE"
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
    """A sentence on the base that an adapter was trained over, and what another one changes."""
    made = (
        f"trained over an {about['format']} base, whose weights are {about['error']:.2%} from the "
        "floats"
    )
    if "requantized" in about:
        return f"{made}; quantised again, these move the logits by up to {about['requantized']:.3g}"
    return f"{made}; over the floats the logits move by up to {about['over_floats']:.3g}"


def _is_published(trained: Trained) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", trained.base_model) is not None


def _name(trained: Trained) -> str:
    """The base's name, without a path of this machine."""
    if _is_published(trained):
        return trained.base_model
    return Path(trained.base_model).name


def _of_model(trained: Trained) -> Iterator[tuple[str, Any]]:
    """Rows of the card's table: the base, and what was trained over it."""
    base = _name(trained)
    adapter = trained.adapter_config
    unstated = "" if base == "random" else "not stated in its model card"
    quantised = f" ({trained.quantised})" if trained.quantised else ""
    yield "base model", f"{base}{quantised}"
    yield "licence of the base", trained.licence.name or unstated
    yield "method", f"`{adapter.method}` ({_PAPER.get(adapter.method, _FLORA)})"
    if trained.adapter:
        rslora = " (rsLoRA)" if adapter.rslora else ""
        yield "rank", f"{adapter.rank}, scale {adapter.scale:g}{rslora}"
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
    """Rows of the card's table: how it was made."""
    if "step" in summary:
        yield "step", summary["step"]
    yield "weights", report["dtype"]
    if command:
        yield "command", f"`{command}`"
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def describe_run(summary: Mapping[str, Any]) -> str:
    """Data and scores of an `eval.json`, as Markdown. Raises UserError where it is not as a run
    wrote it."""
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
        before = f" ({losses['0']:.4f} before training)" if "0" in losses else ""
        scores.append(f"- validation loss {losses[str(summary['step'])]:.4f}{before}")
    evaluation = summary.get("evaluation") or {}
    for task, result in evaluation.get("tasks", {}).items():
        where = f"{evaluation['protocol']}, {evaluation['split']}, n = {result['n']}"
        shown = [f"{kind} {result[kind]:.4f}" for kind in _SHOWN if kind in result]
        scores.append(f"- {task} ({where}): {', '.join(shown)}")
    if scores:
        parts.append("## Scores\n\n" + "\n".join(scores) + "\n")
    return "\n".join(parts)
