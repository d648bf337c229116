"""Path rules and what they decide: what trains, what decays, at which rate, on which mesh axes."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from flora_jax.adapters import METHODS, AdapterConfig, abstract_adapter
from flora_jax.config import get_config
from flora_jax.errors import UserError
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import abstract_base
from flora_jax.training.optimizer import make_optimizer, make_schedule, trains
from flora_jax.training.rules import combine, decide, partition, paths, tree
from flora_jax.training.sharding import make_mesh, sharding_rules, shardings

TINY = LlamaConfig.preset("tiny")
BASE = abstract_base(TINY)


def variables_of(method, rank=8):
    return {"params": BASE, "adapter": abstract_adapter(TINY, AdapterConfig(method, rank))}


def settings(method="ffba", **fields):
    """The tiny configuration at rank 8 with the given `section__name` fields."""
    config = get_config("tiny", method)
    config.adapter.rank = 8
    config.optim.learning_rate = 1e-3
    for field, value in fields.items():
        section, name = field.split("__")
        config[section][name] = value
    return config


# --------------------------------------------------------------------------------------------------
# The table


def test_first_match_wins_and_matches_the_whole_path():
    names = ["a/b/scale", "a/b/kernel", "c/scale"]
    rules = [(r"a/.*/scale", 1), (r"a/.*", 2), (r".*", 3)]
    assert decide(rules, names, "it") == {"a/b/scale": 1, "a/b/kernel": 2, "c/scale": 3}
    assert decide([(r"a/.*", 2)], names, "it", default=0) == {
        "a/b/scale": 2,
        "a/b/kernel": 2,
        "c/scale": 0,
    }
    with pytest.raises(UserError, match="no rule covers 'a/b/scale'"):
        decide([(r"scale", 1), (r"c/.*", 2)], names, "it")


@pytest.mark.parametrize(
    "rules, words",
    [
        ([(r"a/.*", 1)], "rates: no rule covers 'b/scale'"),
        # always beaten to it
        ([(r".*", 1), (r"a/kernel", 2)], "rates: rule 'a/kernel' decides no leaf"),
        (
            [(r"a/kernl", 1), (r".*", 1)],
            "rates: rule 'a/kernl' decides no leaf; did you mean 'a/kernel'",
        ),
        ([(r"a/(", 1)], "rates: 'a/(' is not a regular expression"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(rules, words):
    with pytest.raises(UserError) as error:
        decide(rules, ["a/kernel", "b/scale"], "rates")
    assert words in str(error.value) and "\n" not in str(error.value)


@given(st.dictionaries(st.sampled_from(["a/x", "a/y/z", "b", "c/w", "c/v"]), st.booleans()))
def test_partition_and_combine_are_inverse(decision):
    variables = tree({path: i for i, path in enumerate(decision)})
    trainable, frozen = partition(variables, decision)
    assert set(paths(trainable)) == {path for path, does in decision.items() if does}
    assert combine(trainable, frozen) == variables


# --------------------------------------------------------------------------------------------------
# What trains


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_trains_or_all_of_the_base(method):
    variables = variables_of(method)
    trained = {path for path, does in trains(settings(method), variables).items() if does}
    assert trained == {
        path
        for path in paths(variables)
        if path.startswith("params" if method == "fft" else "adapter")
    }


@pytest.mark.parametrize(
    "rule, named",
    [
        ("params/.*norm/scale", "scale"),
        ("params/.*embedding, params/.*scale", "s"),
        ("params/.*", ""),
    ],
)
def test_base_leaves_train_by_rule(rule, named):
    decisions = trains(settings(train__trainable=rule), variables_of("ffba"))
    base = {path for path in decisions if path.startswith("params")}
    expected = {
        "scale": {
            "params/final_norm/scale",
            "params/layers/attention_norm/scale",
            "params/layers/mlp_norm/scale",
        },
        "": base,
    }
    expected["s"] = expected["scale"] | {"params/embed_tokens/embedding"}
    assert {path for path in base if decisions[path]} == expected[named]
    assert all(does for path, does in decisions.items() if path not in base)


def test_a_rule_that_trains_nothing_is_refused():
    with pytest.raises(
        UserError, match=r"config.train.trainable: rule 'params/.\*nrom/scale' decides no leaf"
    ):
        trains(settings(train__trainable="params/.*nrom/scale"), variables_of("ffba"))
    with pytest.raises(UserError, match="fft trains every leaf already"):
        trains(settings("fft", train__trainable="params/.*norm/scale"), variables_of("fft"))


# --------------------------------------------------------------------------------------------------
# The optimizer


def first_updates(config, variables, gradients):
    """`(parameters, updates)` of the first step over what trains, by path."""
    trained = trains(config, variables)
    optimizer = make_optimizer(config, variables, trained)
    trainable, _ = partition(variables, trained)
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), trainable
    )
    grads = jax.tree.map(gradients, parameters)
    updates, _ = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p))(parameters, grads)
    return paths(parameters), paths(updates)


def test_decay_spares_norms():
    """With zero gradients only decay is left: p shrinks by rate x decay, a norm's scale stays."""
    config = settings(
        train__trainable="params/.*norm/scale", optim__weight_decay=0.1, optim__warmup_steps=0
    )
    parameters, updates = first_updates(config, variables_of("ffba"), np.zeros_like)
    assert sum(path.endswith("scale") for path in updates) == 3
    for path, update in updates.items():
        expected = 0.0 if path.endswith("scale") else -1e-3 * 0.1 * parameters[path]
        np.testing.assert_allclose(update, np.broadcast_to(expected, update.shape), rtol=1e-6)


