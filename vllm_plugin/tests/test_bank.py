"""A bank: each request has its own adapter, and its answer is the one that it has alone."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import bank_settings, check, generate, mixed
from safetensors.torch import load_file, save_file

from flora_vllm.bank import check_adapter
from flora_vllm.plan import Plan, plan_of

KINDS = {
    "ffba": ["ffba_0", "base", "ffba_1", "ffba_2", "ffba_3"],
    "fpa": ["fpa_1", "base", "fpa_0"],
    "ffba_qd_add": ["ffba_qd_add_0", "base", "ffba_qd_add_1"],
    "ffba_qg_add": ["ffba_qg_add_0", "base"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch(exports, kind):
    import vllm

    asked, owed = mixed(exports / "bank", KINDS[kind])
    llm = vllm.LLM(**bank_settings(exports, KINDS[kind][0], 4))
    check(generate(llm, asked), owed)


@pytest.mark.parametrize("places", [1, 2])
def test_more_adapters_than_places(exports, places):
    """Who comes takes the place of who was used least, and what was there is gone."""
    import vllm

    names = KINDS["ffba"]
    llm = vllm.LLM(**bank_settings(exports, "ffba_3", places))
    for order in (names, names[::-1]):
        asked, owed = mixed(exports / "bank", order)
        check(generate(llm, asked), owed)


def test_places_that_nothing_was_written_to(exports, monkeypatch):
    """They hold zeros, whatever was in their memory before."""
    import vllm
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    create = UnquantizedLinearMethod.create_weights

    def poisoned(self, layer, *args, **kwargs):
        create(self, layer, *args, **kwargs)
        layer.weight.data.fill_(float("nan"))

    monkeypatch.setattr(UnquantizedLinearMethod, "create_weights", poisoned)
    llm = vllm.LLM(**bank_settings(exports, "ffba_0", 2))
    for names in (["base"], ["base", "ffba_2"]):
        asked, owed = mixed(exports / "bank", names)
        check(generate(llm, asked), owed)


# ---------------------------------------------------------------------------------------- refusals


@pytest.fixture
def bank(exports):
    """A bank of ffba and the configuration of its base, without an engine."""
    config = SimpleNamespace(**json.loads((exports / "base" / "config.json").read_text()))
    config.flora = str(exports / "bank" / "ffba_0")
    lora = SimpleNamespace(max_lora_rank=8, max_loras=2, fully_sharded_loras=False)
    return plan_of(config, lora), config


def test_adapters_that_fit(exports, bank):
    for name in KINDS["ffba"]:
        if name != "base":
            check_adapter(exports / "bank" / name, *bank)


def test_a_block_that_the_bank_has_not(exports):
    """A bank like ffba_2, attention alone, does not take what is in the FFN, too."""
    plans = [
        Plan.of(json.loads((exports / "bank" / name / "adapter_config.json").read_text())["flora"])
        for name in ("ffba_0", "ffba_2")
    ]
    assert plans[1].fits(plans[0])
    assert not plans[0].fits(plans[1])


@pytest.mark.parametrize(
    "name, why",
    [
        ("fpa_0", "'fpa' is not laid out as this bank's are"),
        ("ffba_qg_add_0", "'ffba_qg_add' is not laid out as this bank's are"),
        ("large", "rank 16 is above --max-lora-rank 8"),
        ("../ffba", "no such adapter"),
    ],
)
def test_an_adapter_of_another_kind(exports, bank, name, why):
    with pytest.raises((ValueError, OSError), match=why) as error:
        check_adapter(exports / "bank" / name, *bank)
    assert "\n" not in str(error.value)


def change_config(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def flora_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())["flora"]


def change_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


A = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight"
B = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
DAMAGES = {
    "a LoRA": (lambda d: change_config(d, peft_type="LORA"), "peft_type='LORA'"),
    "a later format": (lambda d: change_config(d, format_version=3), "format_version=3"),
    "equal shapes, another base": (
        lambda d: change_config(d, fingerprint="0" * 32),
        "trained on another base, of fingerprint 0000",
    ),
    "no flora": (lambda d: change_config(d, flora={}), "does not say what rides where"),
    "zFLoRA as it was": (
        lambda d: change_config(d, flora={**flora_of(d), "stream": 8, "stream_norm": False}),
        "passed the norms as they were",
    ),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "no JSON"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "no complete"),
    "half a file": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x"), "no complete"),
    "a missing side": (lambda d: change_tensors(d, lambda t: t.pop(B)), f"{B} is missing"),
    "another base": (
        lambda d: change_tensors(d, lambda t: t.update({A: t[A][:, :-1].contiguous()})),
        r"is \(24, 127\), this base wants \(24, 128\)",
    ),
    "too much": (lambda d: change_tensors(d, lambda t: t.update(more=t[A].clone())), "wants none"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter(exports, bank, tmp_path, damage):
    change, why = DAMAGES[damage]
    own = tmp_path / "adapter"
    shutil.copytree(exports / "bank" / "ffba_0", own)
    change(own)
    with pytest.raises(ValueError, match=why) as error:
        check_adapter(own, *bank)
    assert "\n" not in str(error.value)


def test_a_bank_over_another_architecture(exports, bank):
    """Its adapters say what the base computes."""
    config = SimpleNamespace(model_type="qwen3", flora=bank[1].flora)
    lora = SimpleNamespace(max_lora_rank=8, max_loras=2, fully_sharded_loras=False)
    with pytest.raises(ValueError, match="for a base of model_type='llama'; this one's is 'qwen3'"):
        plan_of(config, lora)


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda differences: differences.pop("qk_norm"), "missing .* 'qk_norm'.*export it again"),
        (lambda differences: differences.update(softcap=3.0), "unexpected .* 'softcap'"),
    ],
)
def test_a_base_that_is_not_known(exports, change, why):
    config = json.loads((exports / "ffba" / "config.json").read_text())
    change(config["differences"])
    with pytest.raises(ValueError, match=why) as error:
        plan_of(SimpleNamespace(**config), None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flora, lora, why",
    [
        (None, SimpleNamespace(), "must name the directory of an adapter"),
        ("somewhere", None, "--enable-lora is needed"),
        ("nowhere", SimpleNamespace(fully_sharded_loras=False), "no such adapter"),
        ("nowhere", SimpleNamespace(fully_sharded_loras=True), "--fully-sharded-loras"),
        ({}, SimpleNamespace(), "has its adapter in its weights"),
    ],
)
def test_flags_that_do_not_go_together(flora, lora, why):
    with pytest.raises((ValueError, OSError), match=why):
        plan_of(SimpleNamespace(flora=flora), lora)


def test_a_rank_that_does_not_tile(exports):
    """8 is no multiple of 3: fpa fills up with zeros, ffba cannot."""
    plan = Plan.of(json.loads((exports / "bank/fpa_1/adapter_config.json").read_text())["flora"])
    assert plan.rank == 3
    assert not plan.repeats
    plan = Plan.of(json.loads((exports / "bank/ffba_0/adapter_config.json").read_text())["flora"])
    assert plan.repeats
