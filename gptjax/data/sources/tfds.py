"""Splits of TensorFlow datasets, read from ArrayRecord files without TensorFlow.

A dataset prepared in the data directory is read, whatever prepared it. Otherwise TFDS downloads and
prepares it, if its hosts can be reached: this is checked first, because TFDS retries ten times with
pauses. Many builders of TFDS need TensorFlow for preparation, though not for reading.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import re
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config import InputError, near_names
from gptjax.data.sources.protocol import Spec, check_index, check_no_option, first_line, refuse
from gptjax.data.sources.records import no_field, text_of

ARRAY_RECORD = "array_record"

FEATURES = "tensorflow_datasets.core.features."
"""Module of TFDS's own feature classes."""
_BUILDING = threading.RLock()

DESCRIPTION = 1 << 26
"""Most bytes of a file that describes a dataset."""

PROBE_SECONDS = 4.0
"""Timeout for the hosts that a dataset comes from."""

INSTEAD = (
    "prepare it where there is a network and give its directory (#data_dir=DIR), or read a file or "
    "the embedded text"
)
"""What to do about a dataset that is not available."""


class Dataset:
    """A text field of a split.

    Raises:
      InputError: a missing split, field or file.
    """

    def __init__(self, spec: Spec, builder: Any, split: str, field: str):
        self.name = spec.text
        self._field = field
        _check_field(spec, builder.info.features, field)
        self._examples = _examples(spec, builder, split)
        self.fingerprint = _fingerprint(builder.info, split, field)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> str:
        check_index(index, len(self))
        where = f"example {index} of {self.name}"
        try:
            value = self._examples[index]
        except Exception as error:  # ArrayRecord's C++ does not document what it raises.
            raise InputError(f"data.source: cannot read {where}: {first_line(error)}.") from error
        for name in self._field.split("/"):
            value = value[name]
        if not isinstance(value, bytes):
            return text_of(value, where, self._field)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            refuse(
                f"the field {self._field} in {where} is not UTF-8: byte "
                f"0x{value[error.start]:02x} at offset {error.start}"
            )

    def __reduce__(self):
        from gptjax.data.sources import reopen

        return reopen, (self.name, self.fingerprint)


def open_dataset(spec: Spec) -> Dataset:
    """The dataset of `tfds:NAME`, where NAME is TFDS's, with config and version.

    Raises:
      InputError: a dataset that does not exist, is damaged, or cannot be prepared.
    """
    options = spec.choose("tfds", split="train", field="text", data_dir=None)
    with _known_features():
        builder = _builder(spec, _directory(options["data_dir"]))
        if not (builder.data_path / "dataset_info.json").exists():
            prepare(spec, builder)
        try:
            return Dataset(spec, builder, str(options["split"]), str(options["field"]))
        except InputError:
            raise
        except Exception as error:  # TFDS may raise anything for unexpected files.
            refuse(f"TFDS cannot read {builder.data_path}: {first_line(error)}")


@contextlib.contextmanager
def _known_features() -> Iterator[None]:
    """Within it, TFDS builds only its own features.

    A prepared dataset names the class of each of its features, and TFDS imports that class's
    module, whichever it is: an untrusted dataset could so run code that lies beside it.
    """
    from tensorflow_datasets.core.features.feature import FeatureConnector

    connector: Any = FeatureConnector
    with _BUILDING:
        anything = vars(connector)["cls_from_name"]

        def known(cls: Any, name: str) -> Any:
            if not name.startswith(FEATURES):
                raise ValueError(f"it has a feature {name!r}, which is none of TFDS's own")
            return anything.__func__(cls, name)

        connector.cls_from_name = classmethod(known)
        try:
            yield
        finally:
            connector.cls_from_name = anything


def _directory(data_dir: str | None) -> str | None:
    """Absolute data directory, as TFDS mishandles relative ones; None is TFDS's default."""
    named = data_dir or os.environ.get("TFDS_DATA_DIR")
    return named if not named or "://" in named else os.path.abspath(os.path.expanduser(named))


def _check_files(directory: Path) -> None:
    """Check the files that TFDS reads whole: regular, and at most `DESCRIPTION` bytes.

    Raises:
      InputError: one is not.
    """
    for path in directory.rglob("*"):
        if (
            path.is_file()
            and path.suffix in (".json", ".txt")
            and path.stat().st_size > DESCRIPTION
        ):
            refuse(f"{path} is larger than {DESCRIPTION >> 20} MiB, which no description is")
        if path.exists() and not path.is_file() and not path.is_dir():
            refuse(f"{path} is no regular file")


def _builder(spec: Spec, data_dir: str | None) -> Any:
    """TFDS's builder of this name: from prepared files, or code that prepares them."""
    import tensorflow_datasets as tfds

    check_no_option(spec)
    name = spec.address.removeprefix("tfds:")
    dataset, colon, version = name.partition(":")
    if not dataset or (colon and not version[:1].isdigit()):
        # A community namespace, which TFDS would look up online.
        refuse(f"{spec.text} is no name of TFDS: it must be tfds:NAME, NAME/CONFIG or NAME:1.0.0")
    if data_dir and "://" not in data_dir:
        try:
            _check_files(Path(data_dir, dataset.partition("/")[0]))
        except OSError as error:
            refuse(f"cannot read {data_dir}: {error.strerror}")
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = {*tfds.list_builders(with_community_datasets=False)}
        near = near_names(dataset.partition("/")[0], known)
        if len(near) > 200:  # The whole list, as none is close.
            near = "tfds.list_builders() names those that it knows."
        where = data_dir or "TFDS's directory"
        raise InputError(
            f"data.source: TFDS knows no dataset {dataset}, and none is prepared in {where}: {near}"
        ) from error
    except Exception as error:  # Versions and configs: AssertionError, ValueError and others.
        why = re.sub(r'^Failed to construct dataset ".*?\}": ', "", first_line(error))
        raise InputError(f"data.source: TFDS refuses {name}: {why}.") from error


