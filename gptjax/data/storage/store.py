"""Tokens on disk, of which only what was read lately is in memory."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OFFSET = np.dtype([("tokens", np.int64), ("bytes", np.int64)])
"""What stands before a document."""
BLOCK = 1 << 20
"""Documents that are looked at together."""
READS = 128
"""Parts of a file in memory at most; Linux maps about half a MiB around each."""


class Mapped:
    """An array in a file, read in parts.

    Pages that were read stay mapped, and so count as the process's memory, until the system needs
    them: on a machine that has enough, never. So they are given back now and then, to the system's
    own cache of the file, from where they come again at little cost.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        with path.open("rb") as file:
            empty = path.stat().st_size == 0  # Which no system maps.
            self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._map or b"", dtype)
        self._reads = 0

    def __len__(self) -> int:
        return len(self._array)

    @property
    def dtype(self) -> np.dtype:
        """Of the elements."""
        return self._array.dtype

    def __getitem__(self, places: Any) -> Any:
        """A number's element, or a copy of what a slice or an array of places holds."""
        found = self._array[places].copy()
        self._reads += 1 if np.size(found) < BLOCK else READS
        if self._reads >= READS and self._map is not None:
            self._reads = 0
            self._map.madvise(mmap.MADV_DONTNEED)
        return found


class TokenStore(NamedTuple):
    """Documents as token ids, one after another.

    Where the tokenizer has an end token, each document ends with it; an empty one has no tokens.
    """

    tokens: Mapped
    """[M], unsigned; of all documents."""
    offsets: Mapped
    """[N + 1], `OFFSET`, of each of these N documents and of what would follow the last."""
    directory: Path
    """Where it lies."""
    ends: bool
    """Whether each document ends with an end token."""

    def document(self, index: int) -> np.ndarray:
        """The tokens of a document, without the end token."""
        first, last = self.offsets[index : index + 2]["tokens"]
        return self.tokens[first : max(first, last - self.ends)]

    def blocks(self, *, ends: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of consecutive documents the place of the first token and the tokens, [n] each.

        Args:
          ends: whether the end tokens are counted.
        """
        for first in range(0, len(self.offsets) - 1, BLOCK):
            bounds = self.offsets[first : first + BLOCK + 1]["tokens"]
            lengths = np.diff(bounds)
            yield bounds[:-1], lengths if ends else np.maximum(lengths - self.ends, 0)

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of its text."""
        return int(self.offsets[-1]["bytes"])
