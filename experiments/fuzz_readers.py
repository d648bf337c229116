"""The readers that experiments.fuzz tries, each with whole files and a check of what it accepts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from experiments import gpu_table, quantized_training, real_text
from flora_jax import evaluate, export, generate, harness, latency, launches
from flora_jax.adapters import AdapterConfig, init_adapter, paths
from flora_jax.analysis import latency_run
from flora_jax.commands import read_flags
from flora_jax.config import get_config
from flora_jax.config_files import read_command
from flora_jax.data import get_task, load_examples
from flora_jax.errors import run_command
from flora_jax.files import write_json
from flora_jax.finetune import run
from flora_jax.interop.adapter_files import load_adapter, read_trained_on, save_adapter
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import abstract_base, init_base
from flora_jax.models.loading import load_config, load_pretrained
from flora_jax.models.tokenizer import check_tokenizer, load_tokenizer
from flora_jax.tokens import render
from flora_jax.training.trained import load_run

CONFIG = dataclasses.replace(
    LlamaConfig.preset("tiny"), num_hidden_layers=1, hidden_size=96, intermediate_size=64
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """make: writes whole files to a new folder; spoiled: patterns of those that get faults; read:
    reads the folder, and raises AssertionError if what it accepted is not right."""

    make: Callable[[Path], Any]
    spoiled: Sequence[str]
    read: Callable[[Path], Any]


def _base() -> dict[str, Any]:
    return init_base(jax.random.key(0), CONFIG)


def make_model(folder: Path) -> None:
    """An HF directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    save_file(dict(to_hf_tensors(CONFIG, _base())), folder / "model.safetensors")
    load_tokenizer("tiny").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))


def make_sharded(folder: Path) -> None:
    """The same in two shards."""
    make_model(folder)
    (folder / "model.safetensors").unlink()
    tensors = dict(to_hf_tensors(CONFIG, _base()))
    names = list(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / shard)
    places = {name: shard for shard, own in shards.items() for name in own}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_gguf(folder: Path) -> None:
    """A GGUF file, its matrices in Q8_0."""
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    sizes = {
        "block_count": CONFIG.num_hidden_layers,
        "context_length": CONFIG.max_position_embeddings,
        "embedding_length": CONFIG.hidden_size,
        "feed_forward_length": CONFIG.intermediate_size,
        "attention.head_count": CONFIG.num_attention_heads,
        "attention.head_count_kv": CONFIG.num_key_value_heads,
        "attention.key_length": CONFIG.head_dim,
        "attention.value_length": CONFIG.head_dim,
        "rope.dimension_count": CONFIG.head_dim,
        "vocab_size": CONFIG.vocab_size,
    }
    for name, size in sizes.items():
        writer.add_uint32(f"llama.{name}", size)
    writer.add_float32("llama.rope.freq_base", CONFIG.rope_theta)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", CONFIG.rms_norm_eps)
    tokens = [chr(0x100 + i) for i in range(CONFIG.vocab_size - 1)]
    tokens.append(tokens[0] + tokens[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    for name in ("bos", "eos", "padding"):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", 2)
    mapped = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    for name, value in to_hf_tensors(CONFIG, _base()):
        value = np.asarray(value)
        kind = None
        if value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            value = gguf.quantize(value, kind)
        place = mapped.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(place, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_adapter(method: str) -> Callable[[Path], None]:
    """A function that writes an adapter's directory."""

    def make(folder: Path) -> None:
        adapter_config = AdapterConfig(method, 4)
        trained = {"adapter": init_adapter(jax.random.key(1), CONFIG, adapter_config)}
        about = {"tasks": ["gsm8k"], "prompts": ["0" * 16]}
        folder.parent.mkdir(parents=True, exist_ok=True)
        fingerprint = base_fingerprint(_base())
        save_adapter(folder, trained, CONFIG, adapter_config, "base", fingerprint, about)

    return make


def make_run(folder: Path) -> None:
    """What a run of one step leaves, and its base beside it."""
    make_model(folder / "base")
    config = get_config("tiny", "ffba")
    config.model.weights = str(folder / "base")
    config.adapter.rank = 4
    config.data.tasks = "chain_sum"
    config.data.max_length = 128
    config.data.generator.update({"train": 20, "validation": 4, "test": 2})
    config.data.validation_size = 2
    config.train.update({"steps": 1, "batch_size": 2, "eval_every": 1, "save_every": 1})
    config.eval.tasks = ""
    run(config, folder / "run")


RECORDS = {
    "gsm8k/train.jsonl": [{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}],
    "ARC-Easy/train.json": [
        {
            "instruction": "Choose: A?\n\nAnswer1: B. Answer2: C\n\nAnswer format: answer1/answer2",
            "input": "",
            "output": "the correct answer is answer1",
            "answer": "answer1",
        }
    ],
    "AddSub/test.json": [{"instruction": "1 + 1?", "input": "", "output": "2", "answer": "2.0"}],
    "dialogsum/train.jsonl": [{"dialogue": "A: hi", "summary": "A greets."}],
    "hellaswag/train.jsonl": [
        {"activity_and_ctx": "Roofs: A man. he", "label": 3, "endings": ["a", "b", "c", "d"]}
    ],
}


def make_records(folder: Path) -> None:
    """Data files of several layouts, three records each."""
    for name, records in RECORDS.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        many = records * 3
        lines = "\n".join(map(json.dumps, many)) if path.suffix == ".jsonl" else json.dumps(many)
        path.write_text(lines)
    own = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, own * 3)))


