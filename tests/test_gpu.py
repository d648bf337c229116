"""What a GPU computes, each test in two forms: `pytest -m gpu` runs them where there is one. The
other form runs the same test on a CPU, with kernels interpreted or XLA's attention in their place,
so that a mistake in a test is found before a GPU sees it.

Models are small, with heads as wide as the kernels want them, and compute in bfloat16. They are
held to float64 in NumPy, to XLA's own attention in float32, or to their own bits. No weights, no
data.
"""

import dataclasses
import functools
import gc
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_attention
import test_decode_attention
import test_decode_layer
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import save_file
from support import interpret_decode_kernels, largest, numbers, packed
from test_adapters import DEFAULT_ADDS, numpy_logits

from flora_jax.adapters import (
    METHODS,
    AdapterConfig,
    Scaled,
    abstract_adapter,
    device_layout,
    fuse,
    gpu_layout,
)
from flora_jax.errors import Stopped
from flora_jax.inference.generator import Generator
from flora_jax.interop.exports import export
from flora_jax.interop.formats import Trained
from flora_jax.models.adapted import base_fingerprint
from flora_jax.models.attention import attend, attend_segments, capability, cudnn_runs
from flora_jax.models.config import LlamaConfig
from flora_jax.models.decode_product import (
    Behind,
    Columns,
    Gated,
    Normed,
    Term,
    decode_product,
)
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import REMAT_POLICIES, Llama, init_base
from flora_jax.models.loading import load_pretrained
from flora_jax.models.tokenizer import load_tokenizer
from flora_jax.train import run
from flora_jax.training.rules import partition, paths
from flora_jax.training.step import TrainState, make_train_step
from flora_jax.training.workdir import Metrics

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
)
RANK = 8
SCALE = 1.5


@dataclasses.dataclass(frozen=True)
class Form:
    """Where a test runs, and how much of it.

    decode: head_dim and heads of a group, of the decode kernel; slots: of its cache, cut into parts
    of 256. products: rows, width of the MLP, rows B and width of the stream. packed: head_dim and
    lengths of segments; plain: head_dim, heads of a group and tokens, of attention without any.
    rows: lengths of the segments that are trained on: of unequal rows, which are padded at the end
    and do not fill a kernel's tiles."""

    gpu: bool
    decode: tuple
    slots: int
    products: tuple
    packed: tuple
    plain: tuple
    rows: tuple

    @property
    def name(self):
        return "gpu" if self.gpu else "cpu"

    @property
    def interpret(self):
        return not self.gpu


CPU = Form(
    gpu=False,
    decode=((64, 3), (128, 8)),
    slots=512,
    products=((1, 96, 4, 40), (3, 130, 5, 33)),
    packed=((64, [[100, 33], [60, 70]]), (128, [[20, 12]])),
    plain=((64, 3, 77), (128, 1, 150)),
    rows=([40, 17], [20, 22, 13]),
)
GPU = Form(
    gpu=True,
    decode=tuple((width, group) for width in (64, 128) for group in (1, 3, 8)),
    slots=1024,
    products=((1, 8192, 32, 2048), (8, 1536, 32, 576), (16, 1000, 5, 333)),
    packed=tuple(
        (width, rows)
        for width in (64, 128)
        for rows in ([[100, 77, 90], [130, 100]], [[20, 12]], [[900, 300, 37]])
    ),
    plain=((64, 1, 150), (64, 3, 77), (64, 8, 150), (128, 3, 1037)),
    rows=([100, 47], [60, 52, 23]),
)


