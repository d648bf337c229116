"""What an export owes to the licence of its base: the base's own licence files, and Meta's notices.

A Llama of Meta's is known by its model card (`license: llama3.2`) or by the first lines of its
licence file, never by its architecture: others train that under licences of their own. Section 1.b
of Meta's licences asks whoever passes on such a model, or one trained from it, for a copy of the
agreement, a NOTICE file, "Built with Llama" where the model is described, and a name that begins
with "Llama".
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from flora_jax.models.loading import LICENCE_FILES, find_licence, resolve_source

_LARGEST = 2**20  # bytes; a licence is some 10 thousand
_AGREEMENT = re.compile(
    r"[# ]*(?:META )?LLAMA (\d(?:\.\d)?) COMMUNITY LICENSE AGREEMENT", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Meta:
    """One of Meta's licences.

    notice: its sentence in NOTICE; built: what the card shows, None where none is asked for;
    begins: how the name of a model made from it has to begin.
    """

    title: str
    notice: str
    built: str | None
    begins: str


_RIGHTS = "Copyright © Meta Platforms, Inc. All Rights Reserved."
METAS = {
    "llama2": Meta(
        "Llama 2 Community License",
        "Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        None,
        "",
    ),
    "llama3": Meta(
        "Meta Llama 3 Community License",
        f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {_RIGHTS}",
        "Built with Meta Llama 3",
        "Llama 3",
    ),
    **{
        f"llama{version}": Meta(
            f"Llama {version} Community License",
            f"Llama {version} is licensed under the Llama {version} Community License, {_RIGHTS}",
            "Built with Llama",
            "Llama",
        )
        for version in ("3.1", "3.2", "3.3")
    },
}


@dataclasses.dataclass(frozen=True)
class Licence:
    """Of a base. name: as model cards have it, such as `apache-2.0`, None where none is stated;
    files: the base's licence files."""

    name: str | None = None
    files: tuple[Path, ...] = ()

    @property
    def meta(self) -> Meta | None:
        """What Meta's licence asks for, None under any other."""
        return METAS.get(self.name)

    @property
    def text_missing(self) -> bool:
        """Whether a copy of Meta's agreement has to be passed on and is not at hand."""
        return self.meta is not None and not any(_is_agreement(file.name) for file in self.files)

    def title(self, base: str) -> str:
        """The name of a base as a model made from it may bear it."""
        name = base.rsplit("/", 1)[-1]
        if self.meta is None:
            return base
        # "Llama-3-8B" begins with "Llama 3", too.
        if not name.replace("-", " ").startswith(self.meta.begins):
            return f"{self.meta.begins}: {name}"
        return name

    def write(self, directory: Path) -> None:
        """The files, and under Meta's licences a NOTICE that has their sentence."""
        for file in self.files:
            (directory / file.name).write_bytes(file.read_bytes())
        if self.meta is None:
            return
        path = directory / "NOTICE"
        there = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if self.meta.notice not in there:
            before = there.rstrip("\n") + "\n\n" if there else ""
            path.write_text(f"{before}{self.meta.notice}\n", encoding="utf-8")


NO_LICENCE = Licence()


def base_licence(source: str) -> Licence:
    """The licence of a base, by the source it is loaded from."""
    if source == "random":
        return NO_LICENCE
    path = resolve_source(source, weights=False)
    files = _licence_files(path) if path.is_dir() else ()
    return Licence(next(filter(None, map(_meta_of, files)), None) or find_licence(source), files)


def _is_agreement(name: str) -> bool:
    return name.upper().startswith(("LICENSE", "LICENCE"))


def _licence_files(directory: Path) -> tuple[Path, ...]:
    """Files right in the directory, by name.

    A link is followed only as in the hub's cache, from a snapshot to its blobs. One that leads
    elsewhere would have a stranger's model publish a file of this machine.
    """
    whole = directory.resolve()
    places = [whole]
    if whole.parent.name == "snapshots":
        places.append(whole.parent.parent / "blobs")
    found = [
        file
        for file in sorted(directory.iterdir())
        if file.name.upper().startswith(LICENCE_FILES)
        and file.is_file()
        and file.resolve().parent in places
        and file.stat().st_size <= _LARGEST
    ]
    return tuple(found)


def _meta_of(file: Path) -> str | None:
    """The name of Meta's licence that a file begins with."""
    if not _is_agreement(file.name):
        return None
    begin = " ".join(file.read_bytes()[:400].decode("utf-8", errors="replace").split())
    found = _AGREEMENT.match(begin)
    if not found or (name := f"llama{found[1]}") not in METAS:
        return None
    return name
