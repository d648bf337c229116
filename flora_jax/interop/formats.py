"""The four formats of an export: what each can hold, how it is written and how it is read back.

    merged        transformers' own class, the adapter in its weights    any reader of the base
    peft          a LoRA over the base                                   PEFT, transformers, vLLM
    transformers  the fused projections in PyTorch, with their code      trust_remote_code=True
    vllm          an adapter around the blocks, over the base            vLLM with `vllm_plugin/`

In the `transformers` format a fused product is one Linear. Its weight `[out, in]` is the leaf of
`fuse(…, transposed=True)`; only lora and pf_lora have a B beside it:

    layers/3/attention/qkv/weight    model.layers.3.self_attn.qkv_proj.weight
    layers/3/attention/qkv/q_B       model.layers.3.self_attn.qkv_proj.B.q.weight
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flora_jax.adapters import (
    BLOCKS,
    NOT_QUANTIZED,
    PRODUCTS,
    STREAM_NORMS,
    AdapterConfig,
    Layout,
    as_lora,
    fused_layers,
    merged_kernel,
)
from flora_jax.errors import UserError
from flora_jax.files import read_json, write_json
from flora_jax.interop.adapter_files import (
    load_adapter,
    read_tensors,
    write_adapter_files,
    write_tensors,
)
from flora_jax.interop.licences import NO_LICENCE, Licence
from flora_jax.interop.peft_lora import CONFIG, PEFT_MODULES
from flora_jax.interop.shards import map_shards, row_blocks, write_shards
from flora_jax.interop.vllm_adapter import (
    MAX_LORA_RANKS,
    MODULES,
    from_vllm,
    max_lora_rank,
    to_vllm,
    vllm_config,
)
from flora_jax.models.adapted import Adapted
from flora_jax.models.architectures import write_token_ids
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import hf_names, hf_shapes, to_hf_tensors
from flora_jax.models.tokenizer import VOCABULARIES, load_tokenizer
from flora_jax.tokens import ends, tokenizer_digest

Tree = dict[str, Any]

_REMOTE_CODE = Path(__file__).parent / "remote_code"
_ACT2FN = {"gelu": "gelu_pytorch_tanh"}  # transformers' name for the gelu that is ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Adapted):
    """A model to export: its base as it was before training, and the base leaves that trained.

    params: base leaves that trained, `{}` if none; base_model: the name that readers know the base
    by; base_files: the HF directory that the base came from, None without one; licence: the base's;
    quantised: what the base's weights were before they were floats, "" if they always were;
    quantization: `quantization_of` the base while it trained, where `base` holds the values of the
    codes; floats: loads the float base.
    """

    params: Tree = dataclasses.field(default_factory=dict)
    base_model: str
    base_files: Path | None = None
    licence: Licence = NO_LICENCE
    quantised: str = ""
    quantization: Mapping[str, Any] = dataclasses.field(default_factory=lambda: NOT_QUANTIZED)
    floats: Callable[[], Tree] | None = None

    @property
    def full_base(self) -> Tree:
        """The base, with the leaves that trained in place of its own."""
        return unflatten_dict({**_flat(self.base), **_flat(self.params)}, sep="/")


def _flat(tree: Tree) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _first(tree: Tree) -> str:
    return next(iter(_flat(tree)))


def _outside(path: str) -> bool:
    """Whether a leaf of the base is outside the four products: embedding, norms, lm_head."""
    return path.split("/")[1] not in BLOCKS


def _module(layer: int | str, product: str) -> str:
    return f"model.layers.{layer}.{MODULES[product]}"


def _write_model_files(
    trained: Trained, directory: Path, dtype: Any, config: Mapping[str, Any]
) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files.

    generation_config.json is the base's own where it has one, with all tokens that end an answer.
    """
    # transformers 5 reads `dtype`, earlier versions `torch_dtype`.
    write_json(
        directory / "config.json",
        {**config, "dtype": dtype.name, "torch_dtype": dtype.name},
    )
    own = trained.base_files and trained.base_files / "generation_config.json"
    if own and own.is_file():
        generation = read_json(own)
    else:
        ids = {name: config[name] for name in ("bos_token_id", "pad_token_id")}
        generation = {name: id for name, id in ids.items() if id is not None}
    # The tokens that our Generator stops at.
    stop = list(dict.fromkeys([*trained.config.eos_token_id, *ends(trained.tokenizer)]))
    if stop:
        generation["eos_token_id"] = write_token_ids(stop)
    write_json(directory / "generation_config.json", generation)
    _write_tokenizer(trained, directory)


