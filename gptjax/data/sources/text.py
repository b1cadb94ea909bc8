"""Documents of text files: an index of their offsets, and a read per access.

The index takes 8 bytes per document. Building it reads each file once, which also validates UTF-8
and computes the fingerprint, so that a bad byte is found before training.
"""

import array
import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from gptjax.data.sources.files import File, Readable, chunks, open_files
from gptjax.data.sources.protocol import Spec, check_index, refuse

LONGEST = 1 << 28
"""Most bytes of a document."""

# Characters of the blank lines between blocks.
_BLANKS = b" \t\r\n"
_IS_TEXT = ~np.isin(np.arange(256), list(_BLANKS))

Chunks = Iterable[tuple[int, bytes]]


class Location(NamedTuple):
    """Where a document is, for errors."""

    file: Readable
    number: int
    """The document's number in its file, from 1; for lines, the line number."""
    start: int
    """Offset of its first byte, after a byte order mark and unpacking."""


class IndexedFiles:
    """Consecutive documents of files.

    Args:
      spec: The parsed spec, which names the source.
      paths: The files, in order.
      options: How the content is read, for the fingerprint.
      split: Yields arrays of the offsets at which documents begin, from a file's chunks.
      errors: `strict` or `replace`, for bytes that are not UTF-8.

    Raises:
      InputError: files that cannot be read or have no document; bytes that are not UTF-8.
    """

    def __init__(
        self,
        spec: Spec,
        paths: list[str],
        options: dict[str, str],
        split: Callable[[Chunks], Iterator[np.ndarray]],
        errors: str,
    ):
        self.name = spec.text
        self._errors = errors
        self._files = open_files(paths)
        self._starts, digests = [], []
        for file in self._files:
            digest, starts = hashlib.sha256(), array.array("Q")
            for found in split(self._checked(file, digest.update, starts)):
                starts.frombytes(found.astype(np.uint64).tobytes())
            self._starts.append(np.frombuffer(starts, np.uint64))
            digests.append(digest.hexdigest())
        self._ends = list(itertools.accumulate(map(len, self._starts)))
        _check_not_empty(self._files, len(self))
        self.fingerprint = fingerprint_of(digests, options)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        check_index(index, len(self))
        number = bisect.bisect_right(self._ends, index)
        file, starts = self._files[number], self._starts[number]
        within = int(index) - self._ends[number] + len(starts)
        start = int(starts[within])
        end = int(starts[within + 1]) if within + 1 < len(starts) else file.size
        data = file.read(start, end - start)
        return self._document(data, Location(file, within + 1, start))

    def __reduce__(self):
        from gptjax.data.sources import reopen

        return reopen, (self.name, self.fingerprint)

    def _document(self, data: bytes, location: Location) -> str:
        """The document in these bytes, which end where the next one begins."""
        return self._decoded(data, location)

    def _decoded(self, data: bytes, location: Location) -> str:
        try:
            return data.decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            _not_utf8(location.file, location.start, error)

    def _checked(
        self, file: Readable, update: Callable[[bytes], object], starts: Sequence[int]
    ) -> Chunks:
        """Yields a file's chunks, validated; `update` gets each, `starts` grows meanwhile."""
        for start, data in chunks(file):
            update(data)
            if self._errors == "strict":
                try:
                    data.decode("utf-8")
                except UnicodeDecodeError as error:
                    _not_utf8(file, start, error)
            yield start, data
            if start + len(data) - (starts[-1] if starts else 0) > LONGEST:
                refuse(
                    f"document {len(starts)} of {file.path} is longer than {LONGEST >> 20} MiB, "
                    "the most that one may have"
                )


class Whole(IndexedFiles):
    """One document per file; a file above `files.CHUNK` bytes (16 MiB) is several.

    It is cut at line ends, so that no document is larger; concatenated, they are the file. An empty
    file among others is an empty document.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str):
        options = {"documents": "file", "errors": errors}
        super().__init__(spec, paths, options, _chunk_starts, errors)
        self.is_one_file = len(paths) == 1


class Lines(IndexedFiles):
    r"""One document per line, empty ones included, without its `\n` or `\r\n`.

    The last line need not end in one. A lone `\r` ends no line.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str):
        options = {"documents": "line", "errors": errors}
        super().__init__(spec, paths, options, line_starts, errors)

    def _document(self, data: bytes, location: Location) -> str:
        return self._decoded(without_end(data), location)


