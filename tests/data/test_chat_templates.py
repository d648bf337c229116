"""Chat style under many tokenizers and templates: the ids are transformers' own, the mask what
generation would write.

The small tokenizers have the pipelines of real ones: SentencePiece's as transformers converts them
(a prefix put before each stretch of text, before the first, or before none; bytes for characters
without a token), GPT-2's and Llama 3's.
"""

import dataclasses
import hashlib
import itertools
import json
import random

import numpy as np
import pytest
import tokenizers
import transformers
from support import encode, encode_all
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

from flora_jax.data import get_task, load_examples
from flora_jax.data.encode import encode_prompt
from flora_jax.data.tasks import Example, Message, Turn
from flora_jax.errors import UserError
from flora_jax.models import tokenizer as ours
from flora_jax.models.tokenizer import byte_tokenizer, load_tokenizer
from flora_jax.tokens import DATE, ends, set_template_arguments

CHATML = byte_tokenizer().chat_template
LLAMA3 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + "
    "system + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + "
    "' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + "
    "m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "A chat. {% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = ZEPHYR.replace("</s>", "<|end|>")
# The last turn with its thinking, earlier ones without.
QWEN3 = (
    "{%- for m in messages %}{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- if m.role == 'assistant' and loop.last %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{%- if '</think>' not in m.content %}{%- set thought = '' %}{%- endif %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

# --------------------------------------------------------------------------------------- tokenizers

MERGES = [
    "Ċ Ċ",
    "Ġ Ġ",
    "ĠĠ ĠĠ",
    "Ċ Ġ",
    "h e",
    "l l",
    "he ll",
    "hell o",
    "Ġ t",
    "Ġt he",
    "Ġ hello",
    "1 2",
    "12 3",
    "' s",
    "| >",
    "< |",
    "|> Ċ",
    "Ġ <|",
    "a s",
    "as s",
    "Ċ hello",
    "! !",
    "!! Ċ",
]


def byte_level(cut, template):
    """A byte-level BPE whose merges reach across spaces and line ends."""
    tokens = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in MERGES),
    ]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[tuple(m.split()) for m in MERGES])
    )
    core.pre_tokenizer, core.decoder = cut, decoders.ByteLevel()
    core.add_special_tokens(
        [
            "<s>",
            "</s>",
            "<|im_start|>",
            "<|im_end|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ]
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


WORDS = (
    "El be . river question answer USER ASSISTANT INST Hello there user assistant model hello "
    "a 12 think system"
)
WORDS = WORDS.split()
CONTROL = ["<unk>", "<s>", "</s>"]
MARKS = [
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|im_start|>",
    "<|im_end|>",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHARACTERS = sorted({*"".join(WORDS), *"▁[]/:<>|.,!?_"})


def bpe_parts():
    """Vocabulary and merges of a SentencePiece BPE: a merge a character."""
    tokens, merges = [*CONTROL, *BYTES, *CHARACTERS], []
    for word in ["▁▁", *(f"▁{word}" for word in WORDS), *WORDS]:
        for i in range(2, len(word) + 1):
            if word[:i] not in tokens:
                tokens.append(word[:i])
                merges.append((word[: i - 1], word[i - 1]))
    return {token: id for id, token in enumerate(tokens)}, merges


def sentencepiece(kind, prefix, template, marks=MARKS, **flags):
    """As transformers converts one: kind 'bpe' or 'unigram'; prefix 'legacy' (a normalizer's) or a
    scheme of Metaspace's; flags: of the template's own tokens."""
    if kind == "bpe":
        vocabulary, merges = bpe_parts()
        model = tokenizers.models.BPE(
            vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    else:
        scores = [
            (-3.0, [f"▁{word}" for word in WORDS]),
            (-4.0, [w for w in WORDS if len(w) > 1]),
            (-5.0, ["▁▁"]),
            (-8.0, CHARACTERS),
            (-20.0, BYTES),
        ]
        pieces = {
            token: score - i / 100
            for score, tokens in reversed(scores)
            for i, token in enumerate(tokens)
        }
        pieces = [(token, 0.0) for token in CONTROL] + list(pieces.items())
        model = tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=True)
    core = tokenizers.Tokenizer(model)
    if prefix == "legacy":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme=prefix, split=kind == "unigram"
        )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    )
    core.add_tokens(
        [AddedToken(token, **{"special": True, "normalized": False, **flags}) for token in marks]
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def llama(template, **flags):
    """transformers' own LlamaTokenizer."""
    vocabulary, merges = bpe_parts()
    tokenizer = transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, **flags)
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


# ------------------------------------------------------------------------------------ conversations

TEXTS = [
    "Hi",
    "Hello there!",
    "hello",
    " hello",
    "  two  spaces ",
    "\n",
    "\nhello\n",
    "\n\n\nlines\n\n",
    "\tdef f(x):\n    return x",
    "1234567 12",
    "it's they'll",
    "Größe, naïve, 漢字",
    "🙂👩‍👩‍👧 emoji",
    "<|im_end|>",
    "a<|im_end|>\nb<|im_start|>assistant\nc",
    "assistant\nHello",
    "</s><s>",
    "x",
    ".",
    "!!\n",
    "|>",
    "<|",
    "ends in space  ",
    "  hello!!\n\n",
    "\u2028sep\x85",
    "e\u0301 \u00e9",
    "الْعَرَبِيَّة",
    "<think>hm</think>\n\nyes",
    "{{ jinja }} {% raw %}",
]


def conversations():
    rng = random.Random(0)
    out = [
        (Message("user", a), Message("assistant", b))
        for a, b in itertools.product(TEXTS[:12], TEXTS)
    ]
    for _ in range(200):
        turns = [Message("system", rng.choice(TEXTS))] if rng.random() < 0.4 else []
        for _ in range(rng.randint(1, 6)):
            asked = rng.choice(TEXTS) + rng.choice(["", " and ", rng.choice(TEXTS)])
            said = rng.choice(TEXTS) + rng.choice(["", "\n", rng.choice(TEXTS)])
            turns += [Message("user", asked), Message("assistant", said)]
        out.append(tuple(turns))
    return [Example(messages=messages) for messages in out]


def digest(tokenizer):
    """sha256 of tokens, masks, counts and prompts of all conversations."""
    found, examples = hashlib.sha256(), conversations()
    for loss_on, length in (("answer", 10**6), ("all", 10**6), ("answer", 60)):
        kept, report = encode_all(
            examples, tokenizer, style="chat", loss_on=loss_on, max_length=length
        )
        for one in kept:
            found.update(one.tokens.tobytes() + one.loss.tobytes() + b"|")
        found.update(repr(report).encode())
    for example in examples:
        found.update(repr(encode_prompt(example, tokenizer, "chat")).encode())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("byte", "27b7a90a7efa8d8e13c8737df73e1ddc8b0d75f8f60c0188b320268c213a49c0"),
        ("smollm", "f55ba57fdc57764f9d88489d8c52082b83cafae86a4afd5b6d412bcb9eb7e1f1"),
        ("llama3", "3cada4a8ec6bbe9f947bcc395c83d206fb4c42cdc574f6b65cd8a477347819b5"),
        ("no pattern", "a0dacad7733d5bf7c0c14eee2f4a8c86f0cd9d5a893f51fce9ec4f819edce770"),
        pytest.param(
            "real",
            "d841a4aad600d40099aa6e98f21680a2019ce6abdaeba555b6fc6c1050a9cde4",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_byte_level_ids_are_those_of_earlier_versions(which, expected):
    """So that a run goes on after an update. The digests were taken when prompt and answer were
    tokenised apart."""
    tokenizer = {
        "byte": byte_tokenizer,
        "smollm": lambda: byte_level(ours._smollm(), CHATML),
        "llama3": lambda: byte_level(ours._llama3(), LLAMA3),
        "no pattern": lambda: byte_level(ours._byte_level(use_regex=False), CHATML),
        "real": lambda: load_tokenizer("smollm2-135m-instruct"),
    }[which]()
    assert digest(tokenizer) == expected


def talks(system):
    rng, spoken = random.Random(1), [text for text in TEXTS[:13] if text.strip()]

    def say():
        return (
            " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
            if rng.random() < 0.6
            else rng.choice(spoken)
        )

    for _ in range(20):
        turns = [Message("system", "Be a river.")] if system and rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 4)):
            turns += [Message("user", say()), Message("assistant", say())]
        yield Example(messages=tuple(turns))


