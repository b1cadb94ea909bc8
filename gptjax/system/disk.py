"""Atomic writes, and errors of a disk that is full or fails."""

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.config import InputError

FAILURES = {
    errno.ENOSPC,  # Full.
    errno.EDQUOT,  # Full for this user.
    errno.EFBIG,  # Larger than a file may be, by `ulimit -f`.
    errno.EROFS,  # Read-only, as systems remount a disk with errors.
    errno.EIO,
    errno.ENXIO,
    errno.ENODEV,
    errno.ESTALE,  # A network's server has lost the file.
    errno.ETIMEDOUT,
}
"""Errors of the disk itself; all others are errors of the request."""


class DiskError(InputError):
    """A disk that is full or fails; the message is one sentence for the user."""


class CheckpointFailed(DiskError):
    """A checkpoint could not be written; threads of Orbax may still be running."""


def check_local(path: Path) -> Path:
    """The path, if it is a local one and valid UTF-8.

    Raises:
      InputError: a URL such as gs://bucket/run, or a name that is not valid UTF-8.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise InputError(f"{path} is a URL: give a path on this machine's disks.")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{str(path)!r} is not valid UTF-8: choose another name.") from None
    return path


def is_failure(error: BaseException) -> bool:
    """Whether an error is that of a disk that is full or fails."""
    return isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in FAILURES)


def write_error(error: OSError, what: object, flag: str = "") -> InputError:
    """The error that `what`, of `flag`, cannot be written; a `DiskError` if the disk failed."""
    kind = DiskError if is_failure(error) else InputError
    prefix = f"{flag}: " if flag else ""
    return kind(f"{prefix}cannot write {what}: {error.strerror or error}.")


@contextlib.contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file atomically: it replaces `path` once it is complete and on disk.

    Until then it is `temporary`, by default a unique name, which no other process may use.
    """
    temporary = temporary or path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, through `NAME.tmp` beside it, which allows one writer at a time."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path, path.with_suffix(".tmp")) as file:
        file.write(text.encode("utf-8"))
