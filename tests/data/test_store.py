"""Encoded examples in a file: the arrays that went in come out, or the file is known to be
damaged."""

import hashlib

import numpy as np
import pytest

from flora_jax.data.encode import Encoded
from flora_jax.data.pipeline import eval_batches, train_iterator
from flora_jax.data.store import new_store, open_store

T = 24


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    return [
        Encoded(rng.integers(0, 2**31 - 1, n, np.int32), rng.random(n) < 0.5)
        for n in rng.integers(2, T + 2, 60)
    ]


@pytest.fixture
def path(examples, tmp_path):
    with new_store(tmp_path / "store") as store:
        for example in examples:
            store.add(example)
        store.finish(about=np.arange(3), names=np.array(["a", "bc"]))
    return tmp_path / "store"


def same(one, other):
    for name in ("tokens", "loss"):
        array = getattr(one, name)
        assert array.dtype == getattr(other, name).dtype
        np.testing.assert_array_equal(array, getattr(other, name))


def test_what_goes_in_comes_out(path, examples):
    found, known = open_store(path)
    assert known["about"].tolist() == [0, 1, 2] and known["names"].tolist() == ["a", "bc"]
    assert set(known) == {"about", "names"} and len(found) == len(examples) == 60
    for one, other in zip(found, examples, strict=True):
        same(one, other)
    same(found[-1], examples[-1])
    same(found[np.int64(7)], examples[7])
    for beyond in (60, -61):
        with pytest.raises(IndexError):
            found[beyond]
    for part in (
        slice(10),
        slice(50, None),
        slice(20, 30),
        slice(30, 20),
        slice(None),
        slice(-5, 99),
    ):
        assert len(found[part]) == len(examples[part])
        for one, other in zip(found[part], examples[part], strict=True):
            same(one, other)
    same(found[20:30][3], examples[23])


def test_it_is_a_map_of_the_file(path, examples):
    """Which may be removed; no example is a copy, and none can be written to."""
    found, _ = open_store(path)
    path.unlink()
    same(found[59], examples[59])
    assert found[3].tokens.base is not None and not found[3].tokens.flags.writeable
    assert np.shares_memory(found[3].tokens, found[2:5][1].tokens)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("parts", [None, [(40, 3.0), (20, 1.0)]])
def test_its_batches_are_those_of_a_list(path, examples, packing, parts):
    found, _ = open_store(path)
    for shard in (0, 1):
        options = {"batch_size": 2, "max_length": T, "seed": 5, "packing": packing}
        options |= {"parts": parts, "shard_index": shard, "shard_count": 2}
        mapped, listed = (train_iterator(one, **options) for one in (found, examples))
        for _ in range(25):
            for one, other in zip(next(mapped).items(), next(listed).items(), strict=True):
                assert one[0] == other[0] and one[1].tobytes() == other[1].tobytes()
        assert mapped.get_state() == listed.get_state()
    options = {"batch_size": 7, "max_length": T}
    batches = [list(eval_batches(one, **options)) for one in (found, examples)]
    for one, other in zip(*batches, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in other)


def test_damage_is_known(path, tmp_path):
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        damaged = tmp_path / "damaged"
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert open_store(damaged) is None
        damaged.write_bytes(whole[:at])
        assert open_store(damaged) is None
    damaged.write_bytes(whole + b"x")
    assert open_store(damaged) is None and open_store(tmp_path / "nowhere") is None
    assert open_store(path) is not None


def test_what_was_not_finished_is_no_file(tmp_path, examples):
    with new_store(tmp_path / "half") as store:
        store.add(examples[0])
    assert open_store(tmp_path / "half") is None


def test_the_digest_is_of_tokens_and_masks(tmp_path, examples):
    with new_store(tmp_path / "x") as store:
        for some in (examples[:7], examples[7:], []):
            for example in some:
                store.add(example)
            parts = [b"%b%b|" % (e.tokens.tobytes(), e.loss.tobytes()) for e in some]
            assert store.take_digest() == hashlib.sha256(b"".join(parts)).hexdigest()