# A tokenizer's files in an HF directory.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


def _write_tokenizer(trained: Trained, directory: Path) -> None:
    """Copies the base's own tokenizer files byte for byte, so that whatever reads the base reads
    the export. Without any it writes files that transformers 4 and 5 read."""
    if own := _own_tokenizer_files(trained):
        for file in own:
            copy = directory / file.relative_to(trained.base_files)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        return
    # The chat template goes into tokenizer_config.json, where every version looks for it.
    trained.tokenizer.save_pretrained(directory, save_jinja_files=False)
    config = read_json(directory / "tokenizer_config.json")
    # Only transformers 5 knows its own names of the class and of `additional_special_tokens`.
    extra = config.pop("extra_special_tokens", None)
    config = {name: value for name, value in config.items() if name not in ("backend", "is_local")}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if extra:
        config["additional_special_tokens"] = extra
    write_json(directory / "tokenizer_config.json", config)


def _own_tokenizer_files(trained: Trained) -> list[Path]:
    """The files of the base's tokenizer; none if they are missing or make another tokenizer."""
    own = trained.base_files
    if own is None:
        return []
    files = [file for name in _TOKENIZER_FILES for file in own.glob(name)]
    if not any(file.name in VOCABULARIES for file in files):
        return []
    if tokenizer_digest(load_tokenizer(str(own))) != tokenizer_digest(trained.tokenizer):
        return []
    return files


class Stacked:
    """A leaf `[L, …]` of the split layout over L mapped tensors; a layer is read when it is
    indexed."""

    def __init__(self, layers: list[np.ndarray]):
        self._layers = layers
        self.shape = (len(layers), *layers[0].shape)
        self.dtype = layers[0].dtype

    def __getitem__(self, i: int) -> np.ndarray:
        return self._layers[i]


def _read_leaf(path: str, names: list[str], tensors: dict[str, np.ndarray]) -> Any:
    """A leaf of the base in the split layout, from the HF tensors `names`."""
    found = [tensors[name] for name in names]
    if path.endswith("kernel"):
        found = [tensor.T for tensor in found]
    if path.startswith("layers/"):
        return Stacked(found)
    return found[0]


# ------------------------------------------------------------------------------------------- merged


def _refuse_merged(adapter_config: AdapterConfig, params: Tree) -> str | None:
    if adapter_config.row.reads is not None and not adapter_config.row.mergeable:
        return f"{adapter_config.method} goes around the blocks and is no change of W"
    return None


def _targets(trained: Trained) -> dict[str, tuple[str, str, str, int]]:
    """HF name -> block, product, projection and layer, for each tensor that the adapter changes."""
    places = [
        (block, product, p)
        for block, products in BLOCKS.items()
        for product in products
        for p in PRODUCTS[product]
        if p in trained.adapter_config.targets and trained.adapter
    ]
    layers = range(trained.config.num_hidden_layers)
    return {
        f"model.layers.{i}.{PEFT_MODULES[place[2]]}.weight": (*place, i)
        for place in places
        for i in layers
    }


