"""The manifest of a checkpoint: its files and their checksums, so that damage is detected.

Orbax stores arrays without a checksum: a flipped bit would silently be another number. So a
checkpoint holds `checksums.json`:

| field | content |
|---|---|
| arrays | the dtype and shape of every array, by item and name |
| files | the checksum of every file, by its path in the checkpoint |
| crc32 | the CRC-32 of the two fields above |

`commit_success.txt`, which Orbax writes last and nobody reads, is not listed.

A checksum is the 64-bit XXH3 of a file's content, computed as fast as the file is read; zlib's
CRC-32 takes several times as long. experiments/README.md has the cost per save.
"""

import contextlib
import functools
import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import tensorstore
import xxhash

from gptjax.config import InputError, read_json_object, sealed, unsealed

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints."""
LIST = "checksums.json"
STEP_METADATA = "_CHECKPOINT_METADATA"
"""Orbax's own file in a checkpoint, to which it adds the time of the commit last of all."""
COMMIT_TIME = re.compile(rb'"commit_timestamp_nsecs": (null|\d+)')
METRICS, PROGRESS = "metrics/metrics", "progress/metadata"
ARRAYS = ("params", "optimizer")
NEEDED = (
    STEP_METADATA,
    PROGRESS,
    *(f"{item}/{name}" for item in ARRAYS for name in ("_METADATA", "manifest.ocdbt")),
)
"""The files that a checkpoint without a manifest must hold."""
HAS_LIST = {"checksums": LIST}
"""Custom metadata of a checkpoint that has a manifest, so that a lost manifest is noticed."""
PROCESS_LIST = "checksums_of_process.json"
READERS = 8
"""Files read at a time."""


class Manifest(NamedTuple):
    """The arrays and files of a checkpoint."""

    arrays: dict[str, dict[str, str]]
    """Dtype and shape, such as `float32[16, 4]`, by item and name."""
    files: dict[str, str]
    """Checksums by path."""


