"""Installs this project, editable, with one of its extras into the environment that runs this.

    python tools/install.py test

First what requirements/EXTRA.txt locks, at its versions and hashes; then what setup.py asks for
beyond that. Where the lock cannot be installed (a registry that lacks a version, another platform)
it says so, and setup.py's ranges give everything. A file whose hash differs ends it. uv installs in
half the time of pip, which does it where uv cannot.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip")
# Not all that is installed is compiled to bytecode, which takes a minute and a half: each module is
# when it is first imported, and kept.
WITH_PIP = (*PIP, "install", "--quiet", "--no-compile", "--disable-pip-version-check")
WITH_UV = (sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable)
# uv does not read pip's settings: those of where packages come from, in uv's words.
UV_FLAGS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
}
ONLY_PIP = {"no-index", "proxy", "client-cert"}
MISMATCH = "DO NOT MATCH THE HASHES"  # pip's words


def pip_settings(lines: Iterable[str]) -> dict[str, str]:
    """What `pip config list` prints, by name.

    As pip has it, an environment variable comes before a section of one command, and that before
    the global section.
    """
    found = {}
    for section in ("global.", "install.", ":env:."):
        for line in lines:
            name, _, value = line.partition("=")
            if name.startswith(section):
                found[name.removeprefix(section)] = ast.literal_eval(value)
    return found


def uv_flags(settings: Mapping[str, str]) -> list[str]:
    """The flags with which uv looks where pip does; of all indexes it takes the best version."""
    flags = ["--index-strategy", "unsafe-best-match"]
    for name, flag in UV_FLAGS.items():
        for value in settings.get(name, "").split():
            flags += [flag, value]
    return flags


def installers() -> list[list[str]]:
    """The commands that install, the quicker first."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True)
    settings = pip_settings(listed.stdout.splitlines())
    if ONLY_PIP & settings.keys():
        return [[*WITH_PIP]]
    if subprocess.run([*WITH_PIP, "uv"], capture_output=True).returncode:
        return [[*WITH_PIP]]
    if "cert" in settings:
        os.environ.setdefault("SSL_CERT_FILE", settings["cert"])
    return [[*WITH_UV, *uv_flags(settings)], [*WITH_PIP]]


def install(commands: Iterable[list[str]], *what: str) -> str:
    """Installs by the first command that can; empty, or what the last of them says."""
    for command in commands:
        done = subprocess.run([*command, *what], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            return ""
    return done.stderr.strip() or f"exit code {done.returncode}"


def main(extra: str) -> int:
    """The command; returns the exit code."""
    commands = installers()
    lock = f"requirements/{extra}.txt"
    if (ROOT / lock).exists():
        # All that its packages need stands in it, with hashes, which both installers then check.
        said = install(commands, "--no-deps", "--requirement", lock)
        if MISMATCH in said:  # no matter of what this machine has
            print(said, file=sys.stderr)
            return 1
        if said:
            reason = said.splitlines()[-1].removeprefix("ERROR: ")
            print(f"{lock} cannot be installed ({reason}); taking setup.py's ranges", flush=True)
    said = install(commands, "--editable", f".[{extra}]")
    if said:
        print(said, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
