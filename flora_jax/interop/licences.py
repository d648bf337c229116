"""What the licence of its base asks of an export: the licence files, and Meta's notices.

A Llama of Meta's is known by its model card (`license: llama3.2`) or by the first lines of its
licence file. The architecture says nothing: others train it under licences of their own. Section
1.b of Meta's licences asks whoever passes on such a model, or one trained from it, for a copy of
the agreement, a NOTICE file, "Built with Llama" where the model is described, and a name that
begins with "Llama".
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from flora_jax.models.loading import LICENCE_FILES, find_licence, resolve_source

_LARGEST = 2**20  # bytes; a licence has some ten thousand
_AGREEMENT = re.compile(
    r"[# ]*(?:META )?LLAMA (\d(?:\.\d)?) COMMUNITY LICENSE AGREEMENT", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Meta:
    """One of Meta's licences.

    title: the licence's name; notice: its sentence in NOTICE; built: what the model card shows, ""
    if it asks for nothing; begins: how the name of a model made from it must begin.
    """

    title: str
    notice: str
    built: str
    begins: str


_RIGHTS = "Copyright © Meta Platforms, Inc. All Rights Reserved."
METAS = {
    "llama2": Meta(
        "Llama 2 Community License",
        "Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        "",
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
    """The licence of a base.

    name: as in model cards, such as `apache-2.0`, None if none is stated; files: the base's licence
    files.
    """

    name: str | None = None
    files: tuple[Path, ...] = ()

    @property
    def meta(self) -> Meta | None:
        """What Meta's licence asks for; None under any other licence."""
        return METAS.get(self.name)

    @property
    def text_missing(self) -> bool:
        """Whether a copy of Meta's agreement must be passed on and is not at hand."""
        return self.meta is not None and not any(_is_agreement(file.name) for file in self.files)

    def title(self, base: str) -> str:
        """The name that a model made from the base `base` may have."""
        name = base.rsplit("/", 1)[-1]
        if self.meta is None:
            return base
        # "Llama-3-8B" begins with "Llama 3", too.
        if not name.replace("-", " ").startswith(self.meta.begins):
            return f"{self.meta.begins}: {name}"
        return name

    def write(self, directory: Path) -> None:
        """Writes the licence files, and under Meta's licences a NOTICE with their sentence."""
        for file in self.files:
            (directory / file.name).write_bytes(file.read_bytes())
        if self.meta is None:
            return
        path = directory / "NOTICE"
        there = ""
        if path.exists():
            there = path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
        if self.meta.notice not in there:
            notices = filter(None, (there, self.meta.notice))
            path.write_text("\n\n".join(notices) + "\n", encoding="utf-8")


NO_LICENCE = Licence()


def base_licence(source: str) -> Licence:
    """The licence of the base that is loaded from `source`."""
    if source == "random":
        return NO_LICENCE
    files = _licence_files(resolve_source(source, weights=False))
    return Licence(next(filter(None, map(_meta_of, files)), None) or find_licence(source), files)


def _is_agreement(name: str) -> bool:
    return name.upper().startswith(("LICENSE", "LICENCE"))


def _licence_files(directory: Path) -> tuple[Path, ...]:
    """The licence files in the directory, sorted by name; none of a `.gguf` file.

    A link is followed only as in the hub's cache, from a snapshot to its blobs. Through any other
    link a stranger's model could publish a file of this machine.
    """
    if not directory.is_dir():
        return ()
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
    """The name of the licence of Meta's that a file begins with; None for any other."""
    if not _is_agreement(file.name):
        return None
    begin = " ".join(file.read_bytes()[:400].decode("utf-8", errors="replace").split())
    found = _AGREEMENT.match(begin)
    if not found or (name := f"llama{found[1]}") not in METAS:
        return None
    return name