def checksum(path: Path, *, just_written: bool = False) -> str:
    """The checksum of a file; that of `_CHECKPOINT_METADATA` leaves out the time of the commit.

    A file that was `just_written` is mapped and not copied, in half the time: it is in memory
    still. Of a file that must be read from a disk a failing disk would end the process by SIGBUS.

    Raises:
      OSError: a file that cannot be read.
    """
    if path.name == STEP_METADATA:
        return xxhash.xxh3_64(COMMIT_TIME.sub(b"", path.read_bytes())).hexdigest()
    with path.open("rb", buffering=0) as file:
        if just_written:
            with (
                contextlib.suppress(
                    OSError, ValueError
                ),  # An empty file, or a file system that maps none.
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                return xxhash.xxh3_64(content).hexdigest()
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def list_own_files(directory: Path) -> None:
    """Write the checksums of the files in `directory`, all written by one process, into it."""
    if directory.is_dir():
        content = json.dumps(_checksums(directory, known={}))
        (directory / PROCESS_LIST).write_text(content, encoding="utf-8")


def list_files(checkpoint: Path, arrays: dict[str, dict[str, str]]) -> None:
    """Write the manifest of `checkpoint`, with the checksums that each process has listed."""
    write_list(checkpoint, Manifest(arrays, checksums_of_all(checkpoint)))


def checksums_of_all(checkpoint: Path) -> dict[str, str]:
    """Checksums of all files of a checkpoint just written, with those that processes have listed.

    The lists are deleted.
    """
    known = {}
    for own in checkpoint.rglob(PROCESS_LIST):
        folder = own.parent.relative_to(checkpoint)
        listed = json.loads(own.read_text(encoding="utf-8"))
        known |= {(folder / name).as_posix(): found for name, found in listed.items()}
        own.unlink()
    return _checksums(checkpoint, known)


def write_list(checkpoint: Path, manifest: Manifest) -> str:
    """Write the manifest of `checkpoint`, whose content it returns."""
    text = json.dumps(sealed(manifest._asdict()), indent=1) + "\n"
    (checkpoint / LIST).write_text(text, encoding="utf-8")
    return text


def read_list(checkpoint: Path) -> Manifest | None:
    """The manifest of `checkpoint`; None of an older one, which has none.

    Raises:
      InputError: a damaged manifest.
    """
    path = checkpoint / LIST
    if not path.exists():
        return None
    content = unsealed(read_json_object(path), str(path))
    if set(content) != set(Manifest._fields):
        raise InputError(f"{path} is not what was written.")
    return Manifest(**content)


def changed(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """What is wrong with the first of the files `names` that was changed; None if none was."""

    def wrong(name: str) -> str | None:
        try:
            same = checksum(checkpoint / name) == manifest.files[name]
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None if same else f"{name} is not what was written"

    with ThreadPoolExecutor(READERS) as pool:
        return next(filter(None, pool.map(wrong, names)), None)


def arrays_of_older(checkpoint: Path, items: Iterable[str]) -> dict[str, dict[str, str]]:
    """The dtypes and shapes of the arrays of a checkpoint without a manifest, each read once.

    Unreadable arrays are found here: Orbax reads all at once, and where one fails it abandons the
    others, whose errors would appear after ours.

    Raises:
      Exception: whatever TensorStore raises for damaged files.
    """
    found: dict[str, dict[str, str]] = {}
    for item in items:
        leaves = read_json_object(checkpoint / item / "_METADATA")["tree_metadata"].values()
        names = [".".join(str(part["key"]) for part in leaf["key_metadata"]) for leaf in leaves]
        files = {"driver": "file", "path": f"{checkpoint / item}/"}
        found[item] = {}
        for name in names:
            store = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
            array = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
            array.read().result()
            found[item][name] = f"{array.dtype.name}{list(array.shape)}"
    return found


def survey(directory: Path) -> tuple[list[int], dict[int, str]]:
    """The steps of the complete checkpoints in order, and what each incomplete one lacks.

    The newest counts as complete: no run deletes it, so where it lacks a file it is damaged.
    """
    folders = [path.name for path in directory.glob("*") if path.is_dir()]
    steps = sorted(int(name) for name in folders if name.isdecimal() and name == str(int(name)))
    lacking = {step: missing_file(directory / str(step)) for step in steps[:-1]}
    incomplete = {step: what for step, what in lacking.items() if what}
    return [step for step in steps if step not in incomplete], incomplete


def missing_file(checkpoint: Path, lacks: Callable[[str], bool] | None = None) -> str | None:
    """A sentence about the first file that a checkpoint lacks; None if it lacks none.

    Args:
      checkpoint: its directory.
      lacks: whether it lacks a file, of those in a bucket; by default, whether none is here.
    """
    lacks = lacks or (lambda name: not (checkpoint / name).exists())
    try:
        manifest = read_list(checkpoint)
        names = tuple(manifest.files) if manifest else NEEDED
        if not manifest and (checkpoint / STEP_METADATA).exists():
            saved = read_json_object(checkpoint / STEP_METADATA).get("custom_metadata")
            names = (LIST, *NEEDED) if saved == HAS_LIST else NEEDED
    except InputError:
        return None  # A damaged manifest is reported when the checkpoint is read.
    name = next(filter(lacks, names), None)
    return name and f"{name} is missing"


def _checksums(directory: Path, known: dict[str, str]) -> dict[str, str]:
    """Checksums of all files under `directory`, by path; those `known` are not computed again."""
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*")}
    files = [name for name, path in sorted(paths.items()) if path.is_file()]
    new = [name for name in files if name not in known]
    of_new = functools.partial(checksum, just_written=True)
    with ThreadPoolExecutor(READERS) as pool:
        known = known | dict(zip(new, pool.map(of_new, [paths[name] for name in new]), strict=True))
    return {name: known[name] for name in files}
