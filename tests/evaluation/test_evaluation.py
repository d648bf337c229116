"""Evaluation: answers in texts, log-likelihoods against PyTorch's, results and commands end to end
on tiny models."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from flora_jax.adapters import AdapterConfig, init_adapter
from flora_jax.data.encode import encode_prompt
from flora_jax.data.numbers import final_number, same_number
from flora_jax.data.tasks import Example, Message, Turn, get_task, lm_eval_request, prompt_digests
from flora_jax.errors import UserError, run_command
from flora_jax.evaluation import published, rounds
from flora_jax.evaluation.answers import final_label, final_letter, is_right
from flora_jax.evaluation.loglik import choice_loglik, encode_pair
from flora_jax.evaluation.run import check_prompts
from flora_jax.evaluation.task_data import (
    Settings,
    TaskData,
    few_shot_messages,
    few_shot_requests,
    load_task_data,
)
from flora_jax.inference.generator import Generation, Generator
from flora_jax.interop.adapter_files import load_adapted, save_adapter
from flora_jax.models.adapted import Adapted, base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import init_base
from flora_jax.models.tokenizer import byte_tokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
GENERATED = Settings(protocol="llm_adapters")

NUMBERS = [
    ("The answer is 5.", "5"),
    ("1,234", "1234"),
    ("It is −1,234.50 $.", "-1234.50"),
    ("5-3", "3"),
    ("5 - 3", "3"),
    ("5 -3", "3"),
    ("x = -3", "-3"),
    ("= - 7", "-7"),
    ("costs $12.50.", "12.50"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("50%", "50"),
    ("3/4", "3/4"),
    ("8/2 = 4", "4"),
    ("answer2", None),
    ("H2O", None),
    ("the 3rd", None),
    ("1,2", "2"),
    ("1,2,3", "3"),
    ("10,000,000 people", "10000000"),
    (".5", ".5"),
    ("0.50", "0.50"),
    ("no digits", None),
    ("", None),
    ("COVID-19", "19"),
    ("2 - -3", "-3"),
    ("2--3", "-3"),
    ("(5)-3", "3"),
    ("5km", "5"),
    (r"\boxed{42}", "42"),
    ("#### 72", "72"),
    ("5 + 3 = 8.", "8"),
    ("is -5 degrees", "-5"),
    ("between 3–5", "5"),
    ("1e3", "1e3"),
    ("3.14.", "3.14"),
    ("-0.5", "-0.5"),
    ("x-3", "3"),
    ("so\n-5", "-5"),
    ("$1,080.00", "1080.00"),
    ("**18**", "18"),
    ("2*9=18", "18"),
    ("'7'", "7"),
    ("on 1/2/2020", "1/2/2020"),
    ("-.5", "-.5"),
    ("3,000.", "3000"),
    ("60 - 12 = 48 apples", "48"),
    ("loses 100%-5%", "5"),
    ("1{,}234", "1234"),
    (r"\frac{1}{2}", "1/2"),
    (r"$\dfrac{12}{4} = 3$", "3"),
    ("The answer is 6th.", "6"),
    ("the 6th of 12", "12"),
    ("12 are 6th", "12"),
    ("#### 6th", "6"),
    ("(- 5)", "-5"),
    ("5 - 5", "5"),
    ("Steps:\n- 5", "5"),
    (r"\boxed{- 5}", "5"),
    ("is -€4", "-4"),
    ("£5 - £3", "3"),
    ("€-1,200", "-1200"),
]

LETTERS = [
    ("B", "B"),
    ("(B)", "B"),
    ("B) 12", "B"),
    ("B.", "B"),
    ("The answer is B.", "B"),
    ("the answer is (C)", "C"),
    ("Because it is (D)", "D"),
    ("A train goes. The answer is E", "E"),
    ("(A) 1 (B) 2 (C) 3 (D) 4 (E) 5", None),
    ("(A) 1 (B) 2 (C) 3 (D) 4 (E) 5 so it is (B)", "B"),
    ("(A) 1 (B) 2 (C) 3 (D) 4 (E) 5. The answer is D", "D"),
    ("answer choice is (b)", "B"),
    ("Because", None),
    ("A train left", None),
    ("The correct option is option C", "C"),
    ("Not (A), but (B)", "B"),
    ("The answer is a number", None),
    ("The answer is A train", None),
    ("Answer: C", "C"),
    ("**Answer:** D", "D"),
    ("The answer is: (E) 12", "E"),
    ("I choose option B because", "B"),
    ("", None),
    ("The answer is (A). No, the answer is (B).", "B"),
    ("A) 1 B) 2 C) 3 D) 4 E) 5\nThe answer is C) 3", "C"),
    ("Answer Choices: (A) 5 (B) 6 (C) 7", None),
    (r"The answer is $\boxed{C}$", "C"),
    ("answer is C because", "C"),
    ("B is correct", "B"),
    ("[B]", "B"),
    ("The answer is [c]", "C"),
    ("D is the right one", "D"),
    ("A is 5", None),
    ("Is A correct? E is the correct answer", "E"),
    ("B is the answer", "B"),
    ("a)", "A"),
    ("b) because", "B"),
    ("a) 1 b) 2 c) 3", None),
    ("(B), not (A)", "B"),
    ("B. 12, as (A) is 5", "B"),
    ("(c) dog", "C"),
    ("The correct option is B.", "B"),
    ("The correct choice is C", "C"),
    ("B: 12", "B"),
    ("B: 12 km, since f(a) = 3", "B"),
    ("(A) is incorrect. Option B is correct.", "B"),
    ("A) is not right, B is correct", "B"),
    ("A: 12", "A"),
    ("a) First we add. So option C is correct", "C"),
    ("A) 10, B) 20, so C is the answer", "C"),
    ("Each answer - A, B, C - is", None),
    ("The correct choice is A and the rest are wrong", "A"),
    ("So the answer is therefore B.", "B"),
    ("The answer is B and not C", "B"),
    ("The answer is B (12)", "B"),
    ("The answer is 'E'.", "E"),
    ("A: the answer is 5. So (C)", "C"),
    ("The right choice is a hard one", None),
]

ANSWERS, TRUTH = ("answer1", "answer2", "answer3"), ("true", "false")
LABELS = [
    ("the correct answer is answer2", ANSWERS, "answer2"),
    ("Answer2", ANSWERS, "answer2"),
    ("answer12", ANSWERS, None),
    ("answer1 is wrong, so answer2", ANSWERS, "answer2"),
    ("The correct answer is answer1. Not answer2.", ANSWERS, "answer1"),
    ("Answer1: cat Answer2: dog", ANSWERS, None),
    ("Answer1: cat Answer2: dog the correct answer is answer1", ANSWERS, "answer1"),
    ("untrue", TRUTH, None),
    ("True.", TRUTH, "true"),
    ("the correct answer is false", TRUTH, "false"),
    ("", TRUTH, None),
    ("the answer is: **true**", TRUTH, "true"),
    ("the correct answer is answer2: dog", ANSWERS, "answer2"),
    ("Answer2: dog", ANSWERS, "answer2"),
    ("Answer: Answer2: dog", ANSWERS, "answer2"),
    ("true/false", TRUTH, None),
    ("Answer format: answer1/answer2/answer3. The correct answer is answer3", ANSWERS, "answer3"),
    ("Answer1: cat Answer2: dog. The correct answer is answer3", ANSWERS, "answer3"),
    ("the correct answer is answer1: cat\nAnswer2: dog", ANSWERS, "answer1"),
    ("The answer is answer1/answer2", ANSWERS, None),
    ("false. True/false", TRUTH, "false"),
    ("Answer3: pig Answer1: cat", ANSWERS, "answer1"),
    ("answer1 or answer2", ANSWERS, "answer2"),
    ("answer1, not answer2", ANSWERS, "answer1"),
    ("not answer1 but answer2", ANSWERS, "answer2"),
    ("Not true", TRUTH, None),
    ("the answer is not answer1", ANSWERS, None),
]

# By kind, with what a person reads: thousands; a remark behind the answer; ordinals; another
# question behind it.
NUMBERS += [
    ("1,00,000", "100000"),
    ("It costs Rs. 12,34,567.50.", "1234567.50"),
    ("1,23,45,678", "12345678"),
    ("-1,00,000", "-100000"),
    ("10,00,000 people", "1000000"),
    ("12,34", "34"),
    ("1,00,00", "00"),
    ("1, 00, 000", "000"),
    ("1 000", "1000"),
    ("12 345 678.5", "12345678.5"),
    ("1\u00a0234", "1234"),
    ("1\u202f234,56 €", "1234.56"),
    ("1\u2009000\u2009000", "1000000"),
    ("1 234,56", "1234.56"),
    ("- 5 000", "5000"),
    ("= -5 000", "-5000"),
    ("in 2010 300 people", "300"),
    ("12 345 6789", "6789"),
    ("call 555 123 4567", "4567"),
    ("5 12", "12"),
    ("1 00", "00"),
    ("3 + 4 = 7\n250", "250"),
    ("0 500", "500"),
    ("I have 2 500ml bottles", "500"),
    ("She bought 2 100-page books", "100"),
    ("There are 3 100-page books", "100"),
    ("1 000km", "1000"),
    ("1 050km", "1050"),
    ("1 234 567km", "1234567"),
    ("2 500 ml", "2500"),
    ("1\u00a0500ml", "1500"),
    ("2 500 - 100 = 2 400", "2400"),
    ("12 250g bags", "250"),
    ("it is 2 500.", "2500"),
    ("1'000'000", "1000000"),
    ("1’234.5", "1234.5"),
    ("5'10", "10"),
    ("'7' and '8'", "8"),
    ("1_000_000", "1000000"),
    ("1.234.567", "1234567"),
    ("1.234.567,89", "1234567.89"),
    ("1.234,56", "1234.56"),
    ("1.234", "1.234"),
    ("1,5", "5"),
    ("0,5", "5"),
    ("1, 2, 3", "3"),
    ("100,200,300", "100200300"),
    ("100, 200", "200"),
    ("1,234th", None),
    (r"1\,234", "1234"),
    (r"1,\!000", "1000"),
    (r"$12\,345.6$", "12345.6"),
    ("The answer is: 42nd", "42"),
    ("The answer is: the 42nd.", "42"),
    ("**Answer:** 42nd", "42"),
    ("Answer = 3rd", "3"),
    ("The answer is **42nd**", "42"),
    (r"\boxed{42nd}", "42"),
    ("The answer is: 1,042nd", "1042"),
    ("The answers came 42nd", None),
    ("Answer the 3rd question: 7", "7"),
    ("The answer is 18 (see step 2).", "18"),
    ("Answer: 18 [see step 2]", "18"),
    ("#### 18 (from step 2)", "18"),
    (r"\boxed{18} (see step 2)", "18"),
    ("18 (see step 2)", "18"),
    ("The answer is 18, see step 2.", "18"),
    ("The answer is $18.50 (3 tickets in all)", "18.50"),
    ("The answer is 18 eggs (as in step 2)", "18"),
    ("The answer is -18 (see step 2)", "-18"),
    ("The answer is 20 (18 + 2 = 20)", "20"),
    ("The answer is 3 (see step 1) + 4 = 7", "7"),
    ("There are 18 (see step 2).", "18"),
    ("18 are left [cf. 2]", "18"),
    ("The answer is 18 (see equation (2)).", "18"),
    ("Answer: 18, as in step 2.", "18"),
    ("18 (2 of them red)", "18"),
    ("She has 18 left (from step 2)", "18"),
    ("in the range (from 5 to 8)", "8"),
    ("The answer is 18 [2]", "18"),
    ("12 (6)", "6"),
    ("-₹1,00,000", "-100000"),
    ("The answer is 5.\n\nQuestion: What is 3 + 4?", "5"),
    ("7\n\nQuestion: What is 1 + 1?\nAnswer: 2", "7"),
    ("The answer is 5. Question: Ann has 9", "5"),
    ("5\nQ: What is 8?\nA: 8", "5"),
    ("5\nProblem: 8", "5"),
    ("5\n\nQuestion 2\nAnn has 9", "5"),
    ("#### 5\n### Instruction:\nAdd 9", "5"),
    ("5\n**Question:** 9", "5"),
    ("5\n\n### Question: 9", "5"),
    ("5\nProblem 12: Ann has 9", "5"),
    ("5\nHuman: and 9?", "5"),
    ("5\n### Human: 9", "5"),
    ("5\nExample 2: 9", "5"),
    ("5<|im_start|>user\n9", "5"),
    ("Question: What is 3 + 4?\nAnswer: 7", "7"),
    ("Question: 3 + 4?\nAnswer: 7\n\nQuestion: 9?", "7"),
    ("To answer the question: 3 + 4 = 7", "7"),
    ("So the problem: 15 - 2 = 13", "13"),
    ("12\nQuestion it: 13", "13"),
    ("FAQ: 3", "3"),
]
LETTERS += [
    ("B\n\nQuestion: Which?\n(A) 1 (B) 2 (C) 3\nAnswer: C", "B"),
    ("The answer is (D). Question: … The answer is A.", "D"),
    ("C\n### Instruction:\nPick one. Answer: A", "C"),
    ("Q: Which one?\nA: The answer is (E)", "E"),
    ("The answer is B.\nQ: Next?\nThe answer is C.", "B"),
]
LABELS += [
    (
        "the correct answer is answer2\n\nQuestion: Which? The correct answer is answer3",
        ANSWERS,
        "answer2",
    ),
    ("true\nQuestion: is it false?", TRUTH, "true"),
    ("Question: is it true?\nfalse", TRUTH, "false"),
    ("false\n### Instruction:\nIs it true", TRUTH, "false"),
]

# A question that the text repeats before it answers, and ways in which another one begins.
NUMBERS += [
    (
        "Given: 3 boxes with 4 apples.\nQuestion: how many?\nSolution: 3*4 = 12. The answer is 12",
        "12",
    ),
    ("There are 3 cats.\nTask: count legs.\n3*4=12", "12"),
    ("We have 5.\n\nProblem: find 2x.\nAnswer: 10", "10"),
    ("The answer is 5.\n\nQuestion: What is 7 + 8?\nThe answer is 15", "5"),
    ("Given x = 5.\nQuestion: what is 2x?\nAnswer: 10", "10"),
    ("Step 1: 3 boxes.\nExample: 4\nSo 12", "12"),
    ("Part 1: 3 + 4 = 7.\n\nProblem: now double it.\n2 * 7 = 14. The answer is 14", "14"),
    ("Problem: 3 cats with 4 legs.\nQuestion: how many legs?\nSolution: 12", "12"),
    ("To find the answer: we have 3 boxes.\nQuestion: how many apples?\n12", "12"),
    ("3 + 4 = 7.\n\nQuestion: Bob has 9 and 2?\nAnswer: 9 + 2 = 11", "7"),
    ("So she has 7 left.\n\nQuestion: Bob has 9", "7"),
    ("A: 18\nQ: 4?\nA: 4", "18"),
    ("18\n\nExplanation: there are 18.\n\nQuestion: 9", "18"),
    ("18 eggs\n\nProblem: 4 hens. The answer is 4", "18"),
    ("The answer to the question is 18.\nQ: 9", "18"),
    (r"So \boxed{\frac{3}{4}}." "\n\nProblem: 5", "3/4"),
    ("18.Question: how 2", "18"),
    ("18;Question: 9", "18"),
    ("18</s>Question: 9", "18"),
    ("18\n<|user|> 7", "18"),
    ("18<|eot_id|><|start_header_id|>user 9", "18"),
    ("18<|endoftext|>Human: 9", "18"),
    ("18[INST] 9", "18"),
    ("18<end_of_turn>\n<start_of_turn>user\n9", "18"),
    ("She has 7 left.<|im_end|>\n<|im_start|>user\nBob 9", "7"),
    ("<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>", "7"),
    ("5\nQuestion 2. Ann has 9", "5"),
    ("5\n## Question\nAnn has 9", "5"),
    ("5\n\nNext question: 9", "5"),
    ("5\nQ2) 9", "5"),
    ("5\nInput: 9\nOutput: 18", "5"),
    ("#### 5\nQ: 9 + 9? #### 18", "5"),
]
LETTERS += [
    ("Let me think. Option A is wrong.\nQuestion: is B right?\nThe answer is B", "B"),
    ("Option A is wrong.\n\nProblem: is it B?\nAnswer: B", "B"),
    ("A: 3 boxes.\nQuestion: B?\nThe answer is B", "B"),
    ("B. a red hat of straw\n\nQuestion: Which?\nThe answer is C", "B"),
    ("B.Question: Which? (C)", "B"),
    ("Option B is correct.\nQuestion: next? The answer is C", "B"),
    ("(B)</s>Q: (C)", "B"),
    ("It is option (C).<|eot_id|><|start_header_id|>user<|end_header_id|>\nOr is it (D)?", "C"),
]
LABELS += [
    ("true or false?\nQuestion: is it?\nThe answer is false", TRUTH, "false"),
    ("It would be true if so.\nQuestion: is it so?\nThe answer is false", TRUTH, "false"),
    ("Answer1: cat Answer2: dog\nQuestion: which barks?\nanswer2", ANSWERS, "answer2"),
    ("true.Question: is it false", TRUTH, "true"),
    ("answer2: a dog that barks</s>answer3", ANSWERS, "answer2"),
]


@pytest.mark.parametrize("text, expected", NUMBERS)
def test_final_number(text, expected):
    assert final_number(text) == expected


@pytest.mark.parametrize("text, expected", LETTERS)
def test_final_letter(text, expected):
    assert final_letter(text) == expected


@pytest.mark.parametrize("text, labels, expected", LABELS)
def test_final_label(text, labels, expected):
    assert final_label(text, labels) == expected


@pytest.mark.parametrize(
    "piece", ["answer to ", "3 is correct ", "A: 3\n", "#", "Q ", "<|user|>3", "3 + 4 = ", "* "]
)
def test_a_long_text_is_read_in_time_linear_in_it(piece):
    """A pattern that starts over at each place would take minutes."""
    text = piece * (100_000 // len(piece)) + "\n\nQuestion: 9"
    start = time.process_time()
    final_number(text), final_letter(text), final_label(text, TRUTH)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "found, answer, equal",
    [
        ("5", "5.0", True),
        ("1e3", "1,000", True),
        ("0.3333", "0.333", True),
        ("5", "6", False),
        (None, "5", False),
        ("3/4", "3/4", True),
        ("3/4", "4", False),
        ("-5", "5", False),
    ],
)
def test_same_number(found, answer, equal):
    assert same_number(found, answer) is equal


def test_is_right_by_metric():
    assert is_right("number", "It is 5.", "5.0") and not is_right("number", "It is 5.", "4")
    assert is_right("letter", "The answer is (B).", "B") and not is_right(
        "letter", "The answer is (B).", "A"
    )
    assert is_right("choice", "the correct answer is true", "true", TRUTH)
    assert is_right("exact", " yes\n", "yes") and not is_right("exact", "yes.", "yes")
    with pytest.raises(UserError, match="rouge"):
        is_right("rouge", "a", "a")


# ----------------------------------------------------------------------------------- log-likelihood

REQUESTS = [
    [("Question: why?\nAnswer:", c) for c in (" yes", " because it is so", " n")],
    # contexts of their own, spaces at their end
    [("The sky ", "is blue"), ("The sea ", "is blue")],
    [("", "no context"), ("", "at all")],
    [("x" * 40, " long context"), ("x" * 40, " y")],
]


@pytest.fixture(scope="module")
def tiny():
    base = init_base(jax.random.key(0), TINY)
    base = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, base)
    return base, load_tokenizer("random")


def bare(base, tokenizer):
    """The tiny base without an adapter."""
    return Adapted(config=TINY, base=base, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def scores(tiny):
    base, tokenizer = tiny
    return choice_loglik(bare(base, tokenizer), REQUESTS, batch_size=16)


def test_loglik_equals_pytorch(tiny, scores):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    base, _ = tiny
    settings = TINY.to_hf()
    settings.pop("model_type")
    model = LlamaForCausalLM(HFConfig(**settings)).eval()
    state = {name: torch.tensor(np.asarray(value)) for name, value in to_hf_tensors(TINY, base)}
    model.load_state_dict(state, strict=False)
    for pairs, found in zip(REQUESTS, scores, strict=True):
        for (context, continuation), score in zip(pairs, found, strict=True):
            before = list(context.rstrip().encode()) or [TINY.bos_token_id]
            after = list((context[len(context.rstrip()) :] + continuation).encode())
            with torch.no_grad():
                logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(after)), after].sum().item()
            assert score == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("method", [None, "ffba"])
def test_loglik_does_not_depend_on_batch(tiny, scores, method):
    base, tokenizer = tiny
    adapter_config = method and AdapterConfig(method, 8)
    adapter = method and jax.tree.map(
        lambda x: x + 0.05, init_adapter(jax.random.key(1), TINY, adapter_config)
    )

    model = Adapted(
        config=TINY, base=base, tokenizer=tokenizer, adapter_config=adapter_config, adapter=adapter
    )

    def score(requests, b):
        return choice_loglik(model, requests, b)

    together = score(REQUESTS, 16)
    np.testing.assert_allclose(
        np.concatenate(score(REQUESTS, 1)), np.concatenate(together), atol=1e-3
    )
    difference = np.abs(np.concatenate(together) - np.concatenate(scores)).max()
    assert difference > 0.1 if method else difference == 0


def test_pairs_are_cut_where_the_context_ends(tiny):
    _, tokenizer = tiny
    assert encode_pair(tokenizer, "ab ", "c") == (list(b"ab"), list(b" c"))
    assert encode_pair(tokenizer, "ab", " c") == (list(b"ab"), list(b" c"))
    assert encode_pair(tokenizer, "", "c") == ([256], list(b"c"))
    # Not where a tokenizer's own eos would be: the context goes on.
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 256), ("<|eos|>", 257)]
    )
    assert encode_pair(tokenizer, "ab ", "c") == ([256, *b"ab"], list(b" c"))
    base, _ = tiny
    with pytest.raises(UserError, match="has no tokens"):
        choice_loglik(bare(base, tokenizer), [[("a", "")]])
    with pytest.raises(UserError, match="max_position_embeddings=2048"):
        choice_loglik(bare(base, tokenizer), [[("a" * 3000, " b")]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ARC-Easy", "piqa", "openbookqa"])
def test_smollm2_equals_an_independent_harness(name, folder_at):
    """First 200 questions, within one example and 0.02 a choice of a PyTorch harness on the same
    weights."""
    from flora_jax.data.sources import load_examples
    from flora_jax.models.loading import load_pretrained

    reference = json.loads(
        (folder_at("FLORA_REFERENCE", "reference") / "smollm2_mc_loglik.json").read_text()
    )[name]
    examples = load_examples(get_task(name), "test", folder_at("FLORA_DATA", "data"))[:200]
    config, base = load_pretrained("smollm2-135m-instruct")
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    model = Adapted(config=config, base=base, tokenizer=tokenizer)
    found = choice_loglik(model, [lm_eval_request(e) for e in examples])
    for doc, loglik in zip(reference["docs"], found, strict=True):
        np.testing.assert_allclose(loglik, doc["ll"], atol=0.02)
    right = sum(int(np.argmax(ll)) == e.gold for ll, e in zip(found, examples, strict=True))
    norm = [
        np.argmax(np.divide(ll, [len(c) for c in e.choices]))
        for ll, e in zip(found, examples, strict=True)
    ]
    assert abs(right - 200 * reference["acc"]) <= 1
    right_norm = sum(int(n) == e.gold for n, e in zip(norm, examples, strict=True))
    assert abs(right_norm - 200 * reference["acc_norm"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, protocol",
    [("openbookqa", "lm_eval"), ("openbookqa", "llm_adapters"), ("dailydialogpp", "llm_adapters")],
)
def test_smollm2_scores_are_equal_at_batch_1_and_16(name, protocol, folder_at):
    from flora_jax.evaluation.run import evaluate_tasks
    from flora_jax.models.loading import load_pretrained

    config, base = load_pretrained("smollm2-135m-instruct")
    tokenizer, folder = load_tokenizer("smollm2-135m-instruct"), folder_at("FLORA_DATA", "data")
    model = Adapted(config=config, base=base, tokenizer=tokenizer)
    tasks = load_task_data([name], folder, Settings(protocol=protocol), limit=40)

    def kept(scores):
        return {k: v for k, v in scores.items() if k != "seconds"}

    alone, together = (
        kept(
            evaluate_tasks(tasks, model, Settings(protocol=protocol, batch_size=size))["tasks"][
                name
            ]
        )
        for size in (1, 16)
    )
    assert alone == together and len(alone["items"]) == 40


# -------------------------------------------------------------------------------------------- tasks


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    def choice(i):
        text = f"Please choose the correct answer to the question: Which is {i}?\n\n"
        text += (
            f"Answer1: {i} Answer2: {i + 1} Answer3: a long one\n\n"
            "Answer format: answer1/answer2/answer3"
        )
        return {"instruction": text, "input": "", "output": "", "answer": f"answer{1 + i % 3}"}

    def math_problem(i):
        return {
            "instruction": f"What is {i} + 1?",
            "input": "",
            "output": f"{i + 1}",
            "answer": str(i + 1),
        }

    for task, make in (("ARC-Easy", choice), ("gsm8k", math_problem)):
        (folder / task).mkdir()
        for split, numbers in (("train", range(10, 15)), ("test", range(6))):
            (folder / task / f"{split}.json").write_text(json.dumps([make(i) for i in numbers]))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """A tiny HF checkpoint, and an adapter for it whose base leaves trained too."""
    base, tokenizer = tiny
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY.to_hf()))
    save_file(
        {name: np.ascontiguousarray(v) for name, v in to_hf_tensors(TINY, base)},
        folder / "model.safetensors",
    )
    tokenizer.save_pretrained(folder)
    adapter_config = AdapterConfig("ffba", 8)
    adapter = jax.tree.map(lambda x: x + 0.1, init_adapter(jax.random.key(1), TINY, adapter_config))
    trained = {
        "adapter": adapter,
        "params": {"final_norm": {"scale": 2 * base["final_norm"]["scale"]}},
    }
    save_adapter(
        folder / "adapter", trained, TINY, adapter_config, str(folder), base_fingerprint(base)
    )
    return folder


@pytest.fixture(autouse=True)
def cache(request, tmp_path_factory, monkeypatch):
    """Prepared data goes to a temporary place; slow tests keep the cache that holds real
    weights."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("FLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def command(name, *arguments):
    """Exit code of a command run here."""
    module = __import__(f"flora_jax.{name}", fromlist=["main"])
    try:
        run_command(module.main, [name, *map(str, arguments)])
    except SystemExit as exit:
        return exit.code
    return 0


