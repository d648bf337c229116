"""Batches: nothing lost, nothing mixed, every epoch whole, and a restored iterator continues bit
for bit."""

import itertools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.data.encode import Encoded
from flora_jax.data.pipeline import eval_batches, train_iterator
from flora_jax.errors import UserError

KEYS = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}
T = 16


def corpus(lengths, seed=0):
    """Examples of the given token counts. The first token is the example's number, so that it can
    be told apart; zero occurs as a token, so that padding cannot be told from ids."""
    rng = np.random.default_rng(seed)
    return [
        Encoded(
            np.concatenate([[i + 100], rng.integers(0, 3, n - 1)]).astype(np.int32),
            rng.random(n) < 0.5,
        )
        for i, n in enumerate(lengths)
    ]


def rows_of(batch):
    """The examples of a batch, found by segment id alone, as (tokens, targets, weights,
    positions)."""
    for row in range(len(batch["tokens"])):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert (np.diff(at) == 1).all()  # a segment is one stretch
            yield tuple(
                batch[name][row, at] for name in ("tokens", "targets", "loss_weights", "positions")
            )


def check(row, examples):
    """Asserts that a row is exactly its example; returns the example's number."""
    tokens, targets, weights, positions = row
    number = int(tokens[0]) - 100
    example = examples[number]
    np.testing.assert_array_equal(tokens, example.tokens[:-1])
    np.testing.assert_array_equal(targets, example.tokens[1:])
    np.testing.assert_array_equal(weights, example.loss[1:])
    np.testing.assert_array_equal(positions, np.arange(len(tokens)))
    return number


def numbers(iterator, examples, count):
    """The numbers of the first `count` examples that the iterator gives."""
    rows = itertools.chain.from_iterable(map(rows_of, iterator))
    return [check(row, examples) for row in itertools.islice(rows, count)]


def assert_same(left, right):
    assert left.keys() == right.keys() == KEYS.keys()
    for name in KEYS:
        np.testing.assert_array_equal(left[name], right[name])


def make(examples, **options):
    return train_iterator(
        examples, **{"batch_size": 3, "max_length": T, "seed": 1, "packing": False, **options}
    )


@pytest.mark.parametrize("packing", [False, True])
def test_shapes_types_and_padding(packing):
    batch = next(make(corpus([5, 9, 17, 2, 3]), packing=packing, batch_size=4))
    assert {name: array.dtype for name, array in batch.items()} == KEYS
    assert {array.shape for array in batch.values()} == {(4, T)}
    padding = batch["segment_ids"] == 0
    assert padding.any() and not any(array[padding].any() for array in batch.values())


def test_the_docstring_example():
    examples = [
        Encoded(np.array([5, 6, 7]), np.array([False, False, True])),
        Encoded(np.array([8, 9]), np.array([False, True])),
    ]
    batches = (
        next(train_iterator(examples, batch_size=1, max_length=4, seed=s, packing=True))
        for s in range(20)
    )
    batch = next(b for b in batches if b["tokens"][0, 0] == 5)  # in the order of the docstring
    assert {name: array[0].tolist() for name, array in batch.items()} == {
        "tokens": [5, 6, 8, 0],
        "targets": [6, 7, 9, 0],
        "loss_weights": [0, 1, 1, 0],
        "segment_ids": [1, 1, 2, 0],
        "positions": [0, 1, 0, 0],
    }


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_epoch_holds_each_example_once_in_a_new_order(packing, batch_size):
    n = 37
    examples = corpus(np.random.default_rng(0).integers(2, T + 2, n))
    order = numbers(make(examples, packing=packing, batch_size=batch_size), examples, 4 * n)
    epochs = [order[i * n : (i + 1) * n] for i in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order == numbers(make(examples, packing=packing, batch_size=batch_size), examples, 4 * n)
    other = numbers(make(examples, packing=packing, batch_size=batch_size, seed=2), examples, n)
    assert other != epochs[0]


@pytest.mark.parametrize("packing", [False, True])
def test_shards_are_disjoint_and_together_whole(packing):
    n, examples = 23, corpus([4] * 23)
    sizes = [len(range(i, n, 3)) for i in range(3)]
    streams = [
        numbers(
            make(examples, packing=packing, shard_index=i, shard_count=3), examples, 2 * sizes[i]
        )
        for i in range(3)
    ]
    first = [stream[:size] for stream, size in zip(streams, sizes, strict=True)]
    second = [stream[size:] for stream, size in zip(streams, sizes, strict=True)]
    for epoch in (first, second):
        assert sorted(itertools.chain(*epoch)) == list(range(n))
    assert set(first[0]) != set(second[0])  # the split itself is drawn anew


@pytest.mark.parametrize("packing", [False, True])
def test_parts_are_drawn_by_their_weights(packing):
    """A part of 8 with three quarters of the draws beside one of 40: each of the 8 comes fifteen
    times as often."""
    options = {"packing": packing, "parts": [(8, 3.0), (40, 1.0)]}
    examples = corpus([4] * 48)
    order = np.array(numbers(make(examples, **options), examples, 640))
    assert abs((order < 8).mean() - 0.75) < 0.02
    often = np.bincount(order, minlength=48)
    assert set(often[:8]) <= set(range(58, 63)) and set(often[8:]) <= {3, 4, 5}
    alone = [one for one in order.tolist() if one < 8]
    rounds = {tuple(alone[i : i + 8]) for i in range(0, 480 - 8, 8)}
    if not packing:  # packing lets rows overtake each other
        assert all(sorted(one) == list(range(8)) for one in rounds) and len(rounds) > 20
    assert order.tolist() == numbers(make(examples, **options), examples, 640)
    assert order.tolist() != numbers(make(examples, **options, seed=2), examples, 640)
    uneven = corpus([2] * 8 + [T] * 40)
    for shard in (0, 3):  # a process fills its rows at its own pace: each must hold the shares
        drawn = np.array(
            numbers(make(uneven, **options, shard_index=shard, shard_count=4), uneven, 320)
        )
        assert abs((drawn < 8).mean() - 0.75) < 0.04
    state = make(examples, **options)
    for _ in range(30):
        next(state)
    again = make(examples, **options)
    again.set_state(json.loads(json.dumps(state.get_state())))
    for _ in range(20):
        assert_same(next(state), next(again))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("done", [0, 1, 7, 40])
def test_a_restored_iterator_gives_the_very_same_batches(packing, done):
    examples = corpus(np.random.default_rng(0).integers(2, T + 2, 29))
    iterator = make(examples, packing=packing)
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))  # what a checkpoint makes of it
    expected = [next(iterator) for _ in range(30)]  # across two epochs and more
    for _ in range(2):  # a state may be used again
        restored = make(examples, packing=packing)
        next(restored)
        restored.set_state(state)
        for batch in expected:
            assert_same(next(restored), batch)