@pytest.fixture(params=[CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def form(request):
    has_gpu = jax.default_backend() == "gpu"
    if request.param.gpu and not has_gpu:
        pytest.skip("needs an NVIDIA GPU")
    if has_gpu and not request.param.gpu:
        pytest.skip("the other form runs on this GPU")
    if not has_gpu:
        request.getfixturevalue("quick_compile")
    return request.param


# What other tests hold on a CPU on every run, and takes long.
SLOW_ON_A_CPU = pytest.mark.parametrize(
    "form",
    [pytest.param(CPU, marks=pytest.mark.slow), pytest.param(GPU, marks=pytest.mark.gpu)],
    indirect=True,
    ids=["cpu", "gpu"],
)


@pytest.fixture
def kernels(form):
    """`form`, of a test of kernels; an older GPU has none. One of unknown age is not let off."""
    if form.gpu and (capability() or (8, 0)) < (8, 0):
        pytest.skip("needs an NVIDIA GPU of compute capability 8.0 or above")
    return form


def error(found, exact):
    """The largest difference, as a share of the largest number."""
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    assert found.shape == exact.shape
    return np.abs(found - exact).max() / np.abs(exact).max()


# ------------------------------------------------------------------------------------------------
# Kernels


def edges(slots):
    """Places of the new token: first and last of the kernel's blocks of 64 and parts of 256."""
    return sorted({0, 1, 63, 64, 65, 255, 256, 257, slots // 2, slots - 1})


@pytest.mark.parametrize("dtype, bound", [("float32", 2e-5), ("bfloat16", 1e-2)])
def test_decode_kernels(kernels, dtype, bound):
    """Attention over rows without padding, with padding in front, and with holes, as a prompt's
    padding leaves; and products."""
    for shape in kernels.products:
        for codes in ("straight", "none", "int8"):
            check_product(shape, dtype, bound, kernels.interpret, codes)
    check_reads(kernels.interpret, dtype, bound)
    form, S = kernels, kernels.slots
    kernel = functools.partial(test_decode_attention.attend, interpret=form.interpret)
    kernel = jax.jit(kernel, static_argnums=4)
    for H, G in form.decode:
        qkv, rotary, holes, (k, v, _), heads = test_decode_attention.draw(
            B=3, K=2, G=G, H=H, S=S, index=S - 1, extra=RANK, seed=0
        )
        qkv, k, v = (x.astype(dtype) for x in (qkv, k, v))
        slots, front = np.arange(S), np.array([[0], [70], [0]])
        for index in edges(S):
            seen = (slots >= front) & (slots < index)
            seen[2] &= np.asarray(holes)[2]
            seen = jnp.asarray(seen | (slots == index))
            arguments = qkv, rotary, seen, (k, v, jnp.int32(index)), heads
            out, cache = kernel(*arguments)
            expected = test_decode_attention.spelt_out(*arguments)
            for one, other in zip((out, *cache), expected, strict=True):
                assert one.dtype == dtype and error(one, other) <= bound, (H, G, index)


def check_reads(interpret, dtype, bound):
    """What a bank's products and those of attention's parts read."""
    product = functools.partial(decode_product, interpret=interpret)
    how = {"dtype": jnp.dtype(dtype)}
    for B, N, r in ((1, 3, 8), (8, 16, 8), (5, 4, 6)):
        for found, exact in test_decode_layer.products_of_a_bank(product, B, N, r, "silu", **how):
            assert error(found, exact) <= bound, (B, N, r)
    for B, P in ((1, 1), (1, 4), (3, 2)):
        for found, exact in test_decode_layer.product_of_parts(product, B, P, 4, 64, **how):
            assert error(found, exact) <= bound, (B, P)


def check_product(shape, dtype, bound, interpret, codes):
    """A gated product with rows B, and a normed one of what it gives, beside NumPy's float64; over
    arrays that lie transposed, of floats or of codes, and over those that do not."""
    B, F, R, D = shape
    rng = np.random.default_rng(0)
    y, x, scale = (
        jnp.asarray(rng.normal(size=size), dtype) for size in ((B, 2 * F + R), (B, D), (D,))
    )
    down, up = (rng.normal(size=size) for size in ((F + R, D), (D, 2 * F + R)))
    how = {"transposed": codes != "straight"}

    def stored(array):
        array = jnp.asarray(array.T if how["transposed"] else array, dtype)
        if codes != "int8":
            return array
        columns, rows = array.shape
        return Scaled(
            jnp.round(30 * array).astype(jnp.int8), jnp.full(columns, 0.03), jnp.ones(rows)
        )

    def value(array):
        if codes != "int8":
            return np.asarray(jnp.asarray(array, dtype), np.float64)
        return np.asarray(stored(array).codes.T, np.float64) * 0.03

    @jax.jit
    def block(y, down, x, scale, up):
        gated = Gated(y, F, Columns(y, 2 * F, R), None)
        terms = [Term(gated, down, **how), Term(Columns(y, 2 * F, R), down, row=F, **how)]
        x = decode_product(terms, D, Behind(factor=F**-0.5, residual=x), interpret)
        terms = [Term(Normed(x, scale, D, 1e-5), up, **how)]
        return x, decode_product(terms, 2 * F + R, None, interpret)

    found, normed = block(y, stored(down), x, scale, stored(up))
    y, x, scale = (np.asarray(one, np.float64) for one in (y, x, scale))
    gate = y[:, :F] + y[:, 2 * F :][:, np.arange(F) % R]
    gated = gate / (1 + np.exp(-gate)) * y[:, F : 2 * F]
    exact = (np.concatenate([gated, y[:, 2 * F :]], 1) @ value(down)) * F**-0.5 + x
    assert error(found, exact) <= bound, shape
    x = np.asarray(found, np.float64)
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale @ value(up)
    assert error(normed, exact) <= bound, shape


def compare_attention(found, mask, T, G, H, B=1, bound=1.5e-2):
    """In bfloat16, the output and its gradients beside XLA's attention in float32 under a mask."""
    *qkv, cotangent = (x.astype(jnp.bfloat16) for x in test_attention.draw(B, T, K=2, G=G, H=H))
    xla = functools.partial(jax.nn.dot_product_attention, mask=mask, implementation="xla")

    def run(attention, *arguments):
        out, pull = jax.vjp(attention, *arguments[:-1])
        return out, *pull(arguments[-1])

    ours = jax.jit(functools.partial(run, found))(*qkv, cotangent)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(functools.partial(run, xla))(
            *(x.astype(jnp.float32) for x in (*qkv, cotangent))
        )
    for name, one, other in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert one.dtype == jnp.bfloat16 and error(one, other) <= bound, (name, T, G, H)


def test_packed_attention(kernels):
    """Pallas's kernel: segments that do not fill its tiles, padding, groups, both widths."""
    for H, rows in kernels.packed:
        segments = packed(*rows)
        kernel = functools.partial(attend_segments, segments=segments, interpret=kernels.interpret)
        mask = test_attention.spelt_out(segments)
        B, T = segments.shape
        compare_attention(kernel, mask, T, G=3, H=H, B=B)


def test_plain_causal_attention(kernels):
    """cuDNN on a GPU, of an odd number of tokens too."""
    for H, G, T in kernels.plain:
        q = jax.ShapeDtypeStruct((1, T, 2 * G, H), jnp.bfloat16)
        assert cudnn_runs(q) == kernels.gpu
        compare_attention(attend, jnp.tril(jnp.ones((1, 1, T, T), bool)), T, G, H)


def test_packed_training_holds_no_square(kernels):
    """One row of 8,192 tokens. The half of a square is there: cuBLAS's workspace is that large."""
    T = 8192
    step, start = training("ffba")
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ids)
    batch["loss_weights"] = jax.ShapeDtypeStruct((1, T), jnp.float32)
    compiled = step.lower(*start(), batch).compile()
    assert largest(compiled.as_text()) < T * T
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * T  # a square of float32


# ------------------------------------------------------------------------------------------------
# Methods


@functools.cache
def base(dtype=jnp.bfloat16):
    """Kernels four times as wide as initial ones: layers then give as much as they are given."""
    drawn = init_base(jax.random.key(0), CONFIG, dtype)
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 2 else leaf, drawn)


@functools.cache
def adapter(method, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.03 * rng.standard_normal(leaf.shape)).astype(np.float32),
        abstract_adapter(CONFIG, adapter_config(method)),
    )


def adapter_config(method):
    return AdapterConfig(method, RANK, alpha=None if method == "fft" else SCALE * RANK)


def exact_logits(method, tokens, trained, segments=None, params=None):
    """`[B, T, V]` in NumPy's float64."""
    return numpy_logits(
        method,
        RANK,
        SCALE,
        trained,
        add_to=DEFAULT_ADDS.get(method, ()),
        base=params or base(),
        config=CONFIG,
        tokens=np.asarray(tokens),
        segments=segments,
    )


def draw_batch(rows, seed=0):
    """Packed rows as training has them; padding is not counted."""
    rng = np.random.default_rng(seed)
    segments = np.asarray(packed(*rows))
    tokens = rng.integers(0, CONFIG.vocab_size, (len(segments), segments.shape[1] + 1))
    starts = np.diff(segments, prepend=-1) != 0
    place = np.arange(segments.shape[1])
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "loss_weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": (place - np.maximum.accumulate(starts * place, axis=1)).astype(np.int32),
    }


