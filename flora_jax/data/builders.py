"""What needs TFDS: a writer of prepared records, and builders of its catalogue's data sets.

Importing tensorflow_datasets takes a second, so `sources` imports this module on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.read_only_builder import builder_from_files
from tensorflow_datasets.core.registered import DatasetNotFoundError

from flora_jax.errors import UserError, expand_path, in_a_line

Text = tfds.features.Text
# A task's source -> the features of its records.
FEATURES: Mapping[str, Mapping[str, Any]] = {
    "records": {name: Text() for name in ("instruction", "input", "output", "answer")},
    "texts": {"text": Text(), "references": tfds.features.Sequence(Text())},
    "generated": {"question": Text(), "answer": Text()},
    # `messages` is JSON: TFDS takes twice as long to read a sequence of dicts.
    "jsonl": {"messages": Text(), "tools": Text()},
}


def open_writer(source: str, split: str, folder: Path) -> tfds.core.SequentialWriter:
    """A writer of one split's records to a new folder, as array_record.

    It writes records as they come. TFDS's builders first hold up to a gigabyte of them, and need
    TensorFlow for more.
    """
    folder.mkdir()
    identity = tfds.core.DatasetIdentity(
        name=source,
        version=tfds.core.Version("1.0.0"),
        data_dir=str(folder),
        module_name=__name__,
    )
    features = tfds.features.FeaturesDict(dict(FEATURES[source]))
    info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=sys.maxsize, file_format="array_record"
    )
    writer.initialize_splits([split])
    return writer


def own_folder() -> Path:
    """TFDS's own folder of data sets: `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`."""
    return Path(expand_path(tfds.core.constants.DATA_DIR))


def catalogue_builder(name: str, folder: str) -> tfds.core.DatasetBuilder:
    """The builder of the catalogue's data set `name`, prepared in `folder`.

    If it is not there yet, TFDS downloads and prepares it. Raises UserError, with the reason and a
    remedy, if that fails.
    """
    where = {"data_dir": folder, "file_format": "array_record"}
    build = f"`tfds build {name} --file_format=array_record"
    try:
        return builder_from_files(name, **where)
    except DatasetNotFoundError:
        pass
    except ValueError as error:  # It is there, but not as array_record.
        raise UserError(
            f"TFDS {name} in {folder}: {in_a_line(error, 300)} Prepare it as array_record: {build} "
            "--overwrite`"
        ) from None
    try:
        # Google's bucket of prepared data has no array_record, and TFDS needs TensorFlow to look.
        download = tfds.download.DownloadConfig(try_download_gcs=False)
        tfds.builder(name, **where).download_and_prepare(download_config=download)
        return builder_from_files(name, **where)
    except DatasetNotFoundError:
        # TFDS finds the code of its older builders only if it can import TensorFlow.
        why = "TFDS's own builder of it needs tensorflow, which is not installed here"
    # TFDS has no class of its own for a download, check sum, package or manual step that fails.
    except Exception as error:
        why = f"preparing it failed ({type(error).__name__}: {in_a_line(error, 300)})"
    raise UserError(
        f"TFDS {name} is not prepared in {folder}, and {why}; on a machine with a network, "
        f"tensorflow and importlib_resources, run {build} --data_dir=DIR` and set data.dir "
        "(evaluate: --data_dir) to tfds:DIR"
    )
