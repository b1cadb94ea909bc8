"""Any text as a TensorFlow dataset of ArrayRecord files, which any user of TFDS can load.

Examples keep the source's order, one per document. They are written shard by shard, not through
TFDS's GeneratorBasedBuilder, which shuffles, holds up to 1 GB to do so, and beyond that writes
temporary files with TensorFlow.
"""

import contextlib
import io
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config import InputError
from gptjax.data.sources import Documents
from gptjax.system.disk import check_local

SHARD_BYTES = 128 << 20
"""Size of a shard in bytes of memory, where TFDS holds it while writing."""

OVERHEAD = 400
"""Bytes of memory per document in addition to its text."""

Columns = dict[str, Documents]
Examples = Iterator[tuple[int, dict[str, str]]]


def build_dataset(
    columns: Columns,
    data_dir: str | Path,
    *,
    name: str,
    version: str = "1.0.0",
    validation_fraction: float = 0.0,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write documents as a dataset; returns its directory, `data_dir/name/version`.

    Args:
      columns: The documents of each field: `text`, or `source` and `target`.
      data_dir: Directory of datasets.
      name: Of the dataset: lower case letters, digits and underscores.
      version: Three numbers; an existing one is never overwritten.
      validation_fraction: Share of the documents, from the end, in the split validation.
      shard_bytes: Bytes of memory after which a shard ends.

    Raises:
      InputError: an invalid or existing name or version; documents that cannot be read, are too
        few for two splits, or differ in number between fields; a full disk.
    """
    from tensorflow_datasets.core import registered

    _check_name(name, version)
    directory = check_local(Path(data_dir)) / name / version
    if os.path.lexists(directory):
        raise InputError(f"{directory} is there, and is not overwritten: take another version.")
    splits = _splits(columns, validation_fraction)
    shards = {
        split: _shards(columns, documents, shard_bytes) for split, documents in splits.items()
    }
    fingerprints = {field: documents.fingerprint for field, documents in columns.items()}
    generators = {
        split: [_generator(columns, shard) for shard in parts] for split, parts in shards.items()
    }
    with registered.skip_registration():  # Else TFDS keeps the name for the life of the process.
        builder_class = _builder_class(name, version, list(columns))
    builder = builder_class(data_dir=data_dir, shards=generators, fingerprints=fingerprints)
    try:
        # TFDS prints about downloads and wants a directory for them.
        with (
            tempfile.TemporaryDirectory() as downloads,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            builder.download_and_prepare(download_dir=downloads)
    except OSError as error:
        raise InputError(f"Cannot write {directory}: {error.strerror or error}.") from error
    return directory


def _check_name(name: str, version: str) -> None:
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(
            f"name is {name!r}: it must be lower case letters, digits and underscores, such as "
            "my_corpus."
        )
    if name in tfds.list_builders(with_community_datasets=False):
        raise InputError(f"name is {name!r}: TFDS has a dataset of that name; take another.")
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise InputError(f"version is {version!r}: it must be three numbers, such as 1.0.0.")


def _splits(columns: Columns, validation_fraction: float) -> dict[str, range]:
    """The documents of each split.

    Raises:
      InputError: fields of different lengths, an invalid fraction, or an empty split.
    """
    lengths = {documents.name: len(documents) for documents in columns.values()}
    if len({*lengths.values()}) > 1:
        described = " and ".join(f"{name} has {count}" for name, count in lengths.items())
        raise InputError(f"{described} documents: parallel text needs as many in both.")
    if not 0 <= validation_fraction < 1:
        raise InputError(
            f"validation-fraction is {validation_fraction}: it must be at least 0 and below 1."
        )
    ((name, count), *_) = lengths.items()
    border = count - round(count * validation_fraction)
    if validation_fraction and not 0 < border < count:
        raise InputError(
            f"{name} has {count} documents: a validation-fraction of {validation_fraction} leaves "
            "a split without any (documents=line makes more of a text)."
        )
    splits = {"train": range(border), "validation": range(border, count)}
    return {split: documents for split, documents in splits.items() if documents}


def _shards(columns: Columns, documents: range, shard_bytes: int) -> list[range]:
    """Ranges of consecutive documents of about `shard_bytes` each.

    Reads them all, so that an unreadable document is found before anything is written.
    """
    borders, size = [documents.start], 0
    for index in documents:
        if size >= shard_bytes:
            borders.append(index)
            size = 0
        size += OVERHEAD + sum(len(column[index].encode("utf-8")) for column in columns.values())
    borders.append(documents.stop)
    return [range(*pair) for pair in itertools.pairwise(borders)]


def _generator(columns: Columns, documents: range) -> Callable[[], Examples]:
    def examples() -> Examples:
        for index in documents:
            yield index, {field: column[index] for field, column in columns.items()}

    return examples


def _builder_class(name: str, version: str, fields: list[str]) -> Any:
    """A TFDS builder class; its output is readable without it."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder

    class Corpus(ShardBasedBuilder):
        """Text from a source of gptjax."""

        VERSION = tfds.core.Version(version)
        # Otherwise TFDS looks for checksums beside this module.
        code_path = None

        def __init__(self, *, shards: dict[str, list], fingerprints: dict[str, str], **where: Any):
            self._shards = shards
            self._fingerprints = fingerprints
            super().__init__(file_format="array_record", **where)

        def _info(self) -> tfds.core.DatasetInfo:
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Text by `python -m gptjax build-dataset`: {' and '.join(fields)}.",
                features=tfds.features.FeaturesDict(dict.fromkeys(fields, text)),
                supervised_keys=("source", "target") if "target" in fields else None,
                metadata=tfds.core.MetadataDict(sha256=self._fingerprints),
            )

        def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list]:
            return self._shards

    Corpus.name = name
    return Corpus
