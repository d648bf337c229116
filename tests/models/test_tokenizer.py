"""Tokenizers: the byte tokenizer, those of GGUF files cut and merged as their models expect,
saving, refusals."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
import transformers
from test_chat_templates import LLAMA2, LLAMA3, byte_level, llama, sentencepiece
from test_gguf import write_gguf
from tokenizers.pre_tokenizers import ByteLevel

from flora_jax.errors import UserError
from flora_jax.models import tokenizer as module
from flora_jax.models.config import LlamaConfig
from flora_jax.models.loading import resolve_source
from flora_jax.models.tokenizer import check_tokenizer, load_tokenizer

TINY = LlamaConfig.preset("tiny")
MERGES = ["1 2", "12 3", "t h", "th e", "Ġ the", "l l"]
VOCABULARY = [
    "<s>",
    "</s>",
    "<pad>",
    "<note>",
    *sorted(ByteLevel.alphabet()),
    "12",
    "123",
    "th",
    "the",
    "Ġthe",
    "ll",
    "1234",
]
CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def tokenizer_fields(
    pre, tokens=VOCABULARY, merges=MERGES, model="gpt2", ids=(0, 1, 2), add_bos=None, add_eos=None
):
    def add(writer):
        writer.add_tokenizer_model(model)
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 3, 4] + [1] * (len(tokens) - 4))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(ids[0])
        writer.add_eos_token_id(ids[1])
        writer.add_pad_token_id(ids[2])
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)
        if add_eos is not None:
            writer.add_add_eos_token(add_eos)
        writer.add_chat_template(CHAT)

    return add


def gguf_with(tmp_path, *arguments, **settings):
    tokens = settings.get("tokens", VOCABULARY)
    config = dataclasses.replace(TINY, vocab_size=len(tokens), num_hidden_layers=1)
    return str(
        write_gguf(tmp_path / "m.gguf", config, tokenizer=tokenizer_fields(*arguments, **settings))
    )


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


@pytest.mark.parametrize("source", ["random", "tiny"])
def test_byte_tokenizer(source, tmp_path):
    tokenizer = load_tokenizer(source)
    text = "Grüße, 世界!\n\t 123 \x00"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        256,
        257,
        258,
    )
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids == [259, ord("a"), 260]
    assert tokenizer.decode([259, 97, 260, 257], skip_special_tokens=True) == "a"
    check_tokenizer(tokenizer, TINY)
    assert (TINY.bos_token_id, TINY.eos_token_id, TINY.pad_token_id) == (256, (257,), 258)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    expected = [259, *b"user\nhi", 260, 10, 259, *b"assistant\nyo", 260, 10, 259, *b"assistant\n"]
    assert ids == expected
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again(text).input_ids == list(text.encode())
    assert again.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == expected


@pytest.mark.parametrize(
    "pre, expected",
    [
        # numbers digit by digit; what stands before a digit is cut off from it
        ("smollm", ["the", "Ġ", "1", "2", "3", "4", "Ġthe", "Ġ", "Ġthe", "'", "ll"]),
        # numbers by at most three digits, no space taken along
        ("llama-bpe", ["<s>", "the", "Ġ", "123", "4", "Ġthe", "Ġ", "Ġthe", "'", "ll"]),
        # whole numbers with their space, merged as far as merges go
        ("gpt-2", ["the", "Ġ", "123", "4", "Ġthe", "Ġ", "Ġthe", "'", "ll"]),
    ],
)
def test_texts_are_cut_as_the_model_expects(pre, expected, tmp_path):
    tokenizer = load_tokenizer(gguf_with(tmp_path, pre))
    text = "the 1234 the  the'll"
    assert pieces(tokenizer, text) == expected
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    check_tokenizer(tokenizer, dataclasses.replace(TINY, vocab_size=len(VOCABULARY)))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I'll pay 12345.67€", ["I", "'ll", " pay", " ", "123", "45", ".", "67", "€"]),
        ("a\n\n  b", ["a", "\n\n", " ", " b"]),
        ("(x+=1) DON'T", ["(x", "+=", "1", ")", " DON", "'T"]),
        ("ends  ", ["ends", "  "]),
        ("año 漢字!!\r\nq", ["año", " 漢字", "!!\r\n", "q"]),
    ],
)
def test_llama3_split_by_hand(text, expected, tmp_path):
    """What Llama 3's published pattern means, worked out by hand for each text."""
    tokenizer = load_tokenizer(gguf_with(tmp_path, "llama-bpe"))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == expected


