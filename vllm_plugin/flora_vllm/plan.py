"""What rides in a layer's four products: read from an export's configuration, or for a bank from
one of its adapters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig

PRODUCTS = ("qkv", "o", "gate_up", "down")
ADAPTER_CONFIG = "adapter_config.json"
FUSED = "FLORA_FUSED"  # the peft_type of what `flora_jax.export --format vllm` writes
FORMAT_VERSION = 1


class FloraLlamaConfig(LlamaConfig):
    """LlamaConfig, `flora`, the fields of a Plan, and `differences` of the base from a Llama, as
    the `transformers` export has them."""

    model_type = "flora_llama"
    flora: dict | None = None
    differences: dict | None = None


@dataclasses.dataclass(frozen=True)
class Rider:
    """What one product carries. Pieces are `rank` channels wide.

    forward: pieces that ride as extra outputs, by name; matrix: projections that a piece reaches
    through a matrix B; repeat: those that a piece is repeat-and-added to; backward: extra inputs.
    """

    forward: tuple[str, ...] = ()
    matrix: tuple[str, ...] = ()
    repeat: tuple[str, ...] = ()
    backward: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where everything rides.

    rank: width of a piece; activation: of transformers' ACT2FN, or identity; stream: channels that
    the residual stream carries behind its own (zflora); riders: by product; places: adapters side
    by side; bank: whether each token has its own of them, written at run time; fingerprint: of the
    base that a bank's adapters were trained on.
    """

    rank: int
    activation: str
    stream: int
    riders: Mapping[str, Rider]
    places: int = 1
    bank: bool = False
    fingerprint: str = ""

    @classmethod
    def of(cls, flora: Mapping[str, Any], where: Any = "config.json") -> Plan:
        """From the fields that `flora_jax.export` writes; where they stand, for a refusal. Raises
        ValueError where one is missing."""
        try:
            riders = {
                product: Rider(
                    tuple(flora["products"][product]["forward"]),
                    tuple(flora["products"][product]["matrix"]),
                    tuple(flora["products"][product]["repeat"]),
                    flora["products"][product]["backward"],
                )
                for product in PRODUCTS
            }
            return cls(flora["rank"], flora["activation"], flora["stream"], riders)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: flora does not say what rides where ({error})") from None

    @property
    def repeats(self) -> bool:
        """Whether a piece is tiled, so that a place's rank must be a multiple of an adapter's."""
        return any(rider.repeat for rider in self.riders.values())

    def fits(self, bank: Plan) -> bool:
        """Whether an adapter laid out so has a place in a bank: all is the same but the rank, or
        there is nothing in a product."""
        return (self.activation, self.stream) == (bank.activation, bank.stream) and all(
            rider == Rider()
            or _pieces(rider, self.rank) == _pieces(bank.riders[product], bank.rank)
            for product, rider in self.riders.items()
        )


def _pieces(rider: Rider, rank: int) -> tuple[Any, ...]:
    return rider.forward, rider.matrix, rider.repeat, rider.backward // rank


def has_bias(config: Any, product: str) -> bool:
    """Whether the base's projections of a product have a bias."""
    differences = getattr(config, "differences", None)
    if differences is not None:
        return product in differences["biases"]
    flag = "attention_bias" if product in ("qkv", "o") else "mlp_bias"
    return getattr(config, flag, False)


def check_base(config: Any) -> None:
    """Raises ValueError for a base that computes what is not computed here: biases are all that may
    set it apart from a Llama."""
    if config.model_type not in ("llama", "mistral", FloraLlamaConfig.model_type):
        raise ValueError(
            f"model_type={config.model_type!r}: a bank is over a llama or a mistral here; "
            "`flora_jax.export --format transformers` serves the others in transformers"
        )
    head_dim = getattr(config, "head_dim", None)
    neutral = {
        "qk_norm": False,
        "no_rope_layers": [],
        "embedding_multiplier": 1,
        "residual_multiplier": 1,
        "attention_multiplier": (head_dim or config.hidden_size // config.num_attention_heads)
        ** -0.5,
        "logits_divisor": 1,
    }
    differences = getattr(config, "differences", None) or {}
    for name, value in neutral.items():
        if differences.get(name, value) != value:
            raise ValueError(
                f"differences.{name}={differences[name]!r} is not computed here; transformers "
                "serves this export (trust_remote_code=True)"
            )


def plan_of(config: Any, lora_config: Any) -> Plan:
    """The Plan that a model is built by: of an export with its adapter in it, or, where
    `config.flora` names the directory of an adapter, of a bank of adapters like that one.

    lora_config: vLLM's, None without --enable-lora. Raises ValueError where the two do not go
    together.
    """
    flora = getattr(config, "flora", None)
    if isinstance(flora, Mapping):
        if lora_config is not None:
            raise ValueError(
                "--enable-lora: this export has its adapter in its weights; serve the base with "
                "--hf-overrides to have a bank of adapters, or leave --enable-lora out"
            )
        return Plan.of(flora)
    if not isinstance(flora, str):
        raise ValueError(
            f"flora={flora!r} must name the directory of an adapter "
            '(--hf-overrides \'{"architectures": ["FloraLlamaForCausalLM"], "flora": "DIR"}\')'
        )
    if lora_config is None:
        raise ValueError("flora names an adapter, so --enable-lora is needed")
    if lora_config.fully_sharded_loras:
        raise ValueError("--fully-sharded-loras: a bank shards the rows of its adapters by itself")
    stored = read_adapter_config(Path(flora))
    plan = Plan.of(stored["flora"], flora)
    rank = lora_config.max_lora_rank
    check_rank(plan, rank, flora)
    riders = {
        product: dataclasses.replace(rider, backward=rider.backward // plan.rank * rank)
        for product, rider in plan.riders.items()
    }
    return dataclasses.replace(
        plan,
        rank=rank,
        riders=riders,
        places=lora_config.max_loras,
        bank=True,
        fingerprint=stored["fingerprint"],
    )


def check_rank(plan: Plan, rank: int, where: Any) -> None:
    """Raises ValueError where an adapter does not fit a place of a bank of `rank`."""
    if plan.rank > rank:
        raise ValueError(f"{where}: rank {plan.rank} is above --max-lora-rank {rank}")
    if plan.repeats and rank % plan.rank:
        raise ValueError(
            f"{where}: rank {plan.rank} does not divide --max-lora-rank {rank}, and its pieces are "
            "tiled"
        )


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The fields of adapter_config.json in the directory of a fused adapter. Raises ValueError for
    anything else."""
    path = directory / ADAPTER_CONFIG
    try:
        stored = json.loads(path.read_text())
    except OSError:
        raise FileNotFoundError(f"{path}: there is no such adapter") from None
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from None
    kind = stored.get("peft_type") if isinstance(stored, dict) else None
    if kind != FUSED:
        raise ValueError(
            f"{path}: peft_type={kind!r}, a bank takes {FUSED}; `flora_jax.export --format vllm` "
            "writes it"
        )
    if stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={stored.get('format_version')!r}, {FORMAT_VERSION} is read"
        )
    for field in ("flora", "fingerprint", "method"):
        if field not in stored:
            raise ValueError(f"{path}: field {field!r} is missing")
    return stored
