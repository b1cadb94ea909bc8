"""Tokens on disk, memory-mapped: only what was read recently is in memory."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OFFSET = np.dtype([("tokens", np.int64), ("bytes", np.int64)])
"""Tokens and UTF-8 bytes before a document."""
BLOCK = 1 << 20
"""Documents processed at a time."""
READS = 128
"""Reads before mapped pages are released; Linux maps about half a MiB around each."""


class Mapped:
    """A memory-mapped array, read in parts.

    Pages that were read stay mapped, and count as the process's memory, until the system needs
    them: with enough memory, never. So they are released every `READS` reads to the system's page
    cache, from where reading them again is cheap.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        with path.open("rb") as file:
            empty = path.stat().st_size == 0  # No system maps an empty file.
            self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._map or b"", dtype)
        self._reads = 0

    def __len__(self) -> int:
        return len(self._array)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the elements."""
        return self._array.dtype

    def __getitem__(self, indices: Any) -> Any:
        """The element at an index, or a copy of the elements of a slice or index array."""
        found = self._array[indices].copy()
        self._reads += 1 if np.size(found) < BLOCK else READS
        if self._reads >= READS and self._map is not None:
            self._reads = 0
            self._map.madvise(mmap.MADV_DONTNEED)
        return found


class TokenStore(NamedTuple):
    """Concatenated documents as token ids.

    If the tokenizer has an end token, each document ends with it; an empty one has no tokens.
    """

    tokens: Mapped
    """[M], unsigned: the ids of all documents."""
    offsets: Mapped
    """[N + 1], `OFFSET`: the start of each of N documents, and the end of the last."""
    directory: Path
    """The cache directory."""
    ends: bool
    """Whether each document ends with an end token."""

    def document(self, index: int) -> np.ndarray:
        """The tokens of a document, without the end token."""
        first, last = self.offsets[index : index + 2]["tokens"]
        return self.tokens[first : max(first, last - self.ends)]

    def blocks(self, *, ends: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields starts and lengths [n] of consecutive documents, in tokens.

        Args:
          ends: whether lengths include the end tokens.
        """
        for first in range(0, len(self.offsets) - 1, BLOCK):
            bounds = self.offsets[first : first + BLOCK + 1]["tokens"]
            lengths = np.diff(bounds)
            yield bounds[:-1], lengths if ends else np.maximum(lengths - self.ends, 0)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return int(self.offsets[-1]["bytes"])
