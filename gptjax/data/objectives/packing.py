"""Documents to rows of one length.

| `data.packing` | a row is | what it costs |
|---|---|---|
| split | a window of the documents one after another, whatever it cuts | text runs on across them |
| first_fit | documents side by side, each unseen by the others; long ones are cut | some padding |

The second is first-fit bin packing over a bounded number of open rows, as Krell et al. 2021 pack
BERT; the row that is closed for a new one is the fullest.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.data.storage.store import BLOCK, Mapped

OPEN_ROWS = 128
"""Rows that a document may go into; more would pack a little closer, and plan for longer."""


class Windows:
    """Windows of `length` tokens, each `step` after the one before; `step` at most `length`.

    A rest that fills no window is left out, or with `rest` is a shorter window.
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
    """Where the pieces of documents lie, each to be one run of tokens in a row."""

    starts: np.ndarray
    """[P], int64: places in the store's tokens."""
    lengths: np.ndarray
    """[P], int64."""


def cut(starts: np.ndarray, lengths: np.ndarray, most: int, *, overlap: int = 0) -> Pieces:
    """Documents as pieces of at most `most` tokens, all but a document's last of that length.

    Args:
      starts: [N], the place of each document's first token.
      lengths: [N], its tokens.
      most: tokens of a piece.
      overlap: tokens that a piece has in common with the one before it, and more than which it
        needs: 1 where a token is read to predict the next, so that the last one is only predicted.
    """
    step = most - overlap
    counts = np.maximum(-(-(lengths - overlap) // step), 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    before = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * step
    return Pieces(starts[document] + before, np.minimum(lengths[document] - before, most))


def first_fit(places: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece [P], int64: of the open rows the first that has room for it.

    Args:
      places: [P], what each piece takes of a row, at most `room`.
      room: places in a row.
    """
    free = np.full(OPEN_ROWS, room)
    rows = list(range(OPEN_ROWS))
    opened = OPEN_ROWS
    row_of = np.empty(len(places), np.int32)
    for piece, length in enumerate(places.tolist()):
        fits = free >= length
        slot = int(fits.argmax())
        if not fits[slot]:
            slot = int(free.argmin())
            free[slot], rows[slot] = room, opened
            opened += 1
        free[slot] -= length
        row_of[piece] = rows[slot]
    # Open rows that were never used have numbers of no row.
    return np.unique(row_of, return_inverse=True)[1]


PIECE = np.dtype([("start", np.int64), ("length", np.int32), ("row", np.int32)])
"""Of a piece in a row: its first token's place, its tokens, and the row."""


def plan(blocks: Iterable[Pieces], room: int, extra: int) -> Iterator[np.ndarray]:
    """Which pieces make a row: `PIECE`s in the order of the rows, those of each block in its own.

    A piece takes `extra` places more than it has tokens.
    """
    rows = 0
    for found in blocks:
        planned = np.empty(len(found.starts), PIECE)
        planned["start"], planned["length"] = found
        planned["row"] = rows + first_fit(found.lengths + extra, room)
        yield planned[np.argsort(planned["row"], kind="stable")]
        rows = int(planned["row"].max(initial=rows - 1)) + 1


class PackedTokens(NamedTuple):
    """A row of several pieces, with padding behind them."""

    tokens: np.ndarray
    """[T], int32."""
    targets: np.ndarray
    """[T], int32: each token's successor in its document; where pieces are framed, the token."""
    segment_ids: np.ndarray
    """[T], int32: the number of each token's piece, from 1 on; 0 at padding."""
    positions: np.ndarray
    """[T], int32: its place in the piece."""


class PackedRows:
    """The rows of a `plan`."""

    def __init__(
        self,
        tokens: np.ndarray | Mapped,
        planned: np.ndarray | Mapped,
        room: int,
        frame: tuple[int, int] | None = None,
    ):
        """Take `tokens` of a store, the plan, T, and the tokens before and behind each piece.

        Without a frame a piece's last token is only predicted and takes no place.
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
        places = np.repeat(mine["start"], lengths) + positions
        documents = np.repeat(np.arange(1, len(mine) + 1), lengths)
        if self._frame is None:
            tokens, targets = self._tokens[places], self._tokens[places + 1]
        else:
            inside = np.clip(places - 1, 0, len(self._tokens) - 1)
            tokens = self._tokens[inside].astype(np.int32)
            tokens[ends - lengths], tokens[ends - 1] = self._frame
            targets = tokens
        return PackedTokens(*map(self._padded, (tokens, targets, documents, positions)))

    def _padded(self, values: np.ndarray) -> np.ndarray:
        row = np.zeros(self._room, np.int32)
        row[: len(values)] = values
        return row
