"""Mirrors: a directory in a bucket and one of this machine, which are kept in step.

Of several files, what says that the others are complete is uploaded last, and deleted first. What
is on this machine already, as after a run was killed, is not downloaded again: `.mirror.json` has
the store's tag (its ETag or generation) of each file, and the file's size and time.
"""

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from gptjax.config import InputError
from gptjax.system.buckets import (
    attempt,
    caches,
    download,
    file_name,
    filesystem,
    scheme_of,
    sentence,
    tag_of,
    url_of,
)
from gptjax.system.disk import replacing
from gptjax.system.locks import locked

T = TypeVar("T")

TRANSFERS = 16
"""Files transferred at a time."""
INDEX = ".mirror.json"
"""A mirror's record, in its local directory alone."""


class _Copy(NamedTuple):
    """A local file that equals an object."""

    tag: str
    size: int
    mtime_ns: int


class Rules(NamedTuple):
    """Which files of a directory a mirror keeps in step, and in which order."""

    wanted: Callable[[str], bool] = lambda name: True
    """Which names."""
    first: tuple[str, ...] = ()
    """Names of files, of any directory, that say that others are incomplete: they are uploaded
    before them, and deleted after them."""
    last: tuple[str, ...] = ()
    """Those that say that others are complete: uploaded after them, deleted before them."""

    def ordered(self, names: Iterable[str]) -> list[list[str]]:
        """The names in the three parts that are uploaded one after another."""
        parts: list[list[str]] = [[], [], []]
        for name in sorted(names):
            own = name.rpartition("/")[2]
            parts[0 if own in self.first else 2 if own in self.last else 1].append(name)
        return parts