def make_parquet(folder: Path) -> None:
    """Conversations in columns, in two row groups, one compressed."""
    call = {"function": {"name": "f", "arguments": {"x": 1.5}}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
    ]
    folder.mkdir(parents=True)
    rows = [{"messages": turns, "tools": '[{"name": "f"}]', "score": 0.5}] * 6
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "own.parquet", row_group_size=3, compression="none")
    pq.write_table(table, folder / "small.parquet", compression="zstd")


# ------------------------------------------------------------------------------------- readers


def read_weights(folder: Path) -> None:
    """Accepted weights are finite and have the shapes of their configuration."""
    config, base = load_pretrained(str(folder))
    owed = {path: leaf.shape for path, leaf in paths(abstract_base(config)).items()}
    assert {path: leaf.shape for path, leaf in paths(base).items()} == owed
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(base))


def read_config(folder: Path) -> None:
    """The configuration alone, then with its weights."""
    assert load_config(str(folder)).hidden_size > 0
    read_weights(folder)


def read_tokenizer(folder: Path) -> None:
    """An accepted tokenizer has ids below the vocabulary's size."""
    tokenizer = load_tokenizer(str(folder))
    check_tokenizer(tokenizer, CONFIG)
    ids = tokenizer("Hello, 12 worlds\n").input_ids
    assert all(0 <= i < CONFIG.vocab_size for i in ids)
    if tokenizer.chat_template:
        render(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=True)


def read_gguf(folder: Path) -> None:
    """The weights and the tokenizer of the file."""
    read_weights(folder / "m.gguf")
    load_tokenizer(str(folder / "m.gguf"))


def read_adapter(folder: Path) -> None:
    """An accepted adapter is finite."""
    _, trained = load_adapter(folder, CONFIG)
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(trained))
    read_trained_on(folder)


def read_run(folder: Path) -> None:
    """The accepted checkpoint of a run's last step is finite."""
    trained, _ = load_run(folder / "run", 1, "vllm", "float32")
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(trained.adapter))


def read_records(folder: Path) -> None:
    """Accepted records have texts."""
    for name in map(Path, RECORDS):
        for example in load_examples(get_task(name.parent.name), name.stem, folder):
            assert all(isinstance(message.content, str) for message in example.messages)
    load_examples(get_task(str(folder / "own.jsonl")), "train", folder)


def read_parquet(folder: Path) -> None:
    """Accepted conversations have texts."""
    for name in ("own.parquet", "small.parquet"):
        for example in load_examples(get_task(str(folder / name)), "train", None):
            assert all(isinstance(message.content, str) for message in example.messages)


_TIMES = ("tpot_ms", "base_tpot_ms", "ttft_ms", "base_ttft_ms")


def make_results(folder: Path) -> None:
    """Results of experiments, made up, and one that `flora_jax.latency` would resume."""
    folder.mkdir(parents=True)
    for cell, more in (("latency", {}), ("latency-again", {"rank": 8})):
        times = {name: [1.0, 1.1, 0.9] for name in _TIMES}
        place = {"preset": "tiny", "batch_size": 1, "prompt_length": 128, "method": "lora"}
        one = {**place, "rank": None, "bytes": 1.0, "read_bytes": 1e6, **times, **more}
        write_json(folder / "gpu" / f"{cell}-tiny.json", one)
    write_json(folder / "gpu" / "train.json", {"tokens_per_second": 9.0, "peak_gb": None})
    write_json(folder / "real_text.json", {"results": [{"method": "lora", "asked": {}}]})
    results = {"results": {"lora-int8": {"asked": {}}}, "speed": {"ratios": {}}}
    write_json(folder / "training.json", results)
    arguments = latency_run.check(_latency_flags(folder)).arguments
    write_json(folder / "latency" / latency_run.RESULT, {"arguments": arguments})