@pytest.mark.parametrize("packing", [False, True])
def test_orbax_saves_and_restores_the_iterator(packing, tmp_path):
    examples = corpus(np.random.default_rng(0).integers(2, T + 2, 29))
    iterator = make(examples, packing=packing)
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = [next(iterator) for _ in range(12)]
        restored = make(examples, packing=packing)
        manager.restore(
            5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored))
        )
    for batch in expected:
        assert_same(next(restored), batch)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, T + 1), min_size=1, max_size=150), seed=st.integers(0, 2**40)
)
def test_packing_loses_no_token_and_mixes_no_segments(lengths, seed):
    examples = corpus(lengths)
    iterator = make(examples, packing=True, batch_size=1, seed=seed)
    seen, rows = [], 0
    while len(seen) < len(examples):
        batch = next(iterator)
        rows += 1
        found = [check(row, examples) for row in rows_of(batch)]
        assert found and (batch["segment_ids"] > 0).sum() == sum(lengths[i] - 1 for i in found)
        seen += found
    assert sorted(seen) == list(range(len(examples)))  # rows end where the epoch ends
    # First fit leaves at most one row in each round half empty: it would have taken the next one's
    # examples.
    positions = sum(length - 1 for length in lengths)
    assert rows <= 2 * positions / T + -(-len(lengths) // 64) + 1


def test_packing_fills_rows():
    examples = corpus(np.random.default_rng(0).integers(2, 8, 400))
    batches = [
        next(iterator)
        for iterator in [make(examples, packing=True, batch_size=8)]
        for _ in range(8)
    ]
    assert np.mean([(b["segment_ids"] > 0).mean() for b in batches]) > 0.85


def test_eval_batches_hold_each_example_once_in_order():
    examples = corpus([5, 17, 2, 9, 3, 4, 8])
    batches = list(eval_batches(examples, batch_size=3, max_length=T))
    assert [check(row, examples) for batch in batches for row in rows_of(batch)] == list(range(7))
    for batch in batches:
        assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
            name: (dtype, (3, T)) for name, dtype in KEYS.items()
        }
    assert not any(array[1:].any() for array in batches[-1].values())  # two empty rows
    assert list(eval_batches([], batch_size=3, max_length=T)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"train\.batch_size=0 must be at least 1"),
        ({"seed": -1}, r"train\.seed=-1 must be at least 0"),
        ({"shard_index": 2, "shard_count": 2}, r"shard_index=2 must be in 0 … shard_count-1=1"),
        ({"shard_count": 9}, "3 examples cannot feed 9 processes"),
        ({"max_length": 3}, r"data\.max_length=3 is shorter than an example of 4 positions"),
    ],
)
def test_arguments_that_give_no_batch(options, message):
    with pytest.raises(UserError, match=message):
        make(corpus([3, 4, 5]), **options)


def test_no_examples():
    with pytest.raises(UserError, match="0 examples cannot feed 1 processes"):
        make([])