def _write_merged(trained: Trained, directory: Path, dtype: Any) -> dict[str, Any]:
    targets = _targets(trained)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in to_hf_tensors(trained.config, trained.full_base):
            if name in targets:
                block, product, projection, layer = targets[name]
                leaves = {
                    path: leaf[layer]
                    for path, leaf in trained.adapter["layers"][block][product].items()
                }
                kernel = value.T.astype(np.float32)
                merged = np.asarray(
                    merged_kernel(kernel, leaves, trained.adapter_config, projection)
                )
                if np.array_equal(merged, kernel):
                    raise UserError(
                        f"{name}: the adapter of {projection!r} changes nothing there; was it "
                        "trained?"
                    )
                value = merged.T
            yield name, value

    write_shards(directory, hf_shapes(trained.config), dtype, tensors())
    _write_model_files(trained, directory, dtype, trained.config.to_hf())
    # Each tensor against the base's: only the targets and what trained may differ.
    names = hf_names(trained.config)
    changing = {*targets, *(name for path in _flat(trained.params) for name in names[path])}
    there = map_shards(directory)
    changed = 0
    for name, value in to_hf_tensors(trained.config, trained.base):
        pairs = zip(row_blocks(there[name]), row_blocks(value), strict=True)
        same = all(np.array_equal(found, own.astype(dtype)) for found, own in pairs)
        if not same and name not in changing:
            raise UserError(f"{name}: the export changed it, but it is no target of the adapter")
        changed += not same
    if not changed:
        raise UserError(
            f"no tensor differs from the base's in {dtype.name}; --dtype float32 keeps small "
            "changes"
        )
    return {"tensors": len(there), "targeted": len(changing), "changed": changed}


def _read_merged(trained: Trained, directory: Path) -> tuple[None, Tree]:
    """The merged weights as the split base of a bare model."""
    tensors = map_shards(directory)
    leaves = {
        path: _read_leaf(path, names, tensors) for path, names in hf_names(trained.config).items()
    }
    return None, {"params": unflatten_dict(leaves, sep="/")}


# --------------------------------------------------------------------------------------------- peft


def _refuse_peft(adapter_config: AdapterConfig, params: Tree) -> str | None:
    if not adapter_config.row.mergeable:
        return f"{adapter_config.method} is no LoRA"
    if params:
        return f"a LoRA has no place for base leaves, and {_first(params)} trained"
    return None


def _write_peft(trained: Trained, directory: Path, dtype: Any) -> dict[str, Any]:
    adapter, lora = as_lora(trained.adapter, trained.config, trained.adapter_config)
    about = (trained.config, lora, trained.base_model, trained.fingerprint)
    write_adapter_files(directory, {"adapter": adapter}, *about, dtype, trained.quantization)
    return {}


def _read_peft(trained: Trained, directory: Path) -> tuple[AdapterConfig, Tree]:
    lora, found = load_adapter(directory, trained.config, trained.fingerprint)
    return lora, {"params": trained.base, "adapter": found["adapter"]}


# ------------------------------------------------------------------------------------- transformers


def _refuse_transformers(adapter_config: AdapterConfig, params: Tree) -> str | None:
    if adapter_config.row.reads is None:
        return f"{adapter_config.method} has no adapter: what it gives is a model like its base"
    return None


_STORED = Layout(kind="fused", transposed=True)  # the layout of a Linear's weight


def _linears(layers: Tree) -> Iterator[tuple[str, Any]]:
    """Name and value of every Linear's tensors; layers: fused and transposed, by number."""
    for i, layer in layers.items():
        for block in BLOCKS:
            for product, leaves in layer[block].items():
                yield from _linear(_module(i, product), leaves, product)


def _linear(module: str, leaves: Tree, product: str) -> Iterator[tuple[str, Any]]:
    weight = leaves[_STORED.matrix]
    yield f"{module}.weight", weight
    for p in PRODUCTS[product]:
        if f"{p}_B" in leaves:
            yield f"{module}.B.{p}.weight", leaves[f"{p}_B"]
    if "bias" in leaves:
        bias = leaves["bias"]
        # As wide as the Linear's output, which includes the adapter's columns.
        yield f"{module}.bias", jax.numpy.pad(bias, (0, len(weight) - len(bias)))