def test_few_shot_prompts(data_dir):
    [data] = load_task_data(["ARC-Easy"], data_dir, num_fewshot=2, seed=3)
    context, continuation = few_shot_requests(data.examples[0], data.shots)[1]
    shown = [int(shot.question.removeprefix("Which is ").rstrip("?")) for shot in data.shots]
    texts = [shot.choices[shot.gold] for shot in data.shots]
    assert (
        context
        == "".join(
            f"Question: Which is {i}?\nAnswer: {text}\n\n"
            for i, text in zip(shown, texts, strict=True)
        )
        + "Question: Which is 0?\nAnswer:"
    )
    assert continuation == " 1"
    assert load_task_data(["ARC-Easy"], data_dir, num_fewshot=2, seed=3)[0].shots == data.shots
    assert load_task_data(["ARC-Easy"], data_dir, num_fewshot=2, seed=4)[0].shots != data.shots

    shot = Example((Message("user", "1 + 1?"), Message("assistant", "2")))
    asked = Example((Message("user", "2 + 2?"), Message("assistant", "4")))
    assert few_shot_messages(asked, [shot], "plain") == [Message("user", "1 + 1? 2\n\n2 + 2?")]
    chat = few_shot_messages(asked, [shot], "chat")
    assert [m.content for m in chat] == ["1 + 1?", "2", "2 + 2?"]
    assert few_shot_messages(asked, [], "plain") == [Message("user", "2 + 2?")]
    long = Example((*shot.messages, *asked.messages))
    for conversation, shown in ((long, shot), (asked, long)):
        with pytest.raises(UserError, match="a conversation has several; use 'chat'"):
            few_shot_messages(conversation, [shown], "plain")
    assert [m.content for m in few_shot_messages(long, [shot], "chat")] == [
        "1 + 1?",
        "2",
        "1 + 1?",
        "2",
        "2 + 2?",
    ]
    told = Message("system", "Sums.")
    shot, asked = (Example((told, *example.messages)) for example in (shot, asked))
    assert few_shot_messages(asked, [shot], "plain") == [
        Message("user", "Sums.\n\n1 + 1? 2\n\nSums.\n\n2 + 2?")
    ]
    assert few_shot_messages(asked, [shot], "chat") == [told, *chat]