@functools.cache
def training(method, remat="products"):
    """The jitted step, which consumes its state, and what makes a state and the frozen leaves."""
    optimizer = optax.adam(5e-3)
    model = Llama(
        CONFIG, adapter_config(method), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=remat
    )
    step = jax.jit(make_train_step(model, optimizer), donate_argnums=0)

    def start():
        variables = {"params": base(), "adapter": adapter(method)}
        trains = {path: path.startswith("adapter") or method == "fft" for path in paths(variables)}
        trainable, frozen = partition(variables, trains)
        trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trainable)
        state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable), jax.random.key(0))
        return state, frozen

    return step, start


@functools.partial(jax.jit, static_argnums=0)
def split_and_fused(method, params, trained, fused, tokens, segments):
    """The logits of both layouts, in one program."""
    model = Llama(CONFIG, adapter_config(method), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    split = {"params": params, "adapter": trained}
    return [
        model.apply(variables, tokens, segment_ids=segments)
        for variables in (split, {"params": fused})
    ]


def check_layouts(method, exact, batch):
    """Fused, bfloat16 errs no more than split; both err far less than the adapter does anything."""
    trained = adapter(method)
    params = jax.tree.map(np.asarray, base())  # of arrays of the host, nothing is compiled
    fused = fuse(params, trained, CONFIG, adapter_config(method), device_layout())
    inputs = batch["tokens"], batch["segment_ids"]
    split, fused = split_and_fused(method, base(), trained, fused, *inputs)
    bare = exact_logits("fft", batch["tokens"], {}, batch["segment_ids"])
    assert error(split, exact) < 0.05 and error(bare, exact) > 0.1
    assert error(fused, exact) <= 2 * error(split, exact) + 2**-8


def by_method():
    """Both forms of all but fpa's double. Of the CPU's, those not named here are held to the same,
    but not on every run: each costs two compilations."""
    methods = [method for method in METHODS if method != "parallel"]
    fast = ("fft", "lora", "ffba", "zflora")
    cpu = [pytest.param(CPU, m, marks=[] if m in fast else pytest.mark.slow) for m in methods]
    gpu = [pytest.param(GPU, m, marks=pytest.mark.gpu) for m in methods]
    return cpu + gpu


@pytest.mark.parametrize(
    "form, method", by_method(), indirect=["form"], ids=lambda value: getattr(value, "name", value)
)
def test_method(form, method):
    """Fused equals split. The loss of training starts where NumPy has it, falls, and only what
    trains moves."""
    batch = draw_batch(form.rows)
    exact = exact_logits(method, batch["tokens"], adapter(method), batch["segment_ids"])
    if method != "fft":
        check_layouts(method, exact, batch)
    # The best tokens: what moves any logit then moves the loss.
    batch["targets"] = exact.argmax(-1).astype(np.int32)

    step, start = training(method)
    state, frozen = start()
    before = jax.tree.map(np.array, (state.trainable, frozen))
    losses = []
    for _ in range(12):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    log_sum = np.log(np.exp(exact).sum(-1))
    at_target = np.take_along_axis(exact, batch["targets"][..., None], -1)[..., 0]
    expected = np.average(log_sum - at_target, weights=batch["loss_weights"])
    assert losses[0] == pytest.approx(expected, rel=1e-3)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3
    same = functools.partial(jax.tree.map, lambda a, b: bool((np.asarray(a) == b).all()))
    assert jax.tree.all(same(frozen, before[1]))
    assert not any(jax.tree.leaves(same(state.trainable, before[0])))


@SLOW_ON_A_CPU
def test_remat_choices_agree(form):
    """Loss, gradient's norm, and Adam's first moment after one step: a tenth of the gradient."""
    found = {}
    for remat in REMAT_POLICIES:
        step, start = training("ffba", remat)
        state, metrics = step(*start(), draw_batch(form.rows))
        found[remat] = metrics, paths(optax.tree.get(state.optimizer, "mu"))
    expected, gradient = found.pop("none")
    assert found
    for metrics, other in found.values():
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-2)
        for path, leaf in other.items():
            assert error(leaf, gradient[path]) <= 5e-2, path


