"""Buckets: files at `gs://`, `s3://` and the other URLs that fsspec knows.

An object store has no rename, no append and no locks, and each request takes milliseconds. So what
lies in a bucket is worked on in files of this machine, as without a bucket:

| what | how |
|---|---|
| a file to read | downloaded once per machine and content, into the user's cache |
| a file to write | an object is replaced whole or not at all, so each upload is atomic |
| a directory | mirrors.py |
| a lock | bucket_locks.py |
"""

import datetime
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gptjax.config import InputError
from gptjax.system.disk import DiskError, replacing
from gptjax.system.programs import user_caches

T = TypeVar("T")

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}
"""The extra of gptjax that a scheme needs."""
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt, besides those that the packages of the stores make."""
FINAL = FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError
"""Errors that another attempt would meet again."""
TAGS = "ETag", "etag", "generation", "created", "mtime"
"""Where the stores keep what changes with an object's content."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL that a path is, of whose two slashes pathlib keeps one; None of a local path.

    Raises:
      InputError: a URL with `..`, which no store resolves.
    """
    matched = _URL.fullmatch(os.fspath(path))
    if matched is None:
        return None
    root = "/" if matched[1] == "file" else ""  # It has no bucket, but an absolute path.
    url = f"{matched[1]}://{root}{matched[2].rstrip('/')}"
    if ".." in matched[2].split("/"):
        raise InputError(f"{url} has '..', which is part of a name in a bucket: leave it out.")
    return url


@functools.cache
def filesystem(scheme: str) -> Any:
    """fsspec's file system of a scheme.

    Raises:
      InputError: an unknown scheme, or one whose package is not installed.
    """
    import fsspec  # Here, since most commands use no bucket.

    # file:// is a directory taken for a bucket, which has no directories of its own.
    options = {"auto_mkdir": True} if scheme == "file" else {}
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, **options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        how = f": pip install 'gptjax[{extra}]'" if extra else f" ({error})"
        raise InputError(f"{scheme}:// needs a package that is not installed{how}.") from error
    except ValueError as error:
        raise InputError(f"{scheme}:// is no scheme that fsspec knows.") from error


def attempt(url: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried again where the store fails.

    Raises:
      FileNotFoundError: no such object or bucket; other errors that would come again likewise.
      InputError: no credentials.
      DiskError: the store failed at every attempt.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except FINAL:
            raise
        except Exception as error:  # Each store's package has errors of its own.
            if "Credentials" in type(error).__name__:
                raise InputError(f"{url}: no credentials were found ({error}).") from error
            if wait is None:
                said = " ".join(str(error).split())[:300] or type(error).__name__
                raise DiskError(f"{url} failed {len(WAITS) + 1} times: {said}.") from error
            time.sleep(wait)
    raise AssertionError


def sentence(url: str, error: OSError) -> InputError:
    """The error for a URL that cannot be read or written."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{url}: there is no such bucket or file.")
    said = "access is denied" if isinstance(error, PermissionError) else str(error)
    return InputError(f"{url}: {' '.join(said.split())}.")


def find(pattern: str) -> list[str]:
    """The URLs of the file at a URL, or of all files that a pattern fits, sorted.

    Raises:
      InputError: none, or a store that cannot be read.
    """
    store, scheme = filesystem(scheme_of(pattern)), scheme_of(pattern)
    try:
        if not any(sign in pattern for sign in "*?["):
            return [pattern]
        found = attempt(pattern, lambda: store.glob(pattern, detail=True))
    except OSError as error:
        raise sentence(pattern, error) from error
    names = sorted(name for name, info in found.items() if info["type"] == "file")
    return [f"{scheme}://{name.removeprefix(f'{scheme}://')}" for name in names]


def downloaded(url: str) -> Path:
    """A local copy of a file, downloaded if this machine has none of its content.

    Raises:
      InputError: it is missing or cannot be read, or the copy cannot be written.
    """
    store = filesystem(scheme_of(url))
    try:
        info = attempt(url, lambda: store.info(url))
        if info["type"] != "file":
            raise InputError(f"{url} is a directory: give a file, or a pattern such as {url}/*.")
        key = hashlib.sha256(f"{url} {tag_of(info)} {info['size']}".encode()).hexdigest()[:20]
        path = caches("downloads") / key / url.rpartition("/")[2]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                attempt(url, lambda: download(store, url, Path(file.name), info["size"]))
        return path
    except OSError as error:
        raise sentence(url, error) from error


def upload(path: Path, url: str) -> None:
    """Write a file to a URL.

    Raises:
      InputError: a bucket that does not exist or may not be written.
    """
    store = filesystem(scheme_of(url))
    try:
        attempt(url, lambda: store.put_file(str(path), url))
    except OSError as error:
        raise sentence(url, error) from error


def has(directory: str | Path, name: str) -> bool:
    """Whether a directory, which may be in a bucket, has a file or a directory of a name."""
    url = url_of(directory)
    return (Path(directory) / name).exists() if url is None else exists(f"{url}/{name}")


def exists(url: str) -> bool:
    """Whether there is a file at a URL, or one below it.

    Raises:
      InputError: a bucket that does not exist or may not be read.
    """
    store = filesystem(scheme_of(url))
    try:
        return attempt(url, lambda: store.exists(url))
    except OSError as error:
        raise sentence(url, error) from error


def caches(kind: str) -> Path:
    """The user's cache of a kind of copies.

    Raises:
      InputError: the user has no home.
    """
    try:
        return user_caches() / "gptjax" / kind
    except RuntimeError as error:
        raise InputError("XDG_CACHE_HOME must name a directory: there is no home.") from error


def file_name(url: str) -> str:
    """A file's name for a URL, which people can read and no other URL has."""
    words = re.sub(r"[^A-Za-z0-9.=-]+", "_", url)[-100:]
    return f"{words}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def scheme_of(url: str) -> str:
    """The scheme of a URL, such as `s3`."""
    return url.partition("://")[0]


def tag_of(info: dict[str, Any]) -> str:
    """What an object's content has and another content of it has not, of fsspec's `info`."""
    found = next((info[key] for key in TAGS if info.get(key) is not None), "")
    # A time is a number in some answers of a package, and not in others.
    return f"{found.timestamp() if isinstance(found, datetime.datetime) else found} {info['size']}"


def download(store: Any, at: str, path: Path, size: int) -> None:
    """Download an object, of which `size` bytes must arrive."""
    store.get_file(at, str(path))
    if path.stat().st_size != size:
        raise ConnectionError(f"{path.stat().st_size} of {size} bytes arrived")
