"""Exports against their real consumers: transformers, PEFT, safetensors; our own logits and text
are what they owe."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import ROOT, random_adapter, spread

from flora_jax.adapters import METHODS, AdapterConfig, merge
from flora_jax.errors import UserError
from flora_jax.inference.generator import Generator
from flora_jax.interop import exports, formats, shards
from flora_jax.interop.adapter_files import load_adapter
from flora_jax.interop.exports import MARKER, export
from flora_jax.interop.formats import FORMATS, Trained
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.architectures import ARCHITECTURES, PRODUCTS
from flora_jax.models.config import LlamaConfig, RopeScaling
from flora_jax.models.hf import hf_shapes, to_hf_tensors
from flora_jax.models.llama import Llama, init_base
from flora_jax.models.loading import load_pretrained
from flora_jax.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
# What the preset has not: an untied head, biases, llama3 scaling, another grouping.
OTHER = dataclasses.replace(
    TINY,
    tie_word_embeddings=False,
    biases=PRODUCTS,
    num_key_value_heads=3,
    rope_theta=5e5,
    rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=64),
    num_hidden_layers=3,
)
# One of each architecture, with what sets it apart.
ROWS = {
    config.model_type: config
    for config in (
        dataclasses.replace(TINY, model_type="qwen3", qk_norm=True),
        dataclasses.replace(TINY, model_type="qwen2", biases=("qkv",)),
        dataclasses.replace(TINY, model_type="mistral", tie_word_embeddings=False),
        dataclasses.replace(TINY, model_type="smollm3", no_rope_layers=(1,)),
        dataclasses.replace(
            TINY,
            model_type="granite",
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.1,
            logits_divisor=4.0,
        ),
    )
}
assert {"llama", *ROWS} == {*ARCHITECTURES}
EACH = [pytest.param(name, marks=[] if name == "qwen3" else pytest.mark.slow) for name in ROWS]
ADAPTERS = {
    "lora": AdapterConfig("lora", 4, alpha=6.0),
    "pf_lora": AdapterConfig("pf_lora", 4, targets="q,v,down", rslora=True),
    "ffa": AdapterConfig("ffa", 8, alpha=4.0),
    "fpa": AdapterConfig("fpa", 8, activation="gelu"),
    "parallel": AdapterConfig("parallel", 4, activation="silu", targets="q,k,v,o"),
    "ffba": AdapterConfig("ffba", 8, alpha=12.0),
    "ffba_qg_add": AdapterConfig("ffba_qg_add", 16),
    "ffba_qd_add": AdapterConfig("ffba_qd_add", 8),
    "zflora": AdapterConfig("zflora", 8),
}
assert {*ADAPTERS, "fft"} == set(METHODS)


@pytest.fixture(scope="module")
def bases():
    def base(config):
        params = spread(init_base(jax.random.key(0), config))
        # Biases and norms that do something.
        return jax.tree.map(
            lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape) * (x.ndim < 3),
            params,
        )

    return {config: base(config) for config in (TINY, OTHER, *ROWS.values())}


def make(base, config, adapter_config, params=None, seed=1):
    adapter = random_adapter(config, adapter_config, seed)
    return Trained(
        config=config,
        base=base,
        adapter_config=adapter_config,
        adapter=adapter,
        params=params or {},
        tokenizer=load_tokenizer("tiny"),
        base_model="base",
        fingerprint=base_fingerprint(base),
    )


def our_logits(trained, tokens, **arguments):
    variables = {"params": trained.full_base, "adapter": trained.adapter}
    return np.asarray(
        Llama(trained.config, trained.adapter_config).apply(
            variables, jnp.asarray(tokens), **arguments
        )
    )


def torch_model(path, **arguments):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True, **arguments
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def torch_logits(model, tokens, **arguments):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens), **arguments).logits.float().numpy()


TOKENS = np.random.default_rng(0).integers(0, 256, (2, 100))
MERGEABLE = [name for name in ADAPTERS if METHODS[name].mergeable]


@pytest.mark.parametrize(
    "config, method",
    [
        *((TINY, method) for method in ADAPTERS),
        *((OTHER, method) for method in ("lora", "ffba_qd_add", "zflora")),
        (ROWS["qwen3"], "ffba"),
        *(
            pytest.param(config, method, marks=pytest.mark.slow)
            for config in ROWS.values()
            for method in ADAPTERS
        ),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else value.model_type + "-biased" * bool(value.biases)
    ),
)
def test_transformers_export_gives_our_logits(tmp_path, bases, config, method):
    trained = make(bases[config], config, ADAPTERS[method])
    report = export(trained, tmp_path / "out", "transformers")
    assert report["logits"]["max_change"] <= report["logits"]["bound"]
    model, ours = torch_model(tmp_path / "out"), our_logits(trained, TOKENS)
    assert np.abs(torch_logits(model, TOKENS) - ours).max() <= 2e-4
    off = np.asarray(Llama(config, None).apply({"params": trained.base}, jnp.asarray(TOKENS)))
    assert np.abs(ours - off).max() > 0.1
    assert_four_products(model)
    stored = json.loads((tmp_path / "out/config.json").read_text())
    assert {*stored["auto_map"]} == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert stored["rope_parameters"]["rope_theta"] == stored["rope_theta"] == config.rope_theta
    assert (stored["rope_scaling"] is None) == (config.rope_scaling is None)


def assert_four_products(model):
    """A layer has four fused products and the B's of a LoRA. vLLM's Transformers backend replaces
    every nn.Linear, and every norm that is nothing but one: those products are none, and zflora's
    norms have a class of their own."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    parts = dict(model.model.layers[0].named_modules())
    fused = [name for name, part in parts.items() if type(part).__name__ == "FusedLinear"]
    assert fused == ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    linears = [name for name, part in parts.items() if isinstance(part, torch.nn.Linear)]
    assert all(".B." in name for name in linears)
    assert bool(linears) == (model.config.flora["method"] in ("lora", "pf_lora"))
    norms = {type(part).__name__ for part in model.modules() if isinstance(part, LlamaRMSNorm)}
    expected = {"RMSNormOfStream"} if model.config.flora["stream"] else {"LlamaRMSNorm"}
    if model.config.differences["qk_norm"]:
        expected.add("LlamaRMSNorm")
    if model.config.flora["stream"] or model.config.differences["logits_divisor"] != 1:
        expected.add("RMSNormAfterStream")
    assert norms == expected


