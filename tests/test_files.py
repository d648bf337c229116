"""Directories that appear whole or not at all."""

import os
import subprocess
import sys

import pytest

from flora_jax import files
from flora_jax.files import new_directory


def tree(path):
    return {
        str(p.relative_to(path)): p.read_text() if p.is_file() else None for p in path.rglob("*")
    }


def fill(path, text):
    with new_directory(path) as new:
        (new / "file").write_text(text)


def test_made_with_its_parents_and_replaced(tmp_path):
    fill(tmp_path / "a/b", "one")
    fill(tmp_path / "a/b", "two")
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/file": "two"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_nothing_is_left_of_one_that_fails(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "a/b/c") as new:
        (new / "file").write_text("half")
        raise error
    assert tree(tmp_path) == {}
    fill(tmp_path / "a", "one")
    with pytest.raises(error), new_directory(tmp_path / "a"):
        raise error
    assert tree(tmp_path) == {"a": None, "a/file": "one"}


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_what_stood_there_stands_after_an_interrupt_between_the_renames(
    tmp_path, monkeypatch, at, after
):
    """An interrupt just before or just after either rename leaves the old directory or the new one,
    whole."""
    fill(tmp_path / "a", "old")
    given, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == at and not after:
            raise KeyboardInterrupt
        given(source, target)
        if len(calls) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "a", "new")
    assert tree(tmp_path) == {"a": None, "a/file": "new" if (at, after) == (2, True) else "old"}


_COMPILES = """
import jax
from flora_jax.files import keep_programs
keep_programs()
hits = []
listen = jax.monitoring.register_event_listener
listen(lambda event, **_: hits.append(event.endswith("/cache_hits")))
jax.jit(lambda x: 2 * x + 1)(1.0)
print(sum(hits))
"""


def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    environment = {
        **os.environ,
        "FLORA_CACHE": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for hits in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", _COMPILES], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout.strip()) == (0, hits), done.stderr
    assert any((tmp_path / "programs").iterdir())
    # JAX's own setting comes first
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "own")
    subprocess.run(
        [sys.executable, "-c", _COMPILES], env=environment, check=True, capture_output=True
    )
    assert any((tmp_path / "own").iterdir())