def test_special_tokens_are_those_of_the_file(tmp_path):
    tokenizer = load_tokenizer(gguf_with(tmp_path, "llama-bpe"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    assert (
        tokenizer.chat_template == CHAT
        and tokenizer.model_max_length == TINY.max_position_embeddings
    )
    ids = tokenizer("a</s><note>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "</s>", "<note>"]
    # Control tokens are left out of a decoded text, user-defined ones belong to it.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<note>"
    assert tokenizer("a", add_special_tokens=False).input_ids == [VOCABULARY.index("a")]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "</s>"]


@pytest.mark.parametrize(
    "pre, flags, expected",
    [
        ("smollm", {}, ["a"]),
        ("smollm", {"add_bos": True, "add_eos": True}, ["<s>", "a", "</s>"]),
        ("llama-bpe", {}, ["<s>", "a"]),
        ("llama-bpe", {"add_bos": False}, ["a"]),
    ],
)
def test_bos_follows_the_file_and_survives_saving(pre, flags, expected, tmp_path):
    tokenizer = load_tokenizer(gguf_with(tmp_path, pre, **flags))
    assert pieces(tokenizer, "a") == expected
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert pieces(again, "a") == expected
    text = "the 1234 the<note>"
    assert again(text).input_ids == tokenizer(text).input_ids and again.chat_template == CHAT


def test_llama3_takes_whole_words_before_merges(tmp_path):
    """Llama 3 looks a word up before it merges: '1234'[:3] is cut first, but 'Ġthe' needs no merge
    to be found."""
    merges = [merge for merge in MERGES if merge != "Ġ the"]
    assert pieces(load_tokenizer(gguf_with(tmp_path, "llama-bpe", merges=merges)), " the") == [
        "<s>",
        "Ġthe",
    ]
    assert pieces(load_tokenizer(gguf_with(tmp_path, "gpt-2", merges=merges)), " the") == [
        "Ġ",
        "the",
    ]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(pre="smollm", model="llama"), "tokenizer.ggml.model='llama' is not supported"),
        (dict(pre="deepseek-llm"), "tokenizer.ggml.pre='deepseek-llm' is not supported"),
        (dict(pre="smolm"), "did you mean 'smollm'"),
        (dict(pre=None), "'tokenizer.ggml.pre' is missing"),
        (dict(pre="smollm", merges=["q z"]), "holds 'q z'"),
        (dict(pre="smollm", tokens=[*VOCABULARY, "a"]), "holds a token twice"),
        (dict(pre="smollm", ids=(0, 1, 9999)), "padding_token_id=9999 is not among"),
    ],
)
def test_another_tokenizer_is_refused(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_tokenizer(gguf_with(tmp_path, **arguments))


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TINY, tokenizer=tokenizer_fields("smollm"))
    with pytest.raises(
        UserError, match=f"counts {len(VOCABULARY)} tokens, token_embd.weight has 320 rows"
    ):
        load_tokenizer(str(path))
    with pytest.raises(
        UserError, match=r"largest id is 260, the model's vocab_size=260.*at least 261"
    ):
        check_tokenizer(load_tokenizer("tiny"), dataclasses.replace(TINY, vocab_size=260))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer\\.json"):
        load_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_is_refused_in_one_line(tmp_path):
    load_tokenizer("tiny").save_pretrained(tmp_path)
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    good["model"]["merges"] = ["x not-a-token"]
    for content, words in (
        ("garbage", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "cannot be read"),
        (json.dumps(good), "out of vocabulary"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=words) as error:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.slow
def test_smollm2_tokenizer():
    """Where no digit is near, transformers' own GGUF tokenizer agrees; numbers split digit by
    digit."""
    from transformers import AutoTokenizer

    path = resolve_source("smollm2-135m-instruct")
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        "Hello, world! It's a test.\n\n\tdef f(x): return x",
        "Größe, 漢字 and emoji 🙂  spaces",
        "<|im_start|>user\nHi<|im_end|>",
    ):
        assert tokenizer(text).input_ids == theirs(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert pieces(tokenizer, "in 2024: 3.14") == [
        "in",
        "Ġ",
        "2",
        "0",
        "2",
        "4",
        ":",
        "Ġ",
        "3",
        ".",
        "1",
        "4",
    ]
    chat = [{"role": "user", "content": "Hi"}]
    ours = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    np.testing.assert_array_equal(
        ours, theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    )
    check_tokenizer(tokenizer, LlamaConfig.preset("smollm2-135m"))


def test_code_of_a_directory_is_neither_run_nor_asked_for(tmp_path, monkeypatch):
    """Not even where the directory's files name it, as those of our own transformers exports do."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    load_tokenizer("tiny").save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", None]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for extra in ({}, {"auto_map": {"AutoTokenizer": ["evil.T", None]}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | extra))
        try:
            assert load_tokenizer(str(tmp_path))("a").input_ids == [ord("a")]
        except UserError as error:
            assert "\n" not in str(error)
        assert not (tmp_path / "ran").exists()


def declared(path, tokenizer, tokenizer_class, **settings):
    """An HF directory that names the class of its tokenizer, and more."""
    tokenizer.save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "tokenizer_class": tokenizer_class, **settings})
    )
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(path)


def llama3():
    return byte_level(module._llama3(), LLAMA3)


@pytest.mark.parametrize(
    ("make", "tokenizer_class", "settings"),
    [
        (llama3, "PreTrainedTokenizerFast", {}),
        (llama3, "GPT2Tokenizer", {"add_prefix_space": True}),
        (lambda: sentencepiece("bpe", "legacy", LLAMA2), "LlamaTokenizer", {"legacy": True}),
        (
            lambda: sentencepiece("bpe", "legacy", LLAMA2),
            "LlamaTokenizerFast",
            {"legacy": False, "add_prefix_space": False},
        ),
        (lambda: sentencepiece("bpe", "never", LLAMA2), "LlamaTokenizer", {}),
        (lambda: sentencepiece("unigram", "always", LLAMA2), "PreTrainedTokenizerFast", {}),
        (lambda: llama(LLAMA2), "LlamaTokenizer", {}),
        (module.byte_tokenizer, "PreTrainedTokenizerFast", {"split_special_tokens": True}),
    ],
)
def test_a_tokenizer_that_is_read_right_is_not_refused(tmp_path, make, tokenizer_class, settings):
    loaded = load_tokenizer(declared(tmp_path, make(), tokenizer_class, **settings))
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = loaded("x hello  12 345", add_special_tokens=False).input_ids
    assert ids[-5:] == raw.encode("x hello  12 345", add_special_tokens=False).ids[-5:]


def test_a_tokenizer_that_transformers_misreads_is_refused(tmp_path, monkeypatch):
    """As many releases read a byte-level Llama that is declared a LlamaTokenizer: without its
    spaces."""
    path = declared(tmp_path / "llama3", llama3(), "LlamaTokenizer")
    assert load_tokenizer(path)(" the", add_special_tokens=False).input_ids == [
        llama3().get_vocab()["Ġthe"]
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.AutoTokenizer.from_pretrained",
            transformers.LlamaTokenizer.from_pretrained,
        )
        patch.setattr("transformers.__version__", "5.19.0")
        line = (
            r"llama3: transformers 5\.19\.0 reads the tokenizer, as a Llama.*pip install "
            r"transformers==5\.24\.0"
        )
        with pytest.raises(UserError, match=line) as error:
            load_tokenizer(path)
        assert "\n" not in str(error.value)
    # One that the installed release misreads, too: Unigram read as BPE. The remedy that the line
    # names mends it.
    path = declared(
        tmp_path / "unigram", sentencepiece("unigram", "first", LLAMA2), "LlamaTokenizer"
    )
    with pytest.raises(UserError, match="write PreTrainedTokenizerFast as tokenizer_class"):
        load_tokenizer(path)
    path = declared(
        tmp_path / "unigram", sentencepiece("unigram", "first", LLAMA2), "PreTrainedTokenizerFast"
    )
    load_tokenizer(path)


PIECES = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"  # how a SentencePiece model begins


@pytest.mark.parametrize(
    ("content", "there", "line"),
    [
        (PIECES, [], "SentencePiece.*: pip install sentencepiece protobuf, or add"),
        (PIECES, ["google.protobuf"], "SentencePiece.*: pip install sentencepiece, or add"),
        (
            b"IQ== 0\nIg== 1\n",
            ["sentencepiece", "google.protobuf"],
            "tiktoken.*: pip install tiktoken, or add the token",
        ),
    ],
)
def test_a_lone_model_file_says_what_it_needs(tmp_path, monkeypatch, content, there, line):
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(module, "_installed", there.__contains__)
    with pytest.raises(UserError, match=line) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
