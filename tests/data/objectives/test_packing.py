"""Documents to rows: what is cut, what stands side by side, what is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.objectives.packing import (
    OPEN_ROWS,
    PackedRows,
    Pieces,
    Windows,
    cut,
    first_fit,
    plan,
)

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def store(lengths: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens that count from 0, and where documents of these lengths begin in them."""
    sizes = np.array(lengths)
    return np.arange(sizes.sum(), dtype=np.uint16), np.cumsum(sizes) - sizes, sizes


def planned(pieces: Pieces, room: int, extra: int) -> np.ndarray:
    """The plan of pieces that come in two blocks."""
    half = len(pieces.starts) // 2
    blocks = (
        Pieces(*(column[part] for column in pieces)) for part in (slice(half), slice(half, None))
    )
    return np.concatenate(list(plan(blocks, room, extra)))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3))
def test_windows_are_all_of_the_tokens_in_order(size, step, overlap):
    length = step + overlap
    tokens = np.arange(size, dtype=np.uint16)
    windows = Windows(tokens, length, step)
    for index in range(len(windows)):
        expected = np.arange(index * step, index * step + length)
        np.testing.assert_array_equal(windows[index], expected)
    left = size - (len(windows) * step + overlap if len(windows) else 0)
    assert left < (step if len(windows) else length)
    with_rest = Windows(tokens, length, step, rest=True)
    new = [with_rest[index][overlap if index else 0 :] for index in range(len(with_rest))]
    seen = np.concatenate([*new, np.zeros(0, np.int32)])
    # A rest of nothing new is no row: with an overlap of one token its target was predicted.
    assert len(seen) == size or (len(with_rest) == 0 and size <= overlap)
    np.testing.assert_array_equal(seen, np.arange(len(seen)))


@given(LENGTHS, st.integers(2, 12), st.integers(0, 1))
def test_pieces_are_all_of_each_document(lengths, most, overlap):
    _, starts, sizes = store(lengths)
    pieces = cut(starts, sizes, most, overlap=overlap)
    assert all(overlap < length <= most for length in pieces.lengths)
    expected = []
    for start, size in zip(starts, sizes, strict=True):
        expected += range(start + overlap, start + size)
    found = [
        place
        for start, length in zip(*pieces, strict=True)
        for place in range(start + overlap, start + length)
    ]
    assert found == expected


@given(st.lists(st.integers(1, 16), min_size=1, max_size=400))
def test_first_fit_is_what_its_name_says(places):
    rows = first_fit(np.array(places), 16)
    filled = np.bincount(rows, weights=places)
    assert filled.max() <= 16
    assert set(rows) == set(range(len(filled)))
    # By hand, where no row is closed: the first row with room.
    if sum(places) <= 16 * OPEN_ROWS // 2:
        free: list[int] = []
        for place, row in zip(places, rows, strict=True):
            expected = next((i for i, room in enumerate(free) if room >= place), len(free))
            if expected == len(free):
                free.append(16)
            free[expected] -= place
            assert row == expected


def test_a_full_house_closes_its_fullest_row():
    # 128 rows of 9 and one of 12 leave no room for 8: the row of 12 makes way.
    places = np.array([9] * (OPEN_ROWS - 1) + [12, 8, 8, 4])
    rows = first_fit(places, 16)
    assert rows[OPEN_ROWS] == OPEN_ROWS
    assert rows[OPEN_ROWS + 1] == OPEN_ROWS
    assert rows[OPEN_ROWS + 2] == 0


@given(LENGTHS, st.integers(4, 16))
def test_packed_rows_predict_every_successor_in_a_document_once(lengths, room):
    tokens, starts, sizes = store(lengths)
    pieces = cut(starts, sizes, room + 1, overlap=1)
    if not len(pieces.starts):
        return
    rows = PackedRows(tokens, planned(pieces, room, -1), room)
    predicted = []
    for index in range(len(rows)):
        row = rows[index]
        real = row.segment_ids > 0
        assert row.tokens.shape == row.targets.shape == row.positions.shape == (room,)
        np.testing.assert_array_equal(row.targets[real], row.tokens[real] + 1)
        assert not row.tokens[~real].any()
        assert not row.positions[~real].any()
        for number in range(1, row.segment_ids.max() + 1):
            mine = row.segment_ids == number
            np.testing.assert_array_equal(np.diff(np.flatnonzero(mine)), 1)
            np.testing.assert_array_equal(row.positions[mine], np.arange(mine.sum()))
            np.testing.assert_array_equal(np.diff(row.tokens[mine]), 1)
        predicted += row.targets[real].tolist()
    inside = set(range(int(sizes.sum()))) - set(starts[sizes > 0].tolist())
    assert sorted(predicted) == sorted(inside)


@given(LENGTHS, st.integers(4, 16))
def test_framed_rows_have_each_token_once_between_its_frame(lengths, room):
    tokens, starts, sizes = store(lengths)
    pieces = cut(starts, sizes, room - 2)
    if not len(pieces.starts):
        return
    frame = (60_001, 60_002)
    rows = PackedRows(tokens, planned(pieces, room, 2), room, frame)
    found = []
    for index in range(len(rows)):
        row = rows[index]
        np.testing.assert_array_equal(row.tokens, row.targets)
        for number in range(1, row.segment_ids.max() + 1):
            piece = row.tokens[row.segment_ids == number]
            assert (piece[0], piece[-1]) == frame
            found += piece[1:-1].tolist()
    assert sorted(found) == tokens.tolist()


def test_rows_of_many_short_documents_are_nearly_full():
    lengths = np.random.default_rng(0).integers(2, 60, 3000)
    starts = np.cumsum(lengths) - lengths
    rows = planned(Pieces(starts, lengths), 128, 0)["row"][-1] + 1
    assert lengths.sum() / (rows * 128) > 0.97


@pytest.mark.parametrize("size", [0, 1])
def test_tokens_without_a_successor_are_no_window(size):
    assert len(Windows(np.zeros(size, np.uint8), 5, 4, rest=True)) == 0