def _write_transformers(trained: Trained, directory: Path, dtype: Any) -> dict[str, Any]:
    config = trained.config
    adapter_config = trained.adapter_config
    base = jax.tree.map(np.asarray, trained.full_base)  # no copy on a CPU

    def layers(base: Tree, adapter: Tree) -> Iterator[tuple[str, Tree]]:
        return fused_layers(base, adapter, config, adapter_config, _STORED, dtype)

    linears = jax.eval_shape(
        lambda *trees: dict(_linears(dict(layers(*trees)))), base, trained.adapter
    )
    outside = {name for path, names in hf_names(config).items() if _outside(path) for name in names}
    shapes = {name: shape for name, shape in hf_shapes(config).items() if name in outside}
    shapes |= {name: value.shape for name, value in linears.items()}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from to_hf_tensors(config, base, _outside)
        for i, layer in layers(base, trained.adapter):
            yield from _linears({i: layer})

    write_shards(directory, shapes, dtype, tensors())
    for file in sorted(_REMOTE_CODE.glob("*.py")):
        shutil.copyfile(file, directory / file.name)
    about = {**base_config(config), **remote_config(adapter_config)}
    _write_model_files(trained, directory, dtype, about)
    return {}


def base_config(config: LlamaConfig) -> dict[str, Any]:
    """The fields of a Llama's config.json, and `differences`: what remote_code computes unlike a
    Llama."""
    differences = {**config.differences, "attention_multiplier": config.attention_scale}
    return {**config.plain.to_hf(), "differences": differences}


def remote_config(adapter_config: AdapterConfig) -> dict[str, Any]:
    """The fields of config.json that remote_code reads."""
    activation = adapter_config.activation
    products = {
        product: {
            "forward": list(slot.forward),
            "matrix": list(slot.matrix),
            "repeat": list(slot.repeat),
            "backward": slot.backward_rank,
        }
        for product, slot in adapter_config.slots.items()
    }
    stream = 0
    if adapter_config.row.writes == "stream":
        stream = adapter_config.rank
        # Every product reads and writes the wider stream whole: none takes channels off it or
        # joins them to it.
        for held in products.values():
            held |= {"forward": [], "backward": 0}
    return {
        "model_type": "flora_llama",
        "architectures": ["FloraLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_flora_llama.FloraLlamaConfig",
            "AutoModel": "modeling_flora_llama.FloraLlamaModel",
            "AutoModelForCausalLM": "modeling_flora_llama.FloraLlamaForCausalLM",
        },
        "flora": {
            "method": adapter_config.method,
            "rank": adapter_config.rank,
            "activation": _ACT2FN.get(activation, activation),
            "stream": stream,
            "stream_norm": stream > 0,
            "products": products,
        },
    }


def _read_transformers(trained: Trained, directory: Path) -> tuple[AdapterConfig, Tree]:
    """The export as a fused, transposed tree."""
    config = trained.config
    adapter_config = trained.adapter_config
    tensors = map_shards(directory)
    layout = dataclasses.replace(_STORED, adapters=1, rank=adapter_config.rank)
    stream = layout.stream(config.hidden_size, adapter_config)
    leaves = {}
    for path, names in hf_names(config).items():
        if not path.startswith("layers/"):
            leaves[path] = _read_leaf(path, names, tensors)
        elif _outside(path):
            room = 0
            if path.split("/")[1] in STREAM_NORMS:
                room = stream - config.hidden_size
            for i, name in enumerate(names):
                scale = np.pad(tensors[name], (0, room), constant_values=1)
                leaves[path.replace("layers", f"layers/{i}", 1)] = scale
    for i in range(config.num_hidden_layers):
        for block, products in BLOCKS.items():
            for product in products:
                found = _read_linear(tensors, _module(i, product), config, product)
                leaves |= {
                    f"layers/{i}/{block}/{product}/{name}": leaf for name, leaf in found.items()
                }
    return adapter_config, {"params": layout.mark(unflatten_dict(leaves, sep="/"))}


