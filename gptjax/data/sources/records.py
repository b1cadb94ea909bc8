"""Documents that are a field of a record: JSON lines and Parquet."""

import json
import threading
from collections.abc import Collection
from typing import Any, NoReturn

import numpy as np

from gptjax.data.sources.files import File, sha256
from gptjax.data.sources.protocol import Spec, check_index, refuse
from gptjax.data.sources.text import IndexedFiles, Place, fingerprint_of, line_starts


class JsonLines(IndexedFiles):
    """A field of every line, each of which is a JSON object.

    Raises:
      InputError: a first line that lacks the field, or is something else.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str, field: str):
        self._field = field
        options = {"field": field, "errors": errors}
        super().__init__(spec, paths, options, line_starts, errors)
        self[0]

    def _document(self, data: bytes, place: Place) -> str:
        where = f"line {place.number} of {place.path}"
        try:
            record = json.loads(self._decoded(data, place))
        except (json.JSONDecodeError, RecursionError):
            refuse(f"{where} is not JSON")
        if not isinstance(record, dict):
            refuse(f"{where} is not a JSON object")
        if self._field not in record:
            no_field(where, self._field, record)
        return text_of(record[self._field], where, self._field)


class Parquet:
    """A column of Parquet files. What is held is the last row group that was read, and no more.

    Reading in order decodes a row group once; reading in random order decodes one a document,
    unless it is small. (`build-dataset` writes what is quick to read in any order.)

    Raises:
      InputError: files that are missing, damaged or have no such column of strings.
    """

    def __init__(self, spec: Spec, paths: list[str], field: str):
        self.name = spec.text
        self._field = field
        self._files = [File(path) for path in paths]
        groups = [
            (file, group, rows)
            for file in self._files
            for group, rows in enumerate(self._rows_of_groups(file))
            if rows
        ]
        if not groups:
            refuse(f"{spec.address} has no rows")
        self._groups = [(file, group) for file, group, _ in groups]
        self._ends = np.cumsum([rows for _, _, rows in groups])
        self._lock = threading.Lock()
        self._last: tuple[int, Any] | None = None
        self.fingerprint = fingerprint_of([sha256(file) for file in self._files], {"field": field})

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        check_index(index, len(self))
        number = int(np.searchsorted(self._ends, index, side="right"))
        column = self._column(number)
        within = int(index) - int(self._ends[number]) + len(column)
        file, group = self._groups[number]
        where = f"row {within + 1} of row group {group + 1} of {file.path}"
        try:
            value = column[within].as_py()
        except UnicodeDecodeError:
            refuse(f"the field {self._field} in {where} is not UTF-8")
        return text_of(value, where, self._field)

    def __reduce__(self):
        from gptjax.data.sources import reopen

        return reopen, (self.name, self.fingerprint)

    def _rows_of_groups(self, file: File) -> list[int]:
        """The lengths of the row groups.

        Raises:
          InputError: see the class.
        """
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(file.path) as opened:
                schema, metadata = opened.schema_arrow, opened.metadata
                rows = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            _damaged(file, error)
        if self._field not in schema.names:
            no_field(file.path, self._field, schema.names)
        kind = schema.field(self._field).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            refuse(f"the field {self._field} of {file.path} holds {kind}, not strings")
        return rows

    def _column(self, number: int) -> Any:
        """The column in the row group of this number, counted through all files."""
        import pyarrow
        from pyarrow import parquet

        file, group = self._groups[number]
        with self._lock:  # Two threads would hold two row groups.
            if self._last and self._last[0] == number:
                return self._last[1]
            self._last = None  # Its memory is free before the next one takes some.
            file.check_unchanged()
            try:
                with parquet.ParquetFile(file.path) as opened:
                    table = opened.read_row_group(group, columns=[self._field])
            except (pyarrow.ArrowException, OSError) as error:
                _damaged(file, error)
            column = table.column(self._field)
            self._last = number, column
            return column


def no_field(where: str, field: str, fields: Collection[str]) -> NoReturn:
    """Refuse a record or table that lacks a field.

    Raises:
      InputError: always.
    """
    refuse(f"{where} has no field {field!r}: it has {', '.join(fields) or 'none'}")


def text_of(value: object, where: str, field: str) -> str:
    """The value of a field, if it is text.

    Raises:
      InputError: a value that is no string, or one that UTF-8 cannot hold.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        refuse(f"the field {field} in {where} is {kind}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        refuse(f"the field {field} in {where} has half of a surrogate pair")
    return value


def _damaged(file: File, error: Exception) -> NoReturn:
    refuse(f"{file.path} is no whole Parquet file: {str(error).splitlines()[0].rstrip('.')}")
