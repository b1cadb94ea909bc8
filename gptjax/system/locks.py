"""One writer at a time: a lock in a file, which says whose it is.

    with locked(directory / LOCK, f"{directory}"):
        ...

The file holds its owner's host, process and start, and `flock` holds the file. The system frees
that when the owner ends, however it ends, so that the next one takes over at once; a process that
forks gives no lock to its children here, as nothing in gptjax forks.

On a file system that several machines share, `flock` may hold among the processes of each machine
alone, or not be there at all. So an owner also touches the file every `BEAT_SECONDS`. Whoever finds
the file of another machine unheld looks at it for `SILENT_SECONDS`, by its own clock: if it is
touched, it is held. Where there is no `flock`, an owner on this machine is asked for by its process
and start, and of two that come at the same moment the later one has it. An owner that stood still
for so long (a stopped process, a network that was gone) is taken for dead there.
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
"""Name of the file in a directory that is locked as a whole."""
BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0
WAIT_SECONDS = 0.5
SETTLE_SECONDS = 1.0
"""In which a later one's note would show, where there is no `flock`."""
NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Owner(NamedTuple):
    """Who holds a lock."""

    host: str
    boot: str
    """Of its machine: what tells a machine from another one, and from itself before a restart."""
    process: int
    started: float
    """Its process, seconds since 1970: numbers of processes come again."""
    since: str
    """When it took the lock, for a person."""


class InUse(InputError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, what: object, *, waiting: str = "") -> Iterator[None]:
    """Hold the lock at `path` while the context is open; then the file is gone.

    Args:
      path: The lock's file, in a directory that is there.
      what: Is locked, as an error names it.
      waiting: What to say on standard error, once, where another process holds it, and then to
        wait for its end; without it, that is an error.

    Raises:
      InUse: another process holds it, or this one does already.
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
    said = False
    while True:
        try:
            return _take(path, what)
        except InUse:
            if not said:
                print(waiting, file=sys.stderr)
                said = True
            time.sleep(WAIT_SECONDS)


def _take(path: Path, what: object) -> BinaryIO:
    """The file, held, and with this process as its owner.

    Raises:
      InUse: it has another.
    """
    while True:
        file = path.open("a+b", buffering=0)
        try:
            alone = _flock(file)
            if _is_at(file, path):
                owner = _owner(file)
                if owner and _is_alive(owner, path, what, alone):
                    raise InUse(_sentence(owner, what))
                _sign(file, what, alone)
                return file
            file.close()  # Its owner has ended and deleted it just now.
        except BlockingIOError as error:
            owner = _owner(file)
            file.close()
            raise InUse(_sentence(owner, what)) from error
        except BaseException:
            file.close()
            raise


def _flock(file: BinaryIO) -> bool:
    """Hold the file; False where the file system knows no such thing.

    Raises:
      BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_FLOCK:
            return False
        raise
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether it is this file that has the name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _owner(file: BinaryIO) -> Owner | None:
    """Who stands in the file; None where nobody does, as while it is written."""
    file.seek(0)
    try:
        return Owner(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _sign(file: BinaryIO, what: object, alone: bool) -> None:
    """Write this process into the file.

    Raises:
      InUse: another one did after it, where nothing held that off.
    """
    process = psutil.Process()
    now = datetime.datetime.now().astimezone()
    own = Owner(
        host=socket.gethostname(),
        boot=_boot(),
        process=process.pid,
        started=process.create_time(),
        since=now.isoformat(" ", "seconds"),
    )
    file.truncate(0)
    file.write(json.dumps(own._asdict()).encode() + b"\n")
    os.fsync(file.fileno())
    if not alone:
        time.sleep(SETTLE_SECONDS)
        if (owner := _owner(file)) != own:
            raise InUse(_sentence(owner, what))


def _is_alive(owner: Owner, path: Path, what: object, alone: bool) -> bool:
    """Whether the owner of a file still runs; if `alone`, nothing on this machine holds it."""
    if owner.boot != _boot():
        return _is_touched(owner, path, what)
    if alone:
        return False
    try:
        process = psutil.Process(owner.process)
        return abs(process.create_time() - owner.started) < 1 and process.is_running()
    except psutil.Error:
        return False


def _is_touched(owner: Owner, path: Path, what: object) -> bool:
    """Look at the file for a while; each time anew, as a network's file system needs it."""
    print(
        f"{what} was in use by {_name(owner)}: looking for {SILENT_SECONDS:.0f} s whether it "
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
    """Touch the file until the lock is given back; a failing disk is for others to notice."""
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(file.fileno())


@functools.cache
def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()


def _name(owner: Owner | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.process} on {owner.host} since {owner.since}"


def _sentence(owner: Owner | None, what: object) -> str:
    return f"{what} is in use by {_name(owner)}: wait for its end, or choose another directory."
