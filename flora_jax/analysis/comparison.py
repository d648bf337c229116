"""Ways of serving timed beside the merged base, and the table that comes of it.

In memory are never more than three models: the base with merged products, one variant and, where
there is one, the peer. What variants are made from, the base in the split layout, lies in a file
and is mapped while one is built; the merged base is built anew beside each variant, so that
building takes no more memory than timing.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import AdapterConfig, Tree, device_layout, quantization_format
from flora_jax.analysis.timing import (
    Contestant,
    Programs,
    Seconds,
    Setting,
    claims,
    compile_programs,
    interleave,
    paired_ratio,
    summary,
)
from flora_jax.analysis.variants import (
    NO_DOT_MERGER,
    get_variant,
    random_adapter,
    rank_for,
    read_bytes,
    serve,
    trained_parameters,
)
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama

if TYPE_CHECKING:
    from flora_jax.analysis.peer import Peer


REFERENCE = "reference"  # the merged base as it stands beside a variant, in every round


@dataclasses.dataclass(frozen=True)
class Size:
    """rank and parameters of a method's adapter (None and 0 without one), bytes that one decode
    step reads."""

    rank: int | None
    parameters: int
    read_bytes: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The rounds of one variant at one setting: times by name, the reference among them; compile:
    seconds that the decode loop took to compile by name, and whether they were a look-up in the
    persistent cache."""

    name: str
    setting: Setting
    rounds: list[dict[str, Seconds]]
    compile: dict[str, tuple[float, bool]]


def adapter_configs(
    methods: Sequence[str], config: LlamaConfig, rank: int, equal_parameters: bool
) -> dict[str, AdapterConfig | None]:
    """The adapter of each variant: all at `rank`, or each at the rank where its number of
    parameters comes nearest to that of ffba at `rank`. Raises UserError for an unknown name and a
    rank that a method cannot have."""
    out: dict[str, AdapterConfig | None] = {}
    for name in methods:
        method = get_variant(name).method
        if method is None:
            out[name] = None
            continue
        out[name] = AdapterConfig(method, lora_rank(config, rank, equal_parameters, method))
        out[name].check(config.widths)
    return out


def lora_rank(config: LlamaConfig, rank: int, equal_parameters: bool, method: str = "lora") -> int:
    """The rank of a method (the peer's is LoRA) beside ffba at `rank`."""
    if not equal_parameters:
        return rank
    return rank_for(method, config, trained_parameters(config, AdapterConfig("ffba", rank)))


def turns(new_tokens: int, turn: int | None) -> int:
    """How often a model has its turn in a generation, whose first token is the prefill's."""
    return 1 if turn is None else -(-(new_tokens - 1) // turn)


def on_disk(tree: Tree, folder: Path) -> Tree:
    """The tree with its leaves in files of `folder`, mapped read-only: pages that memory can drop
    at any time."""
    leaves, structure = jax.tree.flatten(tree)

    def move(i: int, leaf: jax.Array) -> np.ndarray:
        file = folder / f"{i}.bin"
        np.asarray(leaf).tofile(file)
        return np.memmap(file, leaf.dtype, "r", shape=leaf.shape)

    return structure.unflatten([move(i, leaf) for i, leaf in enumerate(leaves)])


def build(
    name: str, base: Tree, config: LlamaConfig, adapter_config: AdapterConfig | None
) -> tuple[Llama, Tree]:
    """`(model, params)` of a variant with a random adapter, on the device; base in the split
    layout, from anywhere."""
    adapter = (
        None
        if adapter_config is None
        else random_adapter(jax.random.key(1), config, adapter_config)
    )
    layout = device_layout(quantization_format(base) != "none")
    model, params = serve(name, base, config, adapter_config, adapter, layout)
    return model, jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf), params
    )


def sizes(
    config: LlamaConfig, base: Tree, configs: Mapping[str, AdapterConfig | None]
) -> dict[str, Size]:
    """Sizes of the reference and of each variant by name, from shapes alone; `base` may be shapes
    too."""

    def one(name: str, adapter_config: AdapterConfig | None) -> Size:
        params = jax.eval_shape(lambda base: build(name, base, config, adapter_config)[1], base)
        read = read_bytes(params, config)
        if adapter_config is None:
            return Size(None, 0, read)
        return Size(adapter_config.rank, trained_parameters(config, adapter_config), read)

    return {REFERENCE: one("base", None), **{name: one(name, own) for name, own in configs.items()}}


