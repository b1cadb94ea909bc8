"""Documents of text files: an index of where each begins, and a read where one is asked for.

The index takes 8 bytes a document. A file is read once to make it; UTF-8 and the fingerprint are
checked and computed on the way, so that a bad byte is found before the training and not within it.
"""

import array
import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, NoReturn

import numpy as np

from gptjax.data.sources.files import Readable, chunks, open_files
from gptjax.data.sources.protocol import Spec, check_index, refuse

# As the blank lines of block documents have them.
_BLANKS = b" \t\r\n"
_IS_TEXT = ~np.isin(np.arange(256), list(_BLANKS))

Chunks = Iterable[tuple[int, bytes]]


class Place(NamedTuple):
    """Where a document is."""

    path: str
    number: int
    """Of the document in its file, from 1: in a file of lines, the line's."""
    start: int
    """Its first byte's offset in the file, unpacked if it is a gzip file."""


class IndexedFiles:
    """Documents that follow each other in files.

    Args:
      spec: What was asked for; names the object.
      paths: The files, in order.
      options: What the fingerprint holds beside the content.
      split: Yields arrays of the offsets at which the documents of a file's chunks begin.
      errors: `strict` or `replace`: what is done about bytes that are not UTF-8.

    Raises:
      InputError: files that cannot be read or hold no document; bytes that are not UTF-8.
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
            for found in split(self._checked(file, digest.update)):
                starts.frombytes(found.astype(np.uint64).tobytes())
            if starts and starts[-1] == file.size:  # After the last line's end there is no line.
                starts.pop()
            if not starts:
                refuse(f"{file.path} has only blank lines")
            self._starts.append(np.frombuffer(starts, np.uint64))
            digests.append(digest.hexdigest())
        self._ends = list(itertools.accumulate(map(len, self._starts)))
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
        return self._document(data, Place(file.path, within + 1, start))

    def __reduce__(self):
        from gptjax.data.sources import reopen

        return reopen, (self.name, self.fingerprint)

    def _document(self, data: bytes, place: Place) -> str:
        """The document in these bytes, which reach to where the next one begins."""
        return self._decoded(data, place)

    def _decoded(self, data: bytes, place: Place) -> str:
        try:
            return data.decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            _not_utf8(place.path, place.start, error)

    def _checked(self, file: Readable, update: Callable[[bytes], object]) -> Chunks:
        """The file's chunks; `update` gets each."""
        for start, data in chunks(file):
            update(data)
            if self._errors == "strict":
                try:
                    data.decode("utf-8")
                except UnicodeDecodeError as error:
                    _not_utf8(file.path, start, error)
            yield start, data


class Whole(IndexedFiles):
    """A document a file, as it is; a file above `files.CHUNK` bytes (16 MiB) is several.

    It is cut at line ends, so that no document is larger; joined, they are the file.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str):
        options = {"documents": "file", "errors": errors}
        super().__init__(spec, paths, options, _chunk_starts, errors)


class Lines(IndexedFiles):
    r"""Every line is a document, empty ones too, without the `\n` or `\r\n` that ends it.

    The end of the last line may be missing. A lone `\r` ends no line.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str):
        options = {"documents": "line", "errors": errors}
        super().__init__(spec, paths, options, line_starts, errors)

    def _document(self, data: bytes, place: Place) -> str:
        return self._decoded(without_end(data), place)


class Column(IndexedFiles):
    """A column of every line of tab-separated text; nothing is quoted in it.

    Raises:
      InputError: a first line that lacks the column.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str, column: int):
        self._column = column
        options = {"column": str(column), "errors": errors}
        super().__init__(spec, paths, options, line_starts, errors)
        self[0]

    def _document(self, data: bytes, place: Place) -> str:
        columns = without_end(data).split(b"\t")
        if self._column > len(columns):
            refuse(
                f"line {place.number} of {place.path} has {len(columns)} columns, and column "
                f"{self._column} is asked for"
            )
        start = place.start + sum(len(column) + 1 for column in columns[: self._column - 1])
        return self._decoded(columns[self._column - 1], place._replace(start=start))


class Blocks(IndexedFiles):
    """Documents between blank lines, which may hold spaces and tabs; without their last line end.

    Their lines, the first one's indentation included, are as they are.
    """

    def __init__(self, spec: Spec, paths: list[str], errors: str):
        options = {"documents": "block", "errors": errors}
        super().__init__(spec, paths, options, _block_starts, errors)

    def _document(self, data: bytes, place: Place) -> str:
        last_line = data.find(b"\n", len(data.rstrip(_BLANKS)))
        return self._decoded(data if last_line < 0 else without_end(data[: last_line + 1]), place)


def fingerprint_of(digests: list[str], options: dict[str, str]) -> str:
    """The fingerprint of files with these digests, in order, read with these options."""
    read = json.dumps({"files": digests, "options": options}, sort_keys=True)
    return hashlib.sha256(read.encode("utf-8")).hexdigest()


def without_end(line: bytes) -> bytes:
    r"""A line without the `\n` or `\r\n` that ends it."""
    if line.endswith(b"\r\n"):
        return line[:-2]
    return line[:-1] if line.endswith(b"\n") else line


def _not_utf8(path: str, start: int, error: UnicodeDecodeError) -> NoReturn:
    byte, offset = error.object[error.start], start + error.start
    refuse(
        f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset} (#errors=replace reads such "
        "bytes as U+FFFD)"
    )


def _chunk_starts(chunks: Chunks) -> Iterator[np.ndarray]:
    for start, _ in chunks:
        yield np.array([start])


def line_starts(chunks: Chunks) -> Iterator[np.ndarray]:
    """Where lines begin, and after the end of the last line, the file's end."""
    yield np.array([0])
    for start, data in chunks:
        yield start + _after_ends(data)


def _block_starts(chunks: Chunks) -> Iterator[np.ndarray]:
    line, line_has_text, after_blank = 0, False, True
    for start, data in chunks:
        begins = np.concatenate([[0], _after_ends(data)])
        ended = begins[-1] == len(data)
        begins = begins[:-1] if ended else begins
        text = np.logical_or.reduceat(_IS_TEXT[np.frombuffer(data, np.uint8)], begins)
        # The first line here may go on from the chunk before, if it is longer than a chunk.
        text[0] |= line_has_text
        lines = start + begins
        lines[0] = line
        before = np.concatenate([[after_blank], ~text[:-1]])
        if ended:
            line, line_has_text, after_blank = start + len(data), False, not text[-1]
        else:
            line, line_has_text, after_blank = int(lines[-1]), bool(text[-1]), bool(before[-1])
            text, lines, before = text[:-1], lines[:-1], before[:-1]
        yield lines[text & before]
    if line_has_text and after_blank:
        yield np.array([line])


def _after_ends(data: bytes) -> np.ndarray:
    """Where lines begin in `data`, but for the first one."""
    return np.flatnonzero(np.frombuffer(data, np.uint8) == 0x0A) + 1
