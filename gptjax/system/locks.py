"""A lock file for one writer at a time, which names its owner.

    with locked(directory / LOCK, f"{directory}"):
        ...

The file names its owner's host, process and start time, and is locked by `flock`. The system
releases that when the owner exits, for whatever reason, so that the next one can take it at once;
forked children, of which gptjax has none, would share the lock.

On a network file system, `flock` may work only among the processes of each machine, or not at all.
So an owner also touches the file every `BEAT_SECONDS`. A process that finds a file of another
machine not locked watches it for `SILENT_SECONDS`, by its own clock: if it is touched, it is held.
Without `flock`, an owner on this machine is looked up by process and start time, and of two that
lock at the same moment the later one wins. There, an owner that was suspended or offline for that
long counts as dead.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil

from gptjax.config import InputError

LOCK = ".lock"
"""Name of the lock file of a directory."""
BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0
WAIT_SECONDS = 0.5
SETTLE_SECONDS = 1.0
"""Without `flock`: the time in which a later owner's entry would show."""
NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Owner(NamedTuple):
    """The owner of a lock."""

    host: str
    boot: str
    """The boot id of its machine, which differs between machines and changes on restart."""
    process: int
    started: float
    """Start time of its process, seconds since 1970, since process ids are reused."""
    since: str
    """When it took the lock, human-readable."""


class InUse(InputError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, what: object, *, waiting: str = "") -> Iterator[None]:
    """Hold the lock at `path` while the context is open; then delete the file.

    Args:
      path: the lock file, in an existing directory.
      what: is locked, for error messages.
      waiting: the message for standard error if another process holds the lock, which is then
        waited for; if empty, that raises.

    Raises:
      InUse: another process holds the lock, or this one does already.
      OSError: a file that cannot be written.
    """
    file = _take_or_wait(path, what, waiting) if waiting else _take(path, what)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, ended), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with contextlib.suppress(OSError):
            if _is_at(file, path):
                path.unlink()
        file.close()


def _take_or_wait(path: Path, what: object, waiting: str) -> BinaryIO:
    reported = False
    while True:
        try:
            return _take(path, what)
        except InUse:
            if not reported:
                print(waiting, file=sys.stderr)
                reported = True
            time.sleep(WAIT_SECONDS)


def _take(path: Path, what: object) -> BinaryIO:
    """The file, locked, with this process as its owner.

    Raises:
      InUse: it has another owner.
    """
    while True:
        file = path.open("a+b", buffering=0)
        try:
            alone = _flock(file)
            if _is_at(file, path):
                owner = _owner(file)
                if owner and _is_alive(owner, path, what, alone):
                    raise InUse(sentence_of(owner, what))
                _sign(file, what, alone)
                return file
            file.close()  # Its owner has just exited and deleted it.
        except BlockingIOError as error:
            owner = _owner(file)
            file.close()
            raise InUse(sentence_of(owner, what)) from error
        except BaseException:
            file.close()
            raise


def _flock(file: BinaryIO) -> bool:
    """Lock the file; False where the file system does not support it.

    Raises:
      BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_FLOCK:
            return False
        raise
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether `path` is still this file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _owner(file: BinaryIO) -> Owner | None:
    """The owner named in the file; None if there is none, as while it is written."""
    file.seek(0)
    try:
        return Owner(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _sign(file: BinaryIO, what: object, alone: bool) -> None:
    """Write this process into the file as its owner.

    Raises:
      InUse: without `flock`, another process has done so after it.
    """
    own = this_owner()
    file.truncate(0)
    file.write(json.dumps(own._asdict()).encode() + b"\n")
    os.fsync(file.fileno())
    if not alone:
        time.sleep(SETTLE_SECONDS)
        if (owner := _owner(file)) != own:
            raise InUse(sentence_of(owner, what))


def _is_alive(owner: Owner, path: Path, what: object, alone: bool) -> bool:
    """Whether the owner still runs; `alone` says that no process of this machine holds it."""
    if owner.boot != _boot():
        return _is_touched(owner, path, what)
    return not alone and is_running(owner)


def _is_touched(owner: Owner, path: Path, what: object) -> bool:
    """Watch the file for a while, reopened each time, as network file systems require."""
    print(
        f"{what} was in use by {name_of(owner)}: checking for {SILENT_SECONDS:.0f} s whether it "
        "still is.",
        file=sys.stderr,
    )
    before, end = _touched(path), time.monotonic() + SILENT_SECONDS
    while time.monotonic() < end:
        time.sleep(WAIT_SECONDS)
        if _touched(path) != before:
            return True
    return False


def _touched(path: Path) -> int:
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _beat(file: BinaryIO, ended: threading.Event) -> None:
    """Touch the file until the lock is released; a failing disk is reported elsewhere."""
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(file.fileno())


def this_owner() -> Owner:
    """This process as an owner from now on."""
    process = psutil.Process()
    now = datetime.datetime.now().astimezone()
    return Owner(
        host=socket.gethostname(),
        boot=_boot(),
        process=process.pid,
        started=process.create_time(),
        since=now.isoformat(" ", "seconds"),
    )


def is_running(owner: Owner) -> bool:
    """Whether an owner on this machine still runs."""
    try:
        process = psutil.Process(owner.process)
        return abs(process.create_time() - owner.started) < 1 and process.is_running()
    except psutil.Error:
        return False


@functools.cache
def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()


def name_of(owner: Owner | None) -> str:
    """The owner in words."""
    if owner is None:
        return "another process"
    return f"process {owner.process} on {owner.host} since {owner.since}"


def sentence_of(owner: Owner | None, what: object) -> str:
    """The error that another process holds the lock."""
    return f"{what} is in use by {name_of(owner)}: wait until it ends, or choose another directory."
