"""The rows of ARCHITECTURES against transformers: values, logits, text, exports; each difference
counts, what is not understood is refused, and another row is all that another architecture
takes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from support import interpret_decode_kernels, random_adapter

from flora_jax.adapters import METHODS, AdapterConfig, fuse, repeat_and_add, split
from flora_jax.errors import UserError
from flora_jax.inference.generator import Generator
from flora_jax.models import llama
from flora_jax.models.architectures import ARCHITECTURES, PRODUCTS, Architecture
from flora_jax.models.config import DIFFERENCES, PRESETS, LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import KVCache, Llama
from flora_jax.models.loading import load_pretrained

pytestmark = pytest.mark.usefixtures("quick_compile")

ROPE = {"rope_type": "default", "rope_theta": 1e4}
SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_parameters": ROPE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What a config.json says beside the sizes.
OWN = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
}
# The differences that each has, and what the field is without.
EXPECTED = {
    "llama": {},
    "qwen2": {"biases": ()},
    "qwen3": {"biases": (), "qk_norm": False},
    "mistral": {},
    "smollm3": {"no_rope_layers": ()},
    "granite": {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": None,
        "logits_divisor": 1.0,
    },
}
FAST = ("llama", "qwen3")
ROWS = [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in ARCHITECTURES]
TOKENS = np.random.default_rng(0).integers(3, 128, (2, 40))


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """`published("qwen3")`: a directory that transformers wrote and its model, small and random, in
    which no parameter (bias, norm) keeps a trivial value."""
    torch = pytest.importorskip("torch")
    import transformers

    @functools.cache
    def make(model_type):
        torch.manual_seed(0)
        own = OWN.get(model_type, {})
        config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **own})
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        path = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(path)
        return str(path), model

    return make


@pytest.fixture(scope="session")
def loaded(published):
    return functools.cache(lambda model_type: load_pretrained(published(model_type)[0]))


def theirs(model, tokens, **arguments):
    import torch

    arguments = {name: torch.tensor(value) for name, value in arguments.items()}
    with torch.no_grad():
        return model(torch.tensor(tokens), **arguments).logits.numpy()


def ours(config, variables, tokens, adapter_config=None, **arguments):
    model = Llama(config, adapter_config)
    return np.asarray(model.apply(variables, jnp.asarray(tokens, jnp.int32), **arguments))


def without(config, base, field):
    """The model with one difference switched off."""
    config = dataclasses.replace(config, **{field: EXPECTED[config.model_type][field]})
    keep = jax.eval_shape(lambda: llama.init_base(jax.random.key(0), config))

    def cut(tree, shape):
        if not isinstance(shape, dict):
            return tree
        return {name: cut(tree[name], inner) for name, inner in shape.items()}

    return config, cut(base, keep)


@pytest.mark.parametrize("model_type", ROWS)
def test_logits_are_those_of_transformers(published, loaded, model_type):
    """At positions beyond 1,000; and each difference alone, switched off, makes another model."""
    _, model = published(model_type)
    config, base = loaded(model_type)
    tokens = np.random.default_rng(1).integers(0, 128, (1, 1050))
    expected = theirs(model, tokens)
    assert np.abs(ours(config, {"params": base}, tokens) - expected).max() <= 2e-4
    neutral = LlamaConfig.preset("tiny").differences
    apart = {name for name, value in config.differences.items() if value != neutral[name]}
    assert apart == EXPECTED[model_type].keys()
    for field in apart:
        other, params = without(config, base, field)
        assert np.abs(ours(other, {"params": params}, tokens) - expected).max() > 1e-2, field


@pytest.mark.parametrize("model_type", ROWS)
def test_padded_batches_and_greedy_text(published, loaded, model_type):
    """Rows of 40 and 25 tokens padded on the left, in one pass and with a cache; then 64 tokens of
    greedy text."""
    torch = pytest.importorskip("torch")
    _, model = published(model_type)
    config, base = loaded(model_type)
    mask = np.arange(40) >= np.array([[0], [15]])
    positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
    expected = theirs(model, TOKENS, attention_mask=mask, position_ids=positions)
    found = ours(config, {"params": base}, TOKENS, mask=jnp.asarray(mask))
    assert np.abs(found - expected)[mask].max() <= 2e-4

    apply = jax.jit(Llama(config).apply)
    fused = {"params": fuse(base, None, config, None)}
    cache = KVCache.empty(config, 2, 40)
    logits, cache = apply(fused, TOKENS[:, :37], mask=jnp.asarray(mask[:, :37]), cache=cache)
    steps = [logits]
    for i in range(37, 40):
        logits, cache = apply(fused, TOKENS[:, i : i + 1], cache=cache)
        steps.append(logits)
    assert np.abs(np.concatenate(steps, 1) - expected)[mask].max() <= 2e-4

    prompts = [row[keep].tolist() for row, keep in zip(TOKENS, mask, strict=True)]
    with torch.no_grad():
        out = model.generate(
            torch.tensor(np.where(mask, TOKENS, 0)),
            attention_mask=torch.tensor(mask.astype(int)),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )
    generator = Generator(config, base, max_length=128, batch_size=2)
    for row, text in zip(out[:, 40:].tolist(), generator.generate(prompts, 64), strict=True):
        assert [*row, 2][: [*row, 2].index(2)] == list(text.tokens)


@pytest.mark.parametrize("model_type", ROWS)
def test_hf_to_jax_to_hf_is_bit_equal(published, loaded, model_type, tmp_path):
    """Tensors, and a config.json from which transformers makes the same model."""
    import transformers

    _, model = published(model_type)
    config, base = loaded(model_type)
    assert config.model_type == model_type
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    exported = dict(to_hf_tensors(config, base))
    assert exported.keys() == state.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    hf = config.to_hf()
    assert LlamaConfig.from_hf(json.loads(json.dumps(hf))) == config
    (tmp_path / "config.json").write_text(json.dumps(hf))
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    names = {type(model).__name__}
    assert {*again.architectures} == names and type(again) is type(model.config)
    own = model.config.to_dict()
    read = again.to_dict()
    for name in (*SIZES, *OWN[model_type], "rms_norm_eps", "sliding_window", "use_sliding_window"):
        assert read.get(name) == own.get(name), name


METHODS_HERE = [method for method in METHODS if method != "fft"]


@pytest.mark.parametrize("model_type", ROWS)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[] if m in ("ffba", "zflora") else pytest.mark.slow)
        for m in METHODS_HERE
    ],
)
def test_a_method_over_each(loaded, model_type, method):
    """Step 0 is the base; fused is split, and split again bit-equal; every leaf of the adapter has
    a gradient."""
    config, base = loaded(model_type)
    adapter_config = AdapterConfig(method, 8)
    model = Llama(config, adapter_config)
    start = llama.init_adapter(jax.random.key(0), config, adapter_config)
    bare = ours(config, {"params": base}, TOKENS)
    begun = ours(config, {"params": base, "adapter": start}, TOKENS, adapter_config)
    assert np.abs(begun - bare).max() <= 1e-6 * np.abs(bare).max()

    adapter = random_adapter(config, adapter_config, 1)
    variables = {"params": base, "adapter": adapter}
    logits = ours(config, variables, TOKENS, adapter_config)
    assert np.abs(logits - bare).max() > 0.1
    fused = fuse(base, adapter, config, adapter_config)
    served = ours(config, {"params": fused}, TOKENS, adapter_config)
    assert np.abs(served - logits).max() <= 1e-5 * np.abs(logits).max()
    for one, other in zip(
        jax.tree.leaves(split(fused, config, adapter_config)),
        jax.tree.leaves((base, adapter)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)

    def loss(adapter):
        return jnp.square(model.apply({"params": base, "adapter": adapter}, TOKENS)).mean()

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(adapter)):
        assert np.abs(np.asarray(gradient)).max() > 0, path


def test_norms_of_q_and_k_come_behind_repeat_and_add(loaded):
    """Our choice, spelt out on the first layer: the product and its adapter, the norm, then
    attention."""
    config, base = loaded("qwen3")
    adapter_config = AdapterConfig("ffba", 8)
    adapter = random_adapter(config, adapter_config, 1)
    layer = jax.tree.map(lambda leaf: leaf[0], base["layers"])
    x = jax.random.normal(jax.random.key(2), (1, 4, config.hidden_size))
    kernels = layer["attention"]["qkv"]
    A = adapter["layers"]["attention"]["qkv"]["A"][0]
    raw = [x @ kernels[f"{p}_kernel"] + kernels[f"{p}_bias"] for p in "qkv"]
    pieces = jnp.split(adapter_config.scale * x @ A, 3, axis=-1)
    q, k, v = (repeat_and_add(y, z).reshape(1, 4, -1, 16) for y, z in zip(raw, pieces, strict=True))

    def normed(x, scale):
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    q, k = normed(q, layer["q_norm"]["scale"]), normed(k, layer["k_norm"]["scale"])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "attend", lambda q, k, v, *_: seen.append((q, k, v)) or q)
        patch.setattr(llama, "rotate", lambda x, *_: x)
        parts = llama.Parts(config=config, adapter=adapter_config)
        variables = {
            "params": layer["attention"],
            "adapter": jax.tree.map(lambda leaf: leaf[0], adapter["layers"]["attention"]),
        }
        norms = layer["q_norm"]["scale"], layer["k_norm"]["scale"]
        rest = (None, None, llama.Seen(), None, None, True, norms)
        llama.Attention(parts).apply(variables, x, *rest[:1], (None, None), *rest[2:])
    for found, expected in zip(seen[0], (q, k, v), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "model_type", [pytest.param(m, marks=[] if m == "qwen3" else pytest.mark.slow) for m in OWN]
)
def test_the_decode_kernel_computes_the_same(loaded, model_type, monkeypatch):
    """Interpreted: norms, layers that are not turned and the scale are inside."""
    config, base = loaded(model_type)
    interpret_decode_kernels(monkeypatch)
    adapter_config = AdapterConfig("ffba", 8)
    fused = {
        "params": fuse(base, random_adapter(config, adapter_config, 1), config, adapter_config)
    }
    logits = []
    for kernels in ("none", "attention", "layer"):
        apply = jax.jit(Llama(config, adapter_config, decode_kernels=kernels).apply)
        _, cache = apply(fused, TOKENS[:, :20], cache=KVCache.empty(config, 2, 24))
        first, cache = apply(fused, TOKENS[:, 20:21], cache=cache)
        logits.append(np.concatenate([first, apply(fused, TOKENS[:, 21:22], cache=cache)[0]], 1))
    for found in logits[1:]:
        np.testing.assert_allclose(found, logits[0], atol=1e-5 * np.abs(logits[0]).max())


@pytest.mark.parametrize("model_type", ROWS)
def test_a_bank_over_each(loaded, model_type):
    config, base = loaded(model_type)
    adapter_config = AdapterConfig("ffba_qg_add", 8)
    adapters = [random_adapter(config, adapter_config, i) for i in (1, 2)]
    fused = {"params": fuse(base, adapters, config, adapter_config)}
    select = jnp.array([[False, True], [False, False]])
    found = ours(config, fused, TOKENS, adapter_config, select=select)
    second = {"params": base, "adapter": adapters[1]}
    expected = [
        ours(config, second, TOKENS[:1], adapter_config),
        ours(config, {"params": base}, TOKENS[1:]),
    ]
    expected = np.concatenate(expected)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# ----------------------------------------------------------------------------------------- refusals


def config_of(model_type, **changes):
    return {"model_type": model_type, **SIZES, **OWN.get(model_type, {}), **changes}


@pytest.mark.parametrize(
    "hf, words",
    [
        (config_of("gemma2"), "model_type='gemma2' is not supported; llama, qwen2, qwen3, mistral"),
        (config_of(None), "model_type=None is not supported"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not supported"),
        (config_of("mistral", sliding_window=1024), "sliding_window=1024 is in use and shorter"),
        (
            {
                k: v
                for k, v in config_of("mistral", max_position_embeddings=8192).items()
                if k != "sliding_window"
            },
            "sliding_window=4096 is in use",
        ),
        (
            config_of("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
            "sliding_window=64 is in use",
        ),
        (
            config_of("smollm3", use_sliding_window=True, sliding_window=64),
            "sliding_window=64 is in use",
        ),
        (
            config_of(
                "qwen2", use_sliding_window=True, max_window_layers=1, max_position_embeddings=8192
            ),
            "sliding_window=4096 is in use",
        ),
        (
            config_of(
                "qwen3",
                use_sliding_window=True,
                sliding_window=64,
                layer_types=["sliding_attention"] * 3,
            ),
            "sliding_window=64 is in use",
        ),
        (
            config_of("mistral", sliding_window=64, max_position_embeddings=None),
            "max_position_embeddings=None must be an integer of at least 1",
        ),
        (
            config_of("mistral", sliding_window="64"),
            "sliding_window='64' must be an integer of at least 1",
        ),
        (
            config_of("mistral", sliding_window=64, layer_types=["full_attention"] * 3),
            "sliding_window=64 is in use",
        ),
        (
            config_of("qwen3", use_sliding_window=True, layer_types="full_attention"),
            "layer_types='full_attention' must have a kind a layer",
        ),
        (
            {**config_of("smollm3"), "no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval=0 must be an integer of at least 1",
        ),
        (config_of("llama", final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
        (config_of("llama", attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
        (config_of("llama", logits_scaling=8.0), "logits_scaling=8.0 is not supported"),
        (config_of("mistral", no_rope_layers=[1, 0, 1]), "no_rope_layers=.* a mistral"),
        (config_of("smollm3", no_rope_layers=[1]), r"no_rope_layers=\[1\] must have a 0 or 1"),
        (
            config_of("qwen3", rope_parameters={"rope_type": "yarn", "factor": 4.0}),
            "rope_type='yarn' is not supported",
        ),
        (
            config_of("qwen3", rope_parameters={"full_attention": ROPE}),
            r"by kind of layer \('full_attention'\)",
        ),
        (config_of("granite", logits_scaling=None), "logits_scaling=None must be a number"),
        (config_of("granite", residual_multiplier=-1), "residual_multiplier=-1.0 must be a pos"),
        (config_of("qwen3", attention_bias="yes"), "attention_bias='yes' must be true or false"),
    ],
)
def test_what_is_not_understood_is_refused(hf, words):
    with pytest.raises(UserError, match=words) as error:
        LlamaConfig.from_hf(hf)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "hf",
    [
        config_of("mistral", sliding_window=4096),
        config_of("qwen2", use_sliding_window=False, sliding_window=64, max_window_layers=1),
        config_of("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=3),
        config_of("qwen2", use_sliding_window=True, sliding_window=2048, max_window_layers=0),
        config_of(
            "qwen3", use_sliding_window=True, sliding_window=64, layer_types=["full_attention"] * 3
        ),
        config_of("llama", embedding_multiplier=1.0, num_experts=0, sliding_window=64),
    ],
)
def test_what_changes_nothing_passes(hf):
    assert LlamaConfig.from_hf(hf).model_type == hf["model_type"]


@pytest.mark.parametrize("model_type", ROWS)
def test_fields_left_out_are_filled_in_as_transformers_does(model_type):
    sizes = {name: 4 for name in ("vocab_size", "hidden_size", "intermediate_size")}
    stated = {**sizes, "num_hidden_layers": 40, "num_attention_heads": 32, "hidden_size": 256}
    stated |= {"sliding_window": None} if model_type == "mistral" else {}
    theirs = transformers.AutoConfig.for_model(model_type, **stated).to_dict()
    # a config.json without these has none
    theirs |= {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    found = LlamaConfig.from_hf({"model_type": model_type, **stated})
    assert found == LlamaConfig.from_hf(theirs)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"biases": ("o", "qkv")}, r"biases=\('o', 'qkv'\) must be a tuple of qkv, o, gate_up"),
        ({"biases": ("q",)}, r"biases=\('q',\) must be a tuple of"),
        ({"no_rope_layers": (2,)}, r"no_rope_layers=\(2,\) must be a tuple of layers from 0 to 1"),
        ({"attention_multiplier": 0.0}, "attention_multiplier=0.0 must be a positive number"),
        ({"logits_divisor": "8"}, "logits_divisor='8' must be a positive number"),
        ({"model_type": "qwen"}, "model_type='qwen'"),
    ],
)
def test_a_configuration_that_is_none_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(LlamaConfig.preset("tiny"), **changes)


def test_a_config_json_that_cannot_say_so_is_not_written():
    for changes, words in (
        ({"qk_norm": True}, "qk_norm=True cannot be stated in the config.json of a llama"),
        ({"biases": ("qkv",)}, r"biases=\('qkv',\) cannot be stated"),
        ({"model_type": "qwen2"}, r"biases=\(\) cannot be stated in the config.json of a qwen2"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(LlamaConfig.preset("tiny"), **changes).to_hf()


def test_tables_agree():
    """Constants that are spelt twice, so that reading a configuration does without JAX."""
    from flora_jax.adapters import PRODUCTS as products

    assert tuple(products) == PRODUCTS
    assert {*DIFFERENCES} <= {field.name for field in dataclasses.fields(LlamaConfig)}
    assert OWN.keys() == EXPECTED.keys() == ARCHITECTURES.keys()
    for name, config in PRESETS.items():
        assert LlamaConfig.from_hf(config.to_hf()) == config, name


# ------------------------------------------------------------------------------------- one row more


def test_another_architecture_is_another_row(monkeypatch, published):
    """ByteDance's Seed-OSS: a Llama with biases on q, k and v, and a flag of its own for o
    (docs/develop.md)."""
    row = Architecture(
        hf_class="SeedOssForCausalLM",
        biases={
            "attention_bias": ("qkv",),
            "attention_out_bias": ("o",),
            "mlp_bias": ("gate_up", "down"),
        },
        defaults={"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8},
    )
    path, model = published("seed_oss")
    with pytest.raises(UserError, match="model_type='seed_oss' is not supported"):
        load_pretrained(path)
    monkeypatch.setitem(ARCHITECTURES, "seed_oss", row)
    config, base = load_pretrained(path)
    assert config.biases == ("qkv",)
    assert np.abs(ours(config, {"params": base}, TOKENS) - theirs(model, TOKENS)).max() <= 2e-4
    assert LlamaConfig.from_hf(config.to_hf()) == config