class Mirror:
    """A directory in a bucket and one on this machine.

    Names are paths in either, with `/`. One process at a time pushes a name; several threads may.

    Args:
      url: the directory in the bucket.
      local: the one on this machine, which exists.
      rules: which files `pull` and `push` are about, and in which order.
    """

    def __init__(self, url: str, local: Path, rules: Rules):
        self.url, self.local = url, local
        self._rules = rules
        self._store = filesystem(scheme_of(url))
        self._root = self._store._strip_protocol(url)
        self._using = threading.RLock()
        self.names: dict[str, str] = {}
        """The tag of every object, as last listed or pushed."""
        self.check_held: Callable[[], None] = lambda: None
        """Raises if this process has lost the lock of the directory, before anything is pushed."""
        self._copies = {name: _Copy(*copy) for name, copy in self._index().items()}

    def pull(self) -> None:
        """Make the local files what the bucket has, by the rules.

        Raises:
          InputError: a bucket that is missing or may not be read.
          DiskError: a store that fails, or a full disk here.
        """
        with self._using:
            wanted = {name for name in self.refresh() if self._rules.wanted(name)}
            for name in self._local_names() - wanted:
                (self.local / name).unlink()
            self._all(self._get, sorted(name for name in wanted if not self._is_copied(name)))
            self._save_index()

    def push(self) -> None:
        """Upload the local files that changed, and delete what is gone here, by the rules.

        Raises:
          InputError: a bucket that may not be written, or another process has taken the lock.
          DiskError: a store that fails.
        """
        with self._using:
            self.check_held()
            local, wanted = self._local_names(), self._rules.wanted
            changed = {name for name in local if not self._is_copied(name)}
            gone = {name for name in self.names if wanted(name) and name not in local}
            for batch in self._rules.ordered(changed):
                self._all(self._put, batch)
            for batch in reversed(self._rules.ordered(gone)):
                self._all(self._delete, batch)
            self._save_index()

    def put(self, files: dict[str, Path]) -> None:
        """Upload local files under names of their own."""

        def put(name: str) -> None:
            self._attempt(name, lambda at: self._store.put_file(str(files[name]), at))
            self.names[name] = ""

        self.check_held()
        self._all(put, [*files])

    def get(self, names: list[str]) -> None:
        """Download objects to the local files of their names."""
        self._all(self._get, names)

    def beginning(self, prefix: str) -> list[str]:
        """The names in the directory itself, not below it, that begin with a prefix."""
        found = self._attempt(f"{prefix}*", self._store.glob)
        return [at.removeprefix(f"{self._root}/") for at in found]

    def put_text(self, name: str, text: str) -> None:
        """Write an object."""
        self._attempt(name, lambda at: self._store.pipe_file(at, text.encode()))
        self.names[name] = ""

    def create_text(self, name: str, text: str) -> bool:
        """Write an object unless it exists, which the store decides; whether it did not exist."""

        def create(at: str) -> None:
            self._store.pipe_file(at, text.encode(), mode="create")

        try:
            self._attempt(name, create, FileExistsError)
        except FileExistsError:
            # Its answer to an earlier attempt may have been lost.
            return self.text(name) == text
        return True

    def text(self, name: str) -> str | None:
        """The content of an object; None if there is none."""
        try:
            return self._attempt(name, self._store.cat_file, FileNotFoundError).decode()
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""
        self._delete(name)

    def delete_below(self, directory: str, *, first: str = "") -> None:
        """Delete all objects below a directory, the file `first` before the others."""
        names = sorted(name for name in self.refresh() if name.startswith(f"{directory}/"))
        self.check_held()
        if first:
            self._delete(f"{directory}/{first}")
        self._all(self._delete, names)

    def refresh(self) -> dict[str, str]:
        """The tag of every object, by name.

        Raises:
          InputError: a bucket that is missing or may not be read.
        """
        root = f"{self._root}/"
        with self._using:
            found = self._attempt("", lambda _: self._store.find(self._root, detail=True))
            self.names = {
                at.removeprefix(root): tag_of(info)
                for at, info in found.items()
                if at.startswith(root) and _is_path(at.removeprefix(root))
            }
        return self.names

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _attempt(self, name: str, action: Callable[[str], T], *expected: type[BaseException]) -> T:
        """What `action` returns for an object; errors become sentences, but those `expected`."""
        url = f"{self.url}/{name}" if name else self.url
        try:
            return attempt(url, lambda: action(self._at(name)))
        except expected:
            raise
        except OSError as error:
            raise sentence(url, error) from error

    def _all(self, act: Callable[[str], None], names: list[str]) -> None:
        if len(names) == 1:
            act(names[0])
        elif names:
            with ThreadPoolExecutor(TRANSFERS) as pool:
                for _ in pool.map(act, names):
                    pass

    def _get(self, name: str) -> None:
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        info = self._attempt(name, self._store.info)
        with replacing(path) as file:
            into = Path(file.name)
            self._attempt(name, lambda at: download(self._store, at, into, info["size"]))
        self._copied(name, tag_of(info))

    def _put(self, name: str) -> None:
        path = self.local / name
        before = path.stat()
        self._attempt(name, lambda at: self._store.put_file(str(path), at))
        tag = self.names[name] = tag_of(self._attempt(name, self._store.info))
        self._copies[name] = _Copy(tag, before.st_size, before.st_mtime_ns)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._attempt(name, self._store.rm_file, FileNotFoundError)
        self.names.pop(name, None)
        self._copies.pop(name, None)

    def _copied(self, name: str, tag: str) -> None:
        found = (self.local / name).stat()
        self._copies[name] = _Copy(tag, found.st_size, found.st_mtime_ns)

    def _is_copied(self, name: str) -> bool:
        """Whether the local file is the object, as far as both are known."""
        try:
            found = (self.local / name).stat()
        except FileNotFoundError:
            return False
        now = _Copy(self.names.get(name, ""), found.st_size, found.st_mtime_ns)
        return self._copies.get(name) == now

    def _local_names(self) -> set[str]:
        """The local files that the rules are about.

        Other threads may make and delete what the rules leave out meanwhile.
        """
        names = set()
        for directory, _, files in os.walk(self.local):
            below = Path(directory).relative_to(self.local)
            names |= {(below / name).as_posix() for name in files if name != INDEX}
        return {*filter(self._rules.wanted, names)}

    def _index(self) -> dict[str, Any]:
        try:
            content = json.loads((self.local / INDEX).read_text("utf-8"))
            return content["files"] if content["url"] == self.url else {}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def _save_index(self) -> None:
        with replacing(self.local / INDEX) as file:
            file.write(json.dumps({"url": self.url, "files": self._copies}).encode())