@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("content", ["", "Let me look."])
def test_a_call_of_a_tool_is_no_text_to_compare_with(tiny, style, content):
    """Silence would be as right as its empty text."""
    call = Turn(
        "assistant", content, more=json.dumps({"tool_calls": [{"function": {"name": "weather"}}]})
    )
    turns = Message("assistant", "x"), call
    good, bad = (Example((Message("user", "hi"), turn), answer=turn.content) for turn in turns)

    def check(*data):
        settings = Settings(protocol="llm_adapters", prompt_style=style, max_length=999)
        tasks = [TaskData(get_task("a.jsonl"), *data, "")]
        return check_prompts(tasks, TINY, byte_tokenizer(), settings)

    with pytest.raises(
        UserError, match=r"^a\.jsonl: question 1 is to be answered by a call of a tool"
    ):
        check([good, bad], [])
    if style == "plain":
        with pytest.raises(UserError, match=r"^a\.jsonl: .*'plain' has no place for tools"):
            check([good], [bad])
    assert check([good], [good])


def test_what_is_asked_is_never_shown(tmp_path):
    """One file is both splits, and a folder's two may overlap."""

    def line(i):
        return json.dumps({"prompt": f"{i} + {i}?", "completion": str(2 * i)}) + "\n"

    mine, folder = tmp_path / "mine.jsonl", tmp_path / "own"
    mine.write_text("".join(map(line, range(4))))
    with pytest.raises(UserError, match="has 0 examples that are not in its test split"):
        load_task_data([str(mine)], None, GENERATED, limit=1, num_fewshot=1)
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(map(line, range(4))))
    (folder / "train.jsonl").write_text("".join(map(line, range(6))))
    for seed in range(8):
        [data] = load_task_data(["jsonl"], folder, GENERATED, num_fewshot=2, seed=seed)
        assert {shot.answer for shot in data.shots} == {"8", "10"}


