"""A chat template is a program that comes with weights: a process with limits tries it first.

transformers runs it in Jinja's sandbox, which keeps a template from files and from Python, but not
from running for ever or filling the memory. Other errors are no verdict, since some templates
refuse a conversation. Run as a program, this module is the process with limits.
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

_SECONDS = 2  # of processor time; a published template takes a hundredth of a second
_PATIENCE = 60  # seconds by the clock, on a busy machine
_BYTES = 2**30
_CHARACTERS = 200_000  # for a conversation of a few words
_TOO_MUCH = 3  # exit code
_READY = b"ready"


def check_template(template: str, where: str) -> None:
    """Raises UserError for a template that is no text, does not end in time or takes too much.

    where: the template's source, for the message. Raises RuntimeError if no process can try it.
    """
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
            [sys.executable, "-P", "-m", __name__],  # -P: no modules of the current directory
            input=template.encode("utf-8", "surrogatepass"),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.stdout != _READY:  # the process failed before it read the template
        raise RuntimeError(f"a chat template cannot be tried: {done.stderr.decode()[-2000:]}")
    return done.returncode == 0


def _environment() -> Any:
    """Jinja's environment as transformers sets it up."""
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: repr(value)
    environment.globals |= {"strftime_now": lambda _: DATE, "raise_exception": _refuse}
    return environment


def _render(environment: Any, template: str) -> None:
    """Renders a few conversations as transformers does, and drops the text."""
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
            except Exception:  # the template refuses the conversation
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
    import resource  # not every system has it, and only this process needs it

    environment = _environment()
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    for kind, most in ((resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_AS, _BYTES)):
        # The system's own limit may be lower, or it may have no limit of this kind.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))
    template = without_generation(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    try:
        _render(environment, template)
    except MemoryError:
        sys.exit(_TOO_MUCH)


if __name__ == "__main__":
    _main()