def as_dicts(messages):
    return [dataclasses.asdict(message) for message in messages]


def runs(loss):
    """Where the runs of counting tokens begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def check(tokenizer, example):
    """One example with the template's ids; each answer counts, behind the very prompt that the
    template gives it."""
    [encoded], _ = encode_all(
        [example], tokenizer, style="chat", loss_on="answer", max_length=10**6
    )
    tokens = encoded.tokens.tolist()
    whole = tokenizer.apply_chat_template(as_dicts(example.messages), tokenize=True)["input_ids"]
    assert tokens == whole[: len(tokens)] and encoded.loss[-1]
    assert not tokenizer.decode(whole[len(tokens) :]).strip()
    answers = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
    found = runs(encoded.loss)
    assert len(found) == len(answers)
    for (start, stop), i in zip(found, answers, strict=True):
        before = as_dicts(example.messages[:i])
        prompt = tokenizer.apply_chat_template(before, tokenize=True, add_generation_prompt=True)[
            "input_ids"
        ]
        assert tokens[:start] == prompt == encode_prompt(example.messages[:i], tokenizer, "chat")
        said = example.messages[i].content
        assert tokenizer.decode(tokens[start:stop]).strip().startswith(said.strip()[:1])
    assert encode_prompt(example, tokenizer, "chat") == prompt


TEMPLATES = {
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "vicuna": VICUNA,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "phi3": PHI3,
    "chatml": CHATML,
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "make",
    [
        lambda template: sentencepiece("bpe", "legacy", template),
        lambda template: sentencepiece("bpe", "first", template),
        lambda template: sentencepiece("bpe", "never", template),
        lambda template: sentencepiece("unigram", "always", template),
        lambda template: sentencepiece("bpe", "first", template, rstrip=True),  # as Phi-3's
        lambda template: sentencepiece("unigram", "first", template, lstrip=True),
        lambda template: llama(template, legacy=True),
        lambda template: llama(template, legacy=False),
        lambda template: llama(template, add_prefix_space=False),
    ],
    ids=[
        "legacy",
        "first",
        "never",
        "unigram",
        "rstrip",
        "lstrip",
        "llama-legacy",
        "llama",
        "llama-plain",
    ],
)
def test_sentencepiece_has_the_ids_of_the_template(name, make):
    tokenizer = make(TEMPLATES[name])
    for example in talks(system=name in ("llama2", "zephyr", "phi3", "chatml")):
        check(tokenizer, example)


def test_a_tokenizer_without_offsets(monkeypatch):
    """One that is written in Python: the ids up to each place are looked at instead."""
    tokenizer = sentencepiece("bpe", "first", LLAMA2)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    for example in itertools.islice(talks(system=True), 5):
        check(tokenizer, example)


def test_issue_sample_written_out():
    """`▁El`, `▁be`, `.`: not `▁El be` from pieces that each begin with a space of their own."""
    tokenizer = sentencepiece("bpe", "first", CHATML)
    encoded = encode(
        Example((Message("user", "Hello"), Message("assistant", "El be ."))),
        tokenizer,
        style="chat",
        loss_on="answer",
        max_length=99,
    )
    said = tokenizer.convert_ids_to_tokens(encoded.tokens[encoded.loss])
    assert said == ["El", "▁be", "▁.", "<|im_end|>"]


@pytest.mark.parametrize("prefix", ["legacy", "always", "first", "never"])
def test_a_prompt_that_ends_in_a_space_is_cut_there(prefix):
    """The one case in which the template's ids would give the answer a token that begins in the
    prompt: generation is given that space, and writes no second one."""
    tokenizer = sentencepiece("bpe", prefix, VICUNA.replace("'ASSISTANT:' }}", "'ASSISTANT: ' }}"))
    example = Example(
        (
            Message("user", "question"),
            Message("assistant", "El be"),
            Message("user", "river"),
            Message("assistant", "answer"),
        )
    )
    [encoded], _ = encode_all([example], tokenizer, style="chat", loss_on="answer", max_length=999)
    tokens, (first, second) = encoded.tokens.tolist(), runs(encoded.loss)
    prompt = tokenizer.apply_chat_template(
        as_dicts(example.messages[:1]), tokenize=True, add_generation_prompt=True
    )
    assert tokens[: first[0]] == prompt["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens[slice(*first)]) == ["El", "▁be", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokens[slice(*second)]) == ["answer", "</s>"]
    assert tokens[: second[0]] == encode_prompt(example, tokenizer, "chat")
    whole = tokenizer.apply_chat_template(as_dicts(example.messages), tokenize=True)["input_ids"]
    assert tokens != whole and tokenizer.decode(tokens) == tokenizer.decode(whole)


def test_turns_that_change_each_other_are_an_example_each():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN3
    messages = [
        Message("user", "Two?"),
        Message("assistant", "<think>\n1 + 1\n</think>\n\n2"),
        Message("user", "Three?"),
        Message("assistant", "3"),
        Message("user", "Four?"),
        Message("assistant", "<think>hm</think>4 or so"),
    ]
    encoded, report = encode_all(
        [Example(tuple(messages))], tokenizer, style="chat", loss_on="answer", max_length=999
    )
    said = [
        "<think>\n1 + 1\n</think>\n\n2",
        "<think>\n\n</think>\n\n3",
        "<think>\nhm\n</think>\n\n4 or so",
    ]
    assert report.kept == len(encoded) == 3
    for i, one, text in zip((1, 3, 5), encoded, said, strict=True):
        prompt = tokenizer.apply_chat_template(
            as_dicts(messages[:i]), tokenize=True, add_generation_prompt=True
        )
        [(start, stop)] = runs(one.loss)
        assert (
            one.tokens[:start].tolist()
            == prompt["input_ids"]
            == encode_prompt(messages[:i], tokenizer, "chat")
        )
        assert (
            stop == len(one.tokens) and tokenizer.decode(one.tokens[start:]) == text + "<|im_end|>"
        )
        whole = tokenizer.apply_chat_template(as_dicts(messages[: i + 1]), tokenize=True)[
            "input_ids"
        ]
        assert one.tokens.tolist() == whole[:-1]


BYTE_LEVEL = {
    "byte": lambda template: with_template(byte_tokenizer(), template),
    "smollm": lambda template: byte_level(ours._smollm(), template),
    "llama3": lambda template: byte_level(ours._llama3(), template),
    "gpt2": lambda template: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), template),
    "no pattern": lambda template: byte_level(ours._byte_level(use_regex=False), template),
}


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("make", BYTE_LEVEL)
@pytest.mark.parametrize("name", [*TEMPLATES, "llama3", "spaces"])
def test_an_answer_stands_behind_the_very_ids_of_its_prompt(make, name):
    spaces = CHATML.replace("assistant\n'", "assistant \n \n'").replace("'\n' + m", "' \n \n' + m")
    tokenizer = BYTE_LEVEL[make]({**TEMPLATES, "llama3": LLAMA3, "spaces": spaces}[name])
    for example in itertools.islice(conversations(), 0, None, 23):
        if example.messages[0].role == "system" and name in ("mistral", "vicuna", "gemma"):
            continue
        if not all(message.content.strip() for message in example.messages):
            continue
        [encoded], _ = encode_all(
            [example], tokenizer, style="chat", loss_on="answer", max_length=10**6
        )
        prompt = encode_prompt(example, tokenizer, "chat")
        assert encoded.tokens[: len(prompt)].tolist() == prompt
        assert runs(encoded.loss)[-1][0] == len(prompt)


def test_spaces_that_end_a_prompt_are_one_token_where_generation_has_one():
    """GPT-2's split takes the last of them apart before a word."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), LLAMA3)
    example = Example((Message("user", "a"), Message("assistant", "hello hello")))
    encoded = encode(example, tokenizer, style="chat", loss_on="answer", max_length=99)
    tokens = tokenizer.convert_ids_to_tokens(encoded.tokens)
    assert tokens[-5:] == ["<|end_header_id|>", "ĊĊ", "hello", "Ġhello", "<|eot_id|>"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, date_string=DATE
    )["input_ids"]
    assert (
        encoded.tokens[: len(prompt)].tolist() == prompt and not encoded.loss[: len(prompt)].any()
    )


