"""The training step: what it changes, what it averages over, and what its compiled program never
computes."""

import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from support import silent_pieces

from flora_jax.adapters import METHODS, AdapterConfig, abstract_adapter
from flora_jax.config import get_config
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama, abstract_base
from flora_jax.training import loss
from flora_jax.training.optimizer import make_optimizer, trains
from flora_jax.training.rules import combine, partition, paths
from flora_jax.training.step import TrainState, make_eval_step, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
# the values are the same, and compiling is what takes the time
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def methods(*fast):
    """All methods; those not named are held to the same, but not on every run: each costs a
    compilation."""
    return [
        pytest.param(method, marks=[] if method in fast else pytest.mark.slow) for method in METHODS
    ]


def draw(method, config=TINY, rank=8, zero_side=True):
    """Random variables with ordinary sizes; the side that starts at zero is zero unless told
    otherwise."""
    rng = np.random.default_rng(0)
    zero = "A" if method.startswith(("ff", "zf")) else "B"
    leaves = {}
    for path, leaf in paths(
        {
            "params": abstract_base(config),
            "adapter": abstract_adapter(config, AdapterConfig(method, rank)),
        }
    ).items():
        value = rng.standard_normal(leaf.shape).astype(np.float32)
        if path.startswith("params"):
            value = 1 + 0.1 * value if path.endswith("scale") else value / math.sqrt(leaf.shape[-2])
        else:
            value *= 0.0 if zero_side and path[-1] == zero else 0.1
        leaves[path] = value
    return unflatten_dict(leaves, sep="/")


