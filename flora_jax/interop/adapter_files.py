"""Trained adapters as directories of safetensors and JSON: written atomically, read with every shape checked.

Two layouts. `lora` and `pf_lora` without trained base leaves are PEFT LoRA directories, which PEFT, vLLM and the like
load as they are; what PEFT has no field for stands beside them in `flora_config.json`. Everything else is ours:

    adapter_config.json         {"peft_type": "FLORA", "format_version": 1, "method": "ffba", "rank": 16, …}
    adapter_model.safetensors   adapter/layers/attention/qkv/A, … and params/final_norm/scale, … (base leaves), float32

One of PEFT's tensors and where it lies here, at rank 8 in a layer with D = 96 and Q = 96:

    base_model.model.model.layers.3.self_attn.k_proj.lora_A.weight  [8, 96]
    adapter/layers/attention/qkv/A[3, :, 8:16].T                    the same

Beside them, from a run of `flora_jax.train`, `trained_on.json`: which tasks and prompts the adapter has seen.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flora_jax.adapters import BLOCKS, PRODUCTS, PROJECTIONS, AdapterConfig, abstract_adapter
from flora_jax.device import check_jax
from flora_jax.errors import UserError, near_misses
from flora_jax.files import new_directory, read_json, write_json
from flora_jax.models.config import LlamaConfig
from flora_jax.models.fingerprint import base_fingerprint
from flora_jax.models.llama import abstract_base
from flora_jax.models.loading import FLOATS, load_pretrained
from flora_jax.models.tokenizer import check_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tree = dict[str, Any]

FORMAT_VERSION = 1
CONFIG, WEIGHTS, EXTRAS = "adapter_config.json", "adapter_model.safetensors", "flora_config.json"
TRAINED_ON = "trained_on.json"
_HAS = f"; an adapter directory has {CONFIG} and {WEIGHTS}"

# Projection -> its module in a layer, as transformers and PEFT name it.
PEFT_MODULES = {
    p: f"{'self_attn' if block == 'attention' else 'mlp'}.{p}_proj"
    for block, products in BLOCKS.items()
    for product in products
    for p in PRODUCTS[product]
}
_PLACES = {
    p: (block, product)
    for block, products in BLOCKS.items()
    for product in products
    for p in PRODUCTS[product]
}
# What a LoRA of PEFT's may do that ours does not; each is off where its value is false, empty or "none".
_PEFT_REFUSED = (
    "use_dora",
    "modules_to_save",
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "megatron_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "arrow_config",
)
# Initialisations that change the base: the adapter means nothing on the base as published.
_PEFT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_adapter(
    directory: str | os.PathLike,
    trained: Mapping[str, Tree],
    config: LlamaConfig,
    adapter_config: AdapterConfig,
    base_model: str,
    fingerprint: str,
    trained_on: Mapping[str, Any] | None = None,
) -> None:
    """Writes `trained` = {"adapter": tree, "params": base leaves that trained, {} if none} to `directory`.

    base_model: the source that the base was loaded from; fingerprint: its `base_fingerprint`; trained_on: `tasks` and
    `prompts` (digests of the training records'), by which `read_trained_on` knows a test again. The directory appears
    complete or not at all, and replaces only one that this function wrote. Raises UserError for anything else there
    and for leaves that do not fit the configurations.
    """
    directory = Path(directory)
    if directory.exists() and not _is_ours(directory):
        raise UserError(f"{directory} exists and is no adapter directory of ours; name a new one")
    leaves = [_flat(trained.get(collection, {})) for collection in ("adapter", "params")]
    _check_leaves(*leaves, config, adapter_config, str(directory))
    with new_directory(directory) as new:
        write_adapter_files(new, trained, config, adapter_config, base_model, fingerprint)
        if trained_on is not None:
            write_json(new / TRAINED_ON, trained_on)


def read_trained_on(directory: str | os.PathLike) -> tuple[list[str], set[str]] | None:
    """The tasks that an adapter was trained on, and its prompts' digests; None where nothing is on record."""
    path = Path(directory) / TRAINED_ON
    if not path.is_file():
        return None
    stored = read_json(path)
    for field in ("tasks", "prompts"):
        if not isinstance(stored.get(field), list) or not all(
            isinstance(item, str) for item in stored[field]
        ):
            raise UserError(
                f"{path}: field {field!r} must be a list of texts; delete the file to score all the same"
            )
    return stored["tasks"], set(stored["prompts"])


def write_adapter_files(
    directory: Path,
    trained: Mapping[str, Tree],
    config: LlamaConfig,
    adapter_config: AdapterConfig,
    base_model: str,
    fingerprint: str,
    dtype: Any = np.float32,
) -> None:
    """The files of `save_adapter`, in a directory that is there; dtype: of the tensors."""
    adapter, params = trained.get("adapter", {}), trained.get("params", {})
    about = {
        "format_version": FORMAT_VERSION,
        "method": adapter_config.method,
        "fingerprint": fingerprint,
    }
    if adapter_config.method in ("lora", "pf_lora") and not params:
        files = {CONFIG: _peft_config(adapter_config, base_model), EXTRAS: about}
        tensors = _to_peft(adapter, config, adapter_config)
    else:
        fields = dataclasses.asdict(adapter_config)
        files = {
            CONFIG: {"peft_type": "FLORA", **about, "base_model_name_or_path": base_model, **fields}
        }
        tensors = _flat({"adapter": adapter, "params": params})
    tensors = {
        name: np.ascontiguousarray(np.asarray(value), dtype) for name, value in tensors.items()
    }
    for name, content in files.items():
        write_json(directory / name, content)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def load_adapter(
    directory: str | os.PathLike, config: LlamaConfig, fingerprint: str | None = None
) -> tuple[AdapterConfig, dict[str, Tree]]:
    """`(adapter_config, trained)` from a directory of `save_adapter`, or from anybody's PEFT LoRA of a Llama.

    trained: {"adapter": tree, "params": tree}, numpy float32. `fingerprint`, where given, is compared with the stored
    one (a PEFT directory of others has none). Raises UserError, with one line, for a directory that is missing,
    damaged, of another format or base, or that does not fit `config`, and for PEFT features that are not ours.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: there is no such adapter directory")
    stored = read_json(directory / CONFIG, _HAS)
    extras = read_json(directory / EXTRAS) if (directory / EXTRAS).exists() else {}
    kind = stored.get("peft_type")
    if kind not in ("FLORA", "LORA"):
        raise UserError(
            f"{directory / CONFIG}: peft_type={kind!r} is not supported; FLORA and LORA are"
        )
    about, name = (stored, CONFIG) if kind == "FLORA" else (extras, EXTRAS)
    if about and about.get("format_version") != FORMAT_VERSION:
        version = about.get("format_version")
        raise UserError(
            f"{directory / name}: format_version={version!r} is unknown; {FORMAT_VERSION} is what is read"
        )
    if fingerprint is not None:
        check_fingerprint(directory, fingerprint)
    tensors = _read_tensors(directory)
    for path, value in tensors.items():
        if not np.isfinite(value).all():
            raise UserError(
                f"{directory / WEIGHTS}: {path!r} holds a value that is not finite; train the adapter anew"
            )
    if kind == "LORA":
        return _from_peft(directory, stored, extras.get("method", "lora"), tensors, config)
    adapter_config = _adapter_config(directory, stored)
    split = {"adapter": {}, "params": {}}
    for path, value in tensors.items():
        collection, _, rest = path.partition("/")
        if collection not in split:
            raise UserError(
                f"{directory / WEIGHTS}: leaf {path!r} belongs neither to adapter/ nor to params/"
            )
        split[collection][rest] = value
    _check_leaves(
        split["adapter"], split["params"], config, adapter_config, str(directory / WEIGHTS)
    )
    return adapter_config, {name: unflatten_dict(leaves, sep="/") for name, leaves in split.items()}


def check_fingerprint(directory: Path, fingerprint: str) -> None:
    """Raises UserError if the adapter in `directory` says that it was trained on a base of another fingerprint."""
    stored = read_json(directory / CONFIG, _HAS)
    extras = read_json(directory / EXTRAS) if (directory / EXTRAS).exists() else {}
    found = {**extras, **stored}.get("fingerprint", fingerprint)
    if found != fingerprint:
        raise UserError(
            f"{directory}: the adapter was trained on another base, {stored.get('base_model_name_or_path')!r} with "
            f"fingerprint {found}; this base has {fingerprint}"
        )


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A base with its tokenizer and, where there is one, the adapter over it; `fingerprint` is the base's own."""

    config: LlamaConfig
    base: Tree
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    adapter_config: AdapterConfig | None = None
    adapter: Tree | None = None


def load_adapted(
    source: str, directory: str | os.PathLike | None, dtype: Any = np.float32
) -> Adapted:
    """Base and tokenizer of `source` (as `load_pretrained`), and the adapter of `directory`, which may be None; base
    leaves that trained with the adapter replace the base's. Raises UserError where they do not belong together."""
    check_jax()
    # before a model is loaded
    if directory is not None and not (Path(directory) / CONFIG).is_file():
        below = Path(directory) / "adapter"
        at = (
            f"it is in {below}"
            if (below / CONFIG).is_file()
            else f"an adapter directory has {CONFIG} and {WEIGHTS}"
        )
        raise UserError(f"{directory}: there is no adapter here; {at}")
    tokenizer = load_tokenizer(source)
    config, base = load_pretrained(source, dtype)
    check_tokenizer(tokenizer, config)
    fingerprint = base_fingerprint(base)
    if directory is None:
        return Adapted(config, base, tokenizer, fingerprint)
    adapter_config, trained = load_adapter(directory, config, fingerprint)
    leaves = _flat(base)
    for path, value in _flat(trained["params"]).items():
        leaves[path] = jnp.asarray(value, leaves[path].dtype)
    adapter = jax.tree.map(jnp.asarray, trained["adapter"])
    return Adapted(
        config, unflatten_dict(leaves, sep="/"), tokenizer, fingerprint, adapter_config, adapter
    )


def _flat(tree: Tree) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _check_leaves(
    adapter: Mapping[str, Any],
    params: Mapping[str, Any],
    config: LlamaConfig,
    adapter_config: AdapterConfig,
    where: str,
) -> None:
    """Raises UserError unless the adapter's leaves are exactly the method's, and `params` some of the base's."""
    try:
        adapter_config.check(config.widths)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for name, found, expected, whole in (
        ("adapter", adapter, _flat(abstract_adapter(config, adapter_config)), True),
        ("params", params, _flat(abstract_base(config)), False),
    ):
        for path in sorted({*found, *(expected if whole else ())}):
            wanted = tuple(expected[path].shape) if path in expected else "no such leaf"
            there = tuple(found[path].shape) if path in found else "nothing"
            if wanted != there:
                raise UserError(
                    f"{where}: leaf {name}/{path}: expected {wanted} for this model, found {there}"
                )


# ------------------------------------------------------------------------------------------------- PEFT


def _peft_name(layer: int, projection: str, side: str) -> str:
    return f"base_model.model.model.layers.{layer}.{PEFT_MODULES[projection]}.lora_{side}.weight"


def _peft_config(adapter_config: AdapterConfig, base_model: str) -> dict[str, Any]:
    alpha = adapter_config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": adapter_config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": adapter_config.dropout,
        "use_rslora": adapter_config.rslora,
        "target_modules": [f"{p}_proj" for p in adapter_config.targets],
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _to_peft(
    adapter: Tree, config: LlamaConfig, adapter_config: AdapterConfig
) -> dict[str, np.ndarray]:
    """PEFT's tensors, `lora_A [r, in]` and `lora_B [out, r]`, of a stacked tree."""
    tensors = {}
    for projection in adapter_config.targets:
        block, product = _PLACES[projection]
        leaves = adapter["layers"][block][product]
        pieces = adapter_config.slots[product].forward
        A = np.split(np.asarray(leaves["A"]), len(pieces), axis=-1)[pieces.index(projection)]
        B = np.asarray(leaves[f"{projection}_B"])
        for layer in range(config.num_hidden_layers):
            tensors[_peft_name(layer, projection, "A")] = A[layer].T
            tensors[_peft_name(layer, projection, "B")] = B[layer].T
    return tensors


def _from_peft(
    directory: Path,
    stored: Mapping[str, Any],
    method: str,
    tensors: dict[str, np.ndarray],
    config: LlamaConfig,
) -> tuple[AdapterConfig, dict[str, Tree]]:
    where = directory / CONFIG
    for field in _PEFT_REFUSED:
        value = stored.get(field)
        if not (value is None or value is False or value in ("none", [], {})):  # layer 0 counts
            raise UserError(f"{where}: {field}={value!r} is not supported; only plain LoRA loads")
    init = stored.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_PEFT_CHANGES_BASE):
        raise UserError(
            f"{where}: init_lora_weights={init!r} changed the base; convert the adapter to plain LoRA"
        )
    if method not in ("lora", "pf_lora"):
        raise UserError(
            f"{directory / EXTRAS}: method={method!r} is not a LoRA; lora and pf_lora are"
        )
    if stored.get("lora_alpha") is None:
        raise UserError(
            f"{where}: field 'lora_alpha' is missing, and the scale of the adapter with it"
        )
    adapter_config = _make_config(
        where,
        method=method,
        rank=stored.get("r"),
        alpha=stored["lora_alpha"],
        rslora=stored.get("use_rslora") or False,
        targets=_peft_targets(where, stored, tensors, config),
        dropout=stored.get("lora_dropout", 0.0),
    )
    r, expected = adapter_config.rank, {}
    for projection in adapter_config.targets:
        d_in, d_out = config.widths[projection]
        for layer in range(config.num_hidden_layers):
            expected[_peft_name(layer, projection, "A")] = (r, d_in)
            expected[_peft_name(layer, projection, "B")] = (d_out, r)
    for name in sorted(expected.keys() | tensors.keys()):
        wanted = expected.get(name, "no such tensor")
        found = tensors[name].shape if name in tensors else "nothing"
        if wanted != found:
            raise UserError(
                f"{directory / WEIGHTS}: tensor {name!r}: expected {wanted} for this model, found {found}"
            )

    def stack(projection: str, side: str) -> np.ndarray:
        return np.stack(
            [tensors[_peft_name(i, projection, side)].T for i in range(config.num_hidden_layers)]
        )

    layers: Tree = {}
    for block, products in BLOCKS.items():
        for product in products:
            if pieces := adapter_config.slots[product].forward:
                leaves = {"A": np.concatenate([stack(p, "A") for p in pieces], axis=-1)}
                leaves.update({f"{p}_B": stack(p, "B") for p in pieces})
                layers.setdefault(block, {})[product] = leaves
    return adapter_config, {"adapter": {"layers": layers}, "params": {}}


