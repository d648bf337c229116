"""A chat template is a program that comes with weights: it is tried in a process with limits first.

Jinja's sandbox, in which transformers runs it, keeps a template from files and from Python, but not
from running for ever or filling the memory. What else goes wrong is no verdict here, since some
templates refuse a conversation. Run as a program, this module is the process with limits.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from flora_jax.errors import UserError, require
from flora_jax.tokens import DATE, without_generation

_SECONDS = 2  # of a processor; a published template takes a hundredth of one
_PATIENCE = 60  # seconds of a clock, on a busy machine
_BYTES = 2**30
_CHARACTERS = 200_000  # for a conversation of a few words
_TOO_MUCH = 3  # exit code
_READY = b"ready"


def check_template(template: str, where: str) -> None:
    """Raises UserError for a template that is no text, does not end in time or takes too much;
    RuntimeError where no process can try it. where: it is from."""
    require(isinstance(template, str), f"{where}: the chat template is no text")
    if not _ends(template):
        raise UserError(
            f"{where}: the chat template takes more than {_SECONDS} seconds, {_BYTES // 2**20} MB "
            f"or {_CHARACTERS:,} characters for a conversation of three words; mend or remove it"
        )


@functools.cache
def _ends(template: str) -> bool:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],  # -P: no Python of the directory that we are in
            input=template.encode("utf-8", "surrogatepass"),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.stdout != _READY:  # it is not the template that failed
        raise RuntimeError(f"a chat template cannot be tried: {done.stderr.decode()[-2000:]}")
    return done.returncode == 0


def _environment() -> Any:
    """As transformers has it."""
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: repr(value)
    environment.globals |= {"strftime_now": lambda _: DATE, "raise_exception": _refuse}
    return environment


def _render(environment: Any, template: str) -> None:
    """Conversations as transformers has the template render them, to nowhere."""
    tokens = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for start in ([], [{"role": "system", "content": "c"}]):
        for opens in (False, True):
            given = {"add_generation_prompt": opens, "date_string": DATE, "tools": None}
            given |= {"messages": [*start, *turns[: 2 - opens]], "documents": None, **tokens}
            try:
                _count(environment.from_string(template).generate(**given))
            except MemoryError:
                raise
            except Exception:  # refused
                continue


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _count(pieces: Iterable[str]) -> None:
    written = 0
    for piece in pieces:
        written += len(piece)
        if written > _CHARACTERS:
            raise MemoryError


def _main() -> None:
    import resource  # which only this process needs, and not every system has

    environment = _environment()
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    for kind, most in ((resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_AS, _BYTES)):
        # The system's own limit may be lower, or there is none of this kind.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))
    template = without_generation(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    try:
        _render(environment, template)
    except MemoryError:
        sys.exit(_TOO_MUCH)


if __name__ == "__main__":
    _main()
