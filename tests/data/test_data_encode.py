"""Tokens and loss masks: the answer and its end count, nothing else; training and generation see
one prompt."""

import dataclasses
import datetime

import numpy as np
import pytest
import tokenizers
import transformers
from support import encode, encode_all

from flora_jax.data.encode import encode_prompt
from flora_jax.data.tasks import Example, Message
from flora_jax.errors import UserError
from flora_jax.models.tokenizer import byte_tokenizer
from flora_jax.tokens import encode_open, ends

EOS = 257
ANSWER = {"loss_on": "answer", "max_length": 512}


def talk(*contents, system=None):
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    return Example(messages=(*([Message("system", system)] if system else []), *turns))


def trained_text(encoded, tokenizer):
    return tokenizer.decode(encoded.tokens[encoded.loss])


@pytest.fixture(scope="module")
def byte():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def merging():
    """A BPE whose merges reach across words and line ends, with BOS by its own policy, to expose
    moved boundaries."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    core.train_from_iterator(
        ["assistant\nHello there", "question? answer", "user\nHi"] * 50, trainer
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        # pad = eos on purpose
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=byte_tokenizer().chat_template,
    )


def test_plain_tokens_written_out(byte):
    encoded = encode(talk("Hi?", "Yes"), byte, style="plain", **ANSWER)
    assert encoded.tokens.tolist() == [*b"Hi?", *b" Yes", EOS]
    assert encoded.loss.tolist() == [False] * 3 + [True] * 5
    assert (encoded.tokens.dtype, encoded.loss.dtype) == (np.int32, bool)


def test_plain_boundary_is_where_generation_puts_it(merging):
    example = talk("question?", "answer")
    encoded = encode(example, merging, style="plain", **ANSWER)
    prompt = encode_prompt(example, merging, "plain")
    assert prompt == merging("question?")["input_ids"] and prompt[0] == merging.bos_token_id
    assert (
        encoded.tokens[: len(prompt)].tolist() == prompt and not encoded.loss[: len(prompt)].any()
    )
    assert trained_text(encoded, merging) == " answer</s>"
    # The test can fail: tokenised as one text, a token runs across the boundary.
    assert merging("question? answer")["input_ids"][: len(prompt)] != prompt


def test_plain_adds_no_second_space(byte):
    for prompt, answer in (("a:\n", "b"), ("a:", "\nb"), ("a: ", "b")):
        tokens = encode(talk(prompt, answer), byte, style="plain", **ANSWER).tokens
        assert bytes(tokens[:-1].tolist()).decode() == prompt + answer


def test_answers_that_hold_pad_or_eos_still_count(merging):
    encoded = encode(talk("q", "a</s>b"), merging, style="plain", **ANSWER)
    assert trained_text(encoded, merging) == " a</s>b</s>"


def test_chat_counts_each_answer_and_its_end_alone(byte):
    example = talk("Hi", "Hello", "More?\n", " No. \n", system="Be kind.")
    encoded = encode(example, byte, style="chat", **ANSWER)
    assert trained_text(encoded, byte) == "Hello<|im_end|> No. \n<|im_end|>"
    conversation = [dataclasses.asdict(m) for m in example.messages]
    whole = byte.apply_chat_template(conversation, tokenize=True)["input_ids"]
    # all but the line end after the last turn
    assert encoded.tokens.tolist() == whole[: len(encoded.tokens)]
    assert byte.decode(whole[len(encoded.tokens) :]) == "\n"
    runs = np.flatnonzero(np.diff(encoded.loss.astype(int)))  # no, yes, no, yes
    assert len(runs) == 3 and encoded.loss[-1]


def test_the_frame_of_llm_adapters_is_plain_around_another_prompt(byte):
    framed = encode(talk("question?", "answer"), byte, style="llm_adapters", **ANSWER)
    prompt = byte.decode(encode_prompt(talk("question?", "answer"), byte, "llm_adapters"))
    assert (
        framed.tokens.tolist()
        == encode(talk(prompt, "answer"), byte, style="plain", **ANSWER).tokens.tolist()
    )
    head, instruction, response = prompt.split("###")
    assert head.startswith("Below is an instruction that describes a task.") and head.endswith(
        "\n\n" + " " * 16
    )
    assert (
        instruction.split() == ["Instruction:", "question?"]
        and response == " Response:\n" + " " * 16
    )


@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("which", ["byte", "merging"])
def test_prompt_is_exactly_the_training_prefix(style, which, request):
    tokenizer = request.getfixturevalue(which)
    examples = [talk("question?", "answer"), talk("Hi", "\nHello there")]
    examples += (
        [talk("Hi", "Hello there", "user\nHi", "assistant\nHello")] if style == "chat" else []
    )
    for example in examples:
        encoded = encode(example, tokenizer, style=style, **ANSWER)
        prompt = encode_prompt(example, tokenizer, style)
        # where the last run of True begins
        last_answer = len(encoded.loss) - np.argmin(encoded.loss[::-1])
        assert encoded.tokens[:last_answer].tolist() == prompt
        assert encode_prompt(example.messages[:-1], tokenizer, style) == prompt
        rendered = (
            tokenizer.apply_chat_template(
                [dataclasses.asdict(m) for m in example.messages[:-1]],
                tokenize=False,
                add_generation_prompt=True,
            )
            if style == "chat"
            else example.messages[0].content
        )
        assert (
            tokenizer.decode(prompt)
            == ("<s>" if (style, which) == ("plain", "merging") else "") + rendered
        )


def test_loss_on_all(byte):
    for style in ("plain", "chat"):
        everything = encode(talk("Hi", "Yes"), byte, style=style, loss_on="all", max_length=64)
        assert everything.loss.all()
        assert (
            everything.tokens == encode(talk("Hi", "Yes"), byte, style=style, **ANSWER).tokens
        ).all()


def test_max_length_counts_positions(byte):
    example = talk("Hi?", "Yes")  # 8 tokens: 7 positions
    with pytest.raises(UserError, match="too short for each of the 1 examples"):
        encode(example, byte, style="plain", loss_on="answer", max_length=6)
    assert len(encode(example, byte, style="plain", loss_on="answer", max_length=7).tokens) == 8


def test_too_long_examples_are_counted(byte):
    examples = [talk("Hi?", "Yes"), talk("Hi?", "Yes" * 10), talk("H", "Y")]
    kept, report = encode_all(examples, byte, style="plain", loss_on="answer", max_length=7)
    assert [len(e.tokens) for e in kept] == [8, 4]
    assert dataclasses.asdict(report) == {
        "kept": 2,
        "too_long": 1,
        "positions": 10,
        "loss_tokens": 8,
        "longest": 34,
    }
    with pytest.raises(
        UserError, match=r"data\.max_length=2 is too short for each of the 3 examples; .* needs 3"
    ):
        encode_all(examples, byte, style="plain", loss_on="answer", max_length=2)
    with pytest.raises(UserError, match="no examples to encode"):
        encode_all([], byte, style="plain", loss_on="answer", max_length=2)


CHATML = byte_tokenizer().chat_template
FORGETFUL = CHATML.replace("message['content']", "(message['content'] if loop.last else '…')")
HEADLESS = CHATML.replace("'<|im_start|>assistant\n'", "''")
ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
STRICT = "{{ raise_exception('only users may speak') }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"data\.prompt_style='chat' needs a chat template"),
        (FORGETFUL, "changes earlier turns"),
        (HEADLESS, "must be the content and then an end-of-turn token"),
        (ENDLESS, "must be the content and then an end-of-turn token"),
        (STRICT, "refuses a conversation of roles user: only users may speak"),
        ("{{ 'a' + 1 }}", "refuses a conversation of roles user: .*str"),
        ("{{ 1 // 0 }}", "refuses a conversation of roles user: .*zero"),
    ],
)
def test_templates_that_cannot_be_masked(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        encode(talk("Hi", "Hello", "More", "No"), tokenizer, style="chat", **ANSWER)


def test_a_template_that_strips_is_followed(byte):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    encoded = encode(talk("Hi", " Hello\n"), tokenizer, style="chat", **ANSWER)
    assert trained_text(encoded, tokenizer) == "Hello<|im_end|>"


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
)


@pytest.mark.parametrize("day", [1, 2])
def test_a_template_that_names_the_date_gives_the_same_tokens_every_day(day, monkeypatch):
    """As Llama 3's does, whose own date for want of a clock is this one."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, day)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DATED + "Today Date: {{ date_string }}\n" + CHATML
    conversation = [{"role": "user", "content": "Hi"}]
    assert f"Today Date: 0{day} May 2031" in tokenizer.apply_chat_template(
        conversation, tokenize=False
    )
    example = talk("Hi", "Hello")
    encoded = encode(example, tokenizer, style="chat", **ANSWER)
    text = "Today Date: 26 Jul 2024\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.tokens) == text + "Hello<|im_end|>"
    assert trained_text(encoded, tokenizer) == "Hello<|im_end|>"
    assert tokenizer.decode(encode_prompt(example, tokenizer, "chat")) == text