# ------------------------------------------------------------------------------------------------
# Texts


def draw_prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]


def assert_same_texts(found, expected, prompts, logits_of):
    """Equal but for a place where two tokens are, in bfloat16, equally good; what follows is
    another text. logits_of: NumPy's, `[V]`, of row i after these tokens."""
    for i, (prompt, *texts) in enumerate(zip(prompts, found, expected, strict=True)):
        one, other = (text.tokens for text in texts)
        assert len(one) == len(other)
        differ = [at for at in range(len(one)) if one[at] != other[at]]
        if differ:
            at = differ[0]
            logits = logits_of(i, prompt + one[:at])
            lost = logits.max() - logits[[one[at], other[at]]].min()
            assert lost <= 0.03 * np.abs(logits).max(), (i, at)


@SLOW_ON_A_CPU
def test_texts_with_decode_kernels(kernels, monkeypatch):
    """Prompts shorter than their bucket, so that there are holes; more slots than a part has."""
    if not kernels.gpu:
        interpret_decode_kernels(monkeypatch)
        monkeypatch.setattr("flora_jax.inference.generator.device_layout", gpu_layout)
    prompts = draw_prompts(3, 200, 70, 128)
    texts = [
        Generator(
            CONFIG,
            base(),
            {"a": adapter("ffba")},
            adapter_config("ffba"),
            max_length=512,
            batch_size=4,
            decode_kernels=computed,
        ).generate(prompts, 32)
        for computed in ("none", "attention", "layer")
    ]

    def logits_of(_, tokens):
        return exact_logits("ffba", [tokens], adapter("ffba"))[0, -1]

    for found in texts[1:]:
        assert_same_texts(found, texts[0], prompts, logits_of)


