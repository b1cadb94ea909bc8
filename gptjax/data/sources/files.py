"""Files whose bytes are read where they are wanted: never mapped, never whole.

A page of a mapped file counts as this process's memory, and one that is no longer there ends the
process; `pread` does neither, and threads share it.
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
"""Bytes that are read at a time where a whole file is read."""
UNPACKED, RATIO = 1 << 28, 200
"""A packed file may have so many bytes, and more if they are at most so many times the packed ones:
text is packed to a twentieth at best, and a file that is made to fill memories to a thousandth."""

_ANY_DIRECTORIES = re.compile(r"(?:(?<=/)|^)\*\*(?:/+|$)")


def find_files(pattern: str) -> list[str]:
    """The file at this path, or all files that fit the pattern, sorted; `**` is any directories.

    Of several paths that lead to one file, as links do, the first is taken: its text is not read
    twice, nor validated on after it was trained on.

    Raises:
      InputError: no such file; a directory; a pattern that no file fits.
    """
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    paths: dict[object, str] = {}
    for path in sorted({*_fitting(pattern)}):
        try:
            found = os.stat(path)
        except OSError:  # A link that leads nowhere: who opens it says so.
            paths[path] = path
            continue
        if not stat.S_ISDIR(found.st_mode):
            paths.setdefault((found.st_dev, found.st_ino), path)
    if not paths:
        refuse(f"no file fits {pattern}")
    return [*paths.values()]


def is_gzip(path: str) -> bool:
    """Whether a file is named as one that gzip packed."""
    return path.lower().endswith(".gz")


def unreadable(path: str, error: OSError) -> InputError:
    """The mistake of a file that the system does not give."""
    return InputError(f"data.source: cannot read {path}: {error.strerror or error}.")


def check_unpacked(path: str, packed: int, unpacked: int) -> None:
    """Find out whether so many bytes may come of so many packed ones.

    Raises:
      InputError: far more than text gives, as of a file that was made to fill memories.
    """
    if unpacked > max(UNPACKED, RATIO * packed):
        refuse(
            f"{path} unpacks to more than {RATIO} times its {packed:,} bytes and {UNPACKED >> 20} "
            "MiB, as no text does"
        )


class File:
    """A file of a known size; a read finds out whether it is still what was opened.

    A byte order mark before the text is no part of it.

    Raises:
      InputError: a file that is missing, unreadable or no regular file.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            # Before it is opened: a pipe waits for who writes into it.
            _check_regular(path, os.stat(path))
            with open(path, "rb", buffering=0) as opened:
                found = os.fstat(opened.fileno())
                self.skipped = _mark(opened.read(len(codecs.BOM_UTF8)))
        except OSError as error:
            raise unreadable(path, error) from error
        _check_regular(path, found)
        self._found = found
        self.size = found.st_size - self.skipped

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`; both lie in the file as it was opened.

        Raises:
          InputError: a file that is gone, or has changed since.
        """
        # Opened anew each time: a pattern may fit more files than a process may hold open. It may
        # be a pipe by now, which is not to be waited for.
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
        """Find out whether the file is still the one that was opened.

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
      InputError: a file that is missing, unreadable or damaged, that unpacks to far more than text
        does, or no space to unpack it.
    """

    def __init__(self, path: str, store: Store):
        packed = File(path)
        self.path = path
        self._store = store
        self._start, size = store.append(path, _gunzip(packed))
        packed.check_unchanged()
        self.skipped = _mark(store.read(self._start, min(size, len(codecs.BOM_UTF8))))
        self.size = size - self.skipped

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, of what is unpacked."""
        return self._store.read(self._start + self.skipped + start, length)


Readable = File | Unpacked


def open_files(paths: list[str]) -> list[Readable]:
    """The files, those that end in .gz unpacked into one temporary file.

    Raises:
      InputError: see `File` and `Unpacked`.
    """
    if not any(map(is_gzip, paths)):
        return [File(path) for path in paths]
    store = Store()
    return [Unpacked(path, store) if is_gzip(path) else File(path) for path in paths]


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


def _gunzip(file: File) -> Iterator[bytes]:
    size = 0
    try:
        with gzip.open(file.path) as packed:
            while data := packed.read(CHUNK):
                size += len(data)
                check_unpacked(file.path, file.size, size)
                yield data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"data.source: {file.path} is a damaged gzip file: {error}.") from error
    except OSError as error:
        raise unreadable(file.path, error) from error


def _fitting(pattern: str) -> Iterator[str]:
    """Paths that fit the pattern; a directory that links lead to in a circle is entered once."""
    before, *behind = _ANY_DIRECTORIES.split(pattern, maxsplit=1)
    if not behind:
        yield from glob.iglob(pattern)
        return
    for top in glob.glob(before) if before else [""]:
        for directory in _directories(top):
            yield from _fitting(os.path.join(glob.escape(directory), behind[0] or "*"))


def _directories(top: str) -> Iterator[str]:
    """A directory ("" is the working one) and all below it, but for hidden ones, each once."""
    entered = set()
    for directory, below, _ in os.walk(top or os.curdir, followlinks=True):
        try:
            found = os.stat(directory)
        except OSError:  # It is gone; what is in it is found no more.
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
    """The bytes of a byte order mark, where `begin` is one."""
    return len(codecs.BOM_UTF8) if begin.startswith(codecs.BOM_UTF8) else 0


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
