"""TFDS builders of the record kinds: array_record files in source order, written and read without TensorFlow.

Importing this module imports tensorflow_datasets, which takes a second: `sources` does so on first use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

Text = tfds.features.Text


@dataclasses.dataclass(kw_only=True)
class SourceConfig(tfds.core.BuilderConfig):
    """One prepared split: its name and its records, already validated."""

    split: str
    records: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)


class _Builder(tfds.core.GeneratorBasedBuilder):
    """What the kinds share; each states only its features."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums to look for beside the code (and TFDS 4.9.10 would look
    # with a package that it does not declare).
    code_path = None
    FEATURES: Mapping[str, Any]
    builder_config: SourceConfig

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict(self.FEATURES))
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {self.builder_config.split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        return iter(enumerate(self.builder_config.records))


class Records(_Builder):
    """LLM-Adapters records."""

    FEATURES = {"instruction": Text(), "input": Text(), "output": Text(), "answer": Text()}  # noqa: RUF012


class Texts(_Builder):
    """A text and the texts that answer it."""

    FEATURES = {"text": Text(), "references": tfds.features.Sequence(Text())}  # noqa: RUF012


class Generated(_Builder):
    """reasoning-gym problems."""

    FEATURES = {"question": Text(), "answer": Text()}  # noqa: RUF012


class Conversations(_Builder):
    """People's own JSONL, as messages."""

    FEATURES = {"messages": tfds.features.Sequence({"role": Text(), "content": Text()})}  # noqa: RUF012


BUILDERS = {"records": Records, "texts": Texts, "generated": Generated, "jsonl": Conversations}