def test_of_turns_that_change_each_other_each_token_counts_once():
    """With loss_on='all': the first prompt, and each answer that is trained on."""
    tokenizer = with_template(byte_tokenizer(), QWEN3)
    said = ["<think>t</think>\n\na0", "<think>t</think>\n\na1", "a2"]
    messages = tuple(
        turn
        for i in range(3)
        for turn in (Message("user", f"q{i}"), Turn("assistant", said[i], i > 0))
    )

    def counted(messages):
        found, _ = encode_all(
            [Example(messages)], tokenizer, style="chat", loss_on="all", max_length=999
        )
        return [
            "".join(tokenizer.decode(one.tokens[start:stop]) for start, stop in runs(one.loss))
            for one in found
        ]

    ends = ["<think>\nt\n</think>\n\na1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"]
    assert counted(messages) == ends
    trained = tuple(Message(message.role, message.content) for message in messages)
    asked = "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n"
    first = f"{asked}<think>\nt\n</think>\n\na0<|im_end|>"
    assert counted(trained) == [first, *ends]


def test_a_prompt_that_opens_thinking_which_turns_do_not_have_is_named():
    """As DeepSeek-R1-Distill's."""
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    assert template != CHATML
    tokenizer = with_template(byte_tokenizer(), template)
    example = Example((Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(UserError) as error:
        encode(example, tokenizer, style="chat", loss_on="answer", max_length=99)
    assert (
        r"ends a prompt in '<|im_start|>assistant\n<think>\n', but renders the assistant's turn as"
        in str(error.value)
    )
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------- weights, tools, records

# As Qwen2.5's, in short.
TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson + "
    "'\n' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.content %}{{- m.content }}{%- endif %}{%- for call in m.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}},
}
ASKED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
FUNCTIONS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
]