def _peft_targets(
    where: Path, stored: Mapping[str, Any], tensors: Mapping[str, Any], config: LlamaConfig
) -> tuple[str, ...]:
    """The projections adapted: those of `target_modules`, or where that is a pattern those that have tensors, without
    those of `exclude_modules`. Raises UserError where either says so of some layers alone."""
    modules, excluded = stored.get("target_modules"), stored.get("exclude_modules") or []
    names = {f"{p}_proj": p for p in PROJECTIONS}
    if isinstance(modules, str):
        found = [p for p in PROJECTIONS if any(f".{PEFT_MODULES[p]}." in name for name in tensors)]
    else:
        if not isinstance(modules, list) or not modules:
            raise UserError(
                f"{where}: target_modules={modules!r} must name projections such as 'q_proj'"
            )
        for module in modules:
            if str(module).rpartition(".")[2] not in names:
                near = near_misses(str(module), names)
                raise UserError(f"{where}: target_modules has {module!r}, not supported; {near}")
        found = list(dict.fromkeys(names[str(module).rpartition(".")[2]] for module in modules))
    left_out = set()
    for p in found:
        keys = [f"model.layers.{i}.{PEFT_MODULES[p]}" for i in range(config.num_hidden_layers)]
        for field, value in (("target_modules", modules), ("exclude_modules", excluded)):
            matched = [_peft_matches(where, field, value, key) for key in keys]
            if any(matched) and not all(matched):
                raise UserError(
                    f"{where}: {field}={value!r} names {p}_proj in some layers alone, which is not "
                    "supported: an adapter here is the same in every layer"
                )
        if any(matched):  # of exclude_modules
            left_out.add(p)
    return tuple(p for p in found if p not in left_out)


