"""A lock in a bucket for one writer at a time, as `gptjax.system.locks` is in a directory.

A lock is an object `.lock.NUMBER` with its owner in it, which the store creates only if there is
none (S3's `If-None-Match`, Cloud Storage's `ifGenerationMatch`): of two processes one succeeds. Its
owner writes it again every `BEAT_SECONDS`.

Who finds a lock whose owner ran on this machine and ended, or which was not written for
`SILENT_SECONDS` by the finder's own clock, creates the next number. After it has created one, a
process lists them all, and gives way if there is another than its own and those that it found dead.
So there is no moment at which two hold it, unless an owner was silent that long and goes on; it
notices by its next beat, and pushes nothing more.
"""

import contextlib
import json
import random
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from gptjax.config import InputError
from gptjax.system.locks import (
    BEAT_SECONDS,
    SILENT_SECONDS,
    WAIT_SECONDS,
    InUse,
    Owner,
    is_running,
    name_of,
    sentence_of,
    this_owner,
)
from gptjax.system.mirrors import Mirror

PREFIX = ".lock."


@contextlib.contextmanager
def locked_in_bucket(mirror: Mirror, *, waiting: str = "") -> Iterator[None]:
    """Hold the lock of a mirror's directory in the bucket; `mirror.push` then checks that it does.

    Args:
      mirror: of the directory.
      waiting: the message for standard error if another process holds the lock, which is then
        waited for; if empty, that raises.

    Raises:
      InUse: another process holds the lock.
    """
    own = this_owner()
    name, dead = _take_or_wait(mirror, own, waiting)
    ended, lost = threading.Event(), threading.Event()
    beat = threading.Thread(target=_beat, args=(mirror, own, name, ended, lost), daemon=True)
    beat.start()

    def check_held() -> None:
        """Raise `InUse` if another process has taken over."""
        if lost.is_set():
            raise InUse(
                f"{mirror.url} was taken over by another process, since this one was silent for "
                f"more than {SILENT_SECONDS:.0f} s."
            )

    mirror.check_held = check_held
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if not lost.is_set():
            for each in (*dead, name):
                with contextlib.suppress(InputError):
                    mirror.delete(each)


def _take_or_wait(mirror: Mirror, own: Owner, waiting: str) -> tuple[str, list[str]]:
    reported = False
    while True:
        try:
            return _take(mirror, own)
        except InUse:
            if not waiting:
                raise
            if not reported:
                print(waiting, file=sys.stderr)
                reported = True
            time.sleep(WAIT_SECONDS)


def _take(mirror: Mirror, own: Owner) -> tuple[str, list[str]]:
    """The name of the lock that this process holds, and those of dead processes.

    Raises:
      InUse: another process holds it.
    """
    while True:
        dead = _locks(mirror)
        for name, text in dead.items():
            if _is_alive(mirror, name, text):
                raise InUse(sentence_of(_owner(text), mirror.url))
        name = f"{PREFIX}{max(map(_number, dead), default=0) + 1}"
        if mirror.create_text(name, _signed(own)):
            others = {other: text for other, text in _locks(mirror).items() if other != name}
            if others.items() <= dead.items():
                return name, [*dead]
            mirror.delete(name)
        time.sleep(random.uniform(0, WAIT_SECONDS))


def _locks(mirror: Mirror) -> dict[str, str]:
    """The content of every lock, by name."""
    names = mirror.beginning(PREFIX)
    texts = {name: mirror.text(name) for name in sorted(names, key=_number)}
    return {name: text for name, text in texts.items() if text is not None}


def _number(name: str) -> int:
    return int(name.removeprefix(PREFIX))


def _signed(owner: Owner, beat: int = 0) -> str:
    # The token tells two locks of one process apart.
    return json.dumps({"owner": owner._asdict(), "beat": beat, "token": secrets.token_hex(8)})


def _owner(text: str) -> Owner | None:
    try:
        content: dict[str, Any] = json.loads(text)
        return Owner(**content["owner"])
    except (ValueError, TypeError, LookupError):
        return None


def _is_alive(mirror: Mirror, name: str, text: str) -> bool:
    """Whether the owner of a lock still runs."""
    owner, here = _owner(text), this_owner()
    # A container has the boot id of its machine, and process ids and a host name of its own.
    if owner and (owner.boot, owner.host) == (here.boot, here.host):
        return is_running(owner)
    print(
        f"{mirror.url} was in use by {name_of(owner)}: checking for {SILENT_SECONDS:.0f} s whether "
        "it still is.",
        file=sys.stderr,
    )
    end = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < end:
        time.sleep(WAIT_SECONDS)
        now = mirror.text(name)
        if now != text:
            return now is not None
    return False


def _beat(
    mirror: Mirror, own: Owner, name: str, ended: threading.Event, lost: threading.Event
) -> None:
    """Write the lock again and again; a store that fails is reported where it is used."""
    beat = 0
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(InputError):
            locks = _locks(mirror)
            if name not in locks or max(locks, key=_number) != name:
                lost.set()
                return
            beat += 1
            mirror.put_text(name, _signed(own, beat))