@pytest.fixture
def read(tmp_path):
    """`read(record, …)`: the examples of a JSONL file, twice: as read, and from the cache."""

    def load(*records):
        file = tmp_path / "train.jsonl"
        file.write_text(
            "\n".join(json.dumps(record, ensure_ascii=False) for record in records),
            encoding="utf-8",
        )
        first, again = (
            load_examples(get_task(str(file)), "train", None, tmp_path / "cache") for _ in range(2)
        )
        assert first == again
        return first

    return load


@pytest.mark.parametrize("tools", [FUNCTIONS, json.dumps(FUNCTIONS)])
def test_tools_pass_through_to_the_template(read, tools):
    [example] = read({"messages": ASKED, "tools": tools})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOLS
    encoded = encode(example, tokenizer, style="chat", loss_on="answer", max_length=999)
    whole = tokenizer.apply_chat_template(ASKED, tools=FUNCTIONS, tokenize=True)["input_ids"]
    assert encoded.tokens.tolist() == whole[:-1] and b"Z\xc3\xbcrich" in bytes(
        t for t in whole if t < 256
    )
    (first, end), (second, _) = runs(encoded.loss)
    call = (
        '<tool_call>{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}'
        "</tool_call><|im_end|>"
    )
    assert tokenizer.decode(encoded.tokens[first:end]) == call
    assert tokenizer.decode(encoded.tokens[second:]) == "It rains.<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        ASKED[:3], tools=FUNCTIONS, tokenize=True, add_generation_prompt=True
    )
    assert encode_prompt(example, tokenizer, "chat") == prompt["input_ids"]
    assert (
        encode_prompt(example.messages[:-1], tokenizer, "chat", example.tools)
        == prompt["input_ids"]
    )
    with pytest.raises(UserError, match="'plain' has no place for tools"):
        encode_prompt(example.messages[:1], tokenizer, "plain", example.tools)


