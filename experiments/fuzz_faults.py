"""Faults for files, drawn from a seed: changed bytes and fields, enlarged lengths, and links and
devices in a file's place."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TWIN = "\u0001twin\u0001"  # begins a name; cut off in the text, so that it is there twice
_DEEP = "\u0001deep\u0001"  # becomes a list of lists, deeper than Python recurses
_DEPTH = 3000
_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, 1e-320)
_TEXTS = ("", "\0", "\ud800", "../outside", "/etc/passwd", "~", "${HOME}", "é" * 300, "x" * 200_000)
_VALUES = (None, True, False, [], {}, [None], {"": None}, float("nan"), float("inf"), -float("inf"))

_STATEMENTS = (
    b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    b"{% for i in range(99999) %}{{ messages }}{% endfor %}",
    b"{{ 'x' * 10**11 }}",
    b"{{ 9**(9**9) }}",
    b"{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    b"{{ messages.__class__.__mro__[1].__subclasses__() }}",
    b"{{ cycler.__init__.__globals__.os.system('touch outside/x') }}",
    b"{% include '/etc/passwd' %}",
    b"{% set _ = messages.append(messages) %}",
    b"{{ messages[99].content }}",
    b"{{ unknown.field }}",
    b"{% if %}",
    b"{{ '\x00' }}\xff",
)


def spoil(path: Path, outside: Path, rng: random.Random) -> str:
    """Puts one to three faults into a file, or something else in its place. Returns what it did.

    outside: the target of links, a file that nothing may touch.
    """
    if rng.random() < 0.06:
        return _replace(path, outside, rng)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kinds: list[Callable[[bytes, random.Random], tuple[bytes, str]]] = [_spoil_bytes]
        if path.suffix in (".json", ".jsonl"):
            kinds += [_spoil_json] * 4
        if path.suffix == ".safetensors":
            kinds += [_spoil_header, _spoil_header, _spoil_values]
        if path.suffix in (".gguf", ".parquet"):
            kinds += [_spoil_word, _spoil_word]
        if path.suffix == ".jinja":
            kinds += [_spoil_template] * 2
        data, what = rng.choice(kinds)(path.read_bytes(), rng)
        path.write_bytes(data)
        done.append(what)
    return "; ".join(done)


def _replace(path: Path, outside: Path, rng: random.Random) -> str:
    path.unlink()
    kind = rng.choice(("nothing", "folder", "empty", "zero", "null", "loop", "link", "pipe"))
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        target = {"zero": "/dev/zero", "null": "/dev/null", "loop": path, "link": outside}
        path.symlink_to(target[kind])
    return f"replaced by {kind}"


def _spoil_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    if not data:
        return b"\0", "a byte"
    at = rng.randrange(len(data))
    size = min(rng.choice((1, 8, 64, 4096)), len(data) - at)
    what = rng.choice(("flipped", "cut off", "cut out", "doubled", "zeroed", "random", "appended"))
    own = bytearray(data)
    if what == "flipped":
        own[at] ^= 1 << rng.randrange(8)
    elif what == "cut off":
        del own[at:]
    elif what == "cut out":
        del own[at : at + size]
    elif what == "doubled":
        own[at:at] = own[at : at + size]
    elif what == "zeroed":
        own[at : at + size] = bytes(size)
    elif what == "random":
        own[at : at + size] = rng.randbytes(size)
    else:
        own += rng.randbytes(size)
    return bytes(own), f"{size} bytes {what} at {at}"


def _spoil_word(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changes 4 or 8 bytes near the front of a binary file: a length, a number or a type."""
    if len(data) < 16:
        return _spoil_bytes(data, rng)
    size = rng.choice((4, 8))
    at = rng.randrange(min(len(data), 20_000) - size)
    value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)) % 2 ** (8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :], f"{value} at {at}"