def test_evaluate_command(checkpoint, data_dir, tiny, tmp_path, capsys):
    base, tokenizer = tiny
    out = tmp_path / "new" / "result.json"
    arguments = ["--model", checkpoint, "--tasks", "ARC-Easy", "--data_dir", data_dir, "--limit", 5]
    assert command("evaluate", *arguments, "--out", out) == 0
    result = json.loads(out.read_text())
    scores = result["tasks"]["ARC-Easy"]
    [data] = load_task_data(["ARC-Easy"], data_dir, limit=5)
    loglik = choice_loglik(bare(base, tokenizer), [lm_eval_request(e) for e in data.examples])
    right = [int(np.argmax(ll)) == e.gold for ll, e in zip(loglik, data.examples, strict=True)]
    norm = [
        int(np.argmax([v / len(c) for v, c in zip(ll, e.choices, strict=True)])) == e.gold
        for ll, e in zip(loglik, data.examples, strict=True)
    ]
    p = sum(right) / 5
    assert scores["n"] == 5 and scores["accuracy"] == p and scores["accuracy_norm"] == sum(norm) / 5
    assert scores["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 5))
    assert scores["prompt"] == "Question: Which is 0?\nAnswer: 0"
    assert (
        result["schema_version"] == 1
        and result["protocol"] == "lm_eval"
        and result["adapter"] is None
    )
    assert {"seed", "versions", "dtype", "mask", "base_fingerprint"} <= result.keys()
    assert os.listdir(out.parent) == ["result.json"]

    assert command("evaluate", *arguments, "--adapter", checkpoint / "adapter", "--out", out) == 0
    adapted = json.loads(out.read_text())
    assert adapted["adapter_config"]["method"] == "ffba"
    assert "ARC-Easy" in capsys.readouterr().out


def test_sizes_are_checked_before_another_task_is_scored(
    checkpoint, data_dir, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(
        "flora_jax.evaluation.run.token_loglik", lambda *_: pytest.fail("scored before the check")
    )
    arguments = [
        "--model",
        checkpoint,
        "--tasks",
        "ARC-Easy,gsm8k",
        "--data_dir",
        data_dir,
        "--out",
        tmp_path / "r",
    ]
    assert command("evaluate", *arguments, "--max_length", 4096) == 2
    assert (
        "max_length=4096 must be from 2 to the model's max_position_embeddings=2048"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_test_that_was_trained_on_is_refused(checkpoint, data_dir, tmp_path, capsys):
    """Above 1 % of the questions asked, unless that is allowed; the share is in the result either
    way."""
    adapter, out = tmp_path / "adapter", tmp_path / "result.json"
    shutil.copytree(checkpoint / "adapter", adapter)
    arguments = [
        "--model",
        checkpoint,
        "--adapter",
        adapter,
        "--tasks",
        "ARC-Easy,gsm8k",
        "--data_dir",
        data_dir,
    ]
    arguments += ["--limit", 4, "--max_length", 512, "--out", out]
    [asked] = load_task_data(["gsm8k"], data_dir, GENERATED, limit=4)
    record = adapter / "trained_on.json"
    record.write_text(
        json.dumps({"tasks": ["mine"], "prompts": sorted(prompt_digests(asked.examples[1:2]))})
    )
    assert command("evaluate", *arguments) == 2 and not out.exists()
    assert "--tasks gsm8k: 25.0 % of the questions asked" in (error := capsys.readouterr().err)
    assert (
        "trained on (mine)" in error and "--allow_contaminated" in error and error.count("\n") == 1
    )
    for prompts, flags, share in ((None, ["--allow_contaminated"], 0.25), ([], [], 0.0)):
        if prompts is not None:
            record.write_text(json.dumps({"tasks": ["mine"], "prompts": prompts}))
        assert command("evaluate", *arguments, *flags) == 0
        assert json.loads(out.read_text())["share_of_test_in_train"] == {
            "ARC-Easy": 0.0,
            "gsm8k": share,
        }
    record.write_text(json.dumps({"tasks": ["mine"]}))
    assert (
        command("evaluate", *arguments) == 2
        and "trained_on.json: field 'prompts'" in capsys.readouterr().err
    )


def test_llm_adapters_protocol_and_math(checkpoint, data_dir, tmp_path, monkeypatch):
    """The answers are put into the generator's mouth; what is checked is that they are asked for,
    read and counted."""
    from flora_jax.evaluation import task_data

    asked = []

    def generate(self, prompts, max_new_tokens):
        asked.append([self.tokenizer.decode(p) for p in prompts])
        replies = [
            "the correct answer is answer1",
            "It is 2.",
            "the correct answer is answer3\n\n7",
            "",
            "5",
            "no",
        ]
        return [Generation(reply, [1], True) for reply in replies[: len(prompts)]]

    monkeypatch.setattr(Generator, "generate", generate)
    arguments = ["--model", checkpoint, "--tasks", "ARC-Easy,gsm8k", "--data_dir", data_dir]
    out = tmp_path / "result.json"
    assert (
        command(
            "evaluate",
            *arguments,
            "--protocol",
            "llm_adapters",
            "--prompt_style",
            "chat",
            "--out",
            out,
        )
        == 0
    )
    tasks = json.loads(out.read_text())["tasks"]
    assert tasks["ARC-Easy"]["accuracy"] == 2 / 6 and "accuracy_norm" not in tasks["ARC-Easy"]
    assert tasks["gsm8k"]["accuracy"] == 2 / 6  # "It is 2." to 1 + 1, "5" to 4 + 1
    assert tasks["gsm8k"]["texts"][1:5:3] == ["It is 2.", "5"]
    assert tasks["gsm8k"]["decode"] == {
        "temperature": 0.0,
        "max_new_tokens": 256,
        "first_round": 64,
        "stop_text": None,
    }
    assert asked[1][0].endswith("What is 0 + 1?<|im_end|>\n<|im_start|>assistant\n")
    assert (
        command(
            "evaluate", *arguments, "--protocol", "llm_adapters", "--num_fewshot", 2, "--out", out
        )
        == 0
    )
    assert asked[3][0].count("What is") == 3 and asked[3][0].endswith("\n\nWhat is 0 + 1?")
    assert (
        json.loads(out.read_text())["tasks"]["ARC-Easy"]["decode"]["stop_text"]
        == task_data.SHOT_BREAK
    )

    said = [Generation("7\n\nQuestion:", [1] * 64, False), Generation("no", [1] * 64, False)]
    rows = []

    def ramble(self, prompts, max_new_tokens):
        rows.append(len(prompts))
        return [said[0]] * (len(prompts) - 1) + [said[1]]

    monkeypatch.setattr(Generator, "generate", ramble)
    shots = ["--num_fewshot", 2, "--tasks", "gsm8k"]
    assert command("evaluate", *arguments, "--protocol", "llm_adapters", *shots, "--out", out) == 0
    assert rows == [6, 1, 1]  # what has said a blank line is not asked to go on


PUBLISHED = [  # metric, text, answer, right by the published rules, right by ours
    ("number", "It is 1,2", "12", True, False),
    ("number", "so 5-3", "-3", True, False),
    ("number", "so 5-3", "3", False, True),
    ("number", "in answer2", "2", True, False),
    ("number", "on the 3rd", "3", True, False),
    ("number", "nothing", "0", False, False),
    ("number", "it is 1,234.", "1234", True, True),
    ("number", "3/4", "4", True, False),
    ("letter", "Because of (D)", "B", True, False),
    ("letter", "Because of (D)", "D", False, True),
    ("letter", "none", "A", False, False),
    ("letter", "C", "C", True, True),
    ("choice", "answer1 is wrong, so answer2", "answer1", True, False),
    ("choice", "answer1 is wrong, so answer2", "answer2", False, True),
    ("choice", "answer5, no: answer2", "answer2", False, True),
    ("choice", "Answer2", "answer2", False, True),
    ("choice", "the correct answer is answer2", "answer2", True, True),
    ("number", "It is 7.\n### Response: 9", "7", True, False),
    ("number", "7.\n### Response: 9", "9", False, True),
]


@pytest.mark.parametrize("metric, text, answer, theirs, ours", PUBLISHED)
def test_published_faults_and_their_mending(metric, text, answer, theirs, ours):
    assert published.is_right(metric, text, answer, ANSWERS) == theirs
    assert is_right(metric, text, answer, ANSWERS) == ours
    if metric == "choice":
        assert published.is_right(metric, "untrue", "true", TRUTH) and not is_right(
            metric, "untrue", "true", TRUTH
        )
        two = ("solution1", "solution2")  # only of answers five are looked for
        assert published.is_right(metric, "solution3? no, solution1", "solution1", two)


def test_published_prompts(checkpoint, data_dir, tmp_path, monkeypatch):
    """The trained frame where faults are mended; with them the scored one, and of choice tasks
    padding that is read."""
    asked = put_words_into(monkeypatch, "It is 1,2")
    out, space = tmp_path / "result.json", " " * 16
    arguments = [
        "--model",
        checkpoint,
        "--data_dir",
        data_dir,
        "--protocol",
        "llm_adapters",
        "--prompt_style",
        "llm_adapters",
        "--out",
        out,
    ]
    task = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request."
    )
    trained = (
        f"{task}  \n\n{space}### Instruction:\n{space}What is 0 + 1?\n{space}\n"
        f"{space}### Response:\n{space}"
    )
    scored = (
        f"{task} \n\n{space}### Instruction:\n{space}What is 0 + 1?\n\n{space}### Response:\n"
        f"{space}"
    )
    assert command("evaluate", *arguments, "--tasks", "gsm8k") == 0
    assert json.loads(out.read_text())["published_faults"] is False and asked[0] == trained
    tokenizer = load_tokenizer(checkpoint)
    example = Example((Message("user", "What is 0 + 1?"), Message("assistant", "1")))
    assert tokenizer.decode(encode_prompt(example, tokenizer, "llm_adapters")) == trained
    asked.clear()
    assert command("evaluate", *arguments, "--tasks", "gsm8k", "--published_faults") == 0
    result = json.loads(out.read_text())
    assert (
        result["published_faults"] is True
        and "none over the padding" in result["mask"]
        and asked[0] == scored
    )
    assert "published" in result["tasks"]["gsm8k"]["scoring"]

    lines = [
        published.encode_prompt([Message("user", text)], tokenizer)
        for text in ("a", "abc", "abcdef")
    ]
    assert published.pad(lines, "number", 2) == lines
    one, two, three = published.pad(lines, "choice", 2)
    assert one == [0, 0, *lines[0]] and two == lines[1] and three == lines[2]


def test_a_long_prompt_is_no_fault_of_its_batch(checkpoint, data_dir, tmp_path, monkeypatch):
    """Under the published faults too, what does not fit is left out before the others are padded to
    it."""
    asked = put_words_into(monkeypatch, "the correct answer is answer1")
    records = json.loads((data_dir / "ARC-Easy/test.json").read_text())
    records[1]["instruction"] = records[1]["instruction"].replace("Which", "Which " + "x" * 900)
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy/test.json").write_text(json.dumps(records))
    out = tmp_path / "result.json"
    arguments = [
        "--model",
        checkpoint,
        "--data_dir",
        tmp_path,
        "--tasks",
        "ARC-Easy",
        "--protocol",
        "llm_adapters",
        "--prompt_style",
        "llm_adapters",
        "--published_faults",
        "--max_length",
        800,
        "--out",
        out,
    ]
    assert command("evaluate", *arguments) == 0
    found = json.loads(out.read_text())["tasks"]["ARC-Easy"]
    assert (
        found["too_long"] == 1
        and len(asked) == len(records) - 1
        and found["accuracy"] == 2 / len(records)
    )


def write_problems(folder, texts):
    (folder / "gsm8k").mkdir()
    records = [{"instruction": text, "input": "", "output": "", "answer": "7"} for text in texts]
    (folder / "gsm8k/test.json").write_text(json.dumps(records))
    return ["--tasks", "gsm8k", "--data_dir", folder, "--protocol", "llm_adapters"]


def put_words_into(monkeypatch, reply):
    """Every prompt is answered with `reply`; the prompts asked come into the list that is
    returned."""
    asked = []

    def generate(self, prompts, max_new_tokens):
        asked.extend(self.tokenizer.decode(p) for p in prompts)
        return [Generation(reply, [1], True) for _ in prompts]

    monkeypatch.setattr(Generator, "generate", generate)
    return asked


def test_prompts_that_are_too_long_are_wrong_and_counted(
    checkpoint, data_dir, tmp_path, monkeypatch, capsys
):
    """With 256 new tokens, 280 leave 24 for a prompt: exactly 24 fit, 25 do not."""
    asked = put_words_into(monkeypatch, "It is 7.")
    texts = ["short", "x" * 25, "y" * 24, "z" * 100]
    arguments = ["--model", checkpoint, *write_problems(tmp_path, texts)]
    out = tmp_path / "result.json"
    assert command("evaluate", *arguments, "--max_length", 280, "--out", out) == 0
    result = json.loads(out.read_text())
    scores = result["tasks"]["gsm8k"]
    assert asked == ["short", "y" * 24] and result["max_length"] == 280
    assert (scores["accuracy"], scores["n"], scores["too_long"], scores["finished"]) == (
        0.5,
        4,
        2,
        1.0,
    )
    assert scores["stderr"] == 0.25
    capsys.readouterr()
    assert (
        command("evaluate", *arguments, "--max_length", 260, "--out", tmp_path / "none.json") == 2
    )
    error = capsys.readouterr().err
    assert (
        "max_length=260 leaves no room for 256 new tokens" in error
        and "the shortest has 5 tokens" in error
    )
    assert error.count("\n") == 1 and not (tmp_path / "none.json").exists()
    # Nor is another task scored before that is said.
    monkeypatch.setattr("flora_jax.evaluation.run._score_choices", lambda *_: pytest.fail("scored"))
    (tmp_path / "ARC-Easy").symlink_to(data_dir / "ARC-Easy")
    both = [*arguments, "--tasks", "ARC-Easy,gsm8k", "--protocol", "lm_eval", "--max_length", 260]
    assert command("evaluate", *both) == 2 and "no room for 256" in capsys.readouterr().err
    # Nor where a choice is what is too long.
    records = json.loads((data_dir / "ARC-Easy" / "test.json").read_text())
    records[-1]["instruction"] = records[-1]["instruction"].replace("Which", "Which " * 500)
    (tmp_path / "openbookqa").mkdir()
    (tmp_path / "openbookqa/test.json").write_text(json.dumps(records))
    both = [*arguments, "--tasks", "ARC-Easy,openbookqa", "--protocol", "lm_eval"]
    error = command("evaluate", *both) == 2 and capsys.readouterr().err
    assert (
        "openbookqa: question" in error
        and "max_position_embeddings=2048" in error
        and error.count("\n") == 1
    )
    assert command("evaluate", *arguments, "--max_length", 1024, "--out", out) == 0
    assert json.loads(out.read_text())["tasks"]["gsm8k"]["too_long"] == 0


def recite(monkeypatch, answers):
    """Each question, by how its prompt begins, is answered with what was learnt by heart, as far as
    tokens last."""

    def generate(self, prompts, max_new_tokens):
        out = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            question = next(question for question in answers if text.startswith(question))
            left = list(answers[question].encode())[len(text) - len(question) :]
            said = left[:max_new_tokens]
            out.append(Generation(self.tokenizer.decode(said), said, len(left) < max_new_tokens))
        return out

    monkeypatch.setattr(Generator, "generate", generate)


def test_own_answers_have_room(checkpoint, data_dir, tmp_path, monkeypatch, capsys, caplog):
    """From the longest of them, or what a flag says; what is cut is said, before scoring and in the
    result."""
    answers = {"first": "x" * 299, "second": "short"}
    recite(monkeypatch, answers)
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in answers.items()
    ]
    file, out = tmp_path / "mine{}.jsonl", tmp_path / "result.json"
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    arguments = ["--model", checkpoint, "--protocol", "llm_adapters", "--out", out, "--tasks", file]

    def scored(*flags):
        caplog.clear()
        assert command("evaluate", *arguments, *flags) == 0
        [scores] = json.loads(out.read_text())["tasks"].values()
        said = [
            record.getMessage()
            for record in caplog.records
            if record.name == "flora_jax.evaluation.generated"
        ]
        assert all(line.startswith(f"{file}: ") and "\n" not in line for line in said)
        return scores["accuracy"], scores["decode"]["max_new_tokens"], scores["unfinished"], said

    assert scored() == (1.0, 299 + 1 + 16, 0.0, [])
    *found, said = scored("--max_new_tokens", 100)
    assert (
        found == [0.5, 100, 0.5]
        and "50.0 % of the answers did not end within 100 new tokens" in said[0]
    )
    *found, said = scored("--max_length", 290)
    assert found == [0.5, 284, 0.5] and len(said) == 2
    assert (
        "the longest answer has 299 tokens, but max_length=290 leaves 284 after the longest prompt"
        in said[0]
    )
    *found, said = scored("--max_length", 306, "--max_new_tokens", 301)
    assert (
        found == [0.5, 301, 0.0]
        and "1 of 2 prompts leave no room for 301 new tokens in max_length=306" in said[0]
    )
    # Short ones have what they had.
    file.write_text(json.dumps({"messages": turns[1]}))
    assert scored() == (1.0, 256, 0.0, [])
    lm_eval = ["--max_new_tokens", 5, "--tasks", "ARC-Easy", "--protocol", "lm_eval"]
    for flags, words in (
        (["--max_new_tokens", 0], "--max_new_tokens 0 must be"),
        (lm_eval, "has no effect"),
    ):
        capsys.readouterr()
        assert command("evaluate", *arguments, "--data_dir", data_dir, *flags) == 2
        assert words in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_an_out_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    data_dir, tmp_path, capsys
):
    (tmp_path / "file").write_text("x")
    arguments = ["--model", "./nowhere", "--tasks", "ARC-Easy", "--data_dir", data_dir]
    for out in (tmp_path / "file/result.json", tmp_path / "file/deeper/result.json", tmp_path):
        assert command("evaluate", *arguments, "--out", out) == 2
        error = capsys.readouterr().err
        assert (
            "--out" in error
            and str(out) in error
            and "nowhere" not in error
            and error.count("\n") == 1
        )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_generator_settings_reach_the_task_and_the_result(checkpoint, tmp_path, monkeypatch):
    asked = put_words_into(monkeypatch, "none")
    arguments = ["--model", checkpoint, "--tasks", "chain_sum", "--out", tmp_path / "result.json"]
    terms = {}
    for settings in ("max_terms=2, test=8", "test=8"):
        asked.clear()
        assert command("evaluate", *arguments, "--generator", settings) == 0
        terms[settings] = {len(re.findall(r"\d+", prompt)) for prompt in asked}
        result = json.loads((tmp_path / "result.json").read_text())
        assert len(asked) == result["tasks"]["chain_sum"]["n"] == 8
        assert result["generator"] == (
            {"max_terms": 2, "test": 8} if "terms" in settings else {"test": 8}
        )
    assert list(terms.values()) == [{2}, {2, 3}]