# Of a turn that calls, the call alone, as Llama 3.1's.
CALL_ALONE = TOOLS.replace("{%- if m.content %}", "{%- if m.content and not m.tool_calls %}")


@pytest.mark.parametrize("content", ["Let me look.", "the weather", None])
def test_a_template_may_leave_out_the_text_beside_a_call(read, content):
    turns = [ASKED[0], {**ASKED[1], "content": content}, *ASKED[2:]]
    [example] = read({"messages": turns, "tools": FUNCTIONS})
    tokenizer = with_template(byte_tokenizer(), CALL_ALONE)
    encoded = encode(example, tokenizer, style="chat", loss_on="answer", max_length=999)
    whole = tokenizer.apply_chat_template(turns, tools=FUNCTIONS, tokenize=True)["input_ids"]
    assert encoded.tokens.tolist() == whole[:-1]
    call = (
        '<tool_call>{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}'
        "</tool_call><|im_end|>"
    )
    said = [tokenizer.decode(encoded.tokens[start:stop]) for start, stop in runs(encoded.loss)]
    assert said == [call, "It rains.<|im_end|>"]


@pytest.mark.parametrize("content", ["Let me look.", None, ""])
def test_a_call_is_never_left_out(read, content):
    [example] = read({"messages": [ASKED[0], {**ASKED[1], "content": content}]})
    tokenizer = byte_tokenizer()
    for style in ("plain", "llm_adapters"):
        with pytest.raises(UserError, match=f"'{style}' has no place for tools; use 'chat'"):
            encode(example, tokenizer, style=style, loss_on="answer", max_length=999)
    tokenizer.chat_template = TOOLS.replace("m.tool_calls or []", "[]")
    if not content:
        with pytest.raises(UserError, match=r"renders the assistant's turn '' as '<\|im_end\|>'"):
            encode(example, tokenizer, style="chat", loss_on="answer", max_length=999)


