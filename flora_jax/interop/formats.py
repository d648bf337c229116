"""The four formats of an export: what each can hold, how it is written, how our own model reads it
back.

    merged        transformers' own class, the adapter in its weights    any reader of the base
    peft          a LoRA over the base                                   PEFT, transformers, vLLM
    transformers  the fused projections in PyTorch, with their code      trust_remote_code=True
    vllm          an adapter around the blocks, over the base            vLLM with `vllm_plugin/`

A fused product is one Linear there, its weight `[out, in]` what `fuse(…, transposed=True)` gives:

    layers/3/attention/qkv/weight    model.layers.3.self_attn.qkv_proj.weight
    layers/3/attention/qkv/q_B       model.layers.3.self_attn.qkv_proj.B.q.weight

The latter for lora and pf_lora alone.
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
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import hf_names, hf_shapes, to_hf_tensors
from flora_jax.models.tokenizer import VOCABULARIES, load_tokenizer
from flora_jax.tokens import ends, tokenizer_digest

Tree = dict[str, Any]

_REMOTE_CODE = Path(__file__).parent / "remote_code"
_ACT2FN = {"gelu": "gelu_pytorch_tanh"}  # transformers' name for the gelu that is ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Adapted):
    """What is exported: a model with its base as it was before training, and beside it what trained
    of the base.

    params: base leaves that trained, `{}` if none; base_model: the name that readers know the base
    by; base_files: the HF directory that the base came from, None where it came from none; licence:
    the base's; quantised: what the base's weights were before they were floats, "" if nothing else.
    quantization: of the base while it trained, whose `base` holds what the codes stand for; floats:
    gives the base as it is without.
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
        """The base with the leaves that trained in place of its own."""
        return unflatten_dict({**_flat(self.base), **_flat(self.params)}, sep="/")


def _flat(tree: Tree) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _first(tree: Tree) -> str:
    return next(iter(_flat(tree)))


def _outside(path: str) -> bool:
    """Whether a leaf of the base belongs to none of the four products: embedding, norms,
    lm_head."""
    return path.split("/")[1] not in BLOCKS


def _module(layer: int | str, product: str) -> str:
    return f"model.layers.{layer}.{MODULES[product]}"


def _write_model_files(
    trained: Trained, directory: Path, dtype: Any, config: Mapping[str, Any]
) -> None:
    """config.json, generation_config.json (the base's own, where it came with
    one, with all tokens that end an answer), the tokenizer's files."""
    # transformers 5 reads `dtype`, those before `torch_dtype`.
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
    # Those that our Generator stops at.
    stop = list(dict.fromkeys([*trained.config.eos_token_id, *ends(trained.tokenizer)]))
    generation |= {"eos_token_id": stop[0] if len(stop) == 1 else stop} if stop else {}
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
    """The base's own files, byte for byte, where it came with any and they are the tokenizer's:
    whatever reads the base's then reads these. Otherwise files that transformers 4 and 5 read."""
    own = trained.base_files
    files = [file for name in _TOKENIZER_FILES for file in (own.glob(name) if own else ())]
    known = any(file.name in VOCABULARIES for file in files)
    if known and tokenizer_digest(load_tokenizer(str(own))) == tokenizer_digest(trained.tokenizer):
        for file in files:
            copy = directory / file.relative_to(own)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        return
    # The chat template in tokenizer_config.json, where every version looks for it.
    trained.tokenizer.save_pretrained(directory, save_jinja_files=False)
    config = read_json(directory / "tokenizer_config.json")
    # What transformers 5 alone knows: its name of the class, and its name of what was
    # `additional_special_tokens`.
    extra = config.pop("extra_special_tokens", None)
    config = {name: value for name, value in config.items() if name not in ("backend", "is_local")}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"additional_special_tokens": extra} if extra else {}
    write_json(directory / "tokenizer_config.json", config)


class Stacked:
    """A leaf `[L, …]` of the split layout whose layers lie in as many mapped tensors: nothing is
    read until a layer is taken out."""

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
    return Stacked(found) if path.startswith("layers/") else found[0]