def test_adapter_of_another_base_is_refused(checkpoint, tiny, tmp_path, capsys):
    base, _ = tiny
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    other = {
        name: np.ascontiguousarray(v)
        for name, v in to_hf_tensors(TINY, jax.tree.map(lambda x: 1.1 * x, base))
    }
    save_file(other, tmp_path / "model.safetensors")
    assert (
        command(
            "generate", "--model", tmp_path, "--prompt", "a", "--adapter", checkpoint / "adapter"
        )
        == 2
    )
    error = capsys.readouterr().err
    assert "another base" in error and str(checkpoint) in error


def test_what_generate_refuses(checkpoint, capsys):
    for flags, words in (
        (["--prompt", "a", "--adapter", checkpoint], f"it is in {checkpoint / 'adapter'}"),
        (["--prompt", "\udce9"], "--prompt holds half a character"),
        (["--prompt", ""], "is empty"),
        (["--prompt", "a", "--top_k", 5], "--top_k and --top_p need a --temperature"),
    ):
        assert (
            command("generate", "--model", checkpoint, *flags) == 2
            and words in capsys.readouterr().err
        )


def test_generate_command(checkpoint, tiny, capsys):
    base, tokenizer = tiny
    adapted = load_adapted(str(checkpoint), checkpoint / "adapter")
    np.testing.assert_array_equal(
        adapted.base["final_norm"]["scale"], 2 * base["final_norm"]["scale"]
    )
    np.testing.assert_array_equal(
        adapted.base["embed_tokens"]["embedding"], base["embed_tokens"]["embedding"]
    )

    prompt, chat = "ab", "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    bare = Generator(TINY, base, None, None, tokenizer, max_length=128, batch_size=1)
    with_adapter = Generator(
        TINY, adapted.base, {"a": adapted.adapter}, adapted.adapter_config, tokenizer, 128, 1
    )
    expected = [
        g.generate([p], 16)[0] for g, p in ((bare, prompt), (bare, chat), (with_adapter, prompt))
    ]
    assert len({tuple(g.tokens) for g in expected}) == 3
    for generation, flags in zip(
        expected, [[], ["--chat"], ["--adapter", checkpoint / "adapter"]], strict=True
    ):
        assert (
            command(
                "generate",
                "--model",
                checkpoint,
                "--prompt",
                prompt,
                "--max_new_tokens",
                16,
                *flags,
            )
            == 0
        )
        assert capsys.readouterr().out == generation.text + "\n"


