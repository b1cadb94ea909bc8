"""Files whose bytes are read where they are wanted: never mapped, never whole.

A page of a mapped file counts as this process's memory, and one that is no longer there ends the
process; `pread` does neither, and threads share it.
"""

import glob
import gzip
import hashlib
import os
import stat
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator

from gptjax.config import InputError
from gptjax.data.sources.protocol import refuse

CHUNK = 16 << 20
"""Bytes that are read at a time where a whole file is read."""


def find_files(pattern: str) -> list[str]:
    """The file at this path, or all files that fit the pattern, sorted; `**` is any directories.

    Raises:
      InputError: no such file; a directory; a pattern that no file fits.
    """
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    if not paths:
        refuse(f"no file fits {pattern}")
    return paths


def unreadable(path: str, error: OSError) -> InputError:
    """The mistake of a file that the system does not give."""
    return InputError(f"data.source: cannot read {path}: {error.strerror or error}.")


class File:
    """A file of a known size; a read finds out whether it is still what was opened.

    Raises:
      InputError: a file that is missing, unreadable, empty or no file.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            with open(path, "rb", buffering=0) as opened:
                found = os.fstat(opened.fileno())
        except OSError as error:
            raise unreadable(path, error) from error
        if not stat.S_ISREG(found.st_mode):
            refuse(f"{path} is no regular file, which random access needs")
        if not found.st_size:
            refuse(f"{path} is empty")
        self.size = found.st_size
        self._modified = found.st_mtime_ns

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`; both lie in the file as it was opened.

        Raises:
          InputError: a file that is gone, or has changed since.
        """
        # Opened anew each time: a pattern may fit more files than a process may hold open.
        try:
            opened = os.open(self.path, os.O_RDONLY)
            try:
                self._check_unchanged(os.fstat(opened))
                data = _pread(opened, start, length)
            finally:
                os.close(opened)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if len(data) < length:
            refuse(f"{self.path} has shrunk while it was read")
        return data

    def check_unchanged(self) -> None:
        """Find out whether the file is still the one that was opened.

        Raises:
          InputError: a file that is gone, or has changed since.
        """
        try:
            self._check_unchanged(os.stat(self.path))
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _check_unchanged(self, found: os.stat_result) -> None:
        if found.st_size < self.size:
            refuse(
                f"{self.path} has shrunk from {self.size} to {found.st_size} bytes since it was "
                "opened"
            )
        if (found.st_size, found.st_mtime_ns) != (self.size, self._modified):
            refuse(f"{self.path} has changed since it was opened")


class Store:
    """A temporary file without a name, closed with the last reference to it.

    Raises:
      InputError: no place for temporary files.
    """

    def __init__(self):
        try:
            self._descriptor, name = tempfile.mkstemp()
            os.unlink(name)
        except OSError as error:
            raise InputError(f"data.source: cannot unpack .gz files: {error.strerror}.") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._size = 0

    def append(self, path: str, parts: Iterable[bytes]) -> tuple[int, int]:
        """Write what is unpacked from `path`; where it begins, and its bytes.

        Raises:
          InputError: a disk that is full, or another reason why it cannot be written.
        """
        start = self._size
        for part in parts:
            try:
                while part:
                    written = os.write(self._descriptor, part)
                    self._size += written
                    part = part[written:]
            except OSError as error:
                raise InputError(
                    f"data.source: cannot unpack {path} into {tempfile.gettempdir()} (TMPDIR names "
                    f"another place): {error.strerror}."
                ) from error
        return start, self._size - start

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`."""
        return _pread(self._descriptor, start, length)


class Unpacked:
    """What a gzip file held when it was opened.

    Args:
      path: The gzip file.
      store: Where it is unpacked to; several may share one.

    Raises:
      InputError: a file that is missing, unreadable, empty or damaged, or no space to unpack it.
    """

    def __init__(self, path: str, store: Store):
        File(path)
        self.path = path
        self._store = store
        self._start, self.size = store.append(path, _gunzip(path))
        if not self.size:
            refuse(f"{path} holds nothing")

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, of what is unpacked."""
        return self._store.read(self._start + start, length)


Readable = File | Unpacked


def open_files(paths: list[str]) -> list[Readable]:
    """The files, those that end in .gz unpacked into one temporary file.

    Raises:
      InputError: see `File` and `Unpacked`.
    """
    if not any(path.endswith(".gz") for path in paths):
        return [File(path) for path in paths]
    store = Store()
    return [Unpacked(path, store) if path.endswith(".gz") else File(path) for path in paths]


def chunks(file: Readable) -> Iterator[tuple[int, bytes]]:
    """All of a file in order, as offsets and at most `CHUNK` bytes each.

    A chunk ends where a line ends, or if a line is longer, where a UTF-8 character ends.
    """
    start = 0
    while start < file.size:
        data = file.read(start, min(CHUNK, file.size - start))
        if start + len(data) < file.size:
            data = data[: data.rfind(b"\n") + 1 or _whole_characters(data)]
        yield start, data
        start += len(data)


def sha256(file: Readable) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    for _, data in chunks(file):
        digest.update(data)
    return digest.hexdigest()


def _whole_characters(data: bytes) -> int:
    """The length of `data` without a character that its end cuts; UTF-8's have up to 4 bytes."""
    for end in range(len(data) - 1, len(data) - 4, -1):
        if data[end] < 0x80 or data[end] >= 0xC0:
            return end if data[end] >= 0xC0 else len(data)
    return len(data)


def _gunzip(path: str) -> Iterator[bytes]:
    try:
        with gzip.open(path) as packed:
            while data := packed.read(CHUNK):
                yield data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"data.source: {path} is a damaged gzip file: {error}.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """The bytes, fewer at the file's end; the system gives at most 2 GiB at a time."""
    data = os.pread(descriptor, length, start)
    if len(data) == length or not data:
        return data
    parts, missing = [data], length - len(data)
    while missing and (data := os.pread(descriptor, missing, start + length - missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)
