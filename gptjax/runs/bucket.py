"""Runs and comparisons in a bucket: when what is uploaded, and how they are read.

Each process works in a directory of its machine (`gptjax.system.buckets`). Process 0 uploads what
is one file; every process uploads its own part of a checkpoint (checkpoint_bucket.py). At each of
these moments the bucket holds what a killed process left in a directory: when a run begins, before
each checkpoint, when it is finished, and at the end.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from gptjax import distributed
from gptjax.system.bucket_locks import PREFIX, locked_in_bucket
from gptjax.system.buckets import url_of
from gptjax.system.disk import DiskError
from gptjax.system.locks import LOCK, locked
from gptjax.system.mirrors import Rules, mirror_of, mirrored
from gptjax.training.checkpoint_files import CHECKPOINTS

UNFINISHED = re.compile(r".*\.tmp|\.[0-9]+\..*")
"""Names of files that replace others once they are complete."""


def is_pushed(name: str) -> bool:
    """Whether process 0 uploads a file: all but locks, unfinished files and checkpoints."""
    *directories, own = name.split("/")
    lock = own == LOCK or own.startswith(PREFIX)
    return not (lock or UNFINISHED.fullmatch(own) or CHECKPOINTS in directories)


@contextlib.contextmanager
def held_in_bucket(url: str, rules: Rules) -> Iterator[Path]:
    """The local directory of a run in a bucket, whose lock process 0 holds meanwhile.

    It is deleted at the end. If this process dies or fails, it stays, and a resumed run downloads
    only what it lacks.

    Raises:
      InputError: a bucket that is missing or may not be written, or another process holds the lock.
      DiskError: a store that fails.
    """
    several = jax.process_count() > 1
    member = f"-{jax.process_index()}" if several else ""
    with mirrored(url, rules, member=member) as mirror, contextlib.ExitStack() as held:
        held.enter_context(locked(mirror.local / LOCK, mirror.local))
        if distributed.is_first():
            print(f"{url} is worked on in {mirror.local}.")
            held.enter_context(locked_in_bucket(mirror))
            mirror.pull()
        try:
            yield mirror.local
        except BaseException as error:
            if not isinstance(error, DiskError):  # For who looks for its cause.
                with contextlib.suppress(Exception):
                    push(mirror.local)
            raise
        push(mirror.local)


def push(directory: Path) -> None:
    """Upload what has changed in a run's directory; nothing where it is in no bucket.

    Raises:
      DiskError: a store that fails.
      InUse: another process has taken over the run.
    """
    found = mirror_of(directory)
    if found and distributed.is_first():
        found[0].push()


def pull(directory: Path) -> None:
    """Download what process 0 has uploaded of a run's directory."""
    if found := mirror_of(directory):
        found[0].pull()


def delete_checkpoints(directory: Path) -> None:
    """Delete the checkpoints of a run in a bucket, before a new one begins there."""
    if found := mirror_of(directory):
        mirror, name = found
        mirror.delete_below("/".join(filter(None, (name, CHECKPOINTS))))


def address(directory: Path) -> str:
    """A directory as the user named it, for messages."""
    if found := mirror_of(directory):
        return "/".join(filter(None, (found[0].url, found[1])))
    return url_of(directory) or str(directory)
