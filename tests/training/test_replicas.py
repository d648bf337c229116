"""Runs trained together: each is the run that it is alone, whatever becomes of the others."""

import copy
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import computed_lines

from flora_jax.config_files import read_config
from flora_jax.errors import Stopped, UserError
from flora_jax.train import run
from flora_jax.training.replicas import Together, compute, groups, train_replicas

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS = 8
KINDS = [(0, 3e-3), (1, 1e-3)]  # seed, rate


@pytest.fixture(scope="module")
def weights(tmp_path_factory, hf_directory):
    return str(hf_directory(tmp_path_factory.mktemp("weights")))


@pytest.fixture
def configs(weights):
    """Packing, dropout and a warm-up on."""
    out = []
    for seed, rate in KINDS:
        config = read_config("configs/tiny.py")
        config.model.weights = weights
        config.data.generator.update({"train": 60, "validation": 10, "test": 6})
        config.data.validation_size = 8
        config.data.max_length = 256
        config.adapter.dropout = 0.1
        config.train.update({"steps": STEPS, "batch_size": 4, "seed": seed, "log_every": 1})
        config.train.update({"eval_every": 4, "save_every": 4})
        config.optim.learning_rate = rate
        config.eval.tasks = ""
        out.append(config)
    return out


def figures(workdir):
    """By step, all that metrics.jsonl says of what was computed; and the adapter."""
    return computed_lines(workdir), load_file(workdir / "adapter/adapter_model.safetensors")


def assert_alike(found, owed):
    for ours, theirs in zip(found[0], owed[0], strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5)
    assert found[1].keys() == owed[1].keys()
    for name, value in owed[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=1e-5 * np.abs(value).max())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Figures of a configuration's lone run."""
    kept = {}

    def figures_of(config):
        key = (config.train.seed, config.optim.learning_rate)
        if key not in kept:
            workdir = tmp_path_factory.mktemp("alone") / "w"
            run(config, workdir)
            kept[key] = figures(workdir)
        return kept[key]

    return figures_of


@pytest.mark.parametrize("at_once", [None, 2])
def test_each_is_its_lone_run(configs, alone, tmp_path, at_once):
    """On a CPU one after another, by default."""
    workdirs = [tmp_path / str(i) for i in range(len(configs))]
    assert train_replicas(configs, workdirs, at_once) == {}
    for config, workdir in zip(configs, workdirs, strict=True):
        run(config, workdir)
        assert_alike(figures(workdir), alone(config))
    losses = [figures(workdir)[0][-1]["validation_loss"] for workdir in workdirs]
    assert len(set(losses)) == len(losses)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_one_that_diverges_leaves_the_others(configs, alone, tmp_path):
    configs[0].optim.learning_rate = 1e39  # infinite in float32
    workdirs = [tmp_path / str(i) for i in range(len(configs))]
    diverged = train_replicas(configs, workdirs, at_once=2)
    assert diverged.keys() == {0} and "is nan at step" in str(diverged[0])
    run(configs[1], workdirs[1])
    assert_alike(figures(workdirs[1]), alone(configs[1]))


@pytest.mark.slow
def test_told_to_stop_all_save_and_go_on(configs, alone, tmp_path):
    """Two together, the last one alone."""
    configs = [configs[0], configs[1], copy.deepcopy(configs[1])]
    configs[2].optim.learning_rate = 3e-3
    workdirs = [tmp_path / str(i) for i in range(len(configs))]
    step = Together.step

    def interrupted(self, place, state, frozen, batch):
        if place == 0 and int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return step(self, place, state, frozen, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Together, "step", interrupted)
        with pytest.raises(Stopped, match=r"stopped by a signal after step [345]"):
            train_replicas(configs, workdirs)
    train_replicas(configs[:2], workdirs[:2], at_once=2)
    for config, workdir in zip(configs, workdirs, strict=True):
        run(config, workdir)
        assert_alike(figures(workdir), alone(config))


