"""Datasets of Hugging Face's `datasets` library: of the hub, or of a directory.

A dataset that the library has prepared is memory-mapped from its Arrow files. With `#rows=N` the
first N rows are streamed into a temporary file instead, and the rest is not downloaded.
"""

import hashlib
import importlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gptjax.config import InputError, whole_number
from gptjax.data.sources.files import Store
from gptjax.data.sources.protocol import Documents, Spec, check_index, first_line, refuse
from gptjax.data.sources.records import no_field, text_of

PACKAGE, EXTRA = "datasets", "hf-datasets"
ROWS = 1000
"""Rows read at a time for the fingerprint."""
SAVED = ("state.json", "dataset_dict.json")
"""What a directory of `save_to_disk` has: of a dataset, or of a dictionary of splits."""


def open_huggingface(spec: Spec) -> Documents:
    """The documents of `hf:NAME` or `hf:DIRECTORY`.

    Raises:
      InputError: a package, dataset, split or column that is not there, or a column of no text.
    """
    options = spec.choose("hf", name=None, split="train", field="text", rows=None)
    field, rows = str(options["field"]), whole_number(options["rows"] or "1")
    if not rows:
        refuse(f"{spec.text} has rows={options['rows']}: it must be a number, from 1")
    found = _load(spec, options["name"], str(options["split"]), streaming=bool(options["rows"]))
    if found.column_names is None:  # A stream whose files do not name them.
        found = found.select_columns([field])
    elif field not in found.column_names:
        no_field(spec.text, field, found.column_names)
    try:
        if options["rows"]:
            return Streamed(spec, found, field, rows)
        return Rows(spec, found, field)
    except InputError:
        raise
    except Exception as error:  # The library's, PyArrow's, a server's or the system's.
        refuse(f"the library datasets cannot read {spec.address}: {first_line(error)}")


class Rows:
    """A column of a split that is on this machine."""

    def __init__(self, spec: Spec, rows: Any, field: str):
        self.name = spec.text
        self._field = field
        self._rows = rows.select_columns([field]).with_format(None)
        if not len(self):
            refuse(f"{self.name} has no rows")
        self.fingerprint = _fingerprint(self._texts())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        check_index(index, len(self))
        value = self._rows[int(index)][self._field]
        return text_of(value, f"row {index + 1} of {self.name}", self._field)

    def __reduce__(self):
        from gptjax.data.sources import reopen

        return reopen, (self.name, self.fingerprint)

    def _texts(self) -> Iterator[str]:
        numbers = itertools.count(1)
        for first in range(0, len(self), ROWS):
            for value in self._rows[first : first + ROWS][self._field]:
                yield text_of(value, f"row {next(numbers)} of {self.name}", self._field)


class Streamed:
    """A column of the first rows of a stream, kept in a temporary file."""

    def __init__(self, spec: Spec, stream: Iterable[dict[str, Any]], field: str, rows: int):
        self.name = spec.text
        self._store, ends = Store(), [0]

        def texts() -> Iterator[str]:
            for number, row in enumerate(itertools.islice(stream, rows), 1):
                text = text_of(row.get(field), f"row {number} of {self.name}", field)
                start, size = self._store.append(spec.address, [text.encode("utf-8")])
                ends.append(start + size)
                yield text

        self.fingerprint = _fingerprint(texts())
        self._ends = np.array(ends)
        if not len(self):
            refuse(f"{self.name} has no rows")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        check_index(index, len(self))
        start, end = self._ends[index : index + 2].tolist()
        return self._store.read(start, end - start).decode("utf-8")

    def __reduce__(self):
        from gptjax.data.sources import reopen

        return reopen, (self.name, self.fingerprint)


def _load(spec: Spec, name: str | None, split: str, *, streaming: bool) -> Any:
    """The rows of a split.

    Raises:
      InputError: see `open_huggingface`.
    """
    try:
        datasets: Any = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise InputError(
            f"data.source: {spec.text} needs the package {PACKAGE}: pip install 'gptjax[{EXTRA}]'."
        ) from error
    datasets.disable_progress_bars()
    try:
        if any(os.path.exists(os.path.join(spec.address, saved)) for saved in SAVED):
            found = datasets.load_from_disk(spec.address)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    known = ", ".join(map(str, found))
                    refuse(f"{spec.address} has no split {split!r}: it has {known}")
                found = found[split]
            return found.to_iterable_dataset() if streaming else found
        return datasets.load_dataset(spec.address, name, split=split, streaming=streaming)
    except InputError:
        raise
    except Exception as error:  # The library's, a server's or the system's.
        refuse(f"the library datasets cannot open {spec.address}: {first_line(error)}")


def _fingerprint(texts: Iterable[str]) -> str:
    """Hex SHA-256 of texts, each after its length."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()
