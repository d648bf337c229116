"""The declared weights against shapes written by hand, and the one comparison of trees."""

import dataclasses

import pytest

from flora_jax.adapters import base_leaves, check_tree
from flora_jax.errors import UserError
from flora_jax.models.config import LlamaConfig

# Llama-3.2-1B as published: 16 layers, 32 heads and 8 key/value heads of 64.
PUBLISHED = {
    "embed_tokens/embedding": ("V D", (128256, 2048)),
    "layers/attention_norm/scale": ("L D", (16, 2048)),
    "layers/attention/qkv/q_kernel": ("L D Q", (16, 2048, 2048)),
    "layers/attention/qkv/k_kernel": ("L D K", (16, 2048, 512)),
    "layers/attention/qkv/v_kernel": ("L D K", (16, 2048, 512)),
    "layers/attention/o/o_kernel": ("L Q D", (16, 2048, 2048)),
    "layers/mlp_norm/scale": ("L D", (16, 2048)),
    "layers/mlp/gate_up/gate_kernel": ("L D F", (16, 2048, 8192)),
    "layers/mlp/gate_up/up_kernel": ("L D F", (16, 2048, 8192)),
    "layers/mlp/down/down_kernel": ("L F D", (16, 8192, 2048)),
    "final_norm/scale": ("D", (2048,)),
}


def declared(config):
    return {path: (" ".join(leaf.axes), leaf.shape) for path, leaf in base_leaves(config).items()}


def test_a_published_llama():
    assert declared(LlamaConfig.preset("llama3.2-1b")) == PUBLISHED


def test_biases_and_a_head_of_its_own():
    config = dataclasses.replace(
        LlamaConfig.preset("llama3.2-1b"),
        tie_word_embeddings=False,
        biases=("qkv", "o", "gate_up", "down"),
    )
    assert declared(config).items() - PUBLISHED.items() == {
        ("lm_head/kernel", ("D V", (2048, 128256))),
        ("layers/attention/qkv/q_bias", ("L Q", (16, 2048))),
        ("layers/attention/qkv/k_bias", ("L K", (16, 512))),
        ("layers/attention/qkv/v_bias", ("L K", (16, 512))),
        ("layers/attention/o/o_bias", ("L D", (16, 2048))),
        ("layers/mlp/gate_up/gate_bias", ("L F", (16, 8192))),
        ("layers/mlp/gate_up/up_bias", ("L F", (16, 8192))),
        ("layers/mlp/down/down_bias", ("L D", (16, 2048))),
    }


@pytest.mark.parametrize(
    "found, partly, said",
    [
        ({"a": (2,), "b": (3, 4)}, False, None),
        ({"a": (2,)}, False, "b None (3, 4)"),
        ({"a": (2,)}, True, None),
        ({"a": (2,), "b": (4, 3)}, True, "b (4, 3) (3, 4)"),
        ({"a": (2,), "b": (3, 4), "c": (1,)}, False, "c (1,) None"),
        ({"c": (1,)}, True, "c (1,) None"),
    ],
)
def test_trees_are_compared_leaf_by_leaf(found, partly, said):
    def compare():
        expected = {"a": (2,), "b": (3, 4)}
        check_tree(
            found, expected, lambda *difference: "{} {} {}".format(*difference), partly=partly
        )

    if said is None:
        compare()
        return
    with pytest.raises(UserError) as error:
        compare()
    assert str(error.value) == said
