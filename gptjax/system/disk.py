"""What is written so that it is there whole or not at all, and what a failing disk is called."""

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
    errno.EROFS,  # Read-only, as a system makes it that has found errors.
    errno.EIO,
    errno.ENXIO,
    errno.ENODEV,
    errno.ESTALE,  # A network's server has lost the file.
    errno.ETIMEDOUT,
}
"""Errors of a disk, whatever was asked of it; all others are of what was asked."""


class DiskError(InputError):
    """A disk that is full or fails; the message is one sentence for the user."""


class CheckpointFailed(DiskError):
    """A checkpoint could not be written; threads of Orbax may still be at it."""


def check_local(path: Path) -> Path:
    """The path, if a file of this machine may have it and every library can name it.

    Raises:
      InputError: an address such as gs://bucket/run, or a name that is no text in UTF-8.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise InputError(f"{path} is an address: give a path on this machine's disks.")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{str(path)!r} is no text in UTF-8: choose another name.") from None
    return path


def is_failure(error: BaseException) -> bool:
    """Whether an error is of a disk that is full or fails."""
    return isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in FAILURES)


def write_error(error: OSError, what: object, flag: str = "") -> InputError:
    """The sentence that `what`, of `flag`, cannot be written: if the disk failed, a `DiskError`."""
    kind = DiskError if is_failure(error) else InputError
    prefix = f"{flag}: " if flag else ""
    return kind(f"{prefix}cannot write {what}: {error.strerror or error}.")


@contextlib.contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A file that is at `path` once it is whole and on the disk, and else not at all.

    Until then it is `temporary`, of which nobody else makes use; by default a new name.
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
    """Write JSON whole or not at all, by way of `NAME.tmp` beside it: to one writer at a time."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path, path.with_suffix(".tmp")) as file:
        file.write(text.encode("utf-8"))