def test_groups_are_of_one_size():
    found = {at_once: list(map(list, groups(6, at_once))) for at_once in (1, 3, 4, 9)}
    assert found[1] == [[0], [1], [2], [3], [4], [5]]
    assert found[3] == found[4] == [[0, 1, 2], [3, 4, 5]]
    assert found[9] == [[0, 1, 2, 3, 4, 5]]


def test_a_group_whose_runs_have_left_is_not_computed():
    """And a copy stands in for one that left a group in which another goes on."""
    called = []

    def program(states, frozen, batches, rates):
        called.append((states, batches, rates.tolist()))
        return states, batches

    given = {place: (10 * place, place) for place in (1, 4, 5)}
    found = compute(program, given, None, np.arange(6), at_once=2)
    assert found == {1: (10, 1), 4: (40, 4), 5: (50, 5)}
    assert called == [((10, 10), (1, 1), [0, 1]), ((40, 50), (4, 5), [4, 5])]


@pytest.mark.parametrize("at_once", [1, 4])
def test_groups_do_not_overlap(monkeypatch, at_once):
    """Neither in a step nor at its end; one group alone is not waited for."""
    running = set()

    def program(states, frozen, batches, rates):
        assert at_once == 4 or not running
        states = tuple(state + 10 for state in states)
        running.update(states)
        return states, batches

    monkeypatch.setattr(
        jax, "block_until_ready", lambda x: running.difference_update(jax.tree.leaves(x))
    )
    states = dict(enumerate(range(4)))
    for _ in range(3):
        given = {place: (state, 0) for place, state in states.items()}
        found = compute(program, given, None, np.ones(4, np.float32), at_once)
        states = {place: state for place, (state, _) in found.items()}
    assert states == {0: 30, 1: 31, 2: 32, 3: 33}
    assert len(running) == (1 if at_once == 1 else 12)


def test_what_a_program_raises_ends_all(configs, tmp_path, monkeypatch):
    def refuse(*_):
        raise MemoryError("out of memory")

    monkeypatch.setattr("flora_jax.training.replicas.replica_program", lambda *_: refuse)
    with pytest.raises(MemoryError):
        train_replicas(configs, [tmp_path / str(i) for i in range(len(configs))])


def test_a_stand_in_that_cannot_be_made_ends_all():
    """Whoever waits is told."""
    together = Together(lambda *_: None, np.ones(2, np.float32), at_once=2)
    state = {"weights": np.zeros(2)}
    raised = []

    def wait():
        with pytest.raises(MemoryError) as error:
            together.step(0, state, None, {})
        raised.append(error)

    thread = threading.Thread(target=wait)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(_):
            raise MemoryError("no room for a copy")

        patch.setattr("jax.numpy.copy", refuse)
        thread.start()
        together.leave(1)
        thread.join(timeout=20)
    assert raised and not thread.is_alive()


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"adapter.rank": 4},
            "config.adapter.rank is 8 in one replica and 4 in another;"
            " they may differ in train.seed and",
        ),
        ({"train.steps": 9}, "config.train.steps is 8 in one replica and 9"),
    ],
)
def test_what_differs_is_refused(configs, changes, words, tmp_path):
    configs[0].adapter.rank = 8
    for config in configs[1:]:
        config.adapter.rank = 8
    configs[1].update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        train_replicas(configs, [tmp_path / str(i) for i in range(len(configs))])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("at_once", [0, -1])
def test_no_replicas_at_once_are_refused(configs, tmp_path, at_once):
    with pytest.raises(UserError, match=rf"at_once={at_once} must be a positive number"):
        train_replicas(configs, [tmp_path / str(i) for i in range(len(configs))], at_once)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model.weights": "random"}, "draws a base of each seed's own"),
        ({"train.accumulation": 2}, "config.train.accumulation=2"),
        ({"train.trainable": ".*norm.*"}, "config.train.trainable='.*norm.*'"),
    ],
)
def test_what_shares_no_base_is_refused(configs, changes, words, tmp_path):
    for config in configs:
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        train_replicas(configs, [tmp_path / str(i) for i in range(len(configs))])