def _peft_matches(where: Path, field: str, value: str | list[str], key: str) -> bool:
    """Whether a field of PEFT's names a module: by its path or the end of it, or as a pattern of the whole path."""
    if isinstance(value, list):
        return any(f".{key}".endswith(f".{name}") for name in value)
    try:
        return re.fullmatch(value, key) is not None
    except (TypeError, re.error) as error:
        raise UserError(
            f"{where}: {field}={value!r} must be a list of names or a pattern ({error})"
        ) from None


def _adapter_config(directory: Path, stored: Mapping[str, Any]) -> AdapterConfig:
    where, names = directory / CONFIG, [field.name for field in dataclasses.fields(AdapterConfig)]
    # What the first directories of this format had no field for. It says how training began, not what is computed.
    stored = {"zero_init": None, **stored}
    missing = [name for name in names if name not in stored]
    if missing:
        raise UserError(f"{where}: field {missing[0]!r} is missing")
    fields = {name: stored[name] for name in names}
    for name in ("targets", "add_to"):
        if not isinstance(fields[name], list):
            raise UserError(f"{where}: {name}={fields[name]!r} must be a list of projections")
    return _make_config(where, **fields)


def _make_config(where: Path, **fields: Any) -> AdapterConfig:
    try:
        return AdapterConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# ------------------------------------------------------------------------------------------------ files


def _is_ours(directory: Path) -> bool:
    """Whether `save_adapter` wrote it, so that nothing of a user's is replaced."""
    if not (directory / CONFIG).is_file():
        return False
    return (directory / EXTRAS).is_file() or read_json(directory / CONFIG, _HAS).get(
        "peft_type"
    ) == "FLORA"


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    path = directory / WEIGHTS
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = (
            "; adapter_model.bin is a pickle and is not opened: convert it to safetensors first"
            if pickled
            else ""
        )
        raise UserError(f"{path} is missing{hint}")
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise UserError(
                        f"{path}: tensor {name!r} is stored as {kind}; {', '.join(FLOATS)} are read"
                    )
            with np.errstate(over="ignore"):  # what becomes an infinity is refused by name
                return {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from None
