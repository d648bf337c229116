"""The tokenizer of a checkpoint, from the same sources as its weights, and a built-in one of bytes.

Everything returned is a `transformers.PreTrainedTokenizerFast`, so encoding, chat templates and
`save_pretrained` are transformers' own. GGUF files are read with `gguf` and `tokenizers`:
transformers' reader needs torch, and it splits SmolLM2's numbers wrongly.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from flora_jax.errors import UserError, in_a_line, near_misses, require
from flora_jax.files import check_file, read_json
from flora_jax.models.config import LlamaConfig
from flora_jax.models.gguf import GgufFile
from flora_jax.models.loading import resolve_source
from flora_jax.models.template_check import check_template
from flora_jax.tokens import Tokenizer, encode_batch, set_template_arguments

BYTE_SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>")  # ids 256 to 260

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Llama 3's and Qwen's split: contractions, words, numbers (%s: how many digits), punctuation, line
# ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BUILT_IN = ("random", "tiny")
# An HF directory has at least one of these.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")

# llama.cpp's token types.
_CONTROL = 3
_USER_DEFINED = 4

# A release of transformers that reads byte-level Llamas right; many earlier ones do not.
_RIGHT = "5.24.0"


def load_tokenizer(source: str, template_arguments: str = "") -> Tokenizer:
    """The tokenizer of `source`. Raises UserError where there is none.

    source: as `load_pretrained` takes it (HF directory, `.gguf` file, preset, hub id), or `random`
    or `tiny` for the byte tokenizer; template_arguments: `NAME=VALUE,…`, for its chat template
    wherever it is used.
    """
    tokenizer = _load(source)
    if source not in _BUILT_IN:
        for template in _templates(tokenizer):
            check_template(template, source)
    set_template_arguments(tokenizer, template_arguments)
    return tokenizer


def _templates(tokenizer: Tokenizer) -> Iterable[str]:
    """The tokenizer's chat templates: none, one, or several by name. A broken one is no text."""
    found = tokenizer.chat_template
    if found is None:
        return []
    if isinstance(found, Mapping):
        return found.values()
    return [found]


def _load(source: str) -> Tokenizer:
    if source in _BUILT_IN:
        return byte_tokenizer()
    path = resolve_source(source, weights=False)
    if path.is_file():
        return gguf_tokenizer(GgufFile(path))
    there = [name for name in VOCABULARIES if (path / name).is_file()]
    require(there, f"{path}: no tokenizer.json, tokenizer.model or vocab.json in the directory")
    for entry in path.iterdir():
        # transformers looks for many such files, and reads those that are there.
        if entry.suffix in _SUFFIXES and os.path.exists(entry) and not entry.is_dir():
            check_file(entry)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (path / name).is_file():
            read_json(path / name)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # transformers' warnings (of ids beside the vocabulary, say) are checks of ours, with one line.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        if "tokenizer.json" in there:
            _check_ids(tokenizer, path)
    except UserError:
        raise
    # `tokenizers` has no narrower class for a file that it cannot use.
    except Exception as error:
        why = _missing_packages(path / there[0]) or in_a_line(error)
        raise UserError(f"{path}: the tokenizer cannot be read ({why})") from error
    finally:
        logging.set_verbosity(verbosity)
    return tokenizer