def test_first_adam_step_is_the_rate():
    """Bias-corrected, Adam's first step is the sign of the gradient times the rate, whatever
    clipping scaled it to."""
    config = settings("lora", optim__warmup_steps=0)
    _, updates = first_updates(config, variables_of("lora"), lambda p: np.sign(p) * np.float32(3))
    for update in updates.values():
        np.testing.assert_allclose(np.abs(update), 1e-3, rtol=1e-3)


# one covers every leaf
@pytest.mark.parametrize("rules", ["adapter/.*_B=16", "adapter/.*_B=16, adapter/.*/A=1"])
def test_rate_rules_scale_their_leaves_alone(rules):
    variables = variables_of("lora")
    _, plain = first_updates(settings("lora"), variables, np.copy)
    _, scaled = first_updates(settings("lora", optim__rate_rules=rules), variables, np.copy)
    for path, update in plain.items():
        np.testing.assert_array_equal(
            scaled[path], update * np.float32(16 if path.endswith("_B") else 1)
        )


@pytest.mark.parametrize(
    "rule", ["adapter/.*_B", "adapter/.*_B=fast", "adapter/.*_B=-1", "adapter/.*_B=inf", "=2"]
)
def test_a_malformed_rate_rule_is_refused(rule):
    with pytest.raises(UserError, match="is not PATH_RULE=FACTOR"):
        first_updates(settings("lora", optim__rate_rules=rule), variables_of("lora"), np.copy)


def test_an_idle_rate_rule_is_refused():
    with pytest.raises(
        UserError, match=r"config.optim.rate_rules: rule 'adapter/.\*_C' decides no leaf"
    ):
        first_updates(
            settings("lora", optim__rate_rules="adapter/.*_C=2"), variables_of("lora"), np.copy
        )


def test_gradients_are_clipped_as_one():
    """The second moment of clipped gradients is (1 - b2) g² / ‖g‖²."""
    variables, config = variables_of("fpa"), settings("fpa", optim__clip_norm=1.0)
    trained = trains(config, variables)
    trainable, _ = partition(variables, trained)
    ones = jax.tree.map(lambda leaf: np.full(leaf.shape, 5, np.float32), trainable)
    optimizer = make_optimizer(config, variables, trained)
    _, state = optimizer.update(ones, optimizer.init(ones), ones)
    size = sum(leaf.size for leaf in jax.tree.leaves(ones))
    for leaf in jax.tree.leaves(optax.tree.get(state, "nu")):
        np.testing.assert_allclose(leaf, 1e-3 / size, rtol=1e-4)


@pytest.mark.parametrize(
    "fields, rates",
    [
        # 4 steps of ramp, peak at step 4, half-way down at 12, the final fraction from 20 on.
        (
            dict(schedule="cosine"),
            {0: 0.2, 3: 0.8, 4: 1.0, 8: 0.55 + 0.45 * 2**-0.5, 12: 0.55, 20: 0.1, 30: 0.1},
        ),
        (dict(schedule="linear"), {0: 0.2, 1: 0.4, 4: 1.0, 8: 0.775, 12: 0.55, 20: 0.1, 30: 0.1}),
        (dict(schedule="constant"), {0: 0.2, 4: 1.0, 12: 1.0, 30: 1.0}),
        (dict(schedule="linear", warmup_steps=0, final_fraction=0.0), {0: 1.0, 5: 0.75, 20: 0.0}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if "schedule" in value else "",
)
def test_schedule(fields, rates):
    config = settings(train__steps=20, optim__warmup_steps=4)
    for name, value in fields.items():
        config.optim[name] = value
    schedule = make_schedule(config)
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(1e-3 * rate, rel=1e-5, abs=1e-12), step


# --------------------------------------------------------------------------------------------------
# Sharding


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_sharding_rules_cover_every_leaf(tied, biased):
    """For every method; `decide` itself refuses an uncovered leaf and an idle rule."""
    for biases in (("qkv",), ("gate_up", "down")):
        config = dataclasses.replace(
            TINY, tie_word_embeddings=tied, biases=biases if biased else (), qk_norm=biased
        )
        base = abstract_base(config)
        for method in METHODS:
            adapter = AdapterConfig(method, 8)
            leaves = paths({"params": base, "adapter": abstract_adapter(config, adapter)})
            specs = decide(sharding_rules(config, adapter), list(leaves), method)
            assert specs.keys() == leaves.keys()
            for path, spec in specs.items():
                assert len(spec) <= len(leaves[path].shape), path
                assert not path.endswith(("_kernel", "/A", "_B")) or "fsdp" in spec, path


def test_shardings_of_a_tree():
    adapter = AdapterConfig("ffba", 8)
    mesh = make_mesh(settings())
    found = paths(shardings(variables_of("ffba"), mesh, TINY, adapter))
    assert found["params/layers/mlp/down/down_kernel"].spec == P(None, "tensor", "fsdp")
    assert found["adapter/layers/attention/qkv/A"].spec == P(None, "fsdp", None)
    assert found["params/embed_tokens/embedding"].spec == P("tensor", "fsdp")


@pytest.mark.parametrize(
    "fields, devices, words",
    [
        (dict(mesh__data=-1, mesh__fsdp=-1), 1, "only one axis may be -1"),
        (dict(mesh__fsdp=2), 1, "data,fsdp,tensor=-1,2,1 does not fit 1 device(s)"),
        (dict(mesh__fsdp=2), 5, "data,fsdp,tensor=-1,2,1 does not fit 5 device(s)"),
        (dict(train__batch_size=4, train__accumulation=2), 8, "config.train.batch_size=4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(fields, devices, words):
    with pytest.raises(UserError) as error:
        make_mesh(settings(**fields), devices=[object() for _ in range(devices)])
    assert words in str(error.value) and "\n" not in str(error.value)