def _latency_flags(folder: Path) -> argparse.Namespace:
    words = ["latency", "--preset", "tiny", "--methods", "base", "--out", str(folder / "latency")]
    return read_flags("flora_jax.latency", latency.__doc__, latency.FLAGS, words)


def read_results(folder: Path) -> None:
    """The results that later calls resume from or make tables of."""
    gpu_table.table(folder / "gpu", {})
    real_text.read_before(folder / "real_text.json")
    quantized_training.read_before(folder / "training.json")
    latency_run.check(_latency_flags(folder))


COMMANDS: dict[str, tuple[Callable[[list[str]], Any], list[str]]] = {
    "train": (read_command, ["--config", "configs/tiny.py", "--workdir", "w"]),
    "evaluate": (evaluate.main, ["--model", "nowhere", "--tasks", "gsm8k", "--limit", "2"]),
    "generate": (generate.main, ["--model", "nowhere", "--prompt", "a", "--max_new_tokens", "2"]),
    "export": (export.main, ["--workdir", "nowhere", "--format", "merged", "--out", "o"]),
    "harness": (harness.main, ["--model", "nowhere", "--tasks", "gsm8k", "--batch_size", "2"]),
    "latency": (latency.main, ["--model", "nowhere", "--methods", "base,lora", "--rank", "8"]),
    "launches": (launches.main, ["--preset", "nowhere", "--methods", "base", "--rank", "8"]),
}
_WORDS = ("--", "-", "--unknown", "--rank", "-1", "nan", "1e400", "", "é", "\0", "a\nb", "../..")


def read_command(folder: Path) -> None:
    """Runs the command line in `argv.json`. No command can carry it out: its model is nowhere."""
    argv = json.loads((folder / "argv.json").read_text())
    run_command(COMMANDS[argv[0]][0], argv)


def spoil_command(path: Path, rng: random.Random) -> str:
    """Writes a command line with words dropped, doubled, changed and added. Returns it."""
    name = rng.choice(sorted(COMMANDS))
    words = list(COMMANDS[name][1])
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(words) + 1)
        kind = rng.random()
        if kind < 0.3:
            words[at:at] = [rng.choice(_WORDS)]
        elif kind < 0.5:
            words[at:at] = words[max(0, at - 1) : at]
        elif kind < 0.7:
            del words[at : at + 1]
        else:
            words[at : at + 1] = [rng.choice(_WORDS) * rng.choice((1, 1, 1000))]
    path.write_text(json.dumps([name, *words]))
    return f"{name} {words!r}"[:200]


def make_command(folder: Path) -> None:
    """A command line without words; `spoil_command` writes over it."""
    folder.mkdir(parents=True)
    (folder / "argv.json").write_text("[]")


_TOKENIZER = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "trained_on.json")

READERS = {
    "weights": Reader(make_model, ("model.safetensors",), read_weights),
    "index": Reader(make_sharded, ("model.safetensors.index.json", "a.safetensors"), read_weights),
    "config.json": Reader(make_model, ("config.json", "generation_config.json"), read_config),
    "tokenizer.json": Reader(make_model, ("tokenizer.json",), read_tokenizer),
    "tokenizer_config": Reader(make_model, _TOKENIZER, read_tokenizer),
    "gguf": Reader(make_gguf, ("m.gguf",), read_gguf),
    "adapter": Reader(make_adapter("ffba"), _ADAPTER, read_adapter),
    "peft adapter": Reader(make_adapter("lora"), (*_ADAPTER, "flora_config.json"), read_adapter),
    "checkpoint": Reader(make_run, ("run/checkpoints/**/*",), read_run),
    "workdir": Reader(make_run, ("run/config.json", "run/eval.json"), read_run),
    "results": Reader(make_results, ("**/*.json",), read_results),
    "records": Reader(make_records, (*RECORDS, "own.jsonl"), read_records),
    "parquet": Reader(make_parquet, ("own.parquet", "small.parquet"), read_parquet),
    "commands": Reader(make_command, ("argv.json",), read_command),
}


def copy(whole: Path, folder: Path) -> None:
    """Copies whole files, to be spoilt, over those of the last input."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
