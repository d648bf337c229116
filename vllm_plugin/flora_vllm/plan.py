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
FORMAT_VERSION = 2


class FloraLlamaConfig(LlamaConfig):
    """LlamaConfig, `flora`, the fields of a Plan, and `differences`, those of a Base, as the
    `transformers` export has them."""

    model_type = "flora_llama"
    flora: dict | None = None
    differences: dict | None = None


@dataclasses.dataclass(frozen=True)
class Base:
    """How the base differs from a plain Llama.

    biases: its products that have one; qk_norm: whether each head of q and k has a norm;
    no_rope_layers: those without rotary embeddings; embedding_multiplier: of the embeddings;
    residual_multiplier: of what a block adds to the stream; attention_multiplier: of the products
    of q and k; logits_divisor: of the logits.
    """

    biases: tuple[str, ...]
    qk_norm: bool
    no_rope_layers: tuple[int, ...]
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_divisor: float

    @classmethod
    def of(cls, differences: Mapping[str, Any] | None, where: Any = "config.json") -> Base:
        """From the fields that `flora_jax.export` writes; where they stand, for a refusal. Raises
        ValueError where one is missing, and for one that is not known here."""
        try:
            fields = {**differences}
            for name in ("biases", "no_rope_layers"):
                fields[name] = tuple(fields[name])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{where}: differences does not say what this base is ({error}); export it again"
            ) from None


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
    by side; bank: whether each token has its own of them, written at run time; base: what they ride
    in; fingerprint: of the base that a bank's adapters were trained on.
    """

    rank: int
    activation: str
    stream: int
    riders: Mapping[str, Rider]
    base: Base | None = None
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
            plan = cls(flora["rank"], flora["activation"], flora["stream"], riders)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: flora does not say what rides where ({error})") from None
        if plan.stream and not flora.get("stream_norm"):
            raise ValueError(
                f"{where}: the stream's channels passed the norms as they were when this was "
                "trained, which is no longer computed; train it anew"
            )
        return plan

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
        base = Base.of(getattr(config, "differences", None))
        return dataclasses.replace(Plan.of(flora), base=base)
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
    if stored["model_type"] != config.model_type:
        raise ValueError(
            f"{flora}: for a base of model_type={stored['model_type']!r}; this one's is "
            f"{config.model_type!r}"
        )
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
        base=Base.of(stored["differences"], flora),
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
            f"{path}: format_version={stored.get('format_version')!r}, {FORMAT_VERSION} is read; "
            "export it again"
        )
    for field in ("flora", "fingerprint", "method", "model_type", "differences"):
        if field not in stored:
            raise ValueError(f"{path}: field {field!r} is missing")
    return stored
