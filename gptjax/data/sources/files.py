"""Random access to the bytes of files, neither memory-mapped nor read whole.

Pages of a mapped file count as this process's memory, and a page that is gone kills the process;
`pread` has neither problem and is thread-safe.
"""

import codecs
import errno
import glob
import gzip
import hashlib
import os
import re
import stat
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator

from gptjax.config import InputError
from gptjax.data.sources.protocol import refuse

CHUNK = 16 << 20
"""Bytes read at a time when reading a whole file."""
UNPACKED, RATIO = 1 << 28, 200
"""A packed file may unpack to this many bytes, or to this multiple of its size: text compresses
to a twentieth at best, a decompression bomb to a thousandth."""

_ANY_DIRECTORIES = re.compile(r"(?:(?<=/)|^)\*\*(?:/+|$)")


def find_files(pattern: str) -> list[str]:
    """The file at this path, or all files that match the pattern, sorted; `**` is any directories.

    Of several paths to one file, as with links, the first is taken, so that a text is neither read
    twice nor used in both training and validation.

    Raises:
      InputError: no such file; a directory; a pattern that no file fits.
    """
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    paths: dict[object, str] = {}
    for path in sorted({*_fitting(pattern)}):
        try:
            found = os.stat(path)
        except OSError:  # A dangling link: opening it raises the error.
            paths[path] = path
            continue
        if not stat.S_ISDIR(found.st_mode):
            paths.setdefault((found.st_dev, found.st_ino), path)
    if not paths:
        refuse(f"no file fits {pattern}")
    return [*paths.values()]


def packed_as(path: str) -> str:
    """The suffix of a packed file's name, `.gz` or `.zst`; empty of other files."""
    return next((suffix for suffix in UNPACKERS if path.lower().endswith(suffix)), "")


def unreadable(path: str, error: OSError) -> InputError:
    """The error for a file that the system cannot read."""
    return InputError(f"data.source: cannot read {path}: {error.strerror or error}.")


def check_unpacked(path: str, packed: int, unpacked: int) -> None:
    """Check that `packed` bytes may unpack to `unpacked` bytes.

    Raises:
      InputError: far more than text gives, as from a decompression bomb.
    """
    if unpacked > max(UNPACKED, RATIO * packed):
        refuse(
            f"{path} unpacks to more than {RATIO} times its {packed:,} bytes and {UNPACKED >> 20} "
            "MiB, as no text does"
        )


class File:
    """A file of known size; each read checks that it has not changed since it was opened.

    A byte order mark is skipped, unless `text` is False.

    Raises:
      InputError: a file that is missing, unreadable or not regular.
    """

    def __init__(self, path: str, *, text: bool = True):
        self.path = path
        try:
            # Before it is opened: opening a pipe blocks until something writes to it.
            _check_regular(path, os.stat(path))
            with open(path, "rb", buffering=0) as opened:
                found = os.fstat(opened.fileno())
                self.skipped = _mark(opened.read(len(codecs.BOM_UTF8))) if text else 0
        except OSError as error:
            raise unreadable(path, error) from error
        _check_regular(path, found)
        self._found = found
        self.size = found.st_size - self.skipped

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, within the file as it was opened.

        Raises:
          InputError: a file that is gone, or has changed since.
        """
        # Opened for each read: a pattern may match more files than a process may hold open.
        # Non-blocking, as it may have become a pipe.
        try:
            opened = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                self._check_unchanged(os.fstat(opened))
                data = _pread(opened, self.skipped + start, length)
            finally:
                os.close(opened)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if len(data) < length:
            refuse(f"{self.path} has shrunk while it was read")
        return data

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
          InputError: a file that is gone, or has changed since.
        """
        try:
            self._check_unchanged(os.stat(self.path))
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _check_unchanged(self, now: os.stat_result) -> None:
        before = self._found
        if now.st_size < before.st_size:
            refuse(
                f"{self.path} has shrunk from {before.st_size} to {now.st_size} bytes since it was "
                "opened"
            )
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            refuse(f"{self.path} has changed since it was opened")


