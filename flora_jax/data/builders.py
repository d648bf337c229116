"""How TFDS keeps records that are read once, and its builders of data sets in its catalogue.

Importing this module imports tensorflow_datasets, which takes a second: `sources` does so on first
use.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.read_only_builder import builder_from_files
from tensorflow_datasets.core.registered import DatasetNotFoundError

from flora_jax.errors import UserError, expand_path

Text = tfds.features.Text
# By a task's source: what a record has.
FEATURES: Mapping[str, Mapping[str, Any]] = {
    "records": {name: Text() for name in ("instruction", "input", "output", "answer")},
    "texts": {"text": Text(), "references": tfds.features.Sequence(Text())},
    "generated": {"question": Text(), "answer": Text()},
    # `messages` is JSON, which is read in half the time of TFDS's sequence of dicts.
    "jsonl": {"messages": Text(), "tools": Text()},
}


def open_writer(source: str, split: str, folder: Path) -> tfds.core.SequentialWriter:
    """What writes the records of one split to a new folder, as array_record, as they come.

    (TFDS's builders hold up to a gigabyte of records before they write any, and need TensorFlow for
    more.)
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
    writer = tfds.core.SequentialWriter(info, sys.maxsize, file_format="array_record")
    writer.initialize_splits([split])
    return writer


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
