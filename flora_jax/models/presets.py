"""The fields of LlamaConfig of published models, by name. loading.PUBLISHED has their hub ids."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]


def _llama3(**sizes: Any) -> Fields:
    return dict(
        vocab_size=128256,
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_id=(128001, 128008, 128009),
        **sizes,
    )


def _smollm2(**sizes: Any) -> Fields:
    return dict(
        vocab_size=49152,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=(2,),
        pad_token_id=2,
        **sizes,
    )


def _qwen2(**sizes: Any) -> Fields:
    """Qwen2.5, instruction-tuned."""
    settings = {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "biases": ("qkv",),
        "max_position_embeddings": 32768,
        "bos_token_id": 151643,
        "eos_token_id": (151645, 151643),
        "pad_token_id": 151643,
    }
    return {**settings, **sizes}


def _qwen3(**sizes: Any) -> Fields:
    return dict(
        model_type="qwen3",
        vocab_size=151936,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
        max_position_embeddings=40960,
        bos_token_id=151643,
        eos_token_id=(151645, 151643),
        pad_token_id=151643,
        **sizes,
    )


PRESETS: dict[str, Fields] = {
    "llama3.2-1b": _llama3(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope_scaling=dict(factor=32.0),
        tie_word_embeddings=True,
    ),
    "llama3.2-3b": _llama3(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        rope_scaling=dict(factor=32.0),
        tie_word_embeddings=True,
    ),
    "llama3.1-8b": _llama3(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_scaling=dict(factor=8.0),
    ),
    "smollm2-135m": _smollm2(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_theta=100000.0,
    ),
    "smollm2-360m": _smollm2(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        rope_theta=100000.0,
    ),
    "smollm2-1.7b": _smollm2(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        rope_theta=130000.0,
    ),
    "qwen2.5-0.5b": _qwen2(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": _qwen2(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": _qwen2(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=152064,
    ),
    "qwen3-0.6b": _qwen3(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-1.7b": _qwen3(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": _qwen3(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": _qwen3(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
    ),
    # v0.3, whose attention has no window
    "mistral-7b": dict(
        model_type="mistral",
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        bos_token_id=1,
        eos_token_id=(2,),
    ),
    "smollm3-3b": dict(
        model_type="smollm3",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=5000000.0,
        no_rope_layers=tuple(range(3, 36, 4)),
        tie_word_embeddings=True,
        max_position_embeddings=65536,
        bos_token_id=128000,
        eos_token_id=(128012,),
        pad_token_id=128004,
    ),
    "granite-3-2b": dict(
        model_type="granite",
        vocab_size=49159,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=10000000.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.015625,
        logits_divisor=8.0,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        bos_token_id=0,
        eos_token_id=(0,),
        pad_token_id=0,
    ),
    # Small enough for seconds on a CPU, with everything a real one has: GQA 3, its own head_dim,
    # and the built-in byte tokenizer's vocabulary.
    "tiny": dict(
        vocab_size=320,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=(257,),
        pad_token_id=258,
    ),
}