def _read_linear(
    tensors: dict[str, np.ndarray], module: str, config: LlamaConfig, product: str
) -> Tree:
    """A fused product's leaves from a Linear's tensors."""
    leaves = {_STORED.matrix: tensors[f"{module}.weight"]}
    for p in PRODUCTS[product]:
        if f"{module}.B.{p}.weight" in tensors:
            leaves[f"{p}_B"] = tensors[f"{module}.B.{p}.weight"]
    if f"{module}.bias" in tensors:
        columns = sum(config.widths[p][1] for p in PRODUCTS[product])
        leaves["bias"] = tensors[f"{module}.bias"][:columns]
    return leaves


# --------------------------------------------------------------------------------------------- vllm


def _refuse_vllm(adapter_config: AdapterConfig, params: Tree) -> str | None:
    method = adapter_config.method
    row = adapter_config.row
    if row.reads is None:
        return f"{method} has no adapter"
    if params:
        return f"an adapter has no place for base leaves, and {_first(params)} trained"
    if row.mergeable:
        return f"{method} is a LoRA to vLLM, which reads --format peft"
    if row.writes != "block":
        return f"{method} does not go around the blocks, where the bank in vLLM has its places"
    if max_lora_rank(adapter_config) is None:
        known = ", ".join(map(str, MAX_LORA_RANKS))
        return f"rank {adapter_config.rank} goes into no --max-lora-rank of vLLM's ({known})"
    return None


def _write_vllm(trained: Trained, directory: Path, dtype: Any) -> dict[str, Any]:
    config = trained.config
    adapter_config = trained.adapter_config
    flora = remote_config(adapter_config)["flora"]
    differences = base_config(config)["differences"]
    about = vllm_config(flora, differences, config, trained.base_model, trained.fingerprint)
    write_json(directory / CONFIG, about)
    write_tensors(directory, to_vllm(trained.adapter, config, adapter_config), dtype)
    return {}


def _read_vllm(trained: Trained, directory: Path) -> tuple[AdapterConfig, Tree]:
    """The adapter under the configuration that the files state: its scale is vLLM's."""
    stored = read_json(directory / CONFIG)
    adapter_config = _stated_config(stored["flora"], stored["lora_alpha"])
    adapter = from_vllm(read_tensors(directory), trained.config, adapter_config)
    return adapter_config, {"params": trained.base, "adapter": adapter}


def _stated_config(flora: Mapping[str, Any], alpha: float) -> AdapterConfig:
    """The configuration of an adapter around the blocks, from the `flora` of its
    `remote_config`."""
    ours = {theirs: name for name, theirs in _ACT2FN.items()}
    targets = []
    for product, held in flora["products"].items():
        if held["forward"] == ["block"] or held["backward"]:
            targets += PRODUCTS[product]
        else:
            targets += held["forward"]
    return AdapterConfig(
        flora["method"],
        flora["rank"],
        alpha=alpha,
        targets=targets,
        add_to=[p for held in flora["products"].values() for p in held["repeat"]],
        activation=ours.get(flora["activation"], flora["activation"]),
    )


@dataclasses.dataclass(frozen=True)
class Format:
    """How an export is checked, written and read back.

    refuse: why the format cannot hold a method and the base leaves that trained, None if it can;
    write: writes the files to an existing directory in a dtype, and returns its part of the report;
    read: the configuration and variables for our own Llama, with weights mapped from the files;
    holds_base: whether the base's weights are among the files.
    """

    refuse: Callable[[AdapterConfig, Tree], str | None]
    write: Callable[[Trained, Path, Any], dict[str, Any]]
    read: Callable[[Trained, Path], tuple[AdapterConfig | None, Tree]]
    holds_base: bool = True


FORMATS = {
    "merged": Format(_refuse_merged, _write_merged, _read_merged),
    "peft": Format(_refuse_peft, _write_peft, _read_peft, holds_base=False),
    "transformers": Format(_refuse_transformers, _write_transformers, _read_transformers),
    "vllm": Format(_refuse_vllm, _write_vllm, _read_vllm, holds_base=False),
}