def test_what_a_style_cannot_express(byte):
    with pytest.raises(
        UserError, match="holds one answer, but a conversation has several; use 'chat'"
    ):
        encode(talk("Hi", "Hello", "More", "No"), byte, style="plain", **ANSWER)
    with pytest.raises(
        UserError, match=r"data\.prompt_style='chatt' is unknown; did you mean 'chat'"
    ):
        encode(talk("Hi", "Hello"), byte, style="chatt", **ANSWER)
    with pytest.raises(
        UserError, match=r"data\.loss_on='answers' is unknown; did you mean 'answer'"
    ):
        encode(talk("Hi", "Hello"), byte, style="plain", loss_on="answers", max_length=9)
    without = byte_tokenizer()
    without.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no eos_token"):
        encode(talk("Hi", "Hello"), without, style="plain", **ANSWER)


@pytest.mark.parametrize("style", ["plain", "llm_adapters"])
def test_no_eos_of_the_tokenizers_own_comes_between(style):
    """Some tokenizers end every text with eos: the answer would follow the end of its prompt."""
    tokenizer, example = byte_tokenizer(), talk("One?", "two")
    plain = encode(example, tokenizer, style=style, **ANSWER).tokens.tolist()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 256), ("<|eos|>", EOS)]
    )
    assert tokenizer("a").input_ids == [256, 97, EOS]
    encoded = encode(example, tokenizer, style=style, **ANSWER).tokens.tolist()
    assert encoded == [256, *plain] and encoded.count(EOS) == 1
    prompt = encode_prompt(example, tokenizer, style)
    assert prompt == encoded[: len(prompt)] and bytes(encoded[len(prompt) : -1]).strip() == b"two"
    assert encode_open(tokenizer, "") == [256] and encode_open(tokenizer, "<|eos|>") == [256, EOS]


