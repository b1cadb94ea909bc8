"""Output files and directories that a user names, written atomically and never lost."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from gptjax.config import InputError
from gptjax.system.buckets import exists, upload, url_of
from gptjax.system.disk import check_local, write_error
from gptjax.system.locks import LOCK, locked
from gptjax.system.mirrors import Rules, uploaded

LAST = ("config.json", "checksums.json")
"""Files of a model's directory that say that others are complete: uploaded last."""


def check_output(path: Path, *, overwrite: bool = False) -> Path:
    """The file to write for `path`: the path itself, or the target of a symbolic link.

    Raises:
      InputError: an existing file, unless `overwrite`; a directory, a device, a pipe or a socket; a
        broken link; or a parent directory that is missing or not writable.
    """
    if url := url_of(path):
        if exists(url) and not overwrite:
            raise InputError(f"{url} already exists: choose another, or --overwrite it.")
        return path
    check_local(path)
    try:
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a broken link: give the path of a file.")
        where = path.resolve() if path.is_symlink() else path
        if where.is_dir():
            raise InputError(f"{path} is a directory: give the path of a file.")
        if where.exists():
            if not where.is_file():
                raise InputError(f"{path} is a device or a pipe: give the path of a file.")
            if not overwrite:
                raise InputError(f"{path} already exists: choose another, or --overwrite it.")
        elif not where.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no directory {where.parent}.")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from error
    if not os.access(where.parent, os.W_OK):
        raise InputError(f"cannot write {path}: the directory {where.parent} is not writable.")
    return where


@contextlib.contextmanager
def whole_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path with the same suffix, whose file replaces `path` at the end.

    On an exception the temporary file is deleted and the old file stays; temporary files of killed
    processes are deleted too.

    Raises:
      InputError: what `check_output` refuses, or a file that cannot be written; a `DiskError` where
        the disk is at fault.
    """
    path = Path(path)
    where = check_output(path, overwrite=overwrite)
    if url := url_of(path):
        with tempfile.TemporaryDirectory() as directory:
            made = Path(directory) / path.name
            yield made
            upload(made, url)
        return
    temporary = where.with_name(f".{os.getpid()}.{where.name}")
    try:
        for left in where.parent.glob(f".*.{glob.escape(where.name)}"):
            process = left.name.split(".")[1]
            if process.isdecimal() and not psutil.pid_exists(int(process)):
                left.unlink(missing_ok=True)
        yield temporary
        if where.exists():
            shutil.copymode(where, temporary)
        temporary.replace(where)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # It may not exist, or its name may be too long.
            temporary.unlink()


def write_whole(path: str | Path, text: str, *, overwrite: bool = False) -> None:
    """Write a text atomically as UTF-8, with its line endings unchanged.

    Raises:
      InputError: what `whole_file` refuses.
    """
    with whole_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory, which becomes `path`, absent or empty until then, at the end.

    Until then it is in `.NAME.partial` beside `path`, which one process at a time locks; files of a
    killed process there are deleted.

    Raises:
      InputError: another process is making it, or it cannot be written.
    """
    if url := url_of(path):
        if exists(url):
            raise InputError(f"{url} already exists: choose another.")
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
            uploaded(Path(directory), url, Rules(last=LAST))
        return
    where = check_local(path).resolve()
    partial = where.with_name(f".{where.name}.partial")
    made = partial / "new"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial / LOCK, path):
            if made.exists():
                shutil.rmtree(made)
            made.mkdir()
            try:
                yield made
                made.replace(where)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        with contextlib.suppress(OSError):  # Another process has begun to make it.
            partial.rmdir()
    except OSError as error:
        raise write_error(error, path) from error
