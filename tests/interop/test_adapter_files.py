"""Adapter directories: the same leaves back, PEFT's own reading of ours and ours of PEFT's, and
what is refused."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from flora_jax.adapters import AdapterConfig, init_adapter
from flora_jax.errors import UserError
from flora_jax.interop import peft_lora
from flora_jax.interop.adapter_files import load_adapter, save_adapter
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import Llama, init_base

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")


@pytest.fixture(scope="module")
def base():
    return init_base(jax.random.key(0), TINY)


def random_adapter(adapter_config, seed=1, config=TINY):
    adapter = init_adapter(jax.random.key(seed), config, adapter_config)
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(
        [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def assert_same(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.mark.parametrize(
    "adapter_config",
    [
        AdapterConfig("lora", 4, alpha=7.5, targets="q,v", dropout=0.1),
        AdapterConfig("pf_lora", 8, rslora=True),
        AdapterConfig("ffba_qg_add", 8, alpha=2.0),
        AdapterConfig("fpa", 8, activation="silu"),
        AdapterConfig("zflora", 8),
        AdapterConfig("fft", 8),
    ],
    ids=lambda c: c.method,
)
@pytest.mark.parametrize("with_params", [False, True])
def test_round_trip_is_bit_equal(tmp_path, base, adapter_config, with_params):
    adapter = random_adapter(adapter_config)
    norms = {"final_norm": base["final_norm"], "layers": {"mlp_norm": base["layers"]["mlp_norm"]}}
    params = norms if with_params else {}
    trained = {"adapter": adapter, "params": params}
    save_adapter(tmp_path / "a", trained, TINY, adapter_config, "src", "f" * 32)
    found_config, found = load_adapter(tmp_path / "a", TINY, "f" * 32)
    assert found_config == adapter_config
    assert_same(found["adapter"], adapter)
    assert_same(found["params"], params)
    kind = json.loads((tmp_path / "a/adapter_config.json").read_text())["peft_type"]
    assert kind == (
        "LORA" if adapter_config.method in ("lora", "pf_lora") and not with_params else "FLORA"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # nothing half-written is left beside it


@pytest.fixture(scope="module")
def torch_llama(base):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    settings = TINY.to_hf()
    settings.pop("model_type")

    def make():
        model = LlamaForCausalLM(HFConfig(**settings))
        state = {name: torch.tensor(np.asarray(value)) for name, value in to_hf_tensors(TINY, base)}
        model.load_state_dict(state, strict=False)
        return model.eval()

    return make


@pytest.mark.parametrize(
    "adapter_config",
    [
        AdapterConfig("lora", 4, alpha=8.0),
        AdapterConfig("pf_lora", 8, targets="q,v,down", rslora=True),
    ],
    ids=["lora", "pf_lora"],
)
def test_peft_loads_ours(tmp_path, base, torch_llama, adapter_config):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    adapter = random_adapter(adapter_config)
    save_adapter(
        tmp_path / "a", {"adapter": adapter, "params": {}}, TINY, adapter_config, "src", "f"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing or unexpected key is only a warning in PEFT
        warnings.simplefilter("ignore", FutureWarning)  # of transformers itself
        model = peft.PeftModel.from_pretrained(torch_llama(), str(tmp_path / "a")).eval()
    tokens = np.random.default_rng(0).integers(0, 320, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
        with model.disable_adapter():
            off = model(torch.tensor(tokens)).logits.numpy()
    ours = Llama(TINY, adapter_config).apply(
        {"params": base, "adapter": adapter}, jnp.asarray(tokens)
    )
    assert np.abs(theirs - np.asarray(ours)).max() <= 2e-4
    assert np.abs(theirs - off).max() > 0.05


def test_ours_loads_peft(tmp_path, base, torch_llama):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(torch_llama(), lora).to(torch.bfloat16).float().eval()
    tokens = np.random.default_rng(0).integers(0, 320, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    bf16_base = {k: v.numpy() for k, v in model.get_base_model().state_dict().items()}
    # half precision, as many adapters are stored
    model.to(torch.bfloat16).save_pretrained(tmp_path / "a")
    adapter_config, trained = load_adapter(tmp_path / "a", TINY)
    assert adapter_config == AdapterConfig("lora", 4, alpha=16.0, targets="q,v")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), base)
    assert np.array_equal(
        bf16_base["model.embed_tokens.weight"], rounded["embed_tokens"]["embedding"]
    )
    ours = Llama(TINY, adapter_config).apply(
        {"params": rounded, "adapter": trained["adapter"]}, jnp.asarray(tokens)
    )
    assert np.abs(theirs - np.asarray(ours)).max() <= 2e-4


@pytest.mark.parametrize(
    "targets, excluded, expected",
    [
        (["q_proj", "k_proj", "v_proj"], ["k_proj"], "q,v"),
        (["q_proj", "k_proj", "v_proj"], r".*\.self_attn\.[kv]_proj", "q"),
        (r".*\.(q|v|up)_proj", ["self_attn.v_proj"], "q,up"),
        (
            ["q_proj", "up_proj"],
            [f"model.layers.{i}.mlp.up_proj" for i in range(TINY.num_hidden_layers)],
            "q",
        ),
        (["q_proj", "v_proj"], ["lm_head", "proj"], "q,v"),  # names are whole
    ],
)
def test_what_peft_excludes_is_not_targeted(
    tmp_path, base, torch_llama, targets, excluded, expected
):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=4, target_modules=targets, exclude_modules=excluded, init_lora_weights=False
    )
    model = peft.get_peft_model(torch_llama(), lora).eval()
    model.save_pretrained(tmp_path / "a")
    adapter_config, trained = load_adapter(tmp_path / "a", TINY)
    assert adapter_config.targets == AdapterConfig("lora", 4, targets=expected).targets
    tokens = np.random.default_rng(0).integers(0, 320, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = Llama(TINY, adapter_config).apply(
        {"params": base, "adapter": trained["adapter"]}, jnp.asarray(tokens)
    )
    assert np.abs(theirs - np.asarray(ours)).max() <= 2e-4


def test_every_field_of_peft_is_known():
    """Read, refused, or without a part in what is computed; a newer PEFT's fields are to be looked
    at."""
    peft = pytest.importorskip("peft")
    read = {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "init_lora_weights",
    }
    # layers_pattern goes with layers_to_transform, qalora_group_size with use_qalora, the configs
    # with their initialisation; megatron_core with megatron_config; the others say how an adapter
    # came about.
    idle = {
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    }
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= read | idle | set(peft_lora._PEFT_REFUSED)


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", None),
        ("target_modules", ["q_proj", "model.layers.1.self_attn.v_proj"]),
        ("target_modules", r"model\.layers\.0\..*_proj"),
        ("target_modules", "*_proj"),
        ("exclude_modules", ["layers.0.self_attn.v_proj"]),
        ("exclude_modules", r".*\.1\..*"),
        ("exclude_modules", 3),
        ("exclude_modules", "("),
        ("lora_bias", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [5]),
        ("target_parameters", ["mlp.up_proj.weight"]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [1, 2]),
        ("r", 0),
        ("r", "8"),
        ("peft_type", "IA3"),
    ],
)
def test_peft_features_refused_by_name(tmp_path, field, value):
    adapter_config = AdapterConfig("lora", 4)
    trained = {"adapter": random_adapter(adapter_config), "params": {}}
    save_adapter(tmp_path / "a", trained, TINY, adapter_config, "src", "f")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match="rank" if field == "r" else field) as error:
        load_adapter(tmp_path / "a", TINY)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_or_foreign_directories_are_refused(tmp_path):
    def refused(directory, *words, config=TINY, fingerprint=None):
        with pytest.raises(UserError) as error:
            load_adapter(directory, config, fingerprint)
        assert all(word in str(error.value) for word in words), error.value
        assert "\n" not in str(error.value)

    adapter_config = AdapterConfig("ffba", 8)
    trained = {"adapter": random_adapter(adapter_config), "params": {}}
    path = tmp_path / "a"

    def save():
        return save_adapter(path, trained, TINY, adapter_config, "src", "abc")

    refused(path, "no such adapter directory")
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / "empty",
        "adapter_config.json: there is no such file",
        "adapter_model.safetensors",
    )
    save()
    A = trained["adapter"]["layers"]["attention"]["qkv"]["A"]
    trained["adapter"]["layers"]["attention"]["qkv"]["A"] = A.at[0, 0, 0].set(np.nan)
    save()
    refused(path, "adapter_model.safetensors: 'adapter/layers/attention/qkv/A'", "not finite")
    trained["adapter"]["layers"]["attention"]["qkv"]["A"] = A
    save()
    refused(path, "another base", "abc", "xyz", "'src'", fingerprint="xyz")
    load_adapter(path, TINY, "abc")
    deeper = dataclasses.replace(TINY, num_hidden_layers=3)
    refused(path, "adapter/layers/attention/o/o_B", "(3, 24, 96)", "(2, 24, 96)", config=deeper)

    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(path, str(weights), "safetensors")
    weights.write_bytes(b"garbage")
    refused(path, str(weights), "safetensors")
    weights.unlink()
    refused(path, str(weights), "missing")
    (path / "adapter_model.bin").write_bytes(b"x")
    refused(path, "pickle")

    save()
    assert not (path / "adapter_model.bin").exists()  # replaced as a whole
    tensors = load_file(weights)
    name = "adapter/layers/attention/qkv/A"
    for changed, words in [
        ({**tensors, name: tensors[name][:, :, :8]}, (name, "(2, 96, 24)", "(2, 96, 8)")),
        ({k: v for k, v in tensors.items() if k != name}, (name, "nothing")),
        ({**tensors, "adapter/x": tensors[name]}, ("adapter/x", "no such leaf")),
        (
            {**tensors, "params/final_norm/scale": tensors[name]},
            ("params/final_norm/scale", "(96,)"),
        ),
        ({**tensors, "x": tensors[name]}, ("'x'", "neither")),
    ]:
        save_file(changed, weights)
        refused(path, *words)

    save()
    config_file = path / "adapter_config.json"
    stored = json.loads(config_file.read_text())
    for change, words in [
        ({"format_version": 3}, ("format_version=3",)),
        (
            {"format_version": 1, "method": "zflora"},
            ("format_version=1 of zflora", "train it anew"),
        ),
        ({"method": "fbba"}, ("fbba", "ffba")),
        ({"rank": 5}, ("rank=5",)),
        ({"targets": None}, ("targets=None",)),
    ]:
        config_file.write_text(json.dumps({**stored, **change}))
        refused(path, *words)
    config_file.write_text(json.dumps(stored))
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    whole = weights.read_bytes()
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    refused(path, "tensor 'a' is stored as F8_E4M3")
    weights.write_bytes(whole)
    config_file.write_text(json.dumps({k: v for k, v in stored.items() if k != "alpha"}))
    refused(path, "'alpha' is missing")
    config_file.write_text("{")
    refused(path, "adapter_config.json: not valid JSON (")
    config_file.write_text("[" * 100_000)
    refused(path, "adapter_config.json: cannot be read (nested too deeply)")
    config_file.unlink()
    config_file.mkdir()
    refused(path, "adapter_config.json")


def test_peft_tensor_missing_or_misshapen(tmp_path):
    adapter_config = AdapterConfig("lora", 4, targets="q,v")
    trained = {"adapter": random_adapter(adapter_config), "params": {}}
    save_adapter(tmp_path / "a", trained, TINY, adapter_config, "src", "f")
    weights = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for changed, words in [
        ({k: v for k, v in tensors.items() if k != name}, (name, "nothing")),
        ({**tensors, name: tensors[name][:2]}, (name, "(4, 96)", "(2, 96)")),
        (
            {**tensors, name.replace("q_proj", "o_proj"): tensors[name]},
            ("o_proj", "no such tensor"),
        ),
    ]:
        save_file(changed, weights)
        with pytest.raises(UserError) as error:
            load_adapter(tmp_path / "a", TINY)
        assert all(word in str(error.value) for word in words), error.value


def test_save_keeps_what_is_not_ours(tmp_path):
    adapter_config = AdapterConfig("ffba", 8)
    trained = {"adapter": random_adapter(adapter_config), "params": {}}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/final.tex").write_text("x")
    with pytest.raises(UserError, match="thesis"):
        save_adapter(tmp_path / "thesis", trained, TINY, adapter_config, "src", "f")
    assert (tmp_path / "thesis/final.tex").read_text() == "x"
    with pytest.raises(UserError, match="expected"):
        save_adapter(
            tmp_path / "b", {"adapter": {}, "params": {}}, TINY, adapter_config, "src", "f"
        )
    assert not (tmp_path / "b").exists()


def test_fingerprint_tells_bases_apart_but_not_dtypes(base):
    first = base_fingerprint(base)
    assert first == base_fingerprint(jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
    assert first != base_fingerprint(init_base(jax.random.key(1), TINY))
    # One value moved, or two swapped: every bit and every place counts.
    kernel = base["layers"]["mlp"]["down"]["down_kernel"]
    for changed in (kernel.at[1, 5, 7].multiply(1.01), kernel.at[0, :2].set(kernel[0, 1::-1])):
        mlp = {**base["layers"]["mlp"], "down": {"down_kernel": changed}}
        assert first != base_fingerprint({**base, "layers": {**base["layers"], "mlp": mlp}})