def weighted(*flags):
    turns = []
    for i, flag in enumerate(flags):
        turns.append({"role": "user", "content": f"q{i}", "weight": 0.5})
        turns.append({"role": "assistant", "content": f"a{i}", **flag})
    return {"messages": turns}


@pytest.mark.parametrize("name", ["weight", "train", "training"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, None)])
def test_turns_of_no_weight_are_context(read, name, no, yes):
    tokenizer = byte_tokenizer()
    examples = read(
        weighted({name: no}, {name: yes}), weighted({name: yes}, {name: no}, {}, {name: no})
    )
    said = [["a1<|im_end|>"], ["a0<|im_end|>", "a2<|im_end|>"]]
    for example, wanted in zip(examples, said, strict=True):
        for loss_on in ("answer", "all"):
            encoded = encode(example, tokenizer, style="chat", loss_on=loss_on, max_length=999)
            plain = [Message(m.role, m.content) for m in example.messages]
            whole = tokenizer.apply_chat_template(as_dicts(plain), tokenize=True)["input_ids"]
            assert encoded.tokens.tolist() == whole[: len(encoded.tokens)]
            parts = [
                tokenizer.decode(encoded.tokens[start:stop]) for start, stop in runs(encoded.loss)
            ]
            if loss_on == "answer":
                assert parts == wanted
            else:  # all the rest
                kept = "".join(parts)
                assert all(text in kept for text in wanted) and "q0" in kept
                assert ("a0" in kept, "a1" in kept) == ((False, True), (True, False))[
                    example is examples[1]
                ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (weighted({"weight": 0}), r"train\.jsonl:2: no turn of the assistant is trained on"),
        (
            weighted({}, {"weight": 0.5}),
            r"messages\[3\]: field 'weight' is 0\.5; it must be 0 or 1",
        ),
        (
            weighted({"train": "false"}),
            r"messages\[1\]: field 'train' is 'false'; it must be 0 or 1, or false or true",
        ),
        (
            weighted({"weight": 1, "training": False}),
            r"messages\[1\]: 'weight' is 1, 'training' is False; they must say",
        ),
        (
            weighted({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}),
            r"messages\[1\]: field 'train_detail' is not supported",
        ),
        (
            weighted({"training_detail": [{"begin_offset": 0}]}),
            r"messages\[1\]: field 'training_detail' is not supported",
        ),
        (
            {"prompt": "p", "completion": "c", "weight": 0},
            r"jsonl:2: the record is not trained on \(it has weight 0",
        ),
        (
            {"prompt": "p", "completion": "c", "weight": 0.5},
            r"train\.jsonl:2: field 'weight' is 0\.5; it must be 0 or 1",
        ),
        ({**weighted({}), "weight": 2}, r"train\.jsonl:2: field 'weight' is 2; it must be 0 or 1"),
        ({"messages": ASKED, "tools": "weather"}, "field 'tools' is text that is no JSON"),
        (
            {"messages": ASKED, "tools": {"name": "weather"}},
            "field 'tools' must be a list of objects",
        ),
        (
            {"messages": [ASKED[0], {**ASKED[3], "tool_calls": ["weather"]}]},
            "field 'tool_calls' must be a list of objects",
        ),
        ({"messages": [ASKED[2], *ASKED]}, "begins with a tool's turn"),
        (
            {"messages": [ASKED[0], {"role": "assistant", "content": None}]},
            "field 'content' is NoneType",
        ),
    ],
)
def test_turns_that_cannot_be_read(read, record, message):
    with pytest.raises(UserError, match=message) as error:
        read({"prompt": "p", "completion": "c"}, record)
    assert "\n" not in str(error.value)


