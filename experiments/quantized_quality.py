"""What quantising a base costs in quality: perplexity, two benchmarks, and what fusing adds.

    python -m experiments.quantized_quality --data_dir DIR --adapter runs/demo/adapter --out OUT

Perplexity is of the first 20,000 tokens of `cnn_dailymail/test100`, article by article, in windows
of 1,024; accuracy is lm-eval's `acc` of the first 200 questions of each task. Fusing is measured on
512 of these tokens: how far the logits with the fused adapter are from those with its own products
over the same codes, as a share of the largest logit. The same figure of the bare base, whose codes
fusing leaves as they are, shows how much of that is not the adapter's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.flags import Flags, parse
from experiments.report import beside
from flora_jax.adapters import device_layout, fuse, quantization_of
from flora_jax.analysis.results import about_process, header, table
from flora_jax.errors import check_writable, run_command, split_names
from flora_jax.evaluation.loglik import token_loglik
from flora_jax.evaluation.run import evaluate_tasks
from flora_jax.evaluation.task_data import Settings, load_task_data
from flora_jax.files import keep_programs, write_json
from flora_jax.interop.adapter_files import load_adapted
from flora_jax.models.adapted import Adapted
from flora_jax.models.config import QUANTIZATIONS
from flora_jax.models.llama import Llama

FLAGS: Flags = {
    "--data_dir": dict(required=True),
    "--model": dict(default="smollm2-135m-instruct", help="what load_pretrained takes"),
    "--adapter": dict(type=Path, help="adapter directory; default: nothing is fused"),
    "--quantizations": dict(default=",".join(QUANTIZATIONS)),
    "--tasks": dict(default="ARC-Easy,piqa"),
    "--limit": dict(type=int, default=200),
    "--tokens": dict(type=int, default=20000),
    "--out": dict(type=Path, required=True, help="OUT.json and OUT.md are written"),
}
_WINDOW = 1024
_SAMPLE = 512
_HEADS = ["base", "weights off", "perplexity", "over floats"]


def windows(adapted: Adapted, data_dir: str, tokens: int) -> list[list[int]]:
    """Token ids of the articles, in pieces of at most _WINDOW, `tokens` in all."""
    lines = (Path(data_dir) / "cnn_dailymail/test100.jsonl").read_text(encoding="utf-8")
    out: list[list[int]] = []
    left = tokens
    for line in lines.splitlines():
        text = json.loads(line)["article"].replace("<t>", "").replace("</t>", "")
        ids = adapted.tokenizer(" ".join(text.split()), add_special_tokens=False).input_ids[:left]
        out += [ids[i : i + _WINDOW] for i in range(0, len(ids), _WINDOW)]
        left -= len(ids)
        if left <= 0:
            break
    return [ids for ids in out if len(ids) > 1]


def perplexity(adapted: Adapted, pieces: list[list[int]]) -> float:
    """The perplexity of all tokens but the first of each piece."""
    scores = token_loglik(adapted, [[(ids[:1], ids[1:])] for ids in pieces], batch_size=1)
    total = sum(score for row in scores for score, _ in row)
    return math.exp(-total / sum(len(ids) - 1 for ids in pieces))


def fused_change(adapted: Adapted, tokens: list[int]) -> dict[str, float]:
    """The largest change of a logit over the largest logit: by fusing, with the adapter and of the
    bare base, and by the adapter itself (`effect`)."""
    ids = jnp.asarray([tokens])
    layout = device_layout(quantized=True)
    bare = dataclasses.replace(adapted, adapter=None, adapter_config=None)
    out = {}
    owed = {}
    for name, one in {"adapted": adapted, "bare": bare}.items():
        owed[name] = one.model.apply(one.variables, ids)
        fused = fuse(one.base, one.adapter, one.config, one.adapter_config, layout)
        found = Llama(one.config, one.adapter_config).apply({"params": fused}, ids)
        out[name] = _change(found, owed[name])
    return {**out, "effect": _change(owed["bare"], owed["adapted"])}


def _change(found: jax.Array, owed: jax.Array) -> float:
    return float(jnp.abs(found - owed).max() / jnp.abs(owed).max())


def measure(args: Any, quantization: str) -> dict[str, Any]:
    """All results of one base."""
    bare = load_adapted(args.model, None, quantization=quantization)
    pieces = windows(bare, args.data_dir, args.tokens)
    out: dict[str, Any] = {
        "quantization": quantization_of(bare.base),
        "tokens": sum(map(len, pieces)),
        "perplexity": perplexity(bare, pieces),
    }
    names = split_names(args.tasks)
    if names:
        settings = Settings(protocol="lm_eval", prompt_style="plain", batch_size=16)
        tasks = load_task_data(names, args.data_dir, settings, limit=args.limit)
        scores = evaluate_tasks(tasks, bare, settings)["tasks"]
        out["accuracy"] = {name: scores[name]["accuracy"] for name in names}
    if args.adapter and quantization != "none":
        adapted = load_adapted(args.model, args.adapter, quantization=quantization)
        out["fused"] = fused_change(adapted, pieces[0][:_SAMPLE])
    jax.clear_caches()
    return out


def markdown(args: Any, about: dict[str, Any], found: dict[str, Any]) -> str:
    """The tables."""
    names = split_names(args.tasks)
    floats = found.get("none")
    rows = []
    for name, one in found.items():
        change = ""
        if floats is not None:
            change = f"{one['perplexity'] / floats['perplexity'] - 1:+.2%}"
        cells = [name, f"{one['quantization']['error']:.2%}", f"{one['perplexity']:.3f}", change]
        rows.append([*cells, *(f"{one['accuracy'][task]:.3f}" for task in names)])
    fused = [
        [name, *(f"{one['fused'][key]:.2e}" for key in ("adapted", "bare", "effect"))]
        for name, one in found.items()
        if "fused" in one
    ]
    lines = [
        header(f"Quality over quantised bases: {Path(args.model).name}", about),
        f"Perplexity of {next(iter(found.values()))['tokens']:,} tokens; accuracy of the first "
        f"{args.limit} questions.\n",
        *table([*_HEADS, *names], rows),
    ]
    if fused:
        heads = ["fused", "adapter in codes", "bare base", "what the adapter does"]
        lines += ["\nMax |change of a logit| over max |logit|:\n", *table(heads, fused)]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.quantized_quality", __doc__, FLAGS)
    check_writable(beside(args.out, ".json"), "--out")
    keep_programs()
    about = about_process("qwix", data_dir=args.data_dir)
    found: dict[str, Any] = {}
    for name in split_names(args.quantizations):
        found[name] = measure(args, name)
        write_json(beside(args.out, ".json"), {"provenance": about, "results": found})
        beside(args.out, ".md").write_text(markdown(args, about, found))
    print(markdown(args, about, found))


if __name__ == "__main__":
    run_command(main)
