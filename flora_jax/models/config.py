"""What a Llama is made of: sizes, rotary settings, presets. Nothing here touches an array.

Axis letters used in all model code: B batch, T query length, S key length, D model width, N heads,
K key/value heads, G heads per key/value head (N / K), H head width, F ffn width, R rank, V
vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from flora_jax.errors import UserError, require, require_known

DTYPES = ("float32", "bfloat16")  # of parameters and of compute
# of the base's kernels; as in adapters/quantized.py, which takes a second to import
QUANTIZATIONS = ("none", "int8", "fp8", "nf4")


def _check_number(name: str, value: Any) -> None:
    require(
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0,
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
    """Architecture of one Llama. Field names are those of HF's `config.json`."""

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
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 8192
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        self._check_sizes()
        for name in ("rms_norm_eps", "rope_theta"):
            _check_number(f"LlamaConfig.{name}", getattr(self, name))
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
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"LlamaConfig.num_key_value_heads={self.num_key_value_heads} must divide "
            f"num_attention_heads={self.num_attention_heads}",
        )

    def _check_tokens(self) -> None:
        eos = self.eos_token_id
        require(
            isinstance(eos, tuple)
            and all(isinstance(token, numbers.Integral) and token >= 0 for token in eos),
            f"LlamaConfig.eos_token_id={eos!r} must be a tuple of token ids",
        )
        for name in ("bos_token_id", "pad_token_id"):
            token = getattr(self, name)  # -1 is published for a pad token that is none
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
        """Lengths of the axes of the weights, by letter."""
        return {
            "L": self.num_hidden_layers,
            "V": self.vocab_size,
            "D": self.hidden_size,
            "Q": self.q_width,
            "K": self.kv_width,
            "F": self.intermediate_size,
        }

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """`(d_in, d_out)` of each projection of a layer, by its name."""
        # Here, so that who only wants the names of dtypes does without JAX.
        from flora_jax.adapters.leaves import AXES

        sizes = self.sizes
        return {name: (sizes[d_in], sizes[d_out]) for name, (d_in, d_out) in AXES.items()}

    @property
    def biases(self) -> dict[str, bool]:
        """Whether the projections of each block have a bias."""
        return {"attention": self.attention_bias, "mlp": self.mlp_bias}

    @classmethod
    def preset(cls, name: str) -> LlamaConfig:
        """The architecture of a named preset; a UserError with near misses if there is none."""
        require_known(name, PRESETS, f"model preset {name!r}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str = "config.json") -> LlamaConfig:
        """Reads an HF `config.json` dict, of transformers 4 (`rope_theta`, `rope_scaling`) or 5
        (`rope_parameters`).

        Raises UserError for another architecture or an unsupported rotary type.
        """
        _check_llama(hf, source)
        # Where both forms stand there the older fields count, as transformers reads them.
        scaled = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        rope = {"rope_theta": hf.get("rope_theta"), **scaled}
        scaling = _read_scaling(rope, source)
        turned = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
        require(
            turned in (None, 1),
            f"{source}: partial_rotary_factor={turned!r} is not supported; Llama turns whole heads",
        )
        flags = {name: hf.get(name, False) for name in _FLAGS}
        for name, value in flags.items():
            require(isinstance(value, bool), f"{source}: {name}={value!r} must be true or false")
        heads = hf["num_attention_heads"]
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or 10000.0),
            rope_scaling=scaling,
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_id=_token_ids(hf.get("eos_token_id")),
            pad_token_id=hf.get("pad_token_id"),
            **flags,
        )

    def to_hf(self) -> dict[str, Any]:
        """The HF `config.json` dict, with `rope_parameters` (transformers 5) and `rope_theta` /
        `rope_scaling` (older readers) alike."""
        scaling = self.rope_scaling and {
            "rope_type": "llama3",
            **dataclasses.asdict(self.rope_scaling),
        }
        eos = list(self.eos_token_id)
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "rope_scaling": scaling,
            "rope_parameters": {
                "rope_type": "default",
                **(scaling or {}),
                "rope_theta": self.rope_theta,
            },
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }


_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def _check_llama(hf: dict[str, Any], source: str) -> None:
    """Raises UserError unless an HF `config.json` describes a Llama, with all its sizes."""
    require(
        hf.get("model_type") == "llama",
        f"{source}: model_type={hf.get('model_type')!r} is not supported; only 'llama' is",
    )
    require(
        hf.get("hidden_act", "silu") == "silu",
        f"{source}: hidden_act={hf.get('hidden_act')!r} is not supported; only 'silu' is",
    )
    for name in _NEEDED:
        require(name in hf, f"{source}: field {name!r} is missing")


def _read_scaling(rope: dict[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    require(
        kind == "llama3",
        f"{source}: rope_type={kind!r} is not supported; 'default' and 'llama3' are",
    )
    try:
        return RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise UserError(f"{source}: rope scaling field {error.args[0]!r} is missing") from None


def _token_ids(given: Any) -> tuple[Any, ...]:
    """No token, one, or several, as HF writes them."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _llama3(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_id=(128001, 128008, 128009),
        **sizes,
    )


def _smollm2(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=(2,),
        pad_token_id=2,
        **sizes,
    )


PRESETS: dict[str, LlamaConfig] = {
    "llama3.2-1b": _llama3(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope_scaling=RopeScaling(factor=32.0),
        tie_word_embeddings=True,
    ),
    "llama3.2-3b": _llama3(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        rope_scaling=RopeScaling(factor=32.0),
        tie_word_embeddings=True,
    ),
    "llama3.1-8b": _llama3(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_scaling=RopeScaling(factor=8.0),
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
    # Small enough for seconds on a CPU, with everything a real one has: GQA 3, its own head_dim,
    # and the built-in byte tokenizer's vocabulary.
    "tiny": LlamaConfig(
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