def test_a_prompt_needs_no_eos(byte):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert encode_prompt(talk("One?", "two"), tokenizer, "plain") == encode_prompt(
        talk("One?", "two"), byte, "plain"
    )
    with pytest.raises(UserError, match="has no eos_token"):
        encode(talk("One?", "two"), tokenizer, style="plain", **ANSWER)


def test_a_rendered_chat_gets_no_second_bos():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    assert encode_open(tokenizer, "a") == encode_open(tokenizer, "<|bos|>a") == [256, 97]
    assert encode_prompt([Message("user", "<|bos|>a")], tokenizer, "plain") == [256, 97]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}", [257, 260]),
        ("{% for m in messages %}{{ m['content'] }} <|eos|>{% endfor %}", [257]),
        ("{% for m in messages %}{{ m['content'] }}<|im_end|><|eos|>{% endfor %}", [257, 260]),
        ("{% for m in messages %}{{ m['content'] }} END{% endfor %}", [257]),
        (
            "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "<|im_start|>assistant\n",
            [257, 260],
        ),
        ("<|bos|><|im_start|>{{ messages[0]['content'] }}<|im_end|>", [257]),
        ("{{ 1 / 0 }}", [257]),
        ("{{ raise_exception('no') }}", [257]),
        (None, [257]),
    ],
)
def test_what_ends_an_answer(template, expected):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert ends(tokenizer) == expected
    tokenizer.eos_token = None
    assert set(ends(tokenizer)) == {
        token for token in expected if token != 257 or (template and "eos" in template)
    }
