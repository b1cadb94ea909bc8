"""Checkpoints of a run in a bucket, of which each process has only its own part on its machine.

Orbax writes a checkpoint into a local directory of each process; of several processes as one file
per chunk of an array, so that the files of all together are the checkpoint. Each uploads its own;
then process 0 uploads `checksums.json` with the checksums of all. A checkpoint is in the bucket if
that file is, which is deleted first.

Reading downloads the files that this machine lacks, by the checksums in that list.
"""

import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from gptjax import distributed
from gptjax.system.disk import DiskError
from gptjax.system.mirrors import Mirror
from gptjax.training import checkpoint_files as files
from gptjax.training.checkpoint_files import ARRAYS, LIST, Manifest

POLL_SECONDS = 0.2
CHUNK_PARTS = 3
"""The parts of the path of an array's chunk in a checkpoint: item, array, chunk."""
PART_LIST = ".checksums"


class BucketCheckpoints:
    """The checkpoints in a directory of a bucket.

    Args:
      mirror: of the run, or of a directory around it.
      name: of the checkpoints' directory in the mirror.
      writes: whether this process is one of the run that writes them; all of its processes must
        make theirs at the same time.
    """

    def __init__(self, mirror: Mirror, name: str, writes: bool):
        self._mirror, self._name = mirror, name
        names = mirror.refresh()
        own = [other.split("/") for other in names if other.startswith(f"{name}/")]
        depth = len(name.split("/"))
        found = {parts[depth] for parts in own if len(parts) > depth + 1}
        self.steps = sorted(int(s) for s in found if s.isdecimal() and self._at(s, LIST) in names)
        """The steps of the checkpoints."""
        self._session = ""
        if writes:
            # Processes that died may have left their parts of a checkpoint of the same step.
            self._session = distributed.meet("the checkpoints", secrets.token_hex(4))[0]
            for unfinished in sorted(found - {*map(str, self.steps)}) * distributed.is_first():
                self.delete(unfinished)
            for here in (mirror.local / name).glob("*"):
                if not here.name.isdecimal() or int(here.name) not in self.steps:
                    shutil.rmtree(here)
        self._closed = threading.Event()
        mirror.get([other for other in names if self._is_small(other)])

    def close(self) -> None:
        """Wait for no other process any more."""
        self._closed.set()

    def lacks(self, step: int, name: str) -> bool:
        """Whether the bucket lacks a file of a checkpoint."""
        return self._at(step, name) not in self._mirror.names

    def fetch(self, step: int, manifest: Manifest, names: Iterable[str]) -> None:
        """Download those of the files `names` of a checkpoint that are not here as they should be.

        Raises:
          DiskError: a store that fails, or a full disk here.
        """
        folder = self._mirror.local / self._at(step)
        known = {folder / name for name in (*manifest.files, LIST)}
        for path in folder.rglob("*"):
            # Of another attempt at this step, which was killed before it was in the bucket.
            if path.is_file() and path not in known:
                path.unlink()

        def is_here(name: str) -> bool:
            path = folder / name
            return path.exists() and files.checksum(path) == manifest.files[name]

        names = [name for name in names if not self.lacks(step, name)]
        with ThreadPoolExecutor(files.READERS) as pool:
            here = pool.map(is_here, names)
            missing = [name for name, found in zip(names, here, strict=True) if not found]
        self._mirror.get([self._at(step, name) for name in missing])

    def upload(self, step: int, folder: Path, arrays: dict[str, dict[str, str]]) -> None:
        """Upload this process's part of a checkpoint; process 0 waits for the others'.

        Args:
          step: of the checkpoint.
          folder: with its files.
          arrays: for its manifest.

        Raises:
          DiskError: a store that fails, or a process that uploads nothing.
        """
        own = files.checksums_of_all(folder)
        index = jax.process_index()
        if index:
            own = {name: of for name, of in own.items() if len(Path(name).parts) == CHUNK_PARTS}
        self._mirror.put({self._at(step, name): folder / name for name in own})
        if index:
            self._mirror.put_text(self._part(step, index), json.dumps(own))
            return
        parts = [self._part(step, other) for other in range(1, jax.process_count())]
        for part in parts:
            own |= json.loads(self._wait_for(part))
        text = files.write_list(folder, Manifest(arrays, own))
        self._mirror.push()  # The lines of metrics.jsonl up to this step.
        self._mirror.put_text(self._at(step, LIST), text)
        for part in parts:
            self._mirror.delete(part)

    def delete(self, step: int | str) -> None:
        """Delete a checkpoint."""
        self._mirror.delete_below(self._at(step), first=LIST)

    def _at(self, *parts: int | str) -> str:
        return "/".join(map(str, (self._name, *parts)))

    def _part(self, step: int, index: int) -> str:
        return self._at(step, f"{PART_LIST}.{self._session}.{index}")

    def _is_small(self, name: str) -> bool:
        """Whether a file is part of a checkpoint, and no chunk of an array."""
        parts = name.removeprefix(f"{self._name}/").split("/")
        chunk = len(parts) > CHUNK_PARTS and parts[1] in ARRAYS
        whole = parts[0].isdecimal() and int(parts[0]) in self.steps
        return name.startswith(f"{self._name}/") and whole and not chunk

    def _wait_for(self, part: str) -> str:
        """What another process writes when it has uploaded its part."""
        end = time.monotonic() + distributed.MEET_SECONDS
        while time.monotonic() < end and not self._closed.is_set():
            text = self._mirror.text(part)
            if text is not None:
                return text
            time.sleep(POLL_SECONDS)
        raise DiskError(f"{self._mirror.url}/{part} was not written by its process.")
