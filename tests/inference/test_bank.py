"""Switching adapters in place, and banks of them: what each row gets is what the adapter gives it
alone."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from support import random_adapter, spread

from flora_jax.adapters import (
    METHODS,
    AdapterConfig,
    device_layout,
    fuse,
    init_adapter,
    merge,
)
from flora_jax.analysis.unmerged import SevenDense, UnmergedDense, unmerge
from flora_jax.errors import UserError
from flora_jax.inference import bank
from flora_jax.inference.generator import Generator
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import init_base

pytestmark = pytest.mark.usefixtures("quick_compile")

ADAPTED = [m for m in METHODS if m != "fft"]


@pytest.fixture(scope="module")
def two_layers():
    """zflora's channels cross layers, so there are two; spread, so that greedy choices are clear
    ones."""
    config = dataclasses.replace(LlamaConfig.preset("tiny"), eos_token_id=())
    return config, spread(init_base(jax.random.key(0), config))


@pytest.mark.parametrize("method", ADAPTED)
def test_a_bank_gives_each_row_what_it_gets_alone(two_layers, prompts, method):
    config, base = two_layers
    adapter_config = AdapterConfig(method, rank=8, alpha=12.0)
    adapters = {name: random_adapter(config, adapter_config, i) for i, name in enumerate("abc")}
    generator = Generator(config, base, adapters, adapter_config, max_length=64, batch_size=8)
    names = ["b", None, "a", "c", "b"]
    alone = {}
    for name in (None, *adapters):
        generator.use(name)
        alone[name] = generator.generate(prompts, 6)
    generator.use("c")
    expected = [alone[name][i] for i, name in enumerate(names)]
    assert generator.generate(prompts, 6, adapter_names=names) == expected
    assert len({tuple(alone[name][1].tokens) for name in alone}) == 4
    # The bank stays, and `use` means in it what it meant before.
    assert generator.generate(prompts, 6) == alone["c"]
    generator.use(None)
    assert generator.generate(prompts, 6) == alone[None]
    assert generator.generate(prompts, 6, adapter_names=["a"] * 5) == alone["a"]


@pytest.mark.parametrize(
    "method, rank", [("lora", 6), ("fpa", 3), ("ffba_qg_add", 4), ("zflora", 4)]
)
def test_adapters_of_other_ranks_and_scales_share_a_bank(two_layers, prompts, method, rank):
    config, base = two_layers
    configs = {
        "a": AdapterConfig(method, rank=8, alpha=4.0),
        "b": AdapterConfig(method, rank=rank, alpha=9.0),
    }
    adapters = {name: random_adapter(config, configs[name], i) for i, name in enumerate("ab")}
    bank = Generator(config, base, adapters, configs, max_length=64, batch_size=8)
    found = bank.generate(prompts, 6, adapter_names=["a", "b", "b", None, "a"])
    for i, name in enumerate(["a", "b", "b", None, "a"]):
        one = {name: adapters[name]} if name else None
        alone = Generator(config, base, one, configs.get(name), max_length=64, batch_size=8)
        assert found[i] == alone.generate([prompts[i]], 6)[0]


def test_a_thousand_switches_leave_the_base_alone(two_layers, prompts):
    config, base = two_layers
    adapter_config = AdapterConfig("ffba", rank=8, alpha=12.0)
    adapters = {name: random_adapter(config, adapter_config, i) for i, name in enumerate("abc")}
    generator = Generator(config, base, adapters, adapter_config, max_length=64, batch_size=2)
    first = {}
    for name in (None, *adapters):
        generator.use(name)
        first[name] = generator.generate(prompts[:2], 6)
    order = np.random.default_rng(0).integers(0, 4, 1000)
    for i in order:
        generator.use([None, *adapters][i])
    last = [None, *adapters][order[-1]]
    assert generator.generate(prompts[:2], 6) == first[last]
    for name, adapter in adapters.items():
        generator.use(name)
        expected = fuse(base, adapter, config, adapter_config, device_layout())
        same = jax.tree.map(lambda a, b: bool((a == b).all()), generator.params, expected)
        assert jax.tree.all(same)
    assert len({tuple(g[0].tokens) for g in first.values()}) == 4


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_switch_changes_no_answer(two_layers, prompts, monkeypatch, at):
    """Ctrl-C at one of three writes: of a switch, and of a bank of two."""
    config, base = two_layers
    adapter_config = AdapterConfig("ffba", rank=8, alpha=12.0)
    adapters = {name: random_adapter(config, adapter_config, i) for i, name in enumerate("ab")}
    generator = Generator(config, base, adapters, adapter_config, max_length=64, batch_size=8)
    alone = {}
    for name in ("b", None, "a"):
        generator.use(name)
        alone[name] = generator.generate(prompts, 6)

    write = bank._write

    def interrupted(*arguments):
        if next(writes) == at:
            raise KeyboardInterrupt
        return write(*arguments)

    both = ["a", "b", "b", None, "a"]
    for names in (["a"] * 5, ["b"] * 5, [None] * 5, both):
        generator = Generator(config, base, adapters, adapter_config, max_length=64, batch_size=8)
        writes = itertools.count(1)
        monkeypatch.setattr(bank, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generator.use("b")
            generator.generate(prompts, 6, adapter_names=both)
        monkeypatch.undo()
        expected = [alone[name][i] for i, name in enumerate(names)]
        assert generator.generate(prompts, 6, adapter_names=names) == expected


@pytest.mark.parametrize("method", ["lora", "ffba", "fpa"])
@pytest.mark.parametrize("merged", [True, False])
def test_products_apart_decode_to_the_same(two_layers, prompts, method, merged):
    """The baseline of the measurements computes what it is measured against."""
    config, base = two_layers
    adapter_config = AdapterConfig(method, rank=8, alpha=12.0)
    adapter = random_adapter(config, adapter_config, 1)
    generator = Generator(config, base, {"a": adapter}, adapter_config, max_length=64, batch_size=8)
    expected = generator.generate(prompts, 6)
    generator._bank.params = unmerge(base, adapter, config, adapter_config, seven=not merged)
    generator._model = generator._model.clone(dense=UnmergedDense if merged else SevenDense)
    assert generator.generate(prompts, 6) == expected
    if method == "lora":
        assert (
            Generator(config, merge(base, adapter, config, adapter_config), max_length=64).generate(
                prompts, 6
            )
            == expected
        )


def test_one_adapter_beside_the_bare_base(two_layers, prompts):
    """Rows with the only adapter and rows without one, in a batch: a bank of one place."""
    config, base = two_layers
    adapter_config = AdapterConfig("ffba", rank=8, alpha=12.0)
    adapter = random_adapter(config, adapter_config, 1)
    generator = Generator(config, base, {"a": adapter}, adapter_config, max_length=64, batch_size=8)
    adapted = generator.generate(prompts, 6)
    bare = Generator(config, base, max_length=64, batch_size=8).generate(prompts, 6)
    names = ["a", None, None, "a", "a"]
    expected = [
        own if name else plain for name, own, plain in zip(names, adapted, bare, strict=True)
    ]
    assert adapted != expected != bare
    assert generator.generate(prompts, 6, adapter_names=names) == expected


def test_adapters_that_do_not_go_together_are_refused(two_layers):
    config, base = two_layers

    def make(method, **fields):
        return AdapterConfig(method, rank=8, **fields)

    for one, other, words in [
        (
            make("ffba"),
            make("ffba_qg_add"),
            ("'b' (ffba_qg_add", "add_to=q,gate", "add_to=q,k,v,gate,up"),
        ),
        (make("fpa"), make("fpa", activation="relu"), ("activation=relu", "activation=identity")),
        (make("lora"), AdapterConfig("fft", 16), ("'b' (fft", "as the first is (lora")),
        (
            AdapterConfig("ffba_qg_add", 6),
            AdapterConfig("ffba_qg_add", 8),
            ("rank 6", "rank 8", "multiple of 6"),
        ),
    ]:
        configs = {"a": one, "b": other}
        adapters = {
            name: init_adapter(jax.random.key(0), config, configs[name]) for name in configs
        }
        with pytest.raises(UserError) as error:
            Generator(config, base, adapters, configs)
        assert all(word in str(error.value) for word in words), error.value
    adapters = {"a": init_adapter(jax.random.key(0), config, make("lora"))}
    with pytest.raises(UserError, match="adapter 'a' needs its adapter_config"):
        Generator(config, base, adapters)
    generator = Generator(config, base, adapters, make("lora"))
    with pytest.raises(UserError, match="1 names for 2 prompts"):
        generator.generate([[1], [2]], 2, adapter_names=["a"])
    with pytest.raises(UserError, match="'x' is not loaded"):
        generator.generate([[1]], 2, adapter_names=["x"])


def test_full_fine_tuning_is_its_base(two_layers, prompts):
    """fft has no adapter to write: under any name it is the base that was given."""
    config, base = two_layers
    plain = Generator(config, base, max_length=64, batch_size=8).generate(prompts, 4)
    generator = Generator(
        config, base, {"a": {}}, AdapterConfig("fft", 1), max_length=64, batch_size=8
    )
    assert generator.generate(prompts, 4) == plain
    generator.use("a")
    assert generator.generate(prompts, 4, adapter_names=["a", None, "a", "a", None]) == plain