def test_a_record_may_say_that_it_counts(read):
    plain = {"prompt": "p", "completion": "c"}
    first, second = read(plain, {**plain, "weight": 1, "train_detail": None})
    assert first == second


# ------------------------------------------------------------------------------------ ends of turns


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"special": False},
        {"special": False, "normalized": True},
        {"special": False, "lstrip": True},
        {"special": False, "rstrip": True},
        {"special": False, "normalized": True, "lstrip": True, "rstrip": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", ["legacy", "always", "first"])
@pytest.mark.parametrize("closing", ["{}", "\n{}\n", " {}", "{}\n\n", "</answer>{}\n"])
def test_any_added_token_that_ends_a_turn_ends_an_answer(flags, prefix, closing):
    """Read off the ids of the template's own text: the first id behind the answer that is an added
    token."""
    template = CHATML.replace("'<|im_end|>' + '\n'", repr(closing.format("<|im_end|>")))
    tokenizer = sentencepiece("bpe", prefix, template, **flags)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "river"}]
    written = tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert (end in written[-9:]) == (end in ends(tokenizer))
    assert set(ends(tokenizer)) <= {2, end}
    if not flags.get("normalized"):
        assert ends(tokenizer) == [2, end]


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (
            "{% for m in messages %}{{ m.content }}<|im_end|><|end|>{% endfor %}",
            ["<|im_end|>", "<|end|>"],
        ),
        ("{% for m in messages %}{{ m.content }}\n\nriver\n{% endfor %}", []),
        (
            "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + ' . ' }}{% endfor %}"
            "<|assistant|>\n",
            [],
        ),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", []),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
            "'<|im_end|>' }}{% endfor %}<|im_start|>",
            ["<|im_end|>"],
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}",
            ["<|end|>"],
        ),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            ["<|im_end|>"],
        ),
        (LLAMA2, []),
    ],
)
def test_what_else_stands_behind_an_answer_ends_none(template, names):
    """`\n` is an added token of some vocabularies, and the opening of the next answer is one of
    nearly all."""
    tokenizer = sentencepiece("bpe", "first", template, marks=[*MARKS, "\n", "\n\n"], special=False)
    assert ends(tokenizer) == [2, *map(tokenizer.convert_tokens_to_ids, names)]


