"""GGUF files: written here as llama.cpp's converter writes them, and read back against torch and
transformers."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT

from flora_jax.errors import UserError
from flora_jax.models.architectures import PRODUCTS
from flora_jax.models.config import LlamaConfig, RopeScaling
from flora_jax.models.gguf import GgufFile
from flora_jax.models.hf import hf_shapes, to_hf_tensors
from flora_jax.models.loading import load_pretrained, resolve_source

TINY = LlamaConfig.preset("tiny")
SMALL = dataclasses.replace(TINY, rope_theta=500000.0, tie_word_embeddings=False, biases=PRODUCTS)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_tensors(config):
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in hf_shapes(config).items()
    }


def gguf_name(hf_name):
    stem, kind = hf_name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, stem = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[stem]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleave(rows, heads):
    """llama.cpp's order of q and k rows, spelt out: row j of a head's first half, then row j of its
    second."""
    half = rows.shape[0] // heads // 2
    order = [
        h * 2 * half + part * half + j for h in range(heads) for j in range(half) for part in (0, 1)
    ]
    return rows[order]


def rope_divisors(config, factor, original=8192):
    """rope_freqs.weight as llama.cpp's converter computes it, frequency by frequency."""
    divisors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < original / 4:
            divisors.append(1)
        elif wavelength > original:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def write_gguf(
    path,
    config=TINY,
    tensors=None,
    quantise=None,
    fields=None,
    extra=None,
    architecture="llama",
    tokenizer=None,
):
    """Writes `tensors` (HF names) to `path`; `fields` override metadata, `tokenizer(writer)` adds
    its own."""
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        **(fields or {}),
    }
    for key, value in metadata.items():
        if value is not None:
            kinds = {
                str: writer.add_string,
                bool: writer.add_bool,
                float: writer.add_float32,
                list: writer.add_array,
            }
            kinds.get(type(value), writer.add_uint32)(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    if tokenizer is None:
        writer.add_uint32("tokenizer.ggml.bos_token_id", config.bos_token_id)
        writer.add_uint32("tokenizer.ggml.eos_token_id", config.eos_token_id[0])
        writer.add_uint32("tokenizer.ggml.padding_token_id", config.pad_token_id)
    else:
        tokenizer(writer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in (random_tensors(config) if tensors is None else tensors).items():
        for projection, n in heads.items():
            if projection in name and architecture == "llama":
                value = interleave(value, n)
        if quantise and value.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quantize(value, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(gguf_name(name), value)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("config", [TINY, SMALL], ids=["tied", "untied with biases"])
def test_values_come_back_bit_equal(config, tmp_path):
    tensors = random_tensors(config)
    found, base = load_pretrained(str(write_gguf(tmp_path / "m.gguf", config, tensors)))
    assert found == config
    exported = dict(to_hf_tensors(found, base))
    assert exported.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_values_are_those_of_the_reference(kind, tmp_path):
    """Rows are quantised one by one, so taking them out of order and in blocks must not change a
    value."""
    kind = gguf.GGMLQuantizationType[kind]
    tensors = random_tensors(TINY)
    config, base = load_pretrained(
        str(write_gguf(tmp_path / "m.gguf", TINY, tensors, quantise=kind))
    )
    for name, value in to_hf_tensors(config, base):
        whole = tensors[name]
        expected = gguf.dequantize(gguf.quantize(whole, kind), kind) if whole.ndim == 2 else whole
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_transformers_reads_the_same_model(tmp_path):
    """Its GGUF reader (with torch) is independent of ours: the same tensors, and our logits are its
    logits."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    from flora_jax.models.llama import Llama

    config = dataclasses.replace(TINY, tie_word_embeddings=False)
    write_gguf(
        tmp_path / "m.gguf",
        config,
        {k: v / 8 for k, v in random_tensors(config).items()},
        quantise=gguf.GGMLQuantizationType.Q8_0,
    )
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    config, base = load_pretrained(str(tmp_path / "m.gguf"))
    state = model.state_dict()
    exported = dict(to_hf_tensors(config, base))
    assert exported.keys() == state.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(value, state[name].numpy(), err_msg=name)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = Llama(config, None).apply({"params": base}, jnp.asarray(tokens, jnp.int32))
    assert np.abs(logits - expected).max() <= 2e-4


@pytest.mark.parametrize(
    "changes",
    [
        # its heads, whose width transformers does not read there, are as wide as in every published
        # one
        {
            "model_type": "qwen3",
            "qk_norm": True,
            "head_dim": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        pytest.param({"model_type": "qwen2", "biases": ("qkv",)}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: changes["model_type"],
)
def test_files_of_qwen_are_read_as_transformers_does(changes, tmp_path):
    """Rows of q and k lie there as in HF's files; the norms and biases of each come along."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from flora_jax.models.llama import Llama

    config = dataclasses.replace(TINY, tie_word_embeddings=False, **changes)
    tensors = {name: value / 8 + ("norm" in name) for name, value in random_tensors(config).items()}
    write_gguf(
        tmp_path / "m.gguf",
        config,
        tensors,
        quantise=gguf.GGMLQuantizationType.Q8_0,
        architecture=config.model_type,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    found, base = load_pretrained(str(tmp_path / "m.gguf"))
    assert found == config
    state = model.state_dict()
    exported = dict(to_hf_tensors(config, base))
    assert exported.keys() == state.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(value, state[name].numpy(), err_msg=name)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = Llama(config, None).apply({"params": base}, jnp.asarray(tokens, jnp.int32))
    assert np.abs(logits - expected).max() <= 2e-4


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered(factor, tmp_path):
    extra = {"rope_freqs.weight": rope_divisors(SMALL, factor)}
    config = GgufFile(write_gguf(tmp_path / "m.gguf", SMALL, extra=extra)).config
    assert config == dataclasses.replace(SMALL, rope_scaling=RopeScaling(factor=factor))
    shorter = {"rope_freqs.weight": rope_divisors(SMALL, factor, original=4096)}
    path = write_gguf(tmp_path / "n.gguf", SMALL, extra=shorter)
    with pytest.raises(UserError, match=r"'rope_freqs.weight' is not a Llama 3 scaling"):
        GgufFile(path)
    named = {"rope.scaling.original_context_length": 4096}
    config = GgufFile(write_gguf(tmp_path / "o.gguf", SMALL, extra=shorter, fields=named)).config
    assert config.rope_scaling == RopeScaling(factor=factor, original_max_position_embeddings=4096)
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert GgufFile(write_gguf(tmp_path / "p.gguf", SMALL, extra=ones)).config == SMALL


def without(name):
    return {"tensors": {k: v for k, v in random_tensors(TINY).items() if k != name}}


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(architecture="gemma"),
            "architecture 'gemma' is not supported; llama, qwen2, qwen3 are",
        ),
        (dict(fields={"expert_count": 8}), "llama.expert_count=8"),
        (dict(fields={"rope.scaling.type": "yarn"}), "llama.rope.scaling.type='yarn'"),
        (
            dict(fields={"rope.dimension_count": 8}),
            "llama.rope.dimension_count=8 is not the head width 16",
        ),
        (
            dict(fields={"vocab_size": 321}),
            "llama.vocab_size counts 321 tokens, token_embd.weight has 320 rows",
        ),
        (dict(fields={"block_count": None}), "metadata field 'llama.block_count' is missing"),
        (
            dict(fields={"attention.head_count": 0}),
            "llama.attention.head_count=0 must be a positive integer",
        ),
        (
            dict(fields={"embedding_length": "96"}),
            "llama.embedding_length='96' must be a positive integer",
        ),
        (
            dict(fields={"feed_forward_length": 200}),
            r"'model.layers.0.mlp.gate_proj.weight' has shape \[192, 96\]",
        ),
        (dict(fields={"block_count": 3}), "tensor 'blk.2.attn_norm.weight' is missing"),
        (dict(fields={"block_count": 1}), "unexpected tensor 'blk.1"),
        (without("model.embed_tokens.weight"), "tensor 'token_embd.weight' is missing"),
        (without("model.norm.weight"), "tensor 'output_norm.weight' is missing"),
        (
            dict(extra={"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}),
            "unexpected tensor 'blk.0.attn_q_norm",
        ),
        (
            dict(extra={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}),
            "is not a Llama 3 scaling",
        ),
        (dict(extra={"x": np.ones((2, 2), np.int32)}), "'x' is quantised as I32"),
    ],
)
def test_a_model_that_is_no_plain_llama_is_refused(change, words, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_damaged_file_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for data in (
        b"",
        b"GGUF",
        b"no gguf at all " * 99,
        whole[:200],
        whole[:2000],
        whole[: len(whole) // 2],
        whole[:-64],
        whole[:4] + b"\xff" * 400,
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a complete GGUF file") as error:
            load_pretrained(str(path))
        assert "\n" not in str(error.value)


def test_shardings_apply_to_gguf_too(tmp_path):
    path = str(write_gguf(tmp_path / "m.gguf"))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, placed = load_pretrained(path, shardings=lambda _: device)
    _, plain = load_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, placed, plain)


def test_a_part_of_a_tensor_is_that_part_of_the_whole(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    file = GgufFile(write_gguf(tmp_path / "m.gguf", SMALL, quantise=kind))
    for name in ("q_proj.weight", "q_proj.bias", "o_proj.weight"):
        tensor = file.tensors[f"model.layers.1.self_attn.{name}"]
        everything = (slice(None),) * len(tensor.shape)
        part = (slice(3, 70), slice(5, 40))[: len(tensor.shape)]
        np.testing.assert_array_equal(tensor[part], tensor[everything][part])


def test_weights_and_tokenizer_load_without_torch():
    """In a process of its own, whose importer finds no torch."""
    code = """
import sys
from importlib.machinery import PathFinder
class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.split(".")[0] == "torch" else super().find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
import pathlib, tempfile
sys.path[:0] = sys.argv[1:]
from test_gguf import write_gguf
from test_tokenizer import VOCABULARY, tokenizer_fields
import dataclasses
from flora_jax.models.config import LlamaConfig
from flora_jax.models.loading import load_pretrained
from flora_jax.models.tokenizer import load_tokenizer
config = dataclasses.replace(LlamaConfig.preset("tiny"), vocab_size=len(VOCABULARY))
with tempfile.TemporaryDirectory() as folder:
    path = write_gguf(pathlib.Path(folder) / "m.gguf", config, tokenizer=tokenizer_fields("smollm"))
    load_pretrained(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.decode(tokenizer("a 12 b").input_ids) == "a 12 b"
try:
    import torch
except ModuleNotFoundError:
    print("and there was no torch")
"""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            *(str(ROOT / "tests" / room) for room in ("", "data", "models")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0 and "there was no torch" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct: its file, our configuration and base, and transformers' model from our
    tensors."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig as HfConfig
    from transformers import LlamaForCausalLM

    path = resolve_source("smollm2-135m-instruct")
    config, base = load_pretrained("smollm2-135m-instruct")
    model = LlamaForCausalLM(HfConfig(**json.loads(json.dumps(config.to_hf())))).eval()
    state = {name: torch.tensor(value) for name, value in to_hf_tensors(config, base)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    return path, config, base, model


@pytest.mark.slow
def test_smollm2_is_the_preset_and_what_transformers_reads(smollm2):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    path, config, base, _ = smollm2
    assert config == LlamaConfig.preset("smollm2-135m")
    assert sum(leaf.size for leaf in jax.tree.leaves(base)) == 134_515_008
    theirs = LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    for name, value in to_hf_tensors(config, base):
        np.testing.assert_array_equal(value, theirs[name].numpy(), err_msg=name)


@pytest.mark.slow
def test_smollm2_speaks_as_in_transformers(smollm2):
    """Logits within 1e-3, and the same greedy 64 tokens unless the two best logits are closer than
    that."""
    torch = pytest.importorskip("torch")

    from flora_jax.models.llama import Llama
    from flora_jax.models.tokenizer import load_tokenizer

    _, config, base, model = smollm2
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    forward = jax.jit(lambda base, tokens: Llama(config, None).apply({"params": base}, tokens))
    worst = 0.0
    for question in (
        "What is the capital of France?",
        "Write a haiku about the sea.",
        "Add 1234 and 5678.",
        "Why is the sky blue?",
        "Translate 'good morning' to Spanish.",
    ):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                pad_token_id=2,
                attention_mask=torch.ones(1, len(prompt)),
            )[0].tolist()
            expected = model(torch.tensor([theirs])).logits[0].numpy()
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(theirs)] = theirs
        logits = np.asarray(forward(base, padded))[0, : len(theirs)]
        worst = max(worst, np.abs(logits - expected).max())
        # Greedy text is equal step by step: each next token from the same text so far.
        for t in range(len(prompt) - 1, len(theirs) - 1):
            row = logits[t].copy()
            row[list(config.eos_token_id)] = -np.inf  # as min_new_tokens does
            best, second = np.sort(row)[-1:-3:-1]
            assert row.argmax() == theirs[t + 1] or best - second < 1e-3
    print(f"max |logit difference| {worst:.2e}")
    assert worst <= 1e-3


# ------------------------------------------------------------------------- keys that change numbers


@pytest.mark.parametrize(
    "key, value",
    [
        ("rope.scaling.factor", 8.0),
        ("rope.scale_linear", 2.0),
        ("rope.scaling.attn_factor", 0.5),
        ("rope.scaling.attn_factor", 0.0),
        ("rope.scaling.alpha", 1000.0),
        ("rope.scaling.yarn_ext_factor", 1.0),
        ("rope.scaling.yarn_attn_factor", 0.1),
        ("rope.scaling.yarn_beta_fast", 16.0),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.dimension_sections", [4, 4, 0, 0]),
        ("rope.freq_base_swa", 10.0),
        ("rope.dimension_count_swa", 8),
        ("rope.something_new", 3),
        ("attention.scale", 0.0156),
        ("attention.sliding_window", 512),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.causal", False),
        ("attention.output_scale", 0.5),
        ("attention.temperature_length", 8192),
        ("attention.temperature_scale", 0.1),
        ("attention.key_length_mla", 32),
        ("attention.sliding_window_pattern", [True, False]),
        ("attention.q_lora_rank", 4),
        ("attention.kind", "new"),
        ("logit_scale", 0.0625),
        ("residual_scale", 0.22),
        ("embedding_scale", 12.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("embedding_length_out", 48),
        ("attention.scale", float("nan")),
        ("hidden_activation", "gelu"),
    ],
)
def test_a_key_that_may_change_the_numbers_is_refused_by_name(key, value, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", fields={key: value})
    with pytest.raises(UserError, match=f"llama.{key}=.* is not supported") as error:
        GgufFile(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_keys_that_change_nothing_pass(tmp_path):
    """Every key that the format lists for rotary embeddings and attention, at the value that a
    plain Llama has."""
    neutral = {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 1.0,
        "rope.scale_linear": 1.0,
        "rope.scaling.original_context_length": 2048,
        "rope.scaling.finetuned": True,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_ext_factor": -1.0,
        "rope.scaling.yarn_attn_factor": 1.0,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "rope.scaling.yarn_log_multiplier": 0.0,
        "rope.dimension_sections": [0, 0, 0, 0],
        "attention.scale": 0.25,
        "attention.sliding_window": 2048,
        "attention.clamp_kqv": 0.0,
        "attention.causal": True,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.key_length_swa": 16,
        "logit_scale": 1.0,
        "residual_scale": 1.0,
        "embedding_scale": 0.0,
        "expert_count": 0,
        "expert_used_count": 0,
        "tensor_data_layout": "Meta AI original pth",
        "use_parallel_residual": False,
        "embedding_length_out": 96,
    }
    # What speaks of parts that a dense Llama has not, and a factor where the type says that there
    # is no scaling.
    idle = {
        "expert_used_count": 2,
        "expert_feed_forward_length": 128,
        "expert_weights_scale": 2.5,
        "use_parallel_residual": True,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 4.0,
        "rope.scale_linear": 4.0,
    }
    assert GgufFile(write_gguf(tmp_path / "l.gguf", fields={**neutral, **idle})).config == TINY
    assert GgufFile(write_gguf(tmp_path / "m.gguf", fields=neutral)).config == TINY
    # Llama 3's own scaling may be named beside its tensor, and is a lie without it.
    extra, named = {"rope_freqs.weight": rope_divisors(SMALL, 8.0)}, {"rope.scaling.type": "llama3"}
    fields = {**named, "rope.scaling.factor": 8.0}
    assert (
        GgufFile(
            write_gguf(tmp_path / "n.gguf", SMALL, extra=extra, fields=fields)
        ).config.rope_scaling.factor
        == 8
    )
    for fields in ({"rope.scaling.factor": 8.0}, {**named, "rope.scaling.factor": 4.0}):
        with pytest.raises(UserError, match=r"llama.rope.scaling.factor="):
            GgufFile(write_gguf(tmp_path / "o.gguf", SMALL, extra=extra, fields=fields))
    ones = {"rope_freqs.weight": np.ones_like(rope_divisors(SMALL, 8.0))}  # scaling by one is none
    assert (
        GgufFile(write_gguf(tmp_path / "q.gguf", SMALL, extra=ones, fields=named)).config == SMALL
    )
    with pytest.raises(UserError, match=r"llama.rope.scaling.factor=8.0 is not supported"):
        fields = {**named, "rope.scaling.factor": 8.0}
        GgufFile(write_gguf(tmp_path / "r.gguf", SMALL, extra=ones, fields=fields))
    with pytest.raises(UserError, match=r"llama.rope.scaling.type='llama3' is not supported"):
        GgufFile(write_gguf(tmp_path / "p.gguf", SMALL, fields=named))


def test_values_that_are_not_finite_are_refused_with_their_tensor(tmp_path):
    """Stored as they are, as the scale of a quantised block, or too large for the dtype that is
    asked for."""
    name = "model.layers.0.mlp.up_proj.weight"
    for value, quantise, dtype, words in (
        (np.nan, None, jnp.float32, "is not finite"),
        (np.inf, "F16", jnp.bfloat16, "is not finite"),
        (1e6, "Q8_0", jnp.float32, "is not finite"),  # its scale is a float16
        (7e4, None, jnp.float16, "which float16 cannot hold"),
    ):
        tensors = random_tensors(TINY)
        tensors[name][7, 3] = value if quantise != "Q8_0" else 127 * value
        kind = quantise and gguf.GGMLQuantizationType[quantise]
        with np.errstate(over="ignore"):
            path = write_gguf(tmp_path / f"{value}.gguf", TINY, tensors, quantise=kind)
        with pytest.raises(UserError, match=f"tensor '{name}' .*{words}") as error:
            load_pretrained(str(path), dtype)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


# ------------------------------------------------------------------------------------- a real Qwen2


@pytest.fixture(scope="module")
def qwen():
    """The path of a local GGUF of Qwen2.5 0.5B, which FLORA_QWEN_GGUF names."""
    pytest.importorskip("torch")
    path = os.environ.get("FLORA_QWEN_GGUF")
    if not path:
        pytest.skip("FLORA_QWEN_GGUF is unset")
    return Path(path)


@pytest.mark.slow
def test_a_real_qwen2_is_what_transformers_reads(qwen):
    """Logits within 1e-3 of the largest, and the same greedy 64 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from flora_jax.inference.generator import Generator
    from flora_jax.models.llama import Llama
    from flora_jax.models.tokenizer import load_tokenizer

    config, base = load_pretrained(str(qwen))
    preset = LlamaConfig.preset("qwen2.5-0.5b")
    assert {**config.sizes, **config.differences} == {**preset.sizes, **preset.differences}
    model = AutoModelForCausalLM.from_pretrained(
        qwen.parent, gguf_file=qwen.name, dtype=torch.float32
    ).eval()
    tokenizer = load_tokenizer(str(qwen))
    texts = [
        "Write a Python function that reverses a string.",
        "The capital of France is",
        "def fibonacci(n):\n",
        "Q: Ann has 17 apples and gives 5 away. How many are left?\nA:",
        "Once upon a time in a small village",
    ]
    prompts = [tokenizer(text).input_ids for text in texts]
    forward = jax.jit(Llama(config).apply)
    for prompt in prompts:
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits.numpy()
        found = forward({"params": base}, jnp.asarray([prompt]))
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
    generator = Generator(config, base, tokenizer=tokenizer, max_length=128, batch_size=5)
    for prompt, ours in zip(prompts, generator.generate(prompts, 64), strict=True):
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        theirs = out[0, len(prompt) :].tolist()
        assert theirs[: len(ours.tokens)] == list(ours.tokens)
        assert len(ours.tokens) == 64 or theirs[len(ours.tokens)] in config.eos_token_id


@pytest.mark.slow
def test_a_real_qwen2_is_trained_and_exported(qwen, small, tmp_path):
    """30 steps lower the loss, and transformers loads what they gave, with its code."""
    import torch
    from transformers import AutoModelForCausalLM

    from flora_jax.finetune import run
    from flora_jax.interop.exports import hand_over
    from flora_jax.training.trained import load_run

    fields = {
        "model.weights": str(qwen),
        "train.steps": 30,
        "train.batch_size": 2,
        "data.max_length": 48,
        "data.packing": False,
        "train.eval_every": 30,
        "train.save_every": 30,
        "optim.learning_rate": 3e-4,
    }
    run(small("ffba_qg_add", **fields), tmp_path / "w")
    lines = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    trained, _ = load_run(tmp_path / "w", None, "transformers", None)
    report = hand_over(trained, "transformers", tmp_path / "out")
    assert report["logits"]["max_change"] <= report["logits"]["bound"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokens = np.asarray([trained.tokenizer("12 + 30 = ").input_ids])
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = trained.model.apply(trained.variables, jnp.asarray(tokens))
    assert np.abs(theirs - ours).max() <= 1e-3 * np.abs(theirs).max()