def _missing_packages(vocabulary: Path) -> str:
    """A clause on packages that a tokenizer.model alone needs; empty if none is missing."""
    if vocabulary.name != "tokenizer.model":
        return ""
    # A SentencePiece model is a protobuf message. A line of Llama 3's own file holds a base64 token
    # and its rank.
    kind = "SentencePiece"
    needed = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    with vocabulary.open("rb") as file:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", file.read(200)):
            kind = "tiktoken"
            needed = {"tiktoken": "tiktoken"}
    missing = [package for module, package in needed.items() if not _installed(module)]
    if not missing:
        return ""
    return (
        f"tokenizer.model alone, a {kind} model, needs packages that are not installed: "
        f"pip install {' '.join(missing)}, or add the tokenizer.json that belongs to it"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


# The files that a tokenizer is read from.
_SUFFIXES = (".json", ".jinja", ".model", ".txt")
# Spaces of every kind, numbers, contractions, marks like special tokens', characters of many bytes.
_PROBE = (
    "x  Two  spaces, don't: 3.14 + 12345 = 'a_b'?\n\tdef f(x):\n    return [ZQ] "
    "<|zq|> </zq>\n\n naïve 漢字 🙂 …It's "
)


def _check_ids(tokenizer: Tokenizer, path: Path) -> None:
    """Raises UserError if transformers gives a text other ids than the directory's tokenizer.json.

    Some releases of transformers build certain tokenizers anew, and lose the spaces. Not compared:
    the beginning of a text, which a setting (`add_prefix_space`) decides, and how many unknown
    characters make one unknown token.
    """
    raw = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    raw.no_truncation()
    raw.no_padding()
    encoding = raw.encode(_PROBE, add_special_tokens=False)
    [(ids, offsets)] = encode_batch(tokenizer, [_PROBE])
    if offsets is None:
        return

    def compared(ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
        behind = [id for id, (start, _) in zip(ids, offsets, strict=True) if start]
        unknown = tokenizer.unk_token_id
        pairs = itertools.pairwise([None, *behind])
        return [id for before, id in pairs if id != unknown or id != before]

    if compared(ids, offsets) == compared(encoding.ids, encoding.offsets):
        return
    import transformers

    declared = tokenizer.init_kwargs.get("tokenizer_class") or type(tokenizer).__name__
    other = ""
    if transformers.__version__ != _RIGHT:
        other = f", or try another version (pip install transformers=={_RIGHT})"
    raise UserError(
        f"{path}: transformers {transformers.__version__} reads the tokenizer, as a {declared}, "
        "otherwise than its tokenizer.json says, and gives a text other ids; write "
        f"PreTrainedTokenizerFast as tokenizer_class into its tokenizer_config.json{other}"
    )


def check_tokenizer(tokenizer: Tokenizer, config: LlamaConfig) -> None:
    """Raises UserError if the tokenizer has ids without an embedding in the model."""
    largest = max(tokenizer.get_vocab().values())
    require(
        largest < config.vocab_size,
        f"the tokenizer's largest id is {largest}, the model's vocab_size={config.vocab_size}; "
        "use the checkpoint's own tokenizer, or a model with vocab_size of at least "
        f"{largest + 1}",
    )


def byte_tokenizer() -> Tokenizer:
    """A tokenizer without a file: id = byte for the 256 bytes, then `BYTE_SPECIALS`.

    It has a ChatML template. It adds nothing to a text, and any text decodes back to itself.
    """
    # Byte-level BPE writes a byte as a printable character: itself, or else one after 255 in order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    itself = {ord(char): char for char in alphabet if ord(char) < 256}
    others = (char for char in alphabet if ord(char) >= 256)
    vocabulary = {itself.get(byte) or next(others): byte for byte in range(256)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(BYTE_SPECIALS))
    bos, eos, pad, *_ = BYTE_SPECIALS
    return _wrap(core, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=_CHATML)


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer of an opened GGUF file.

    It has the file's special tokens, its chat template, and its rule whether a text begins with
    bos. Raises UserError for another kind of tokenizer.
    """
    kind = file.require("tokenizer.ggml.model")
    require(
        kind == "gpt2",
        f"{file.path}: tokenizer.ggml.model={kind!r} is not supported; "
        "only byte-level BPE ('gpt2') is",
    )
    pre = file.require("tokenizer.ggml.pre")
    if pre not in _PRE_TOKENIZERS:
        known = near_misses(pre, _PRE_TOKENIZERS)
        raise UserError(f"{file.path}: tokenizer.ggml.pre={pre!r} is not supported; {known}")
    tokens = file.require("tokenizer.ggml.tokens")
    core = _gguf_core(file, tokens, pre)

    def special(name: str) -> str | None:
        id = file.get(f"tokenizer.ggml.{name}_token_id")
        if id is None:
            return None
        require(
            id < len(tokens),
            f"{file.path}: tokenizer.ggml.{name}_token_id={id} is not among the "
            f"{len(tokens)} tokens",
        )
        return tokens[id]

    return _wrap(
        core,
        bos_token=special("bos"),
        eos_token=special("eos"),
        pad_token=special("padding"),
        unk_token=special("unknown"),
        add_bos_token=bool(file.get("tokenizer.ggml.add_bos_token", pre in _LLAMA3_NAMES)),
        add_eos_token=bool(file.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=file.get("tokenizer.chat_template"),
        model_max_length=file.config.max_position_embeddings,
    )


def _gguf_core(file: GgufFile, tokens: list[str], pre: str) -> tokenizers.Tokenizer:
    """The file's vocabulary, merges and added tokens; pre: llama.cpp's name of the split."""
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in file.require("tokenizer.ggml.merges")]
    for merge in merges:
        # There are hundreds of thousands, so the message is made for a wrong one alone.
        if len(merge) != 2 or not vocabulary.keys() >= {*merge, "".join(merge)}:
            raise UserError(
                f"{file.path}: tokenizer.ggml.merges holds {' '.join(merge)!r}, "
                "which merges no two tokens"
            )
    require(
        len(vocabulary) == len(tokens), f"{file.path}: tokenizer.ggml.tokens holds a token twice"
    )
    bpe = tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3_NAMES)
    core = tokenizers.Tokenizer(bpe)
    if pre in _NORMALIZERS:
        core.normalizer = _NORMALIZERS[pre]()
    core.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    core.decoder = decoders.ByteLevel()
    # Added tokens are found in a text before it is split; decoding can leave control tokens out.
    add = {_CONTROL: core.add_special_tokens, _USER_DEFINED: core.add_tokens}
    for token, kind in zip(tokens, file.get("tokenizer.ggml.token_type", []), strict=False):
        if kind in add:
            add[kind]([tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)])
    return core


def _wrap(core: tokenizers.Tokenizer, **settings: Any) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    settings = {key: value for key, value in settings.items() if value is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **settings
    )


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT % digits), behavior="isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _split("{1,3}")


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _split("")


# The split of a text before BPE, by llama.cpp's name.
_LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3")
_PRE_TOKENIZERS = {
    "smollm": _smollm,
    "gpt-2": _byte_level,
    "qwen2": _qwen2,
    **dict.fromkeys(_LLAMA3_NAMES, _llama3),
}
# The change of a text before the split, if there is one: Qwen's composes characters.
_NORMALIZERS = {"qwen2": normalizers.NFC}
