"""The configuration of a Llama: sizes, rotary settings, differences. Nothing here touches an array.

Axis letters used in all model code: B batch, T query length, S key length, D model width, N heads,
K key/value heads, G heads per key/value head (N / K), H head width, F ffn width, R rank, V
vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from flora_jax.errors import require, require_known
from flora_jax.models import presets
from flora_jax.models.architectures import (
    ARCHITECTURES,
    MOST_LAYERS,
    PRODUCTS,
    read_config,
    write_config,
)

DTYPES = ("float32", "bfloat16")  # of parameters and of compute
# What of a decode step our kernels compute: nothing, a layer's attention, all of a layer …
DECODE_KERNELS = ("none", "attention", "layer")
DECODE_ROWS = 16  # … of up to so many rows
# Fields of LlamaConfig in which a model may differ from a Llama.
DIFFERENCES = (
    "biases",
    "qk_norm",
    "no_rope_layers",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_divisor",
)
# Of the base's kernels; as in adapters/quantized.py, which takes a second to import.
QUANTIZATIONS = ("none", "int8", "fp8", "nf4")
SERVED = ("none", "int8", "fp8")  # the quantisations of fused arrays


_LARGEST = 3e38  # of float32


def _check_number(name: str, value: Any) -> None:
    require(
        isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value < _LARGEST,
        f"{name}={value!r} must be a positive number",
    )


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3 frequency scaling (HF `rope_type: llama3`): `factor` slows long wavelengths."""

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_number(f"RopeScaling.{field.name}", getattr(self, field.name))
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"RopeScaling.low_freq_factor={self.low_freq_factor} must be below "
            f"high_freq_factor={self.high_freq_factor}",
        )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture of one Llama. Field names are those of HF's `config.json` where it has them.

    biases: the products (of qkv, o, gate_up, down) that have one; qk_norm: whether each head's q
    and k pass an RMSNorm before the rotary embeddings; no_rope_layers: the layers without rotary
    embeddings; embedding_multiplier: of the embeddings; residual_multiplier: of each block's
    addition to the stream; attention_multiplier: of the scores, None for 1/sqrt(H); logits_divisor:
    of the logits; model_type: the row of ARCHITECTURES that config.json is written by. Raises
    UserError for values that no model can have.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H; N * H need not equal D
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    no_rope_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_divisor: float = 1.0
    max_position_embeddings: int = 8192
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    model_type: str = "llama"

    def __post_init__(self):
        self._check_sizes()
        self._check_differences()
        for name in ("rms_norm_eps", "rope_theta"):
            _check_number(f"LlamaConfig.{name}", getattr(self, name))
            # JAX takes no integer above 2**31.
            object.__setattr__(self, name, float(getattr(self, name)))
        require(
            isinstance(self.rope_scaling, RopeScaling | None),
            f"LlamaConfig.rope_scaling={self.rope_scaling!r} must be a RopeScaling or None; "
            "LlamaConfig.from_hf reads HF's form",
        )
        self._check_tokens()
        require(
            self.head_dim % 2 == 0,
            f"LlamaConfig.head_dim={self.head_dim} must be even for rotary embeddings",
        )

    def _check_sizes(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                field.type != "int"
                or (isinstance(value, int) and not isinstance(value, bool) and value >= 1),
                f"LlamaConfig.{field.name}={value!r} must be a positive integer",
            )
        require(
            self.num_hidden_layers <= MOST_LAYERS,
            f"LlamaConfig.num_hidden_layers={self.num_hidden_layers} must be at most {MOST_LAYERS}",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"LlamaConfig.num_key_value_heads={self.num_key_value_heads} must divide "
            f"num_attention_heads={self.num_attention_heads}",
        )

    def _check_differences(self) -> None:
        require_known(self.model_type, ARCHITECTURES, f"LlamaConfig.model_type={self.model_type!r}")
        require(
            self.biases == tuple(one for one in PRODUCTS if one in self.biases),
            f"LlamaConfig.biases={self.biases!r} must be a tuple of {', '.join(PRODUCTS)}, in this "
            "order",
        )
        layers = range(self.num_hidden_layers)
        require(
            self.no_rope_layers == tuple(i for i in layers if i in self.no_rope_layers),
            f"LlamaConfig.no_rope_layers={self.no_rope_layers!r} must be a tuple of layers from 0 "
            f"to {layers[-1]}, in this order",
        )
        for name in ("embedding_multiplier", "residual_multiplier", "logits_divisor"):
            _check_number(f"LlamaConfig.{name}", getattr(self, name))
        _check_number("LlamaConfig.attention_multiplier", self.attention_scale)

    def _check_tokens(self) -> None:
        eos = self.eos_token_id
        require(
            isinstance(eos, tuple)
            and all(isinstance(token, numbers.Integral) and token >= 0 for token in eos),
            f"LlamaConfig.eos_token_id={eos!r} must be a tuple of token ids",
        )
        for name in ("bos_token_id", "pad_token_id"):
            token = getattr(self, name)  # some published models have -1 for no pad token
            require(
                token is None
                or (
                    isinstance(token, numbers.Integral)
                    and not isinstance(token, bool)
                    and token >= -1
                ),
                f"LlamaConfig.{name}={token!r} must be a token id or None",
            )

    @property
    def q_width(self) -> int:
        """Q: width of the query projection, N * H."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K * H: width of the key projection and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    @property
    def sizes(self) -> dict[str, int]:
        """The lengths of the weights' axes, by letter."""
        return {
            "L": self.num_hidden_layers,
            "V": self.vocab_size,
            "D": self.hidden_size,
            "Q": self.q_width,
            "K": self.kv_width,
            "F": self.intermediate_size,
            "H": self.head_dim,
        }

    @property
    def differences(self) -> dict[str, Any]:
        """The fields in which it may differ from a Llama without biases."""
        return {name: getattr(self, name) for name in DIFFERENCES}

    @property
    def plain(self) -> LlamaConfig:
        """The Llama of the same sizes without `differences`."""
        own = {one.name: one.default for one in dataclasses.fields(self) if one.name in DIFFERENCES}
        return dataclasses.replace(self, model_type="llama", **own)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """`(d_in, d_out)` of each projection of a layer, by its name."""
        # Imported here, so that reading the names of dtypes needs no JAX.
        from flora_jax.adapters.leaves import AXES

        sizes = self.sizes
        return {name: (sizes[d_in], sizes[d_out]) for name, (d_in, d_out) in AXES.items()}

    @property
    def attention_scale(self) -> float:
        """The factor of the products of q and k."""
        if self.attention_multiplier is None:
            return self.head_dim**-0.5
        return self.attention_multiplier

    @classmethod
    def preset(cls, name: str) -> LlamaConfig:
        """The architecture of a preset. Raises UserError, with near misses, if there is none."""
        require_known(name, PRESETS, f"model preset {name!r}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str = "config.json") -> LlamaConfig:
        """Reads an HF `config.json` dict of transformers 4 (`rope_theta`, `rope_scaling`) or 5
        (`rope_parameters`).

        Raises UserError, with `source`, for a `model_type` that is not in ARCHITECTURES, an
        unsupported rotary type, a sliding window in use, and any other field that would change the
        numbers and is not read.
        """
        return cls.of(read_config(hf, source))

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> LlamaConfig:
        """The configuration of these fields; rope_scaling: a dict of RopeScaling's fields, or
        None."""
        scaling = fields.get("rope_scaling")
        return cls(**{**fields, "rope_scaling": scaling and RopeScaling(**scaling)})

    def to_hf(self) -> dict[str, Any]:
        """The HF `config.json` dict, with `rope_parameters` for transformers 5, and `rope_theta`
        and `rope_scaling` for older readers.

        Raises UserError for a field that a model of this `model_type` cannot have.
        """
        hf = write_config(dataclasses.asdict(self))
        again = LlamaConfig.from_hf(hf, "config.json")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            read = getattr(again, field.name)
            require(
                read == value,
                f"LlamaConfig.{field.name}={value!r} cannot be stated in the config.json of a "
                f"{self.model_type}, which has {read!r}",
            )
        return hf


PRESETS = {name: LlamaConfig.of(fields) for name, fields in presets.PRESETS.items()}
