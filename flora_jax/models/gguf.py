"""Checkpoints in one GGUF file (llama.cpp's format), without torch.

A file holds configuration, weights and tokenizer. Tensors have their HF names, order and
orientation here, and are dequantised to float32 a slice at a time. For a Llama, llama.cpp rotates
neighbouring pairs of a head where HF rotates its two halves, so its files hold the rows of q and k
interleaved: a head's rows `[a0 b0 a1 b1 …]` are HF's `[a0 a1 … b0 b1 …]`. Reading undoes that.
The rows of architectures.py say which architectures are read, and which of them are interleaved.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from flora_jax.errors import UserError, require
from flora_jax.files import check_file
from flora_jax.models.architectures import ARCHITECTURES, Architecture
from flora_jax.models.attention import inverse_frequencies
from flora_jax.models.config import LlamaConfig, RopeScaling
from flora_jax.models.hf import check_hf_tensors, hf_shapes

# Keys, without the architecture's name before them, that are read here …
_READ = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "expert_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
    }
)
# … and those of rotary embeddings and attention that change no number of a Llama.
_IDLE = frozenset(
    {
        "attention.layer_norm_epsilon",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
    }
)
# The values at which other such keys, and a few more, change nothing. Keys with other names are
# notes, or settings of parts that a dense Llama lacks (experts, a parallel residual). A factor
# without a type is linear scaling (llama.cpp); `rope.scale_linear` is its older name.
_NEUTRAL = {
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 0),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
    "attention.causal": (1,),
    "attention.output_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "hidden_activation": (0,),
}
# Product -> a tensor whose bias tells that the product has one.
_BIASES = {"qkv": "attn_q", "o": "attn_output", "gate_up": "ffn_gate", "down": "ffn_down"}


class GgufTensor:
    """A tensor of the file in HF orientation; a slice is read and dequantised to float32."""

    def __init__(self, tensor: gguf.ReaderTensor, row_order: np.ndarray | None = None):
        self.shape = tuple(reversed(tensor.shape.tolist()))
        self._data = tensor.data
        self._type = tensor.tensor_type
        self._row_order = row_order

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, *columns = index
        if self._row_order is not None:
            rows = self._row_order[rows]
        if len(self.shape) == 1:  # a vector's storage has no row axis
            return gguf.dequantize(self._data, self._type)[rows]
        return gguf.dequantize(self._data[rows], self._type)[:, *columns]


class GgufFile:
    """An opened file: `config`, and `tensors` (HF name -> GgufTensor).

    Weights stay on disk until they are indexed. Raises UserError for a file that is truncated, not
    GGUF, of an architecture that is not read, or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        check_file(self.path)
        try:
            self._reader = gguf.GGUFReader(self.path)
        # The reader checks little, and raises these on bytes that are no GGUF.
        except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise UserError(
                f"{self.path}: not a complete GGUF file ({error}); download it again"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        require(
            self._reader.byte_order == "I",
            f"{self.path}: the file has another byte order than this machine; convert it first",
        )
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._architecture = self._read_architecture()
        self._refuse_unsupported()
        try:
            self.config = self._read_config()
        except UserError as error:
            if str(self.path) in str(error):
                raise
            # The configuration does not know the file.
            raise UserError(f"{self.path}: {error}") from None
        self._refuse_unread_keys()
        self.tensors = self._name_tensors()

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value `key` (scalar, str or list), or `default`."""
        field = self._reader.get_field(key)
        if field is None:
            return default
        try:
            return field.contents()
        except (ValueError, LookupError) as error:  # bytes that are no text, a missing part
            raise UserError(f"{self.path}: {key} cannot be read ({error})") from None

    def require(self, key: str) -> Any:
        """The metadata value `key`. Raises UserError if the file has none."""
        value = self.get(key)
        require(value is not None, f"{self.path}: metadata field {key!r} is missing")
        return value

    @property
    def _row(self) -> Architecture:
        return ARCHITECTURES[self._architecture]

    def _read_architecture(self) -> str:
        """The `model_type`, which also begins the keys of the file's metadata."""
        architecture = self.require("general.architecture")
        able = [name for name, row in ARCHITECTURES.items() if row.gguf is not None]
        require(
            architecture in able,
            f"{self.path}: architecture {architecture!r} is not supported; {', '.join(able)} are",
        )
        return architecture

    def _key(self, name: str) -> str:
        return f"{self._architecture}.{name}"

    def _refuse_unsupported(self) -> None:
        if experts := self.get(self._key("expert_count"), 0):
            raise UserError(
                f"{self.path}: {self._key('expert_count')}={experts} is not supported; only dense "
                "models are"
            )
        scaling = self.get(self._key("rope.scaling.type"), "none")
        known = ["none", "linear"]  # linear scaling by 1 changes nothing
        if "rope_freqs.weight" in self._stored:
            known.append("llama3")
        require(
            scaling in known,
            f"{self.path}: {self._key('rope.scaling.type')}={scaling!r} is not supported; "
            "'none' and Llama 3's rope_freqs are",
        )
        for tensor in {t.tensor_type: t for t in self._stored.values()}.values():
            self._check_readable(tensor)

    def _check_readable(self, tensor: gguf.ReaderTensor) -> None:
        """Raises UserError for a tensor of a type that gguf does not dequantise."""
        data = tensor.data
        if len(tensor.shape) > 1:
            data = data[:1]
        try:
            gguf.dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: tensor {tensor.name!r} is quantised as {tensor.tensor_type.name}, "
                "which cannot be read; use Q4_0 to Q8_0, a K-quant, BF16, F16 or F32"
            ) from None

    def _read_config(self) -> LlamaConfig:
        key = self._key
        width = self.require(key("embedding_length"))
        heads = self.require(key("attention.head_count"))
        kv_heads = self.get(key("attention.head_count_kv"), heads)
        require(
            not (isinstance(heads, list) or isinstance(kv_heads, list)),
            f"{self.path}: head counts that differ by layer are not supported",
        )
        head_dim = self._read_head_dim(width, heads)
        vocab_size = self._read_vocab_size()
        # Chat models have a token that ends a turn, beside the one that ends a document.
        ends = [self.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
        # Stored as float32: the number meant is the shortest decimal that gives the same float32.
        eps = float(str(np.float32(self.require(key("attention.layer_norm_rms_epsilon")))))
        biases = tuple(p for p, name in _BIASES.items() if f"blk.0.{name}.bias" in self._stored)
        config = LlamaConfig(
            model_type=self._architecture,
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=self.require(key("feed_forward_length")),
            num_hidden_layers=self.require(key("block_count")),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=eps,
            rope_theta=float(self.get(key("rope.freq_base"), 10000.0)),
            tie_word_embeddings="output.weight" not in self._stored,
            max_position_embeddings=self.get(key("context_length"), 2048),
            bos_token_id=self.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=tuple(dict.fromkeys(end for end in ends if end is not None)),
            pad_token_id=self.get("tokenizer.ggml.padding_token_id"),
            **{"biases": biases, **self._row.fixed},
        )
        return self._with_rope_scaling(config)

    def _read_head_dim(self, width: Any, heads: Any) -> int:
        """H. Raises UserError where queries, keys and values differ in it."""
        for key, value in (
            (self._key("embedding_length"), width),
            (self._key("attention.head_count"), heads),
        ):
            require(
                isinstance(value, int) and value >= 1,
                f"{self.path}: {key}={value!r} must be a positive integer",
            )
        head_dim = self.get(self._key("attention.key_length")) or width // heads
        for key in map(self._key, ("rope.dimension_count", "attention.value_length")):
            require(
                self.get(key, head_dim) == head_dim,
                f"{self.path}: {key}={self.get(key)} is not the head width {head_dim}; "
                "not supported",
            )
        return head_dim

    def _read_vocab_size(self) -> int:
        """V, the rows of the embedding. Raises UserError where the metadata count otherwise."""
        require(
            "token_embd.weight" in self._stored,
            f"{self.path}: tensor 'token_embd.weight' is missing",
        )
        rows = int(self._stored["token_embd.weight"].shape[-1])
        stated = self._key("vocab_size")
        counted = {stated: self.get(stated, rows)}
        tokens = self._reader.get_field("tokenizer.ggml.tokens")
        if tokens is not None:
            counted["tokenizer.ggml.tokens"] = len(tokens.data)
        for key, found in counted.items():
            require(
                found == rows,
                f"{self.path}: {key} counts {found} tokens, token_embd.weight has {rows} rows",
            )
        return rows

    def _refuse_unread_keys(self) -> None:
        """Raises UserError for the first unread key that may change what the model computes."""
        neutral = self._neutral_values()
        idle = _READ | _IDLE
        if self.get(self._key("rope.scaling.type")) == "none":  # llama.cpp then ignores a factor
            idle = idle | {"rope.scaling.factor", "rope.scale_linear"}
        for key in self._reader.fields:
            name = key.removeprefix(self._key(""))
            telling = name.startswith(("rope.", "attention.")) or name in neutral
            if name == key or name in idle or not telling:
                continue
            value = self.get(key)
            if not _is_silent(value, neutral.get(name, (0,))):
                raise UserError(
                    f"{self.path}: {key}={value!r:.60} is not supported: it may change what the "
                    "model computes, and this reader does not know how"
                )

    def _neutral_values(self) -> dict[str, tuple[float, ...]]:
        """Key, without the architecture's name -> the values that change nothing with this
        config."""
        config = self.config
        width = (0, config.head_dim)
        neutral = {
            **_NEUTRAL,
            "embedding_length_out": (0, config.hidden_size),
            "attention.scale": (0, config.head_dim**-0.5),
            "attention.key_length_swa": width,
            "attention.value_length_swa": width,
            "rope.dimension_count_swa": width,
            "rope.freq_base_swa": (0, config.rope_theta),
        }
        window = self.get(self._key("attention.sliding_window"), 0)
        if isinstance(window, int) and window >= config.max_position_embeddings:  # it hides nothing
            neutral["attention.sliding_window"] = (window,)
        kind = self.get(self._key("rope.scaling.type"))
        if kind == "llama3" and config.rope_scaling is not None:
            neutral["rope.scaling.factor"] = (0, 1, config.rope_scaling.factor)
        return neutral

    def _with_rope_scaling(self, config: LlamaConfig) -> LlamaConfig:
        """The configuration with Llama 3's scaling, where the file has it.

        A file states only the result: a divisor for each of the H/2 frequencies.
        """
        if "rope_freqs.weight" not in self._stored:
            return config
        divisors = GgufTensor(self._stored["rope_freqs.weight"])[(slice(None),)]
        if np.all(divisors == 1):
            return config
        original = self.get(self._key("rope.scaling.original_context_length"), 8192)
        scaling = RopeScaling(
            factor=float(divisors.max()), original_max_position_embeddings=original
        )
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        expected = inverse_frequencies(config) / inverse_frequencies(scaled)
        require(
            divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-4),
            f"{self.path}: tensor 'rope_freqs.weight' is not a Llama 3 scaling with low and "
            f"high frequency factors 1 and 4 over {original} positions; not supported",
        )
        return scaled

    def _name_tensors(self) -> dict[str, GgufTensor]:
        config = self.config
        architecture = gguf.MODEL_ARCH[self._architecture.upper()]
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        orders = {}
        if self._row.gguf == "interleaved":
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            orders = {name: _hf_row_order(count, config.head_dim) for name, count in heads.items()}
        stored = {name: one for name, one in self._stored.items() if name != "rope_freqs.weight"}
        tensors = {}
        for hf_name in hf_shapes(config):
            name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            require(name in stored, f"{self.path}: tensor {name!r} is missing")
            order = next((order for part, order in orders.items() if part in hf_name), None)
            tensors[hf_name] = GgufTensor(stored.pop(name), order)
        # Other tensors keep their own names, so that the check names them.
        left = {name: GgufTensor(tensor) for name, tensor in stored.items()}
        shapes = {name: tensor.shape for name, tensor in (tensors | left).items()}
        check_hf_tensors(config, shapes, str(self.path))
        return tensors


def _is_silent(value: Any, neutral: tuple[float, ...]) -> bool:
    """Whether a metadata value is empty, or one of the neutral numbers."""
    if isinstance(value, list | str):
        return not any(value)
    return any(math.isclose(value, one, rel_tol=1e-6) for one in neutral)


def _hf_row_order(heads: int, head_dim: int) -> np.ndarray:
    """For each HF row of q or k, `[heads * H]`, the row of the file that holds it: in a head
    `[0 2 4 … 1 3 5 …]`."""
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