# ------------------------------------------------------------------------------------------- merged


def _refuse_merged(adapter_config: AdapterConfig, params: Tree) -> str | None:
    if adapter_config.row.reads is not None and not adapter_config.row.mergeable:
        return f"{adapter_config.method} goes around the blocks and is no change of W"
    return None


def _targets(trained: Trained) -> dict[str, tuple[str, str, str, int]]:
    """HF name -> block, product, projection and layer of each tensor that the adapter changes."""
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
    # Tensor by tensor against the base: what was to change may have, all else must be the base's
    # own.
    names = hf_names(trained.config)
    changing = {*targets, *(name for path in _flat(trained.params) for name in names[path])}
    there, changed = map_shards(directory), 0
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
    """As the split base of a bare model."""
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


_STORED = Layout(kind="fused", transposed=True)  # as a Linear's weight is


def _linears(layers: Tree) -> Iterator[tuple[str, Any]]:
    """Name and value of every tensor of the Linears that fused, transposed layers are."""
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
        # As wide as the Linear's outputs, those of the adapter included.
        yield f"{module}.bias", jax.numpy.pad(bias, (0, len(weight) - len(bias)))


def _write_transformers(trained: Trained, directory: Path, dtype: Any) -> dict[str, Any]:
    config, adapter_config = trained.config, trained.adapter_config
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
    """The fields of a Llama's config.json, and `differences`, what remote_code computes beside."""
    differences = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.differences.items()
    }
    differences["attention_multiplier"] = config.attention_scale
    return {**config.plain.to_hf(), "differences": differences}


def remote_config(adapter_config: AdapterConfig) -> dict[str, Any]:
    """The fields of config.json that remote_code reads."""
    stream, activation = adapter_config.row.writes == "stream", adapter_config.activation
    products = {
        product: {
            # A stream is wider for every product alike: nothing is cut off it or joined to it
            # there.
            "forward": [] if stream else list(slot.forward),
            "matrix": list(slot.matrix),
            "repeat": list(slot.repeat),
            "backward": 0 if stream else slot.backward_rank,
        }
        for product, slot in adapter_config.slots.items()
    }
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
            "stream": adapter_config.rank if stream else 0,
            "products": products,
        },
    }


def _read_transformers(trained: Trained, directory: Path) -> tuple[AdapterConfig, Tree]:
    """As a fused tree, stored as PyTorch stores it."""
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
            room = (0, stream - config.hidden_size) if path.split("/")[1] in STREAM_NORMS else 0
            for i, name in enumerate(names):
                leaves[path.replace("layers", f"layers/{i}", 1)] = np.pad(tensors[name], room)
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
    config, adapter_config = trained.config, trained.adapter_config
    flora = remote_config(adapter_config)["flora"]
    differences = base_config(config)["differences"]
    about = vllm_config(flora, differences, config, trained.base_model, trained.fingerprint)
    write_json(directory / CONFIG, about)
    write_tensors(directory, to_vllm(trained.adapter, config, adapter_config), dtype)
    return {}


def _read_vllm(trained: Trained, directory: Path) -> tuple[AdapterConfig, Tree]:
    """With the configuration that the files state, whose scale is vLLM's."""
    stored = read_json(directory / CONFIG)
    adapter_config = _stated_config(stored["flora"], stored["lora_alpha"])
    adapter = from_vllm(read_tensors(directory), trained.config, adapter_config)
    return adapter_config, {"params": trained.base, "adapter": adapter}


def _stated_config(flora: Mapping[str, Any], alpha: float) -> AdapterConfig:
    """The configuration that `remote_config` gives `flora` of, for an adapter around the blocks."""
    ours = {theirs: name for name, theirs in _ACT2FN.items()}
    targets = []
    for product, held in flora["products"].items():
        whole = held["forward"] == ["block"] or held["backward"]
        targets += PRODUCTS[product] if whole else held["forward"]
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
    """refuse: why it cannot hold a method (with base leaves that trained), None if it can. write:
    the files, in a directory that is there, in a dtype; returns what it can say about them. read:
    configuration and variables that our own Llama computes with, the weights mapped from the files.
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