def test_rounds_are_one_generation(tiny, monkeypatch):
    """Rows that stop at a token, at what they say and not at all, over rounds of 3, 3, 6 and 1
    tokens."""
    base, tokenizer = tiny
    prompts = [
        tokenizer(text)["input_ids"] for text in ("ab", "The sky is", "x", "once upon a time", "7")
    ]
    plain = Generator(TINY, base, None, None, tokenizer, max_length=64, batch_size=2)
    free = plain.generate(prompts, 13)
    stop = free[0].tokens[4]
    generator = Generator(
        dataclasses.replace(TINY, eos_token_id=(stop,)),
        base,
        None,
        None,
        tokenizer,
        max_length=64,
        batch_size=2,
    )
    expected = generator.generate(prompts, 13)
    assert expected[0].finished and not all(g.finished for g in expected)
    monkeypatch.setattr(rounds, "FIRST_ROUND", 3)
    asked, generate = [], generator.generate
    monkeypatch.setattr(
        generator, "generate", lambda some, n: asked.append((len(some), n)) or generate(some, n)
    )
    assert rounds.generate_in_rounds(generator, prompts, 13) == expected
    assert [n for _, n in asked] == [3, 3, 6, 1] and asked[0][0] == 5 and asked[-1][0] < 5

    endless = next(i for i, g in enumerate(expected) if not g.finished)
    start = tokenizer.decode(expected[endless].tokens[:4], skip_special_tokens=True)
    ended = rounds.generate_in_rounds(
        generator, prompts, 13, lambda i, text: i == endless and start in text
    )
    assert ended[endless].tokens == expected[endless].tokens[:6] and not ended[endless].finished
    assert ended[:endless] + ended[endless + 1 :] == expected[:endless] + expected[endless + 1 :]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tasks", "ARC-Esy"], "ARC-Easy"),
        (["--tasks", "piqa"], "piqa"),
        (["--tasks", "ARC-Easy,ARC-Easy"], "twice"),
        (["--tasks", ","], "tasks is empty"),
        (["--tasks", "ARC-Easy", "--limit", "0"], "limit=0"),
        (["--tasks", "ARC-Easy", "--num_fewshot", "-1"], "num_fewshot=-1"),
        (["--tasks", "ARC-Easy", "--num_fewshot", "9"], "5 examples"),
        (["--tasks", "ARC-Easy", "--batch_size", "0"], "batch_size"),
        (["--tasks", "ARC-Easy", "--prompt_style", "chat"], "llm_adapters"),
        (["--tasks", "ARC-Easy", "--prompt_style", "llm_adapters"], "protocol 'llm_adapters'"),
        (["--tasks", "ARC-Easy", "--published_faults"], "not of protocol 'lm_eval'"),
        (
            ["--tasks", "ARC-Easy", "--protocol", "llm_adapters", "--published_faults"],
            "with prompt_style 'plain'",
        ),
        (
            [
                "--tasks",
                "samsum",
                "--protocol",
                "llm_adapters",
                "--prompt_style",
                "llm_adapters",
                "--published_faults",
            ],
            "LLM-Adapters has no script for samsum",
        ),
        (["--tasks", "ARC-Easy", "--protocol", "x"], "protocol"),
        (["--tasks", "ARC-Easy", "--adapter", "missing"], "missing"),
        (["--tasks", "ARC-Easy"], "nowhere"),
        (["--tasks", "chain_sum", "--generator", "max_terms"], "'max_terms' is not FIELD=NUMBER"),
        (
            ["--tasks", "chain_sum", "--generator", "max_terms=two"],
            "'max_terms=two' is not FIELD=NUMBER",
        ),
        (
            ["--tasks", "chain_sum", "--generator", "max_terms=²"],
            "'max_terms=²' is not FIELD=NUMBER",
        ),
        (["--tasks", "chain_sum", "--generator", "test=4,"], "'' is not FIELD=NUMBER"),
        (["--tasks", "chain_sum", "--generator", "max_term=2"], "did you mean 'max_terms'"),
        (["--tasks", "chain_sum", "--generator", "max_terms=1"], "max_terms must be >= min_terms"),
        (["--tasks", "ARC-Easy", "--limit", "few"], "--limit: invalid int value: 'few'"),
        (["--tasks", "ARC-Easy", "--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
        (["--tasks", "ARC-Easy", "--lmit", "3"], "unrecognized arguments: --lmit 3"),
        ([], "--tasks"),
    ],
)
def test_bad_input_exits_with_2_before_a_model_is_loaded(data_dir, capsys, arguments, words):
    assert command("evaluate", "--model", "./nowhere", "--data_dir", data_dir, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_commands_explain_themselves():
    done = subprocess.run(
        [sys.executable, "-m", "flora_jax.generate", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--max_new_tokens" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "flora_jax.generate"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the following arguments are required: --model, --prompt")