@SLOW_ON_A_CPU
def test_a_bank_of_four(form):
    """Each row gets what its adapter gives it alone."""
    prompts, names = draw_prompts(3, 21, 9, 16, 1), ["b", None, "a", "d", "c"]
    adapters = {name: adapter("ffba", seed) for seed, name in enumerate("abcd")}
    generator = Generator(
        CONFIG, base(), adapters, adapter_config("ffba"), max_length=64, batch_size=5
    )
    alone = {}
    for name in names:
        generator.use(name)
        alone[name] = generator.generate(prompts, 40)
    assert len({tuple(texts[1].tokens) for texts in alone.values()}) == 5

    def logits_of(i, tokens):
        method = "fft" if names[i] is None else "ffba"
        return exact_logits(method, [tokens], adapters.get(names[i], {}))[0, -1]

    expected = [alone[name][i] for i, name in enumerate(names)]
    found = generator.generate(prompts, 40, adapter_names=names)
    assert_same_texts(found, expected, prompts, logits_of)


# ------------------------------------------------------------------------------------------------
# Runs


def held():
    """Bytes of all arrays, and those in use on the device where it counts them."""
    gc.collect()
    stats = jax.local_devices()[0].memory_stats() or {}
    return sum(array.nbytes for array in jax.live_arrays()), stats.get("bytes_in_use", 0)