@pytest.mark.parametrize("config, method", [(TINY, "lora"), (OTHER, "zflora")])
def test_remote_code_by_its_other_doors(tmp_path, bases, config, method):
    """AutoModel loads the stack without the head; from_config draws every weight as transformers
    draws a Llama's."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export(make(bases[config], config, ADAPTERS[method]), tmp_path / "out", "transformers")
    stack = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(stack).__name__ == "FloraLlamaModel"
    whole = torch_model(tmp_path / "out")
    with torch.no_grad():
        tokens = torch.tensor(TOKENS)
        hidden = stack.eval()(tokens).last_hidden_state
        assert torch.equal(whole.lm_head(hidden), whole(tokens).logits)

    fields = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    drawn = transformers.AutoModelForCausalLM.from_config(fields, trust_remote_code=True)
    assert (drawn.lm_head.weight is drawn.model.embed_tokens.weight) == config.tie_word_embeddings
    for name, value in drawn.named_parameters():
        if "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            spare = 4 / value.numel() ** 0.5
            assert value.std().item() == pytest.approx(fields.initializer_range, rel=spare), name


def test_remote_code_refuses_to_be_split(tmp_path, bases):
    """vLLM hangs its attention, with one device's share of the heads, on the module."""
    torch = pytest.importorskip("torch")
    export(make(bases[TINY], TINY, ADAPTERS["ffba"]), tmp_path / "out", "transformers")
    attention = torch_model(tmp_path / "out").model.layers[0].self_attn
    given = torch.nn.Module()
    given.num_heads = TINY.num_attention_heads
    attention.attn = given
    given.num_heads //= 2
    with pytest.raises(NotImplementedError, match="tensor_parallel_size must be 1"):
        attention.attn = given


@pytest.mark.parametrize(
    "form", [name for name, form in FORMATS.items() if not form.refuse(ADAPTERS["lora"], {})]
)
@pytest.mark.parametrize("method", MERGEABLE)
def test_exports_of_a_lora_give_our_logits_and_text(tmp_path, bases, hf_base, method, form):
    """Logits, and greedy text in batches padded on either side, of every format that can hold the
    method."""
    pytest.importorskip("torch")
    trained = make(bases[TINY], TINY, ADAPTERS[method])
    export(trained, tmp_path / "out", form)
    if form == "peft":
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(torch_model(hf_base), str(tmp_path / "out")).eval()
    else:
        model = torch_model(tmp_path / "out")
    ours = our_logits(trained, TOKENS)
    assert np.abs(torch_logits(model, TOKENS) - ours).max() <= 2e-4
    assert_padding_changes_nothing(model, trained)
    assert_same_text(model, trained)


