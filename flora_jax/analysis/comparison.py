"""Ways of serving timed beside the merged base, and the table of their times.

At most three models are in memory: the base with merged products, one variant, and the peer if
there is one. Variants are built from the base in the split layout, which is a mapped file. The
merged base is built anew beside each variant, so that building takes no more memory than timing.
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


REFERENCE = "reference"  # the merged base beside a variant, in every round


@dataclasses.dataclass(frozen=True)
class Size:
    """Rank and parameters of a variant's adapter (None and 0 without one), and the bytes that one
    decode step reads."""

    rank: int | None
    parameters: int
    read_bytes: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The rounds of one variant at one setting.

    rounds: times by name, the reference among them; compile: by name, seconds to compile the decode
    loop, and whether it came from the persistent cache.
    """

    name: str
    setting: Setting
    rounds: list[dict[str, Seconds]]
    compile: dict[str, tuple[float, bool]]


def adapter_configs(
    methods: Sequence[str], config: LlamaConfig, rank: int, equal_parameters: bool
) -> dict[str, AdapterConfig | None]:
    """The adapter of each variant, None for one without.

    All are at `rank`; with equal_parameters, each is at the rank where its number of parameters
    comes nearest to that of ffba at `rank`. Raises UserError for an unknown name and a rank that a
    method cannot have.
    """
    out: dict[str, AdapterConfig | None] = {}
    for name in methods:
        method = get_variant(name).method
        if method is None:
            out[name] = None
            continue
        out[name] = AdapterConfig(method, rank_beside_ffba(method, config, rank, equal_parameters))
        out[name].check(config.widths)
    return out


def rank_beside_ffba(method: str, config: LlamaConfig, rank: int, equal_parameters: bool) -> int:
    """The rank of a method beside ffba at `rank`."""
    if not equal_parameters:
        return rank
    return rank_for(method, config, trained_parameters(config, AdapterConfig("ffba", rank)))


def turns(new_tokens: int, turn: int | None) -> int:
    """The turns of a model in one generation; the prefill makes the first token."""
    if turn is None:
        return 1
    return -(-(new_tokens - 1) // turn)


def on_disk(tree: Tree, folder: Path) -> Tree:
    """The tree with its leaves in mapped, read-only files of `folder`, whose pages the system can
    drop at any time."""
    leaves, structure = jax.tree.flatten(tree)

    def move(i: int, leaf: jax.Array) -> np.ndarray:
        file = folder / f"{i}.bin"
        np.asarray(leaf).tofile(file)
        return np.memmap(file, leaf.dtype, "r", shape=leaf.shape)

    return structure.unflatten([move(i, leaf) for i, leaf in enumerate(leaves)])


def build(
    name: str,
    base: Tree,
    config: LlamaConfig,
    adapter_config: AdapterConfig | None,
    decode_kernels: str | None = None,
) -> tuple[Llama, Tree]:
    """`(model, params)` of a variant with a random adapter, on the device; base: in the split
    layout, leaves of any array type; decode_kernels: as in `Llama`."""
    adapter = None
    if adapter_config is not None:
        adapter = random_adapter(jax.random.key(1), config, adapter_config)
    layout = device_layout(quantization_format(base) != "none", decode_kernels == "layer")
    model, params = serve(name, base, config, adapter_config, adapter, layout, decode_kernels)
    return model, jax.tree.map(_on_device, params)


def _on_device(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return leaf
    return jnp.array(leaf)  # a copy: asarray may keep a view of the mapped file


def sizes(
    config: LlamaConfig, base: Tree, configs: Mapping[str, AdapterConfig | None]
) -> dict[str, Size]:
    """The Size of the reference and of each variant, by name; `base` may be mere shapes."""

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

    base: in the split layout, best from `on_disk`; prefills: the number of rounds that read the
    prompts anew; peer: timed in every round, and reads the prompts in each; turn: tokens that each
    model decodes before the next one's turn, by default (and beside a peer) all of a round, where
    each turn is a round of the measurement; done: called after every turn. On a GPU an unmerged
    variant is timed with XLA's dot merger and without.
    """
    compiled: dict[tuple[str, Setting], Programs] = {}
    for name, adapter_config in configs.items():
        own = build(name, base, config, adapter_config)
        reference = own
        if name != "base":
            reference = build("base", base, config, None)
        kind = get_variant(name).kind
        key = name
        if kind == "merged":  # to the compiler it is the bare base
            key = "base"
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
        # Frees these models before the next ones are built.
        del own, reference, entrants, contestants, model, params


def table(
    measurements: Sequence[Measurement], sizes: Mapping[str, Size], gb_per_s: float
) -> list[dict[str, Any]]:
    """One JSON-ready row for each setting and name; a peer's row has all rounds it took part in.

    A row has TTFT and TPOT (seconds: median, quartiles, every round), their ratios to the reference
    (`tpot_ratio`) and to the peers of the same round (`tpot_over_peer`), the bytes that a decode
    step reads over the base's, and those bytes over TPOT as a share of the machine's `gb_per_s`.
    `beside` has both readings of the paper's claim against each unmerged LoRA, from the ratios to
    the base.
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