class Store:
    """An anonymous temporary file, closed with the last reference to it.

    Raises:
      InputError: no directory for temporary files.
    """

    def __init__(self):
        try:
            self._descriptor, name = tempfile.mkstemp()
            os.unlink(name)
        except OSError as error:
            raise InputError(f"data.source: cannot unpack files: {error.strerror}.") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._size = 0

    def append(self, path: str, parts: Iterable[bytes]) -> tuple[int, int]:
        """Append what is unpacked from `path`; returns its offset and its size in bytes.

        Raises:
          InputError: a full disk, or another failure to write.
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
    """The unpacked content of a packed file, as of when it was opened.

    Args:
      path: The packed file.
      store: The temporary file it is unpacked to; several may share one.

    Raises:
      InputError: a file that is missing, unreadable, damaged or a decompression bomb, or no space
        to unpack it.
    """

    def __init__(self, path: str, store: Store):
        packed = File(path)
        self.path = path
        self._store = store
        self._start, size = store.append(path, _unpacked(packed))
        packed.check_unchanged()
        self.skipped = _mark(store.read(self._start, min(size, len(codecs.BOM_UTF8))))
        self.size = size - self.skipped

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` of the unpacked content."""
        return self._store.read(self._start + self.skipped + start, length)


Readable = File | Unpacked


def open_files(paths: list[str]) -> list[Readable]:
    """Open the files; packed ones are unpacked into one temporary file.

    Raises:
      InputError: see `File` and `Unpacked`.
    """
    if not any(map(packed_as, paths)):
        return [File(path) for path in paths]
    store = Store()
    return [Unpacked(path, store) if packed_as(path) else File(path) for path in paths]


def chunks(file: Readable) -> Iterator[tuple[int, bytes]]:
    """Yields a file in order, as (offset, at most `CHUNK` bytes).

    A chunk ends at a line end, or if a line is longer, at the end of a UTF-8 character.
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
    """The length of `data` without an incomplete last character; UTF-8's have up to 4 bytes."""
    for end in range(len(data) - 1, len(data) - 4, -1):
        if data[end] < 0x80 or data[end] >= 0xC0:
            return end if data[end] >= 0xC0 else len(data)
    return len(data)


def _unpacked(file: File) -> Iterator[bytes]:
    """The parts of what a packed file unpacks to.

    Raises:
      InputError: a damaged file, or a decompression bomb.
    """
    size, suffix = 0, packed_as(file.path)
    for data in UNPACKERS[suffix](file.path):
        size += len(data)
        check_unpacked(file.path, file.size, size)
        yield data


def _gunzip(path: str) -> Iterator[bytes]:
    try:
        with gzip.open(path) as packed:
            while data := packed.read(CHUNK):
                yield data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"data.source: {path} is a damaged gzip file: {error}.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _unzstd(path: str) -> Iterator[bytes]:
    import pyarrow

    try:
        with open(path, "rb") as file, pyarrow.CompressedInputStream(file, "zstd") as packed:
            while data := packed.read(CHUNK):
                yield data
    except OSError as error:
        if error.errno is not None:
            raise unreadable(path, error) from error
        what = str(error).rstrip(".")
        raise InputError(f"data.source: {path} is a damaged zstd file: {what}.") from error


UNPACKERS = {".gz": _gunzip, ".zst": _unzstd}
"""By suffix: the path of a packed file → the parts of its content."""


def _fitting(pattern: str) -> Iterator[str]:
    """Paths that match the pattern; a directory in a cycle of links is entered once."""
    before, *behind = _ANY_DIRECTORIES.split(pattern, maxsplit=1)
    if not behind:
        yield from glob.iglob(pattern)
        return
    for top in glob.glob(before) if before else [""]:
        for directory in _directories(top):
            yield from _fitting(os.path.join(glob.escape(directory), behind[0] or "*"))


def _directories(top: str) -> Iterator[str]:
    """A directory ("" is the working one) and all non-hidden ones below it, each once."""
    entered = set()
    for directory, below, _ in os.walk(top or os.curdir, followlinks=True):
        try:
            found = os.stat(directory)
        except OSError:  # It is gone, with its content.
            continue
        if (found.st_dev, found.st_ino) in entered:
            below.clear()
            continue
        entered.add((found.st_dev, found.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield directory if top else os.path.relpath(directory).removeprefix(os.curdir)


def _check_regular(path: str, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise unreadable(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if not stat.S_ISREG(found.st_mode):
        refuse(f"{path} is no regular file, which random access needs")


def _mark(begin: bytes) -> int:
    """The length of the byte order mark that `begin` may be, else 0."""
    return len(codecs.BOM_UTF8) if begin.startswith(codecs.BOM_UTF8) else 0


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """Up to `length` bytes, fewer at the file's end; one call returns at most 2 GiB."""
    data = os.pread(descriptor, length, start)
    if len(data) == length or not data:
        return data
    parts, missing = [data], length - len(data)
    while missing and (data := os.pread(descriptor, missing, start + length - missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)
