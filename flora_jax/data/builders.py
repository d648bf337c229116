"""TFDS builders of the record kinds, and TFDS's own, of the data sets in its catalogue.

The former hold array_record files in source order, written and read without TensorFlow. Importing
this module imports tensorflow_datasets, which takes a second: `sources` does so on first use.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.read_only_builder import builder_from_files
from tensorflow_datasets.core.registered import DatasetNotFoundError

from flora_jax.errors import UserError, expand_path
from flora_jax.progress import progress

Text = tfds.features.Text


@dataclasses.dataclass(kw_only=True)
class SourceConfig(tfds.core.BuilderConfig):
    """One prepared split: its name and its records, already validated."""

    split: str
    records: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)


class _Builder(tfds.core.GeneratorBasedBuilder):
    """What the kinds share; each states only its features."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums to look for beside the code (and TFDS 4.9.10
    # would look with a package that it does not declare).
    code_path = None
    FEATURES: ClassVar[Mapping[str, Any]]
    builder_config: SourceConfig

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict(self.FEATURES))
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {self.builder_config.split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        records = self.builder_config.records
        # On a terminal TFDS has bars of its own.
        return enumerate(
            progress(records, len(records), "preparing", "record", silent=sys.stderr.isatty())
        )


class Records(_Builder):
    """LLM-Adapters records."""

    FEATURES: ClassVar = {name: Text() for name in ("instruction", "input", "output", "answer")}


class Texts(_Builder):
    """A text and the texts that answer it."""

    FEATURES: ClassVar = {"text": Text(), "references": tfds.features.Sequence(Text())}


class Generated(_Builder):
    """reasoning-gym problems."""

    FEATURES: ClassVar = {"question": Text(), "answer": Text()}


class Conversations(_Builder):
    """People's own JSONL, as messages."""

    FEATURES: ClassVar = {
        "messages": tfds.features.Sequence(
            {
                "role": Text(),
                "content": Text(),
                "trained": tfds.features.Scalar(np.bool_),
                "more": Text(),
            }
        ),
        "tools": Text(),
    }


BUILDERS = {"records": Records, "texts": Texts, "generated": Generated, "jsonl": Conversations}


def own_folder() -> Path:
    """Where TFDS itself keeps data sets: `$TFDS_DATA_DIR`, or a folder of the home directory."""
    return Path(expand_path(tfds.core.constants.DATA_DIR))


def catalogue_builder(name: str, folder: str) -> tfds.core.DatasetBuilder:
    """The data set `name` of the TFDS catalogue, prepared under `folder`.

    Where it is not, TFDS downloads and prepares it there. Raises UserError where that fails, and
    says why and what would do.
    """
    where = {"data_dir": folder, "file_format": "array_record"}
    build = f"`tfds build {name} --file_format=array_record"
    try:
        return builder_from_files(name, **where)
    except DatasetNotFoundError:
        pass
    except ValueError as error:  # it is there, but not as array_record
        raise UserError(
            f"TFDS {name} in {folder}: {_line(error)} Prepare it as array_record: {build} "
            "--overwrite`"
        ) from None
    try:
        # Google's bucket of prepared data has no array_record, and looking there takes TensorFlow.
        download = tfds.download.DownloadConfig(try_download_gcs=False)
        tfds.builder(name, **where).download_and_prepare(download_config=download)
        return builder_from_files(name, **where)
    except DatasetNotFoundError:
        # TFDS finds the code of its older builders only where it can import TensorFlow.
        why = "TFDS's own builder of it needs tensorflow, which is not installed here"
    # a download, a check sum, a missing package, a manual step: TFDS has no class for them
    except Exception as error:
        why = f"preparing it failed ({type(error).__name__}: {_line(error)})"
    raise UserError(
        f"TFDS {name} is not prepared in {folder}, and {why}; where there are a network, "
        f"tensorflow and importlib_resources, run {build} --data_dir=DIR` and set data.dir "
        "(evaluate: --data_dir) to tfds:DIR"
    )


def _line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if len(line) < 300 else f"{line[:300]}…"