def _is_path(name: str) -> bool:
    """Whether an object's name is that of a file below a directory; a store allows any name."""
    path = PurePosixPath(name)
    return path.as_posix() == name and not path.is_absolute() and ".." not in path.parts


_open: dict[Path, Mirror] = {}
"""The mirrors that are open, by local directory."""


def mirror_of(path: Path) -> tuple[Mirror, str] | None:
    """The open mirror whose local directory holds `path`, and the path's name in it; or None."""
    for directory in (path, *path.parents):
        if directory in _open:
            name = path.relative_to(directory).as_posix()
            return _open[directory], "" if name == "." else name
    return None


@contextlib.contextmanager
def mirrored(url: str, rules: Rules, *, member: str = "") -> Iterator[Mirror]:
    """A mirror of a directory to write, in the user's cache, where it stays if this process dies.

    Args:
      url: the directory.
      rules: of the mirror.
      member: distinguishes the processes of a run on one machine.

    Raises:
      InputError: a scheme whose package is not installed, or a cache that cannot be written.
    """
    local = caches("buckets") / f"{file_name(url)}{member}"
    try:
        local.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {local}: {error.strerror}.") from error
    with _opened(Mirror(url, local, rules)) as mirror:
        yield mirror
    shutil.rmtree(local, ignore_errors=True)


@contextlib.contextmanager
def copied(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, *, empty: bool = False
) -> Iterator[Path]:
    """The directory itself, or a temporary copy of the files with a wanted name of one in a bucket.

    Raises:
      InputError: a URL that cannot be read, or with nothing below it unless it may be `empty`.
    """
    url = url_of(path)
    if url is None:
        yield path
        return
    with (
        tempfile.TemporaryDirectory() as temporary,
        _opened(Mirror(url, Path(temporary).resolve(), Rules(wanted))) as mirror,
    ):
        mirror.pull()
        if not mirror.names and not empty:
            raise InputError(f"{url}: there is nothing.")
        yield mirror.local


@contextlib.contextmanager
def _opened(mirror: Mirror) -> Iterator[Mirror]:
    """Register a mirror; errors that name its local directory name its URL instead."""
    _open[mirror.local] = mirror
    try:
        yield mirror
    except InputError as error:
        said = str(error).replace(str(mirror.local), mirror.url)
        error.args = (said, *error.args[1:])
        raise
    finally:
        del _open[mirror.local]


def downloaded_directory(url: str) -> Path:
    """A local copy of a directory, of which only what changed is downloaded.

    Raises:
      InputError: there is none, or the copy cannot be written.
    """
    local = caches("downloads") / file_name(url)
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"Another process of this machine downloads {url}; waiting for it."
        with locked(local.with_name(f"{local.name}.lock"), local, waiting=waiting):
            local.mkdir(exist_ok=True)
            mirror = Mirror(url, local, Rules())
            mirror.pull()
    except OSError as error:
        raise sentence(str(local), error) from error
    if not mirror.names:
        raise InputError(f"{url}: there is nothing.")
    return local


def uploaded(directory: Path, url: str, rules: Rules) -> None:
    """Write the files of a directory below a URL.

    Raises:
      InputError: a bucket that does not exist or may not be written.
    """
    Mirror(url, directory, rules).push()
