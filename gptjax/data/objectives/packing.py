"""Packing: documents to rows of one length.

| `data.packing` | a row is | what it costs |
|---|---|---|
| split | a window of the concatenated documents, cut anywhere | attention across documents |
| first_fit | documents side by side, masked from each other; long ones are cut | some padding |

The second is first-fit bin packing over a bounded number of open rows, as Krell et al. 2021 pack
for BERT; when none has room, the fullest is closed and a new one opened.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.data.storage.store import BLOCK, Mapped

OPEN_ROWS = 128
"""Open rows a document may go into; more pack slightly tighter but take longer to plan."""


class Windows:
    """Windows of `length` tokens, each `step` after the one before; `step` at most `length`.

    An incomplete last window is dropped, or with `rest` kept, shorter.
    """

    def __init__(self, tokens: np.ndarray | Mapped, length: int, step: int, *, rest: bool = False):
        self._tokens = tokens
        self._length = length
        self._step = step
        beyond = len(tokens) - length
        whole = beyond // step + 1 if beyond >= 0 else 0
        new = len(tokens) - whole * step - (length - step)
        self._count = whole + (rest and new > 0)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._step
        return self._tokens[start : start + self._length].astype(np.int32)


class Pieces(NamedTuple):
    """Spans of documents in a store, each to be one run of tokens in a row."""

    starts: np.ndarray
    """[P], int64: index of the first token in the store."""
    lengths: np.ndarray
    """[P], int64, in tokens."""


def cut(starts: np.ndarray, lengths: np.ndarray, most: int, *, overlap: int = 0) -> Pieces:
    """Cut documents into pieces of `most` tokens; a document's last piece may be shorter.

    Args:
      starts: [N], the index of each document's first token.
      lengths: [N], in tokens.
      most: tokens per piece.
      overlap: tokens that a piece shares with the one before it; a piece needs more than that. 1
        for next-token prediction, where the last token is only a target.
    """
    step = most - overlap
    counts = np.maximum(-(-(lengths - overlap) // step), 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    before = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * step
    return Pieces(starts[document] + before, np.minimum(lengths[document] - before, most))


def first_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece [P], int64: the first open row that has room for it.

    Args:
      sizes: [P], positions that each piece takes in a row, at most `room`.
      room: positions per row.
    """
    free = np.full(OPEN_ROWS, room)
    rows = list(range(OPEN_ROWS))
    opened = OPEN_ROWS
    row_of = np.empty(len(sizes), np.int32)
    for piece, length in enumerate(sizes.tolist()):
        fits = free >= length
        slot = int(fits.argmax())
        if not fits[slot]:
            slot = int(free.argmin())
            free[slot], rows[slot] = room, opened
            opened += 1
        free[slot] -= length
        row_of[piece] = rows[slot]
    # Renumber: open rows that were never used are no rows.
    return np.unique(row_of, return_inverse=True)[1]


PIECE = np.dtype([("start", np.int64), ("length", np.int32), ("row", np.int32)])
"""A piece in a row: the index of its first token, its length in tokens, and its row."""


def plan(blocks: Iterable[Pieces], room: int, extra: int) -> Iterator[np.ndarray]:
    """Assign pieces to rows: yields `PIECE`s sorted by row; each block has rows of its own.

    A piece takes `extra` positions more than it has tokens.
    """
    rows = 0
    for found in blocks:
        planned = np.empty(len(found.starts), PIECE)
        planned["start"], planned["length"] = found
        planned["row"] = rows + first_fit(found.lengths + extra, room)
        yield planned[np.argsort(planned["row"], kind="stable")]
        rows = int(planned["row"].max(initial=rows - 1)) + 1


class PackedTokens(NamedTuple):
    """A row of several pieces, padded at the end."""

    tokens: np.ndarray
    """[T], int32."""
    targets: np.ndarray
    """[T], int32: the next token in the document; for framed pieces, the token itself."""
    segment_ids: np.ndarray
    """[T], int32: the number of each token's piece, from 1; 0 at padding."""
    positions: np.ndarray
    """[T], int32: the position of each token in its piece."""


class PackedRows:
    """Packed rows, assembled from a `plan`."""

    def __init__(
        self,
        tokens: np.ndarray | Mapped,
        planned: np.ndarray | Mapped,
        room: int,
        frame: tuple[int, int] | None = None,
    ):
        """Take `tokens` of a store, the plan, T, and the tokens before and after each piece.

        Without a frame a piece's last token is only a target and takes no position.
        """
        self._tokens = tokens
        self._planned = planned
        self._room = room
        self._frame = frame
        bounds, last = [], -1
        for first in range(0, len(planned), BLOCK):
            rows = planned[first : first + BLOCK]["row"]
            bounds.append(first + np.flatnonzero(np.diff(rows, prepend=last)))
            last = rows[-1]
        self._bounds = np.concatenate([*bounds, [len(planned)]])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> PackedTokens:
        mine = self._planned[self._bounds[index] : self._bounds[index + 1]]
        lengths = mine["length"] + (-1 if self._frame is None else 2)
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        indices = np.repeat(mine["start"], lengths) + positions
        documents = np.repeat(np.arange(1, len(mine) + 1), lengths)
        if self._frame is None:
            tokens, targets = self._tokens[indices], self._tokens[indices + 1]
        else:
            inside = np.clip(indices - 1, 0, len(self._tokens) - 1)
            tokens = self._tokens[inside].astype(np.int32)
            tokens[ends - lengths], tokens[ends - 1] = self._frame
            targets = tokens
        return PackedTokens(*map(self._padded, (tokens, targets, documents, positions)))

    def _padded(self, values: np.ndarray) -> np.ndarray:
        row = np.zeros(self._room, np.int32)
        row[: len(values)] = values
        return row