def compare(
    config: LlamaConfig,
    base: Tree,
    configs: Mapping[str, AdapterConfig | None],
    settings: Sequence[Setting],
    rounds: int,
    prefills: int,
    peer: Peer | None = None,
    turn: int | None = None,
    done: Callable[[], Any] = lambda: None,
) -> Iterator[Measurement]:
    """Yields the measurement of each variant at each setting.

    base: the split layout, best from `on_disk`. prefills: of the rounds, how many read the prompts
    anew. peer: timed in every round too, and reads them in each. done: called after every turn.
    turn: tokens that each model decodes before the next one's turn, by default (and beside a peer)
    all of a round's; each turn is a round of the measurement. On a GPU LoRA's products apart are
    timed with XLA's dot merger and without.
    """
    compiled: dict[tuple[str, Setting], Programs] = {}
    for name, adapter_config in configs.items():
        own = build(name, base, config, adapter_config)
        reference = own if name == "base" else build("base", base, config, None)
        # What is merged into W is the bare base to a compiler.
        kind = get_variant(name).kind
        key = "base" if kind == "merged" else name
        entrants = {REFERENCE: ("base", reference, {}), name: (key, own, {})}
        if adapter_config and kind == "unmerged" and jax.default_backend() == "gpu":
            entrants[f"{name}_no_dot_merger"] = (f"{name}_no_dot_merger", own, NO_DOT_MERGER)
        for setting in settings:
            prompts = setting.prompts(config)
            contestants: dict[str, Any] = {}
            seconds: dict[str, tuple[float, bool]] = {}
            for entrant, (key, (model, params), options) in entrants.items():
                if (key, setting) not in compiled:
                    compiled[key, setting] = compile_programs(
                        model, params, setting, options=options
                    )
                programs = compiled[key, setting]
                contestants[entrant] = Contestant(programs, params, prompts, prefills, turn)
                contestants[entrant].warm_up()
                if entrant != REFERENCE:
                    seconds[entrant] = (programs.compile_seconds, programs.cached)
            if peer is not None:
                contestants |= peer.ways(setting, prompts)
            times = []
            for one in interleave(contestants, rounds * turns(setting.new_tokens, turn)):
                times.append(one)
                done()
            yield Measurement(name, setting, times, seconds)
        del own, reference, entrants, contestants, model, params  # before the next ones are built


def table(
    measurements: Sequence[Measurement], sizes: Mapping[str, Size], gb_per_s: float
) -> list[dict[str, Any]]:
    """One JSON-ready row a setting and name, the peer's over all rounds it stood in.

    A row has TTFT and TPOT (seconds: median, quartiles, every round), each over the reference and
    over the peers of the same round (`tpot_ratio`, `tpot_over_peer`); the bytes a decode step reads
    over the base's, and as a share of what the machine can read in that time (`gb_per_s`); and in
    `beside` both readings of the paper's claim against each unmerged LoRA, from the ratios to the
    base.
    """
    rows = []
    for setting in dict.fromkeys(m.setting for m in measurements):
        rows += _rows_of_setting([m for m in measurements if m.setting == setting], sizes, gb_per_s)
    return rows


def _rows_of_setting(
    measurements: Sequence[Measurement], sizes: Mapping[str, Size], gb_per_s: float
) -> list[dict[str, Any]]:
    setting = measurements[0].setting
    rounds: dict[str, list[dict[str, Seconds]]] = defaultdict(list)
    compiled: dict[str, tuple[float, bool]] = {}
    names = []
    for m in measurements:
        compiled.update(m.compile)
        names += [name for name in m.rounds[0] if name in m.compile]
        for one in m.rounds:
            for name in one:
                rounds[name].append(one)
    peers = sorted(rounds.keys() - {REFERENCE, *names})
    own = {
        name: _row(name, rounds[name], peers, sizes, setting, gb_per_s) for name in (*names, *peers)
    }
    baselines = [n for n in own if n in peers or (n.startswith("lora") and n != "lora_merged")]
    for name, row in own.items():
        row["compile_seconds"], row["compile_cached"] = compiled.get(name, (None, None))
        others = [other for other in baselines if other != name and row["parameters"]]
        row["beside"] = {other: _claims(row, own[other]) for other in others}
    return list(own.values())


def _claims(row: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
    """Both readings of the paper's claim for TTFT and for TPOT."""
    return {
        what: claims(row[f"{what}_ratio"]["median"], lora[f"{what}_ratio"]["median"])
        for what in ("ttft", "tpot")
    }


def _row(
    name: str,
    rounds: list[dict[str, Seconds]],
    peers: list[str],
    sizes: Mapping[str, Size],
    setting: Setting,
    gb_per_s: float,
) -> dict[str, Any]:
    size = sizes[name.removesuffix("_no_dot_merger")]
    row: dict[str, Any] = {
        "method": name,
        **dataclasses.asdict(setting),
        **dataclasses.asdict(size),
    }

    def times(who, i):
        return [one[who][i] for one in rounds]

    for i, what in enumerate(("ttft", "tpot")):
        taken = [seconds for seconds in times(name, i) if seconds is not None]
        row[what] = summary(taken) | {"rounds": taken}
        row[f"{what}_ratio"] = paired_ratio(times(name, i), times(REFERENCE, i))
        others = [peer for peer in peers if peer != name and peer in rounds[0]]
        row[f"{what}_over_peer"] = {
            peer: paired_ratio(times(name, i), times(peer, i)) for peer in others
        }
    tpot = row["tpot"]["median"]
    return row | {
        "bytes_ratio": size.read_bytes / sizes[REFERENCE].read_bytes,
        "tokens_per_second": setting.batch_size / tpot,
        "bandwidth_share": size.read_bytes / tpot / 1e9 / gb_per_s,
    }