def _spoil_template(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Adds a statement that runs long, prints much or asks for what it must not have."""
    at = rng.choice((0, len(data)))
    new = rng.choice(_STATEMENTS)
    return data[:at] + new + data[at:], f"{new[:40]!r} at {at}"


def _spoil_json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changes a field of a JSON file, or of one line of a JSON Lines file."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    whole = len(lines) > 1 and not _parsed(lines[0]) and bool(_parsed(data))
    text = data if whole else lines[at]
    value = _parsed(text)
    if not value:
        return _spoil_bytes(data, rng)
    value, what = _spoil_value(value[0], rng)
    changed = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    for twin, name in _twins(value):
        changed = changed.replace(json.dumps(twin).encode(), json.dumps(name).encode())
    changed = changed.replace(json.dumps(_DEEP).encode(), b"[" * _DEPTH + b"]" * _DEPTH)
    if whole:
        return changed, what
    return b"\n".join([*lines[:at], changed, *lines[at + 1 :]]), f"line {at}: {what}"


def _parsed(text: bytes) -> list[Any]:
    """The value in a list, which is empty for text that is no JSON."""
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return []


def _twins(value: Any) -> list[tuple[str, str]]:
    """The names in a value that begin with _TWIN, each with the name that it becomes."""
    found = []
    nodes = [value]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            found += [(key, key.removeprefix(_TWIN)) for key in node if key.startswith(_TWIN)]
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    return found


def _spoil_value(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A value with one node changed, at any depth, and what was changed."""
    if not isinstance(value, dict | list):
        return _drawn(value, rng), "all of it"
    nodes: list[tuple[Any, Any]] = []
    seen = [value]
    while seen and len(nodes) < 10_000:
        node = seen.pop()
        inside = list(node.items() if isinstance(node, dict) else enumerate(node))
        nodes += [(node, key) for key, _ in inside]
        seen += [own for _, own in inside if isinstance(own, dict | list)]
    if not nodes or rng.random() < 0.02:
        new = _drawn(value, rng)
        return new, f"all of it {_said(new)}"
    # The few fields near the top are drawn as often as the many of a vocabulary.
    node, key = rng.choice(nodes[: rng.choice((20, 200, len(nodes)))])
    kind = rng.random()
    if kind < 0.15:
        del node[key]
        return value, f"{key!r} dropped"
    if kind < 0.22 and isinstance(node, dict):
        node[f"{_TWIN}{key}"] = _drawn(node[key], rng)
        return value, f"{key!r} doubled"
    if kind < 0.3 and isinstance(node, dict):
        node[rng.choice(("unknown", "", "__class__", "../x"))] = node.pop(key)
        return value, f"{key!r} renamed"
    node[key] = _drawn(node[key], rng)
    return value, f"{key!r} {_said(node[key])}"


def _drawn(value: Any, rng: random.Random) -> Any:
    """Another value, of any kind."""
    if isinstance(value, int | float) and rng.random() < 0.3:
        return rng.choice((value + 1, value * 2, -value, str(value), value * 10**6))
    if isinstance(value, str) and rng.random() < 0.3:
        return rng.choice((value + value, value[:-1], value.upper(), [value], len(value)))
    if isinstance(value, list) and value and rng.random() < 0.5:
        return rng.choice((value * 2, value[:-1], value[::-1], [value]))
    if rng.random() < 0.03:
        return _DEEP
    return rng.choice(rng.choice((_NUMBERS, _TEXTS, _VALUES)))


def _said(value: Any) -> str:
    return f"= {value!r}"[:60]


def _spoil_header(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changes a field of a safetensors file's header, or the header's length."""
    if len(data) < 8:
        return _spoil_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    if rng.random() < 0.15 or not _parsed(header):
        new = rng.choice((0, 1, length - 1, length + 1, 2 * length, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", new % 2**64) + data[8:], f"header of {new} bytes"
    changed, what = _spoil_json(header, rng)
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :], what


def _spoil_values(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Writes a NaN, an infinity or a huge float32 somewhere into the values."""
    if len(data) < 4000:
        return _spoil_bytes(data, rng)
    at = len(data) - 4 * rng.randrange(1, len(data) // 8)
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38))
    return data[:at] + struct.pack("<f", value) + data[at + 4 :], f"{value} at {at}"
