"""What a step costs: FLOPs beside those of its jaxpr, the clock, the device's peak, a trace."""

import gzip
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from flora_jax import train as command
from flora_jax.adapters import AdapterConfig, abstract_adapter
from flora_jax.errors import UserError
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama, abstract_base
from flora_jax.training import measure
from flora_jax.training.loop import train
from flora_jax.training.measure import Clock, Flops, peak_flops, peak_memory

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")


def products(jaxpr):
    """FLOPs of all matrix products of a jaxpr, those of a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products(inner)
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in summed)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    return total


@pytest.mark.parametrize("method", ["lora", "ffba", "fpa", "fft"])
def test_flops_are_those_of_the_steps_products(method):
    config = AdapterConfig(method, 8)
    trainable, frozen = {"adapter": abstract_adapter(TINY, config)}, {"params": abstract_base(TINY)}
    if method == "fft":
        trainable, frozen = frozen, {}

    def loss(trainable, frozen, tokens):
        logits = Llama(TINY, config).apply({**trainable, **frozen}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable, frozen, np.arange(12)[None]).jaxpr
    flops = Flops.of(frozen, trainable, TINY)
    # Attention is dense here: a token is multiplied with all, and then not seen. Its scores, one of
    # its six products, are made a second time.
    pairs = 12 * 12 * 7 / 6
    assert products(jaxpr) == 12 * (flops.position + flops.target) + pairs * flops.pair


def test_flops_of_a_batch_leave_padding_out():
    batch = {
        "segment_ids": np.array([[1, 1, 1, 2], [1, 1, 0, 0]]),
        "loss_weights": np.array([[0, 1, 1, 0], [0, 1, 0, 0]]),
    }
    # segments of 3, 1 and 2 tokens
    assert Flops(1, 0, 0).of_batch(batch) == 6
    assert Flops(0, 1, 0).of_batch(batch) == 3
    assert Flops(0, 0, 1).of_batch(batch) == 6 + 1 + 3


def test_the_clock_stands_still_between_steps(monkeypatch):
    moments = iter([0.0, 2.0, 50.0, 52.0, 90.0, 91.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(moments))
    clock = Clock(peak=100.0)
    for tokens in (10, 30):
        with clock:
            clock.count(tokens, 10 * tokens)
    assert clock.lap() == {"tokens_per_second": 10.0, "mfu": 1.0}
    with clock:
        clock.count(7)
    assert clock.lap() == {"tokens_per_second": 7.0, "mfu": 0.0}


def test_a_peak_is_of_a_device_that_is_known():
    def peak(kind, dtype="bfloat16"):
        return peak_flops(SimpleNamespace(device_kind=kind), dtype)

    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA L40S") == 362e12
    assert peak("NVIDIA L40") is None
    assert peak("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert peak("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak("cpu") is None


def test_memory_is_the_fullest_devices_or_the_process(monkeypatch):
    assert 0.1 < peak_memory() < 100

    def device(peak):
        return SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": peak})

    monkeypatch.setattr(jax, "local_devices", lambda: [device(3e9), device(5e9)])
    assert peak_memory() == 5.0


def test_a_profile_of_some_steps(small, tmp_path):
    train(small(**{"train.steps": 6}), tmp_path, profile=2)
    [path] = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(set(steps)) == ["4", "5"]
    with pytest.raises(UserError, match=r"steps=6 to be at least 11: the first 3 .* after 6 are"):
        train(small(**{"train.steps": 6}), tmp_path, profile=2)


def test_a_profile_longer_than_the_run_is_refused():
    flags = ["--config", "configs/tiny.py", "--workdir", "w", "--config.train.steps=5"]
    with pytest.raises(UserError, match=r"--profile=3 needs config\.train\.steps=5 .* least 6"):
        command.main(["train", *flags, "--profile", "3"])