def prepare(spec: Spec, builder: Any) -> None:
    """Download a dataset and write it as ArrayRecord files.

    Raises:
      InputError: no host answers within `PROBE_SECONDS`; a builder needs TensorFlow, which is
        not installed; any other failure within TFDS.
    """
    import tensorflow_datasets as tfds

    name = builder.info.full_name
    urls = builder.url_infos or [builder.info.homepage]
    hosts = {host for host in map(_host, urls) if host}
    if hosts and not any_answers(hosts):
        names = " and ".join(sorted({name for name, _ in hosts})[:3])
        refuse(
            f"{name} is not prepared in {builder.data_path.parent}, and {names} cannot be reached: "
            f"{INSTEAD}"
        )
    if not importlib.util.find_spec("tensorflow") and _uses_tensorflow(builder):
        refuse(
            f"{name} is not prepared in {builder.data_path.parent}, and TFDS needs TensorFlow to "
            "prepare it: install gptjax[tensorflow]"
        )
    try:
        builder.download_and_prepare(
            file_format=ARRAY_RECORD,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    except Exception as error:  # Whatever the builder, its parsers and the network raise.
        raise InputError(
            f"data.source: TFDS cannot prepare {name} ({first_line(error)}): {INSTEAD}."
        ) from error


def any_answers(hosts: Iterable[tuple[str, int]]) -> bool:
    """Whether any of these (host, port) accepts a connection within `PROBE_SECONDS`."""
    ended: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def probe(host: tuple[str, int]) -> None:
        try:
            socket.create_connection(host, timeout=PROBE_SECONDS).close()
        except OSError:
            ended.put(False)
        else:
            ended.put(True)

    # A DNS lookup has no timeout; a thread still in one is abandoned.
    threads = [threading.Thread(target=probe, args=(host,), daemon=True) for host in {*hosts}]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PROBE_SECONDS
    for _ in threads:
        try:
            if ended.get(timeout=max(0.0, deadline - time.monotonic())):
                return True
        except queue.Empty:
            return False
    return False


def _host(url: str) -> tuple[str, int] | None:
    """The host and port that requests for a URL go to: the proxy's, if there is one."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and parts.hostname and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    ports = {"http": 80, "https": 443, "ftp": 21}
    port = parts.port or ports.get(parts.scheme)
    return (parts.hostname, port) if parts.hostname and port else None


def _uses_tensorflow(builder: Any) -> bool:
    """Whether the builder's module imports TensorFlow (lazily, as TFDS's modules do)."""
    module = sys.modules.get(type(builder).__module__)
    return bool({"tf", "tensorflow"} & vars(module).keys()) if module else False


def _examples(spec: Spec, builder: Any, split: str) -> Any:
    """The split as a TFDS data source."""
    info = builder.info
    named = split.replace("+", "[").split("[")[0].strip()
    if named not in (*info.splits, "all"):
        near = near_names(named, info.splits)
        raise InputError(f"data.source: {info.full_name} has no split {named!r}: {near}")
    formats = {known.value for known in info.available_file_formats()}
    if ARRAY_RECORD not in formats:
        refuse(
            f"{info.full_name} is prepared as {' and '.join(sorted(formats)) or 'nothing'} in "
            f"{builder.data_path}, which gives no random access: prepare it with "
            f"file_format={ARRAY_RECORD!r} in another data_dir"
        )
    try:
        instructions = info.splits[split].file_instructions
    except Exception as error:
        raise InputError(
            f"data.source: {spec.text} has no split that TFDS reads: {first_line(error)}."
        ) from error
    if not instructions:
        refuse(f"{spec.text} has no examples in its split {split}")
    examples = builder.as_data_source(split=split, file_format=ARRAY_RECORD)
    for instruction in instructions:
        if not builder.data_path.joinpath(instruction.filename).exists():
            refuse(f"{info.full_name} lacks its file {instruction.filename}")
    return examples


def _check_field(spec: Spec, features: Any, field: str) -> None:
    """Check that the field exists and holds strings; `/` separates nested names."""
    import numpy as np
    import tensorflow_datasets as tfds

    for name in field.split("/"):
        if not isinstance(features, tfds.features.FeaturesDict) or name not in features:
            nested = isinstance(features, tfds.features.FeaturesDict)
            no_field(spec.address, field, sorted(features) if nested else ())
        features = features[name]
    text = isinstance(features, tfds.features.Text)
    if not text and (getattr(features, "shape", None) != () or features.np_dtype != np.object_):
        refuse(f"the field {field} of {spec.address} holds {type(features).__name__}, not strings")


def _fingerprint(info: Any, split: str, field: str) -> str:
    """Hex SHA-256 of all that the dataset declares about its content, but not its location."""
    splits = {
        name: [list(map(int, known.shard_lengths)), int(known.num_bytes)]
        for name, known in info.splits.items()
    }
    content = {
        "dataset": info.full_name,
        "splits": splits,
        "checksums": {url: str(its) for url, its in info.as_proto.download_checksums.items()},
        "metadata": dict(info.metadata or {}),
        "split": split,
        "field": field,
    }
    read = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(read.encode("utf-8")).hexdigest()
