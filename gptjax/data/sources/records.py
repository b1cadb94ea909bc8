"""Documents from a field of records: JSON lines and Parquet."""

import contextlib
import threading
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

import numpy as np

from gptjax.config import InputError, parse_json
from gptjax.data.sources.files import File, check_unpacked, chunks, sha256
from gptjax.data.sources.protocol import Spec, check_index, first_line, refuse
from gptjax.data.sources.text import IndexedFiles, Location, filled_starts, fingerprint_of

SHOWN_FIELDS = 20
"""Fields listed in the error for a missing one."""


class JsonLines(IndexedFiles):
    """A field of each line that is a JSON object; blank lines are skipped.

    Raises:
      InputError: a first line that lacks the field, or is not an object.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str, field: str):
        self._field = field
        options = {"field": field, "errors": errors}
        super().__init__(spec, paths, options, filled_starts, errors)
        self[0]

    def _document(self, data: bytes, location: Location) -> str:
        line = self._decoded(data, location)
        try:
            return self._text(line, "")
        except InputError:  # Count the lines before it only for an error.
            return self._text(line, f"line {_line_number(location)} of {location.file.path}")

    def _text(self, line: str, where: str) -> str:
        """The text of a record; `where` names it in an error."""
        try:
            record = parse_json(line, where)
        except InputError as error:
            raise InputError(f"data.source: {error}") from error
        if not isinstance(record, dict):
            refuse(f"{where} is not a JSON object")
        if self._field not in record:
            no_field(where, self._field, record)
        return text_of(record[self._field], where, self._field)


def _line_number(location: Location) -> int:
    before = ((start, data) for start, data in chunks(location.file) if start < location.start)
    return 1 + sum(data[: location.start - start].count(b"\n") for start, data in before)


class Parquet:
    """A column of Parquet files; only the last row group that was read is in memory.

    Reading in order decodes each row group once; reading in random order decodes one per document,
    unless there is only one. (`build-dataset` writes files that are quick to read in any order.)
    Checksums of pages are verified where present.

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
        except Exception as error:  # A damaged dictionary index.
            _damaged(file, first_line(error))
        return text_of(value, where, self._field)

    def __reduce__(self):
        from gptjax.data.sources import reopen

        return reopen, (self.name, self.fingerprint)

    def _rows_of_groups(self, file: File) -> list[int]:
        """The number of rows of each row group.

        Raises:
          InputError: see the class.
        """
        from pyarrow import types

        with self._opened(file) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            rows = [group.num_rows for group in groups]
            names = schema.names
            if (times := names.count(self._field)) > 1:
                refuse(f"{file.path} has {times} columns of the name {self._field}")
            if not times:
                no_field(file.path, self._field, names)
            kind = schema.field(self._field).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        is_text = (types.is_string, types.is_large_string, types.is_string_view)
        if not any(is_kind(kind) for is_kind in is_text):
            refuse(f"the field {self._field} of {file.path} holds {kind}, not strings")
        if min(rows, default=0) < 0:
            _damaged(file, "it has a negative number of rows")
        # PyArrow aborts the process when asked for a damaged column's sizes.
        check_unpacked(
            file.path, file.size, max((group.total_byte_size for group in groups), default=0)
        )
        return rows

    def _column(self, number: int) -> Any:
        """The column in row group `number`, counted over all files."""
        file, group = self._groups[number]
        rows = int(self._ends[number]) - (int(self._ends[number - 1]) if number else 0)
        with self._lock:  # Else two threads would hold two row groups.
            if self._last and self._last[0] == number:
                return self._last[1]
            self._last = None  # Free its memory before the next one is read.
            file.check_unchanged()
            # With dictionaries, a repeated string takes memory once, as in the file.
            with self._opened(file, read_dictionary=[self._field]) as opened:
                column = opened.read_row_group(group, columns=[self._field]).column(self._field)
            if len(column) != rows:
                _damaged(file, f"row group {group + 1} has {len(column)} rows and not {rows}")
            self._last = number, column
            return column

    @contextlib.contextmanager
    def _opened(self, file: File, **options: Any) -> Iterator[Any]:
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(
                file.path, page_checksum_verification=True, **options
            ) as opened:
                yield opened
        except InputError:
            raise
        # For damage, PyArrow raises its own errors, OSError, IndexError and UnicodeDecodeError.
        except Exception as error:
            _damaged(file, first_line(error))


def no_field(where: str, field: str, fields: Collection[str]) -> NoReturn:
    """Raise the error for a record or table that lacks a field.

    Raises:
      InputError: always.
    """
    names = [name if name.isprintable() else repr(name) for name in fields]
    shown = ", ".join(names[:SHOWN_FIELDS])
    more = f" and {len(names) - SHOWN_FIELDS} more" if len(names) > SHOWN_FIELDS else ""
    refuse(f"{where} has no field {field!r}: it has {shown or 'none'}{more}")


def text_of(value: object, where: str, field: str) -> str:
    """The value of a field, checked to be text.

    Raises:
      InputError: a value that is not a string, or cannot be encoded in UTF-8.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        refuse(f"the field {field} in {where} is {kind}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        refuse(f"the field {field} in {where} has half of a surrogate pair")
    return value


def _damaged(file: File, why: str) -> NoReturn:
    refuse(f"{file.path} is no whole Parquet file: {why}")