class Column(IndexedFiles):
    """A column of each line of tab-separated text, without quoting.

    Raises:
      InputError: a first line that lacks the column.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str, column: int):
        self._column = column
        options = {"column": str(column), "errors": errors}
        super().__init__(spec, paths, options, line_starts, errors)
        self[0]

    def _document(self, data: bytes, location: Location) -> str:
        columns = without_end(data).split(b"\t")
        if self._column > len(columns):
            refuse(
                f"line {location.number} of {location.file.path} has {len(columns)} columns, and "
                f"column {self._column} is asked for"
            )
        start = location.start + sum(len(column) + 1 for column in columns[: self._column - 1])
        return self._decoded(columns[self._column - 1], location._replace(start=start))


class Blocks(IndexedFiles):
    """Documents between blank lines (which may hold spaces and tabs), without the final newline.

    Their lines, including the first one's indentation, are unchanged.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str):
        options = {"documents": "block", "errors": errors}
        super().__init__(spec, paths, options, _block_starts, errors)

    def _document(self, data: bytes, location: Location) -> str:
        last_line = data.find(b"\n", len(data.rstrip(_BLANKS)))
        text = data if last_line < 0 else without_end(data[: last_line + 1])
        return self._decoded(text, location)


def fingerprint_of(digests: list[str], options: dict[str, str]) -> str:
    """The fingerprint of files with these digests, in order, and these options."""
    read = json.dumps({"files": digests, "options": options}, sort_keys=True)
    return hashlib.sha256(read.encode("utf-8")).hexdigest()


def without_end(line: bytes) -> bytes:
    r"""A line without the `\n` or `\r\n` that ends it."""
    if line.endswith(b"\r\n"):
        return line[:-2]
    return line[:-1] if line.endswith(b"\n") else line


def _check_not_empty(files: Sequence[Readable], documents: int) -> None:
    """Check that there is a document, and a non-empty file."""
    filled = next((file for file in files if file.size), None)
    if filled is None:
        refuse(f"{files[0].path} {'is empty' if isinstance(files[0], File) else 'holds nothing'}")
    if not documents:
        refuse(f"{filled.path} has only blank lines")


def _not_utf8(file: Readable, start: int, error: UnicodeDecodeError) -> NoReturn:
    byte, offset = error.object[error.start], file.skipped + start + error.start
    refuse(
        f"{file.path} is not UTF-8: byte 0x{byte:02x} at offset {offset} (#errors=replace reads "
        "such bytes as U+FFFD)"
    )


def _chunk_starts(chunks: Chunks) -> Iterator[np.ndarray]:
    empty = True
    for start, _ in chunks:
        yield np.array([start])
        empty = False
    if empty:
        yield np.array([0])


def line_starts(chunks: Chunks) -> Iterator[np.ndarray]:
    """Yields the offsets at which lines begin."""
    ended = True
    for start, data in chunks:
        begins = start + _after_ends(data)
        if ended:
            begins = np.concatenate([[start], begins])
        ended = data.endswith(b"\n")
        yield begins[:-1] if ended else begins


def filled_starts(chunks: Chunks) -> Iterator[np.ndarray]:
    """Yields the offsets at which non-blank lines begin."""
    for lines, filled in _lines(chunks):
        yield lines[filled]


def _block_starts(chunks: Chunks) -> Iterator[np.ndarray]:
    after_blank = True
    for lines, filled in _lines(chunks):
        before = np.concatenate([[after_blank], ~filled])
        yield lines[filled & before[:-1]]
        after_blank = bool(before[-1])


def _lines(chunks: Chunks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the offsets at which lines begin, and whether each is non-blank."""
    # A line longer than a chunk continues in the next one.
    first, first_filled, ended = 0, False, True
    for start, data in chunks:
        begins = np.concatenate([[0], _after_ends(data)])
        begins = begins[begins < len(data)]
        filled = np.logical_or.reduceat(_IS_TEXT[np.frombuffer(data, np.uint8)], begins)
        lines = start + begins
        if not ended:
            lines[0], filled[0] = first, filled[0] | first_filled
        ended = data.endswith(b"\n")
        first, first_filled = int(lines[-1]), bool(filled[-1])
        whole = len(lines) if ended else -1
        yield lines[:whole], filled[:whole]
    if not ended:
        yield np.array([first]), np.array([first_filled])


def _after_ends(data: bytes) -> np.ndarray:
    """Offsets in `data` at which lines begin, except the first."""
    return np.flatnonzero(np.frombuffer(data, np.uint8) == 0x0A) + 1