def batch_of(rows=4, T=12, vocabulary=TINY.vocab_size, seed=1):
    """A packed random batch: two segments a row, counted tokens that differ from row to row, none
    in the last."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, T + 1)).astype(np.int32)
    counted = rng.random((rows, T)) < np.linspace(1, 0, rows)[:, None]
    place = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T))
    segment_ids = (place >= 5).astype(np.int32) + 1
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": counted.astype(np.float32),
        "segment_ids": segment_ids,
        "positions": np.where(place >= 5, place - 5, place).astype(np.int32),
    }


def start(variables, trained, optimizer):
    trainable, frozen = partition(variables, trained)
    trainable, frozen = jax.tree.map(jax.numpy.array, (trainable, frozen))  # copies on the device
    state = TrainState(
        jax.numpy.int32(0), trainable, jax.jit(optimizer.init)(trainable), jax.random.key(0)
    )
    return state, frozen


def setting(method):
    """The configuration of `trained_run`: weight decay, no warm-up."""
    config = get_config("tiny", method)
    config.adapter.rank, config.optim.learning_rate, config.optim.weight_decay = 8, 3e-3, 0.1
    config.train.steps, config.optim.warmup_steps = 20, 0
    return config


@functools.cache
def optimizer_of(method):
    variables = draw(method)
    trained = trains(setting(method), variables)
    return variables, trained, make_optimizer(setting(method), variables, trained)


@functools.cache
def step_of(method):
    optimizer = optimizer_of(method)[2]
    return jax.jit(
        make_train_step(Llama(TINY, AdapterConfig(method, 8)), optimizer),
        compiler_options=FAST_COMPILE,
    )


@functools.cache
def trained_run(method):
    """20 steps on one batch: `(variables at the start, all 21 states, frozen, metrics of each step,
    batch)`."""
    variables, batch = draw(method), batch_of()
    state, frozen = start(*optimizer_of(method))
    states, metrics = [state], []
    for _ in range(20):
        state, values = step_of(method)(states[-1], frozen, batch)
        states.append(state)
        metrics.append({name: float(value) for name, value in values.items()})
    return variables, states, frozen, metrics, batch


@pytest.mark.parametrize("method", methods("fft", "lora", "ffa", "ffba", "zflora"))
def test_training_moves_the_adapter_and_nothing_else(method):
    before, states, frozen, metrics, batch = trained_run(method)
    # Every piece of every layer has a gradient by step 2: its first moment is no longer zero. After
    # step 1 the side that does not begin at zero has none yet; fft and ffa have no such side.
    silent = [silent_pieces(optax.tree.get(states[n].optimizer, "mu"), 8) for n in (1, 2)]
    assert bool(silent[0]) == (method not in ("fft", "ffa")) and not silent[1]
    # The frozen base that was passed to the steps is unchanged, decay or not; what trains has
    # moved.
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(frozen))
    after = paths(combine(states[-1].trainable, frozen))
    moved = {path for path, leaf in paths(before).items() if not np.array_equal(leaf, after[path])}
    assert after.keys() == paths(before).keys()
    assert moved == {
        path for path in after if path.startswith("params" if method == "fft" else "adapter")
    }
    # Adam's two moments for what trains, and besides that only counters.
    moments = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(states[-1].trainable))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(states[-1].optimizer))
    assert moments <= held <= moments + 64
    losses = [m["loss"] for m in metrics]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.1
    assert all(
        m["tokens"] == batch["loss_weights"].sum() and m["gradient_norm"] > 0 for m in metrics
    )


def test_the_loss_is_the_mean_over_counted_tokens():
    """Of plain logits, scored by optax; the validation step gives the same as a sum and a count."""
    variables, batch = draw("ffba", zero_side=False), batch_of()
    model = Llama(TINY, AdapterConfig("ffba", 8))
    trainable, frozen = partition(
        variables, {path: path.startswith("adapter") for path in paths(variables)}
    )

    def plain(variables):
        logits = model.apply(
            variables,
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jax.numpy.sum(losses * batch["loss_weights"])

    plain, validate = (
        jax.jit(f, compiler_options=FAST_COMPILE) for f in (plain, make_eval_step(model, 8))
    )
    total, count = validate(trainable, frozen, batch)
    assert count == batch["loss_weights"].sum()
    np.testing.assert_allclose(total, plain(variables), rtol=1e-6)
    before, _, _, metrics, _ = trained_run("ffba")
    assert metrics[0]["loss"] == pytest.approx(float(plain(before) / count), rel=1e-5)


def sgd_step(accumulation, batch, variables):
    """Minus the gradient: the update of plain gradient descent at rate 1."""
    trained = {path: path.startswith("adapter") for path in paths(variables)}
    optimizer = optax.sgd(1.0)
    state, frozen = start(variables, trained, optimizer)
    model = Llama(TINY, AdapterConfig("ffba", 8))
    step = jax.jit(
        make_train_step(model, optimizer, accumulation, 16), compiler_options=FAST_COMPILE
    )
    after, metrics = step(state, frozen, batch)
    update = jax.tree.map(
        lambda a, b: np.asarray(a, np.float64) - np.asarray(b), after.trainable, state.trainable
    )
    return paths(update), metrics


def test_micro_batches_are_one_big_batch(monkeypatch):
    """Rows with unequal counts, the last with none: sums are divided once, by the count of all. The
    micro-batches score the vocabulary in blocks, as large ones are."""
    variables, batch = draw("ffba", zero_side=False), batch_of()
    whole, whole_metrics = sgd_step(1, batch, variables)
    monkeypatch.setattr(loss, "_BLOCK", 64)
    assert loss.vocabulary_block(TINY.vocab_size) == 64 < TINY.vocab_size
    cut, metrics = sgd_step(4, batch, variables)
    for path, update in whole.items():
        # The update is read off parameters near 0.3, whose own rounding is 3e-8.
        assert np.abs(cut[path] - update).max() <= 1e-6 * np.abs(update).max() + 3e-8, path
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6)


def test_a_batch_without_counted_tokens_only_decays():
    """Loss 0, no NaN, and the only change to fresh moments is p -> (1 - rate x decay) p."""
    before, states, frozen, _, batch = trained_run("ffba")
    after, metrics = step_of("ffba")(
        states[0], frozen, batch | {"loss_weights": np.zeros((4, 12), np.float32)}
    )
    assert metrics == {"loss": 0.0, "tokens": 0.0, "gradient_norm": 0.0}
    for path, leaf in paths(after.trainable).items():
        np.testing.assert_allclose(leaf, (1 - 3e-3 * 0.1) * paths(before)[path], rtol=1e-6)


def test_norms_beside_the_adapter_and_a_mask_for_each_step():
    """By path rule the norms train too. With dropout, the same batch has another gradient at
    another step, and the same one whenever that step is run again."""
    config = get_config("tiny", "lora")
    config.adapter.rank, config.train.trainable = 8, "params/.*norm/scale"
    variables, batch = draw("lora", zero_side=False), batch_of()
    trained = trains(config, variables)
    optimizer = make_optimizer(config, variables, trained)
    state, frozen = start(variables, trained, optimizer)
    model = Llama(TINY, AdapterConfig("lora", 8, dropout=0.3))
    step = jax.jit(make_train_step(model, optimizer), compiler_options=FAST_COMPILE)
    runs = [step(state.replace(step=jax.numpy.int32(n)), frozen, batch) for n in (0, 0, 1)]
    norms = [float(metrics["gradient_norm"]) for _, metrics in runs]
    assert norms[0] == norms[1] != norms[2]
    after, before = paths(runs[0][0].trainable), paths(variables)
    moved = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    assert moved == {
        path for path in before if path.startswith("adapter") or path.endswith("norm/scale")
    }


# --------------------------------------------------------------------------------------------------
# The compiled step. Sizes whose kernels share their shapes with nothing else: 32 positions,
# rank 16.

MIDDLE = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=48,
    tie_word_embeddings=True,
)
KERNEL_SHAPES = {(256, 384), (256, 192), (384, 256), (256, 1024), (1024, 256)}


@functools.cache
def compiled_step(method, base_too):
    """The step of `method` compiled from shapes alone, differentiating the base's leaves too or
    not."""
    adapter = AdapterConfig(method, 16)
    variables = {"params": abstract_base(MIDDLE), "adapter": abstract_adapter(MIDDLE, adapter)}
    trained = {path: base_too or path.startswith("adapter") for path in paths(variables)}
    trainable, frozen = partition(variables, trained)
    optimizer = optax.sgd(1e-3)
    state = TrainState(
        jax.ShapeDtypeStruct((), np.int32),
        trainable,
        jax.eval_shape(optimizer.init, trainable),
        jax.eval_shape(jax.random.key, 0),
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(2, 16, 512))
    model = Llama(MIDDLE, adapter, remat=get_config("tiny", method).model.remat)
    step = jax.jit(make_train_step(model, optimizer))
    return step.lower(state, frozen, batch).compile(compiler_options=FAST_COMPILE)


def held(compiled):
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def dots(compiled):
    """The result shapes of the program's matrix products, without axes of length 1."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", compiled.as_text())
    return {tuple(n for n in map(int, dims.split(",")) if n > 1) for dims in found if dims}


def kernels():
    return {
        path: leaf
        for path, leaf in paths(abstract_base(MIDDLE)).items()
        if path.endswith("_kernel")
    }


def test_differentiating_the_base_would_show():
    """What the next test looks for is there when the base trains."""
    assert {leaf.shape[1:] for leaf in kernels().values()} == KERNEL_SHAPES
    assert len(dots(compiled_step("ffba", True)) & KERNEL_SHAPES) == len(KERNEL_SHAPES)


@pytest.mark.parametrize("method", methods("lora", "ffba", "zflora")[1:])
def test_the_base_costs_no_gradient(method):
    """No product of the program is a kernel's gradient; memory lies below that of the same step
    differentiating the base too by at least the kernels, and below the kernels themselves."""
    ours = compiled_step(method, False)
    bytes_of_kernels = sum(4 * leaf.size for leaf in kernels().values())
    assert held(compiled_step(method, True)) - held(ours) > 0.9 * bytes_of_kernels
    assert held(ours) < 0.9 * bytes_of_kernels
    assert not dots(ours) & KERNEL_SHAPES
    assert not any(
        math.prod(shape) >= min(leaf.size for leaf in kernels().values()) for shape in dots(ours)
    )
