"""A row for each `model_type` of HF's config.json, by which such a file is read and written.

Today's models are Llamas with one or two differences. A difference is a field of LlamaConfig, which
the model reads. A row says which differences a `model_type` has, and where its config.json states
them. No other code asks for a model's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flora_jax.errors import UserError, require

# As in adapters/methods.py, which takes a second to import.
PRODUCTS = ("qkv", "o", "gate_up", "down")

_ATTENTION_BIAS = {"attention_bias": ("qkv", "o")}
_BIASES = {**_ATTENTION_BIAS, "mlp_bias": ("gate_up", "down")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A `model_type`, by its differences from a Llama.

    hf_class: transformers' causal model; fixed: fields of LlamaConfig that all its models share;
    biases: a flag of config.json -> the products that have a bias where it is true; numbers: a
    field of LlamaConfig -> the field of config.json that states it; no_rope: whether config.json
    lists layers without rotary embeddings; window: None without a sliding window, "flagged" where
    `use_sliding_window` turns it on, "always" where its size alone does; defaults: transformers'
    values of fields that config.json may leave out, where they differ from Llama's; gguf: the order
    of the rows of a head's q and k in llama.cpp's files, "interleaved" or "halves", None where
    these are not read.
    """

    hf_class: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    no_rope: bool = False
    window: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gguf: str | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(hf_class="LlamaForCausalLM", biases=_BIASES, gguf="interleaved"),
    "qwen2": Architecture(
        hf_class="Qwen2ForCausalLM",
        fixed={"biases": ("qkv",)},
        window="flagged",
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        gguf="halves",
    ),
    "qwen3": Architecture(
        hf_class="Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        biases=_ATTENTION_BIAS,
        window="flagged",
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        gguf="halves",
    ),
    "mistral": Architecture(
        hf_class="MistralForCausalLM",
        window="always",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "smollm3": Architecture(
        hf_class="SmolLM3ForCausalLM",
        biases=_BIASES,
        no_rope=True,
        window="flagged",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Architecture(
        hf_class="GraniteForCausalLM",
        biases=_BIASES,
        numbers={
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "attention_multiplier": "attention_multiplier",
            "logits_divisor": "logits_scaling",
        },
        defaults={
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
}

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_ALIKE = (
    *_NEEDED,
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
    "bos_token_id",
    "pad_token_id",
)
_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "pad_token_id": None,
}
# Fields of config.json that change the numbers of other models, and the values at which they change
# nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}


def read_config(hf: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields of LlamaConfig, by name, that an HF `config.json` states.

    rope_scaling is in HF's form, None without one. Raises UserError, with `source`, for a field
    that would change the numbers and is not understood.
    """
    model_type = hf.get("model_type")
    require(
        isinstance(model_type, str) and model_type in ARCHITECTURES,
        f"{source}: model_type={model_type!r} is not supported; {', '.join(ARCHITECTURES)} are",
    )
    row = ARCHITECTURES[model_type]
    hf = {"hidden_act": "silu", **_DEFAULTS, **row.defaults, **hf}
    for name in _NEEDED:
        require(name in hf, f"{source}: field {name!r} is missing")
    _check_neutral(hf, row, source)
    _check_window(hf, row, source)
    flags = {name: hf.get(name, False) for name in ("tie_word_embeddings", *row.biases)}
    for name, value in flags.items():
        require(isinstance(value, bool), f"{source}: {name}={value!r} must be true or false")
    heads = hf["num_attention_heads"]
    biases = [product for flag, its in row.biases.items() if flags[flag] for product in its]
    return {
        "model_type": model_type,
        **{name: hf[name] for name in _ALIKE},
        "num_key_value_heads": hf["num_key_value_heads"] or heads,
        "head_dim": hf["head_dim"] or hf["hidden_size"] // heads,
        "biases": tuple(biases),
        "no_rope_layers": _read_no_rope(hf, row, source),
        "eos_token_id": _token_ids(hf.get("eos_token_id")),
        **{ours: _number(hf, theirs, source) for ours, theirs in row.numbers.items()},
        **_read_rope(hf, source),
        **row.fixed,
    }


def _check_neutral(hf: Mapping[str, Any], row: Architecture, source: str) -> None:
    """Raises UserError for a field that would change the numbers and is not read."""
    for name, neutral in _NEUTRAL.items():
        value = hf.get(name)
        require(
            name in row.numbers.values() or value in neutral,
            f"{source}: {name}={value!r} is not supported; "
            f"only {' or '.join(repr(one) for one in neutral if one is not None) or 'none'} is",
        )
    listed = hf.get("no_rope_layers")
    require(
        row.no_rope or not listed or all(listed),
        f"{source}: no_rope_layers={listed!r} is not supported for a {hf['model_type']}",
    )


def _check_window(hf: Mapping[str, Any], row: Architecture, source: str) -> None:
    """Raises UserError for a sliding window that hides a key from a query."""
    window = hf.get("sliding_window")
    if row.window is None or window is None or not _slides(hf, row, source):
        return
    positions = hf["max_position_embeddings"]
    for name in ("sliding_window", "max_position_embeddings"):
        _check_count(name, hf[name], source)
    require(
        window >= positions,
        f"{source}: sliding_window={window} is in use and shorter than "
        f"max_position_embeddings={positions}, which is not supported; a model that is used on no "
        "more tokens than its window holds can say so in max_position_embeddings",
    )


def _slides(hf: Mapping[str, Any], row: Architecture, source: str) -> bool:
    """Whether a stated window is in use in any layer, as transformers reads it."""
    if row.window == "always":
        return True
    kinds = hf.get("layer_types")
    if kinds is not None:
        require(
            isinstance(kinds, list), f"{source}: layer_types={kinds!r} must have a kind a layer"
        )
        return any(kind != "full_attention" for kind in kinds)
    if not hf.get("use_sliding_window", False):
        return False
    if row.no_rope:
        return True
    _check_count("max_window_layers", hf["max_window_layers"], source, least=0)
    _check_count("num_hidden_layers", hf["num_hidden_layers"], source)
    return hf["max_window_layers"] < hf["num_hidden_layers"]


# A limit: a file that claims millions would have each layer listed before any is missed.
MOST_LAYERS = 10_000


def _check_count(name: str, value: Any, source: str, least: int = 1) -> None:
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"{source}: {name}={value!r} must be an integer of at least {least}",
    )


def _number(hf: Mapping[str, Any], name: str, source: str) -> float:
    value = hf[name]
    require(
        isinstance(value, int | float) and not isinstance(value, bool),
        f"{source}: {name}={value!r} must be a number",
    )
    return float(value)


def _read_no_rope(hf: Mapping[str, Any], row: Architecture, source: str) -> tuple[int, ...]:
    """The layers without rotary embeddings.

    config.json has a 1 for each layer with them and a 0 for each without. Without such a list,
    every fourth layer goes without.
    """
    if not row.no_rope:
        return ()
    count = hf["num_hidden_layers"]
    _check_count("num_hidden_layers", count, source)
    layers = range(min(count, MOST_LAYERS))  # LlamaConfig refuses more
    turned = hf.get("no_rope_layers")
    if turned is None:
        interval = hf.get("no_rope_layer_interval", 4)
        _check_count("no_rope_layer_interval", interval, source)
        turned = [(i + 1) % interval for i in layers]
    require(
        isinstance(turned, list) and len(turned) >= len(layers),
        f"{source}: no_rope_layers={turned!r} must have a 0 or 1 for each of {len(layers)} layers",
    )
    return tuple(i for i in layers if not turned[i])


def _read_rope(hf: Mapping[str, Any], source: str) -> dict[str, Any]:
    """rope_theta, and rope_scaling in HF's form, None without one."""
    # With both forms the older fields count, as in transformers.
    scaled = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    for name, value in scaled.items():
        require(
            not isinstance(value, Mapping),
            f"{source}: rotary settings by kind of layer ({name!r}) are not supported",
        )
    rope = {"rope_theta": hf.get("rope_theta"), **scaled}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        kind in ("default", "llama3"),
        f"{source}: rope_type={kind!r} is not supported; 'default' and 'llama3' are",
    )
    turned = rope.get("partial_rotary_factor")
    require(
        turned in (None, 1),
        f"{source}: partial_rotary_factor={turned!r} is not supported; Llama turns whole heads",
    )
    scaling = None
    if kind == "llama3":
        try:
            scaling = {
                "factor": float(rope["factor"]),
                "low_freq_factor": float(rope["low_freq_factor"]),
                "high_freq_factor": float(rope["high_freq_factor"]),
                "original_max_position_embeddings": int(rope["original_max_position_embeddings"]),
            }
        except KeyError as error:
            raise UserError(f"{source}: rope scaling field {error.args[0]!r} is missing") from None
    return {"rope_theta": float(rope.get("rope_theta") or 10000.0), "rope_scaling": scaling}


def _token_ids(given: Any) -> tuple[Any, ...]:
    """Token ids from a field of HF's: None, one id, or a list."""
    if given is None:
        return ()
    if isinstance(given, list | tuple):
        return tuple(given)
    return (given,)


def write_token_ids(ids: Sequence[int]) -> int | list[int] | None:
    """Token ids as a field of HF's: None for none, one id bare, several as a list."""
    if len(ids) == 1:
        return ids[0]
    return list(ids) or None


def write_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An HF `config.json` that states these fields of a LlamaConfig; rope_scaling: as a dict or
    None.

    It has `rope_parameters` for transformers 5, and `rope_theta` and `rope_scaling` for older
    readers.
    """
    row = ARCHITECTURES[fields["model_type"]]
    scaling = fields["rope_scaling"] and {"rope_type": "llama3", **fields["rope_scaling"]}
    out = {name: fields[name] for name in _ALIKE}
    out |= {flag: set(its) <= set(fields["biases"]) for flag, its in row.biases.items()}
    out |= {theirs: fields[ours] for ours, theirs in row.numbers.items()}
    if row.no_rope:
        without = fields["no_rope_layers"]
        out["no_rope_layers"] = [int(i not in without) for i in range(fields["num_hidden_layers"])]
    if row.window == "flagged":
        out["use_sliding_window"] = False
    if row.window is not None:
        out["sliding_window"] = None
    return {
        **out,
        "model_type": fields["model_type"],
        "architectures": [row.hf_class],
        "hidden_act": "silu",
        "rope_theta": fields["rope_theta"],
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_type": "default",
            **(scaling or {}),
            "rope_theta": fields["rope_theta"],
        },
        "eos_token_id": write_token_ids(fields["eos_token_id"]),
    }