@pytest.mark.parametrize("method", ["fpa", "ffba", "zflora"])
def test_transformers_export_generates_our_text(tmp_path, bases, method):
    trained = make(bases[TINY], TINY, ADAPTERS[method])
    export(trained, tmp_path / "out", "transformers")
    model = torch_model(tmp_path / "out")
    assert_padding_changes_nothing(model, trained)
    assert_same_text(model, trained)


def assert_padding_changes_nothing(model, trained):
    """A batch of unequal rows, padded on the left and on the right: logits of the real tokens are
    ours."""
    import torch

    lengths = [100, 37]
    for side in ("left", "right"):
        mask = np.array(
            [[i >= 100 - n if side == "left" else i < n for i in range(100)] for n in lengths]
        )
        positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
        theirs = torch_logits(
            model, TOKENS, attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        )
        padded = our_logits(trained, TOKENS, mask=jnp.asarray(mask))
        assert np.abs(theirs - padded)[mask].max() <= 2e-4


def assert_same_text(model, trained):
    """Greedy, 64 tokens, a batch of unequal prompts padded on the left, as transformers wants
    it."""
    import torch

    prompts = [TOKENS[0, :40].tolist(), TOKENS[1, :7].tolist()]
    pad = trained.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (40 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (40 - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=pad
        )
    generator = Generator(
        trained.config,
        trained.full_base,
        {"a": trained.adapter},
        trained.adapter_config,
        trained.tokenizer,
        max_length=128,
        batch_size=2,
    )
    for row, ours in zip(out[:, 40:].tolist(), generator.generate(prompts, 64), strict=True):
        # What follows the end (eos, or the template's <|im_end|>) is padding.
        end = next((i for i, token in enumerate(row) if token in (257, 260)), len(row))
        assert row[:end] == ours.tokens


@pytest.fixture(scope="module")
def hf_base(bases, tmp_path_factory):
    """The tiny base as an HF directory."""
    path = tmp_path_factory.mktemp("base")
    save_file(
        dict(to_hf_tensors(TINY, bases[TINY])),
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (path / "config.json").write_text(json.dumps(TINY.to_hf()))
    load_tokenizer("tiny").save_pretrained(path)
    return path


@pytest.mark.parametrize("model_type", EACH)
def test_each_architecture_in_its_own_class(tmp_path, bases, model_type):
    """Merged, and as PEFT's LoRA over the base; both are transformers' own class of it, and ours
    again; in the export with code, padded rows and greedy text, too."""
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    config = ROWS[model_type]
    trained = make(bases[config], config, ADAPTERS["lora"])
    ours = our_logits(trained, TOKENS)
    base = tmp_path / "base"
    base.mkdir()
    save_file(
        dict(to_hf_tensors(config, trained.base)),
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    (base / "config.json").write_text(json.dumps(config.to_hf()))
    export(trained, tmp_path / "merged", "merged")
    export(trained, tmp_path / "peft", "peft")
    merged = torch_model(tmp_path / "merged")
    assert type(merged).__name__ == ARCHITECTURES[model_type].hf_class
    over = peft.PeftModel.from_pretrained(torch_model(base), str(tmp_path / "peft")).eval()
    for model in (merged, over):
        assert np.abs(torch_logits(model, TOKENS) - ours).max() <= 2e-4
    again, params = load_pretrained(str(tmp_path / "merged"))
    assert dataclasses.replace(again, eos_token_id=config.eos_token_id) == config
    logits = Llama(again).apply({"params": params}, jnp.asarray(TOKENS))
    assert np.abs(np.asarray(logits) - ours).max() <= 1e-4
    fused = make(bases[config], config, ADAPTERS["ffba"])
    export(fused, tmp_path / "fused", "transformers")
    assert_padding_changes_nothing(torch_model(tmp_path / "fused"), fused)
    assert_same_text(torch_model(tmp_path / "fused"), fused)


@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_equals_merge_and_peft(tmp_path, bases, hf_base, method):
    peft = pytest.importorskip("peft")
    trained = make(bases[TINY], TINY, ADAPTERS[method])
    report = export(trained, tmp_path / "merged", "merged")
    export(trained, tmp_path / "peft", "peft")
    ours = load_file(tmp_path / "merged/model.safetensors")
    theirs = (
        peft.PeftModel.from_pretrained(torch_model(hf_base), str(tmp_path / "peft"))
        .merge_and_unload()
        .state_dict()
    )
    base = dict(to_hf_tensors(TINY, trained.base))
    in_memory = dict(
        to_hf_tensors(TINY, merge(trained.base, trained.adapter, TINY, trained.adapter_config))
    )
    changed = set()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].numpy(), atol=1e-5, err_msg=name)
        np.testing.assert_allclose(value, in_memory[name], atol=1e-6, err_msg=name)
        if not np.array_equal(value, base[name]):
            changed.add(name)
    assert changed == set(formats._targets(trained))
    assert (
        report["changed"]
        == report["targeted"]
        == len(changed)
        == TINY.num_hidden_layers * len(trained.adapter_config.targets)
    )
    # Our own reader takes it for the Llama that it is.
    config, base = load_pretrained(str(tmp_path / "merged"))
    # the chat template's end, too
    assert config == dataclasses.replace(TINY, eos_token_id=(257, 260))
    logits = np.asarray(Llama(config, None).apply({"params": base}, jnp.asarray(TOKENS)))
    assert np.abs(logits - our_logits(trained, TOKENS)).max() <= 1e-4


def test_full_fine_tuning_and_trained_norms(tmp_path, bases):
    """Base leaves that trained are in merged and transformers exports; a LoRA has no place for
    them."""
    moved = jax.tree.map(lambda x: x + 0.05, bases[TINY])
    fft = Trained(
        config=TINY,
        base=bases[TINY],
        adapter_config=AdapterConfig("fft", 1),
        adapter={},
        params=moved,
        tokenizer=load_tokenizer("tiny"),
        base_model="base",
        fingerprint="f",
    )
    report = export(fft, tmp_path / "fft", "merged")
    assert report["changed"] == report["targeted"] == report["tensors"]
    assert (
        np.abs(torch_logits(torch_model(tmp_path / "fft"), TOKENS) - our_logits(fft, TOKENS)).max()
        <= 2e-4
    )
    for form in ("peft", "transformers", "vllm"):
        with pytest.raises(UserError, match="--format merged can hold it"):
            export(fft, tmp_path / form, form)

    norms = {"final_norm": moved["final_norm"], "layers": {"mlp_norm": moved["layers"]["mlp_norm"]}}
    lora = make(bases[TINY], TINY, ADAPTERS["pf_lora"], norms)
    with pytest.raises(
        UserError, match="final_norm/scale trained; --format merged or transformers can hold it"
    ):
        export(lora, tmp_path / "peft", "peft")
    ffba = make(bases[TINY], TINY, ADAPTERS["ffba"], norms)
    with pytest.raises(UserError, match="final_norm/scale trained; --format transformers can hold"):
        export(ffba, tmp_path / "vllm", "vllm")
    report = export(lora, tmp_path / "merged", "merged")
    assert report["targeted"] == 2 * 3 + 2 + 1
    export(lora, tmp_path / "remote", "transformers")
    for path in ("merged", "remote"):
        assert (
            np.abs(
                torch_logits(torch_model(tmp_path / path), TOKENS) - our_logits(lora, TOKENS)
            ).max()
            <= 2e-4
        )


@pytest.mark.parametrize(
    "method, form",
    [
        ("lora", "merged"),
        ("lora", "peft"),
        ("ffba", "transformers"),
        ("zflora", "transformers"),
        ("ffba", "vllm"),
        ("fpa", "vllm"),
    ],
)
def test_bfloat16(tmp_path, bases, hf_base, method, form):
    """Within the bound that LOGIT_BOUNDS states; and transformers runs it in bfloat16 throughout,
    cache and all."""
    torch = pytest.importorskip("torch")
    trained = make(bases[TINY], TINY, ADAPTERS[method])
    report = export(trained, tmp_path / "out", form, dtype="bfloat16")
    alone = form in ("peft", "vllm")
    file = "adapter_model.safetensors" if alone else "model.safetensors"
    with safe_open(tmp_path / "out" / file, framework="np") as opened:
        names = opened.keys()
        assert {opened.get_slice(name).get_dtype() for name in names} == {"BF16"}
    ours = our_logits(trained, TOKENS)
    assert 1e-5 < report["logits"]["max_change"] <= report["logits"]["bound"]
    if alone:
        return
    model = torch_model(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    bound = exports.LOGIT_BOUNDS["bfloat16"] * np.abs(ours).max()
    assert np.abs(torch_logits(model, TOKENS) - ours).mean() <= bound / 2
    text = model.generate(
        torch.tensor(TOKENS[:, :9]), max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    steps = torch_logits(model, text[:, :-1].numpy())[:, 8:].argmax(-1)
    # a cached step rounds elsewhere than a whole pass
    assert (steps == text[:, 9:].numpy()).mean() >= 0.5
    assert np.abs(torch_logits(model.float(), TOKENS) - ours).max() <= bound


def test_saved_again_piped_and_recorded(tmp_path, bases):
    """save_pretrained of what AutoModelForCausalLM gave, a pipeline, and hidden states of every
    layer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    trained = make(bases[TINY], TINY, ADAPTERS["ffba_qg_add"])
    export(trained, tmp_path / "out", "transformers")
    first = torch_model(tmp_path / "out")
    first.save_pretrained(tmp_path / "again")
    again = torch_model(tmp_path / "again")
    np.testing.assert_array_equal(torch_logits(again, TOKENS), torch_logits(first, TOKENS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == trained.tokenizer.chat_template
    pipe = transformers.pipeline(
        "text-generation", model=str(tmp_path / "out"), trust_remote_code=True, dtype=torch.float32
    )
    text = pipe("The capital of France", max_new_tokens=5, do_sample=False, return_full_text=False)[
        0
    ]["generated_text"]
    generator = Generator(
        TINY, trained.base, {"a": trained.adapter}, trained.adapter_config, trained.tokenizer, 64, 1
    )
    prompt = trained.tokenizer("The capital of France").input_ids
    assert text == generator.generate([prompt], 5)[0].text
    with torch.no_grad():
        out = first(torch.tensor(TOKENS), output_hidden_states=True, use_cache=True)
    assert len(out.hidden_states) == TINY.num_hidden_layers + 1
    assert out["cache" if "cache" in out else "past_key_values"].get_seq_length() == TOKENS.shape[1]


def test_the_version_that_draws_a_tied_head_at_random_is_refused(tmp_path, bases, monkeypatch):
    export(make(bases[TINY], TINY, ADAPTERS["ffba"]), tmp_path / "out", "transformers")
    code = sys.modules[type(torch_model(tmp_path / "out")).__module__]
    monkeypatch.setattr(code.transformers, "__version__", "5.3.0")
    with pytest.raises(ImportError, match=r"5\.3\.0 draws the tied lm_head"):
        torch_model(tmp_path / "out")


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_peft_round_trips(tmp_path, bases, hf_base):
    """PEFT -> ours -> PEFT and ours -> PEFT -> ours to the bit; an ffa comes back as a lora of
    equal logits."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    fields = dict(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    for use_rslora in (False, True):
        torch.manual_seed(0)
        theirs = tmp_path / f"peft{use_rslora}"
        model = peft.get_peft_model(
            torch_model(hf_base),
            peft.LoraConfig(use_rslora=use_rslora, init_lora_weights=False, **fields),
        )
        model.save_pretrained(theirs)
        adapter_config, trained = load_adapter(theirs, TINY)
        out = tmp_path / f"back{use_rslora}"
        export(
            Trained(
                config=TINY,
                base=bases[TINY],
                adapter_config=adapter_config,
                adapter=trained["adapter"],
                tokenizer=load_tokenizer("tiny"),
                base_model=str(hf_base),
                fingerprint="f",
            ),
            out,
            "peft",
        )
        before, after = (
            load_file(theirs / "adapter_model.safetensors"),
            load_file(out / "adapter_model.safetensors"),
        )
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(value, after[name], err_msg=name)
        first, second = (json.loads((d / "adapter_config.json").read_text()) for d in (theirs, out))
        for field in ("r", "lora_alpha", "use_rslora", "peft_type", "task_type", "bias"):
            assert first[field] == second[field], field
        assert sorted(first["target_modules"]) == sorted(second["target_modules"])

    for method in ("lora", "pf_lora"):
        ours = make(bases[TINY], TINY, ADAPTERS[method])
        export(ours, tmp_path / method, "peft")
        # What PEFT itself writes after reading it.
        again = peft.PeftModel.from_pretrained(torch_model(hf_base), str(tmp_path / method))
        again.save_pretrained(tmp_path / f"{method}_again")
        found, trained = load_adapter(tmp_path / f"{method}_again", TINY)
        assert found == dataclasses.replace(ours.adapter_config, method="lora")
        a, b = flatten_dict(ours.adapter, sep="/"), flatten_dict(trained["adapter"], sep="/")
        assert a.keys() == b.keys()
        for path in a:
            np.testing.assert_array_equal(a[path], b[path], err_msg=path)

    ffa = make(bases[TINY], TINY, ADAPTERS["ffa"])
    export(ffa, tmp_path / "ffa", "peft")
    found, trained = load_adapter(tmp_path / "ffa", TINY)
    assert found.method == "lora"
    logits = Llama(TINY, found).apply(
        {"params": ffa.base, "adapter": trained["adapter"]}, jnp.asarray(TOKENS)
    )
    assert np.abs(np.asarray(logits) - our_logits(ffa, TOKENS)).max() <= 1e-4


# ----------------------------------------------------------------------------------------- refusals


def test_what_exists_is_kept(tmp_path, bases, tree_hash):
    trained = make(bases[TINY], TINY, ADAPTERS["lora"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    for overwrite, words in ((False, "exists"), (True, "no directory that this command wrote")):
        with pytest.raises(UserError, match=words):
            export(trained, out, "merged", overwrite=overwrite)
    assert tree_hash(tmp_path).keys() == {"out/thesis.tex"}
    (out / "thesis.tex").unlink()
    out.rmdir()

    export(trained, out, "merged")
    before = tree_hash(out)
    with pytest.raises(UserError, match="--overwrite"):
        export(trained, out, "peft")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"'notes.txt'"):
        export(trained, out, "peft", overwrite=True)
    (out / "notes.txt").unlink()
    config = (out / "config.json").read_text()
    # edited, and as long as before
    (out / "config.json").write_text(config.replace("float32", "FLOAT32"))
    with pytest.raises(UserError, match=r"'config.json'"):
        export(trained, out, "peft", overwrite=True)
    (out / "config.json").write_text(config)
    assert tree_hash(out) == before
    export(trained, out, "peft", overwrite=True)
    assert (out / "adapter_config.json").exists() and not (out / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_that_is_not_what_was_trained_is_not_written(tmp_path, bases, monkeypatch):
    base = bases[TINY]
    silent = dataclasses.replace(make(base, TINY, ADAPTERS["lora"]))
    silent = dataclasses.replace(silent, adapter=jax.tree.map(jnp.zeros_like, silent.adapter))
    with pytest.raises(UserError, match="changes no logit of the base"):
        export(silent, tmp_path / "out", "peft")
    trained = make(base, TINY, ADAPTERS["lora"])
    half = jax.tree.map(lambda x: x, trained.adapter)
    half["layers"]["mlp"]["down"]["down_B"] = half["layers"]["mlp"]["down"]["down_B"].at[1].set(0)
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.down_proj\.weight: the adapter of 'down' changes nothing"
    ):
        export(dataclasses.replace(trained, adapter=half), tmp_path / "out", "merged")
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.inf) if x.ndim > 2 else x, trained.adapter)
    with pytest.raises(UserError, match="holds values that are not finite in float32"):
        export(dataclasses.replace(trained, adapter=broken), tmp_path / "out", "transformers")

    # A writer that loses the scale: caught by the logits. One that touches a norm: caught by name.
    def wrong(kernel, leaves, adapter_config, projection):
        return formats_merged(
            kernel, leaves, dataclasses.replace(adapter_config, alpha=1.0), projection
        )

    formats_merged = formats.merged_kernel
    with monkeypatch.context() as patch:
        patch.setattr(formats, "merged_kernel", wrong)
        with pytest.raises(
            UserError, match="logits differ from those of what was trained by up to"
        ):
            export(trained, tmp_path / "out", "merged")
        # A small change of the logits, lost within what bfloat16 may move them by.
        small = dataclasses.replace(
            trained, adapter=jax.tree.map(lambda x: 0.2 * x, trained.adapter)
        )
        with pytest.raises(UserError, match="on average, and training moved them by no more than"):
            export(small, tmp_path / "out", "merged", dtype="bfloat16")
    with monkeypatch.context() as patch:
        written = formats.write_shards

        def touched(directory, shapes, dtype, tensors):
            written(
                directory,
                shapes,
                dtype,
                ((n, v + 1 if n == "model.norm.weight" else v) for n, v in tensors),
            )

        patch.setattr(formats, "write_shards", touched)
        with pytest.raises(UserError, match=r"model\.norm\.weight: the export changed it"):
            export(trained, tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "method, form, words",
    [
        (
            "ffba",
            "merged",
            "ffba goes around the blocks and is no change of W;"
            " --format transformers or vllm can hold it",
        ),
        ("zflora", "peft", "zflora is no LoRA; --format transformers can hold it"),
        ("ffba", "peft", "ffba is no LoRA; --format transformers or vllm can hold it"),
        ("zflora", "vllm", "zflora does not go around the blocks, .*; --format transformers can"),
        ("lora", "vllm", "lora is a LoRA .*; --format merged or peft or transformers can hold it"),
        ("lora", "gguf", "'gguf' is unknown; known: merged, peft, transformers, vllm"),
    ],
)
def test_formats_that_cannot_hold_a_method(tmp_path, bases, method, form, words):
    with pytest.raises(UserError, match=words):
        export(make(bases[TINY], TINY, ADAPTERS[method]), tmp_path / "out", form)
    assert not list(tmp_path.iterdir())


def test_killed_half_way(tmp_path):
    """SIGKILL in the middle of the weights: nothing of the name asked for, nor anything that looks
    finished."""
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests/interop")!r}]
from test_exports import *
given = formats.write_shards
def dies(directory, shapes, dtype, tensors):
    def some():
        for i, pair in enumerate(tensors):
            if i == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield pair
    given(directory, shapes, dtype, some())
formats.write_shards = dies
trained = make(spread(init_base(jax.random.key(0), TINY)), TINY, ADAPTERS["ffba"])
export(trained, {str(tmp_path / "out")!r}, "transformers")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".out.unfinished-")
    assert not list(left.rglob("config.json")) and not list(left.rglob(MARKER))


# ------------------------------------------------------------------------------------------- shards


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_shards_are_safetensors(tmp_path_factory, data):
    """Whatever the sizes and the order, the library reads back what was written, and so does
    `map_shards`."""
    path = tmp_path_factory.mktemp("shards")
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    shapes = {
        f"t{i}": tuple(s)
        for i, s in enumerate(
            data.draw(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=8))
        )
    }
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    order = data.draw(st.permutations(list(shapes)))
    shards.write_shards(
        path,
        shapes,
        dtype,
        ((name, tensors[name]) for name in order),
        data.draw(st.integers(40, 400)),
    )
    found, mapped = {}, shards.map_shards(path)
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == mapped.keys() == shapes.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value.astype(jnp.dtype(dtype)))
        np.testing.assert_array_equal(mapped[name], found[name])
    index = path / shards.INDEX
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map.keys() == shapes.keys() and {*weight_map.values()} == {
            f.name for f in path.glob("*.safetensors")
        }
    else:
        assert [f.name for f in path.iterdir()] == ["model.safetensors"]