# ---------------------------------------------------------------------------------------- arguments

# The switch at the end of Qwen3's own.
SWITCHED = QWEN3.removesuffix("{%- endif %}") + (
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)


@pytest.mark.parametrize(
    "text, given, ending",
    [
        ("", {}, "assistant\n"),
        ("enable_thinking=false", {"enable_thinking": False}, "</think>\n\n"),
        ("enable_thinking=true", {"enable_thinking": True}, "assistant\n"),
        (" enable_thinking = null ", {"enable_thinking": None}, "assistant\n"),
        ('enable_thinking="x"', {"enable_thinking": "x"}, "assistant\n"),
    ],
)
def test_template_arguments_are_transformers_keywords(text, given, ending, tmp_path):
    """In prompts, in training, and in the tokenizer as it is saved."""
    tokenizer = with_template(byte_tokenizer(), SWITCHED)
    asked = [{"role": "user", "content": "hello"}]
    expected = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=False, **given
    )
    set_template_arguments(tokenizer, text)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, load_tokenizer(str(tmp_path))):
        prompt = encode_prompt([Message("user", "hello")], one, "chat")
        assert one.decode(prompt) == expected
        assert expected.endswith(ending)
    example = Example((Message("user", "hello"), Message("assistant", "there")))
    found = encode(example, tokenizer, style="chat", loss_on="answer", max_length=512)
    answer = tokenizer.decode(found.tokens[found.loss])
    thought = "" if ending.startswith("</think>") else "<think>\n\n</think>\n\n"
    assert answer == f"{thought}there<|im_end|>"


@pytest.mark.parametrize(
    "template, text, words",
    [
        (SWITCHED, "enable_thinkin=false", "takes no 'enable_thinkin'; it takes enable_thinking"),
        (SWITCHED, "if=1", "takes no 'if'"),
        (SWITCHED, "role=null", "takes no 'role'"),
        (SWITCHED, "add_generation_prompt=false", "takes no 'add_generation_prompt'"),
        (SWITCHED, "messages=x", "takes no 'messages'"),
        ("{{ messages", "a=1", "chat template cannot be read: unexpected end of template"),
        ("{{ messages }}", "a=1", "takes no 'a'; it takes nothing"),
        ("{{ messages | nope }}", "a=1", "chat template cannot be read: No filter named 'nope'"),
        ("{{ eos_token }}", "eos_token=x", "takes no 'eos_token'"),
        (SWITCHED, "enable_thinking", "'enable_thinking' is not NAME=VALUE"),
        (SWITCHED, "enable thinking=1", "'enable thinking=1' is not NAME=VALUE"),
        (None, "enable_thinking=1", "the tokenizer has no chat template"),
    ],
)
def test_template_arguments_without_effect_are_refused(template, text, words):
    with pytest.raises(UserError, match=words):
        set_template_arguments(with_template(byte_tokenizer(), template), text)
