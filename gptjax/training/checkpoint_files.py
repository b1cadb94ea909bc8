"""What lies in a checkpoint: all that should be there, bit for bit what was written.

Orbax stores arrays without a checksum, and a bit that turns in them is another number without a
word. So a checkpoint holds `checksums.json`:

| field | content |
|---|---|
| arrays | the dtype and shape of every array, by item and name |
| files | the checksum of every file, by its path in the checkpoint |
| crc32 | of the two fields above |

`commit_success.txt`, which Orbax writes last and nobody reads, is no part of it.

A checksum is the XXH3 (64 bits) of a file's content. It is made as fast as a file is read; a CRC-32
by zlib takes several times as long. experiments/README.md has what a save pays.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import tensorstore
import xxhash

from gptjax.config import InputError, read_json_object, sealed, unsealed

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""
LIST = "checksums.json"
STEP_METADATA = "_CHECKPOINT_METADATA"
"""Orbax's own file of a checkpoint; it puts the time of the commit in after all else is written."""
COMMIT_TIME = re.compile(rb'"commit_timestamp_nsecs": (null|\d+)')
METRICS, PROGRESS = "metrics/metrics", "progress/metadata"
ARRAYS = ("params", "optimizer")
NEEDED = (
    STEP_METADATA,
    PROGRESS,
    *(f"{item}/{name}" for item in ARRAYS for name in ("_METADATA", "manifest.ocdbt")),
)
"""What a checkpoint that has no list of its files must hold."""
HAS_LIST = {"checksums": LIST}
"""Stands in Orbax's own file of a checkpoint that has one, so that a lost list is noticed."""
PROCESS_LIST = "checksums_of_process.json"
READERS = 8
"""Files that are read at a time."""


class Listed(NamedTuple):
    """What a checkpoint says it holds."""

    arrays: dict[str, dict[str, str]]
    """`float32[16, 4]` by item and name."""
    files: dict[str, str]
    """Checksums by path."""


def checksum(path: Path) -> str:
    """The checksum of a file; of `_CHECKPOINT_METADATA` without the time of the commit.

    Raises:
      OSError: a file that cannot be read.
    """
    if path.name == STEP_METADATA:
        return xxhash.xxh3_64(COMMIT_TIME.sub(b"", path.read_bytes())).hexdigest()
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def list_own_files(directory: Path) -> None:
    """Leave in `directory`, whose files one process has written, their checksums."""
    if directory.is_dir():
        content = json.dumps(_checksums(directory, known={}))
        (directory / PROCESS_LIST).write_text(content, encoding="utf-8")


def list_files(checkpoint: Path, arrays: dict[str, dict[str, str]]) -> None:
    """Leave in `checkpoint` the list of all its files.

    What the processes have listed of their own is taken from there.
    """
    known = {}
    for own in checkpoint.rglob(PROCESS_LIST):
        beneath = own.parent.relative_to(checkpoint)
        listed = json.loads(own.read_text(encoding="utf-8"))
        known |= {(beneath / name).as_posix(): found for name, found in listed.items()}
        own.unlink()
    content = {"arrays": arrays, "files": _checksums(checkpoint, known)}
    text = json.dumps(sealed(content), indent=1)
    (checkpoint / LIST).write_text(text + "\n", encoding="utf-8")


def read_list(checkpoint: Path) -> Listed | None:
    """What `checkpoint` says it holds; None of an older one, which has no list.

    Raises:
      InputError: a damaged list.
    """
    path = checkpoint / LIST
    if not path.exists():
        return None
    content = unsealed(read_json_object(path), str(path))
    if set(content) != set(Listed._fields):
        raise InputError(f"{path} is not what was written.")
    return Listed(**content)


def changed(checkpoint: Path, listed: Listed, names: Iterable[str]) -> str | None:
    """What is wrong with the first of the files that is not what was written, or None."""

    def wrong(name: str) -> str | None:
        try:
            same = checksum(checkpoint / name) == listed.files[name]
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None if same else f"{name} is not what was written"

    with ThreadPoolExecutor(READERS) as pool:
        return next(filter(None, pool.map(wrong, names)), None)


def arrays_of_older(checkpoint: Path, items: Iterable[str]) -> dict[str, dict[str, str]]:
    """The arrays of a checkpoint that does not list them, each read once.

    So that what cannot be read comes up here: Orbax reads all at once, and where one fails it
    leaves the others behind, whose errors appear after ours.

    Raises:
      Exception: whatever TensorStore makes of damage.
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
    """The steps of the checkpoints in order, and of those that are none what they lack.

    A run deletes all but the newest, so this one is damaged where it lacks something.
    """
    there = [path.name for path in directory.glob("*") if path.is_dir()]
    steps = sorted(int(name) for name in there if name.isdecimal() and name == str(int(name)))
    lacking = {step: lacks(directory / str(step)) for step in steps[:-1]}
    incomplete = {step: what for step, what in lacking.items() if what}
    return [step for step in steps if step not in incomplete], incomplete


def lacks(checkpoint: Path) -> str | None:
    """The first file that should be in a checkpoint and is missing."""
    try:
        listed = read_list(checkpoint)
        names = tuple(listed.files) if listed else NEEDED
        if not listed and (checkpoint / STEP_METADATA).exists():
            saved = read_json_object(checkpoint / STEP_METADATA).get("custom_metadata")
            names = (LIST, *NEEDED) if saved == HAS_LIST else NEEDED
    except InputError:
        return None  # That is damage of another kind; it comes up where the checkpoint is read.
    name = next((name for name in names if not (checkpoint / name).exists()), None)
    return name and f"{name} is missing"


def _checksums(directory: Path, known: dict[str, str]) -> dict[str, str]:
    """Of all files under `directory`, but for those that are `known`."""
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*")}
    files = [name for name, path in sorted(paths.items()) if path.is_file()]
    new = [name for name in files if name not in known]
    with ThreadPoolExecutor(READERS) as pool:
        known = known | dict(
            zip(new, pool.map(checksum, [paths[name] for name in new]), strict=True)
        )
    return {name: known[name] for name in files}