def test_sharded_export_loads(tmp_path, bases, monkeypatch):
    trained = make(bases[OTHER], OTHER, ADAPTERS["lora"])
    given = formats.write_shards
    monkeypatch.setattr(
        formats, "write_shards", lambda *arguments: given(*arguments, shard_bytes=200_000)
    )
    export(trained, tmp_path / "out", "merged")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    ours = our_logits(trained, TOKENS)
    assert np.abs(torch_logits(torch_model(tmp_path / "out"), TOKENS) - ours).max() <= 2e-4
    config, base = load_pretrained(str(tmp_path / "out"))
    assert {name: value.shape for name, value in to_hf_tensors(config, base)} == hf_shapes(OTHER)


def test_shards_refuse_what_was_not_announced(tmp_path):
    for tensors, words in [
        ([("a", np.zeros(3))], "'a' has shape"),
        ([("b", np.zeros(2))], "'b'"),
        ([("a", np.array([1, np.nan]))], "'a' holds values that are not finite"),
        ([("a", np.array([1, 1e39]))], "not finite in float32"),
        ([], "'a' was never given"),
    ]:
        with pytest.raises(UserError, match=words), np.errstate(over="ignore"):
            shards.write_shards(tmp_path, {"a": (2,)}, "float32", iter(tensors))


