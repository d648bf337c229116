"""No score and no token of values that are not finite: where logits are NaN or infinite, an error
names the place.

Weights that are not finite are refused as they are read: test_loading, test_gguf,
test_adapter_files; checkpoints: test_export_command.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import random_adapter, spread

from flora_jax import evaluate, generate
from flora_jax.adapters import AdapterConfig
from flora_jax.errors import UserError, run_command
from flora_jax.evaluation.loglik import token_loglik
from flora_jax.inference.generator import Generator
from flora_jax.inference.sampling import Sampling
from flora_jax.models.adapted import Adapted
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import init_base
from flora_jax.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = dataclasses.replace(
    LlamaConfig.preset("tiny"), eos_token_id=(), num_hidden_layers=1, tie_word_embeddings=False
)


@pytest.fixture(scope="module")
def base():
    return spread(init_base(jax.random.key(0), TINY))


def with_leaf(base, block, name, change):
    return {**base, block: {name: change(base[block][name])}}


def read_as_nan(base, token):
    return with_leaf(base, "embed_tokens", "embedding", lambda table: table.at[token].set(jnp.nan))


def test_the_row_whose_logits_are_nan_is_named(base):
    """Token 5 is read as NaN, and never chosen, so that no row without it sees that; sampled,
    streamed or neither."""
    hole = read_as_nan(
        with_leaf(base, "lm_head", "kernel", lambda kernel: kernel.at[:, 5].set(0)), 5
    )
    generator = Generator(
        TINY, hole, None, None, load_tokenizer("tiny"), max_length=32, batch_size=1
    )
    for sampling in (Sampling(), Sampling(0.8, top_k=20)):
        expected = generator.generate([[65, 66], [67], [68]], 4, sampling)
        assert [len(one.tokens) for one in expected] == [4, 4, 4]
        with pytest.raises(
            FloatingPointError, match=r"prompt 2 \('AB.*after 0 new tokens are not finite; check"
        ):
            generator.generate([[65, 66], [67], [65, 66, 5], [68]], 4, sampling)
    with pytest.raises(FloatingPointError, match=r"prompt 0 \('AB"):
        list(generator.stream([65, 66, 5], 4))


def test_it_is_met_at_its_token(base):
    """The third token that is chosen is one that is read as NaN. A row that has ended by then does
    not fail."""
    sound = Generator(TINY, base, max_length=32, batch_size=2)
    chosen = sound.generate([[1, 2, 3]], 4)[0].tokens
    assert chosen[2] not in {1, 2, 3, 4, *chosen[:2]}
    generator = Generator(TINY, read_as_nan(base, chosen[2]), max_length=32, batch_size=2)
    with pytest.raises(FloatingPointError, match="prompt 1: the logits after 3 new tokens"):
        generator.generate([[4], [1, 2, 3]], 4)
    assert generator.generate([[1, 2, 3]], 3)[0].tokens == chosen[:3]
    assert generator.generate([[1, 2, 3], [4]], 4, stop=[chosen[2]])[0].tokens == chosen[:2]


def test_an_overflow_in_float16(base):
    """Every weight is finite; what they give is not."""
    half = jax.tree.map(lambda x: x.astype(jnp.float16), base)
    large = with_leaf(half, "final_norm", "scale", lambda scale: jnp.full_like(scale, 6e4))
    with pytest.raises(FloatingPointError, match="compute in float32"):
        Generator(TINY, large, max_length=32, batch_size=2).generate([[1, 2]], 2)


def test_adapters_that_are_not_finite_are_refused_by_name(base):
    adapter_config = AdapterConfig("ffba", 8)
    good, bad = (random_adapter(TINY, adapter_config, seed) for seed in (1, 2))
    product = bad["layers"]["attention"]["qkv"]
    product["A"] = product["A"].at[0, 0, 0].set(jnp.inf)
    with pytest.raises(
        UserError,
        match="adapter 'b': leaf 'layers/attention/qkv/A' holds a value that is not finite",
    ):
        Generator(TINY, base, {"a": good, "b": bad}, adapter_config, max_length=32, batch_size=1)


def test_one_logit_spoils_a_score(base):
    """An infinity below as well, beside which the other probabilities would be finite."""
    asked = [[], [([1, 2], [3])]]
    for value in (np.nan, np.inf, -np.inf):
        spoilt = with_leaf(
            base, "lm_head", "kernel", lambda kernel, value=value: kernel.at[0, 300].set(value)
        )
        with pytest.raises(FloatingPointError, match="row 1, choice 0: the logits are not finite"):
            token_loglik(Adapted(config=TINY, base=spoilt), asked, 2, "row {}".format)
    assert math.isfinite(token_loglik(Adapted(config=TINY, base=base), asked, 2)[1][0][0])


def test_commands(hf_directory, tmp_path, monkeypatch, capsys):
    """Finite weights whose logits overflow. The argmax of NaN would be right wherever the first
    choice is."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    model = hf_directory(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, model / "model.safetensors")
    question = "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"
    record = {
        "instruction": f"Please choose: {question}",
        "input": "",
        "output": "",
        "answer": "answer1",
    }
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy/test.json").write_text(json.dumps([record]))
    small = ["--max_length", 256, "--batch_size", 1]
    scored = [
        "--tasks",
        "ARC-Easy",
        "--data_dir",
        tmp_path,
        "--out",
        tmp_path / "result.json",
        *small,
    ]

    def ends(command, code, *flags):
        with pytest.raises(SystemExit) as end:
            run_command(command.main, ["", "--model", str(model), *map(str, flags)])
        out, error = capsys.readouterr()
        assert end.value.code == code and out == "" and error.count("\n") == 1
        return error

    assert "ARC-Easy: question 0, choice 0: the logits are not finite" in ends(evaluate, 1, *scored)
    assert "ARC-Easy: prompt 0 (" in ends(evaluate, 1, *scored, "--protocol", "llm_adapters")
    hello = ["--prompt", "Hello", "--max_length", 32, "--max_new_tokens", 4]
    assert "prompt 0 ('Hello'): the logits after 0 new" in ends(generate, 1, *hello)
    assert not (tmp_path / "result.json").exists()
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, model / "model.safetensors")
    assert "model.safetensors: tensor 'model.norm.weight' holds a value that" in ends(
        generate, 2, "--prompt", "a"
    )