def test_memory_does_not_grow(form):
    """Over 50 steps and 1,000 tokens, once everything is compiled."""
    prompts = draw_prompts(3, 21, 9, 16, 1)
    step, start = training("ffba")
    state, frozen = start()
    generator = Generator(
        CONFIG, base(), {"a": adapter("ffba")}, adapter_config("ffba"), max_length=64, batch_size=5
    )

    def work(state, steps, texts):
        for seed in range(steps):
            state, metrics = step(state, frozen, draw_batch(form.rows, seed))
        count = 0
        for seed in range(texts):
            count += sum(len(text.tokens) for text in generator.generate(prompts, 40, seed=seed))
        return jax.block_until_ready(state), float(metrics["loss"]), count

    state, _, _ = work(state, 2, 2)
    before = held()
    state, loss, count = work(state, 50, 5)
    after = held()
    assert int(state.step) == 52 and np.isfinite(loss) and count == 1000
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 2**16  # arrays are filled up to blocks, now here, now there


@pytest.fixture
def programs(tmp_path):
    """A folder where every program that is compiled is kept, as long as a test runs."""
    changed = {
        "jax_compilation_cache_dir": str(tmp_path / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in changed}
    for values in (changed, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is changed:
            yield tmp_path / "programs"


@SLOW_ON_A_CPU
def test_a_stopped_run_goes_on_bit_equal(form, small, programs, monkeypatch, tmp_path):
    """Stopped after step 4 of 6. Programs are kept, as the command keeps them: compiled a second
    time, a GPU's products may be timed anew and others chosen, which sum in another order."""
    model, records = tmp_path / "model", tmp_path / "mine.jsonl"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    save_file(dict(to_hf_tensors(CONFIG, base(jnp.float32))), model / "model.safetensors")
    load_tokenizer("tiny").save_pretrained(model)
    lines = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(40)]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = small(
        **{
            "model.weights": str(model),
            "model.dtype": "bfloat16",
            "model.param_dtype": "bfloat16",
            "data.tasks": str(records),
            "adapter.dropout": 0.1,
            "train.steps": 6,
            "train.eval_every": 0,
        }
    )
    run(config, tmp_path / "whole")
    write = Metrics.write

    def stop(self, step, line):
        write(self, step, line)
        if step == 3:  # seen when the next step is done
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "write", stop)
        with pytest.raises(Stopped, match="after step 4"):
            run(config, tmp_path / "parts")
    run(config, tmp_path / "parts")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    steps = [file.name for file in programs.glob("jit_train_step-*-cache")]
    assert len(steps) == 1


@SLOW_ON_A_CPU
def test_exports(form, tmp_path):
    """Merged, read back by ourselves; then for transformers, which torch runs."""
    tokens = np.array(draw_prompts(60))
    params = base(jnp.float32)
    tokenizer, fingerprint = load_tokenizer("tiny"), base_fingerprint(params)
    exact = exact_logits("lora", tokens, adapter("lora"), params=params)
    trained = Trained(
        config=CONFIG,
        base=params,
        adapter_config=adapter_config("lora"),
        adapter=adapter("lora"),
        tokenizer=tokenizer,
        base_model="base",
        fingerprint=fingerprint,
    )
    export(trained, tmp_path / "merged", "merged")
    config, merged = load_pretrained(str(tmp_path / "merged"))
    assert config == dataclasses.replace(CONFIG, eos_token_id=config.eos_token_id)
    assert error(exact_logits("fft", tokens, {}, params=merged), exact) <= 1e-5
    assert error(exact_logits("fft", tokens, {}, params=params), exact) > 0.1

    export(trained, tmp_path / "remote", "transformers")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "remote", trust_remote_code=True
    )
    with torch.no_grad():
        found = model(torch.tensor(tokens)).logits.numpy()
    assert error(found, exact) <= 1e-4