# ------------------------------------------------------------------------------------- real weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, form",
    [
        ("lora", "merged"),
        ("lora", "peft"),
        ("ffa", "peft"),
        ("lora", "transformers"),
        ("fpa", "transformers"),
        ("ffba", "transformers"),
        ("zflora", "transformers"),
    ],
)
def test_real_weights(tmp_path, smollm2, method, form):
    """SmolLM2: logits within 1e-3, and the same 64 greedy tokens unless the two best logits are
    within 1e-3."""
    torch = pytest.importorskip("torch")
    config, base, tokenizer, hf_path = smollm2
    adapter_config = AdapterConfig(method, 16)
    adapter = random_adapter(config, adapter_config, 1, std=0.01)
    trained = Trained(
        config=config,
        base=base,
        adapter_config=adapter_config,
        adapter=adapter,
        tokenizer=tokenizer,
        base_model="base",
        fingerprint=base_fingerprint(base),
    )
    report = export(trained, tmp_path / "out", form)
    assert report["logits"]["moved_by_training"] > 0.1
    if form == "peft":
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(torch_model(hf_path), str(tmp_path / "out")).eval()
    else:
        model = torch_model(tmp_path / "out")
    text = (
        "The capital of France is Paris. 17 - 5 = 12, and then there were three more of them "
        "in the garden."
    )
    ids = np.array([tokenizer(text).input_ids])
    assert np.abs(torch_logits(model, ids) - our_logits(trained, ids)).max() <= 1e-3
    generator = Generator(
        config, base, {"a": adapter}, adapter_config, tokenizer, max_length=128, batch_size=1
    )
    for prompt in (
        "Once upon a time",
        "The opposite of hot is",
        "2 + 2 =",
        "Dear Sir or Madam,",
        "def main():",
    ):
        start = tokenizer(prompt).input_ids
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor([start]), max_new_tokens=64, do_sample=False
            )[0].tolist()
        theirs, ours = out[len(start) :], generator.generate([start], 64)[0].tokens
        ended = next(
            (i for i, token in enumerate(theirs) if token in config.eos_token_id), len(theirs)
        )
        theirs = theirs[:ended]
        # one may be shorter
        split = next((i for i in range(64) if theirs[i : i + 1] != ours[i : i + 1]), None)
        assert len(theirs) > 3
        if split is not None:
            best = np.sort(our_logits(trained, np.array([start + theirs[:split]]))[0, -1])
            assert best[-1] - best[-2] <= 1e-3, (prompt, split)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Configuration, base and tokenizer of SmolLM2-135M-Instruct, and the same as an HF
    directory."""
    config, base = load_pretrained("smollm2-135m-instruct")
    tokenizer, path = load_tokenizer("smollm2-135m-instruct"), tmp_path_factory.mktemp("smollm2")
    save_file(
        dict(to_hf_tensors(config, base)), path / "model.safetensors", metadata={"format": "pt"}
    )
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    return config, base, tokenizer, path


def write_beside_the_weights(path, tokenizer, base_files=None):
    """What every format with a tokenizer writes beside its weights."""
    path.mkdir()
    trained = Trained(
        config=TINY,
        base={},
        adapter_config=AdapterConfig("lora", 8),
        adapter={},
        tokenizer=tokenizer,
        base_model="base",
        fingerprint="f",
        base_files=base_files,
    )
    formats._write_model_files(trained, path, np.dtype("float32"), TINY.to_hf())
    return path


def test_the_tokenizer_is_the_bases_own_to_the_byte(tmp_path):
    """Whatever reads the base's tokenizer, a transformers 4 say, then reads the export's."""
    own = tmp_path / "base"
    load_tokenizer("tiny").save_pretrained(own)
    files = {
        "added_tokens.json": "{}",
        "special_tokens_map.json": "{ }",
        "tokenizer.model": "no model",
        "merges.txt": "#version: 0.2\n",
        "vocab.json": "{}",
        "additional_chat_templates/tool_use.jinja": "x",
        "tokenizer_config.json": '{"tokenizer_class":  "PreTrainedTokenizerFast"}',
    }
    for name, text in files.items():
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text(text)
    (own / "unrelated.json").write_text("{}")
    out = write_beside_the_weights(tmp_path / "out", load_tokenizer(str(own)), own)
    for name in (*files, "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (own / name).read_bytes()
    assert not (out / "unrelated.json").exists()


@pytest.mark.parametrize("change", ["token", "template"])
def test_a_tokenizer_that_was_changed_is_written_as_it_is(tmp_path, change):
    own = tmp_path / "base"
    load_tokenizer("tiny").save_pretrained(own)
    tokenizer = load_tokenizer(str(own))
    if change == "token":
        tokenizer.add_tokens(["<call>"])
    else:
        tokenizer.chat_template = "{{ messages[0].content }}"
    written = load_tokenizer(str(write_beside_the_weights(tmp_path / "out", tokenizer, own)))
    assert written.chat_template == tokenizer.chat_template
    assert written("a<call>b").input_ids == tokenizer("a<call>b").input_ids


@pytest.mark.parametrize("extra", [[], ["<extra>"]])
def test_a_tokenizer_of_no_directory_is_written_for_transformers_4(tmp_path, extra):
    """Which knows no class TokenizersBackend and takes no list for `extra_special_tokens`; the
    older of it look for the chat template in tokenizer_config.json alone."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_special_tokens({"extra_special_tokens": extra})
    out = write_beside_the_weights(tmp_path / "out", tokenizer)
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert (
        written["tokenizer_class"] == "PreTrainedTokenizerFast"
        and "extra_special_tokens" not in written
    )
    assert written.get("additional_special_tokens", []) == extra
    assert written["chat_template"] == tokenizer.chat_template
    again = load_tokenizer(str(out))
    chat = [{"role": "user", "content": "a <extra> b"}]
    assert (
        again.apply_chat_template(chat)["input_ids"]
        == tokenizer.apply_chat_template(chat)["input_ids"]
    )
    assert again.special_tokens_map == tokenizer.special_tokens_map


def test_any_added_token_that_ends_a_turn_is_in_the_stop_list(tmp_path):
    """`tokenizer.add_tokens`, as axolotl writes: no special one."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_tokens(["<|done|>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|done|>")
    out = write_beside_the_weights(tmp_path / "out", tokenizer)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [257, tokenizer.convert_tokens_to_ids("<|done|>")]
