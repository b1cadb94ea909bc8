"""What BERT is asked, over any tokens and seeds (hypothesis), and its rates over many draws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import InputError
from gptjax.data.batch import Batch
from gptjax.data.objectives.masking import masked_lm, next_sentence, shortened
from gptjax.data.objectives.vocabulary import vocabulary
from gptjax.data.tokenizers import ByteTokenizer

BERT = vocabulary(ByteTokenizer(), ("begin", "end", "mask"))
BEGIN, END, MASK = 256, 257, 258

seeds = st.integers(0, 2**32)
# Many special tokens and letters, and words of all lengths.
rows = st.lists(
    st.one_of(st.integers(0, 258), st.sampled_from([BEGIN, END, MASK, 32, 97, 98])), max_size=60
).map(lambda ids: np.array(ids, np.int32))
pieces = st.lists(st.integers(0, 255), min_size=2, max_size=40).map(
    lambda ids: np.array(ids, np.int32)
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(tokens=rows, seed=seeds, rate=st.sampled_from([0.01, 0.15, 0.5, 1.0]), data=st.data())
def test_what_is_chosen_changes_and_nothing_else(tokens, seed, rate, data):
    frozen = np.array(data.draw(st.lists(st.booleans(), min_size=60, max_size=60)), bool)
    frozen = frozen[: len(tokens)]
    given_tokens = tokens.copy()
    masked = masked_lm(tokens, generator(seed), vocabulary=BERT, rate=rate, frozen=frozen)
    inputs, targets, weights = masked
    assert [array.dtype for array in masked] == [np.int32, np.int32, np.float32]
    assert tokens.tolist() == given_tokens.tolist() == targets.tolist()
    free = (tokens < 256) & ~frozen
    assert weights.sum() == (max(1, round(rate * free.sum())) if free.any() else 0)
    assert set(weights.tolist()) <= {0.0, 1.0}
    assert not weights[~free].any()
    assert (inputs == tokens)[weights == 0].all()
    assert ((inputs == MASK) | (inputs < 256))[weights == 1].all()
    again = masked_lm(tokens, generator(seed), vocabulary=BERT, rate=rate, frozen=frozen)
    for array, same in zip(masked, again, strict=True):
        assert array.tolist() == same.tolist()


@given(tokens=rows, seed=seeds, rate=st.sampled_from([0.15, 0.5]))
def test_words_are_chosen_as_wholes(tokens, seed, rate):
    starts = BERT.word_starts(tokens)
    _, _, weights = masked_lm(tokens, generator(seed), vocabulary=BERT, rate=rate, starts=starts)
    words = np.split(weights, np.flatnonzero(starts)[1:]) if len(tokens) else []
    assert all(word.min() == word.max() for word in words)
    free = tokens < 256
    number, chosen = max(1, round(rate * free.sum())), sum(word[0] for word in words)
    assert weights.sum() <= number or chosen == 1
    assert (chosen > 0) == free.any()
    # What was left out is longer than what is left of the number, or no text.
    rest = number - weights.sum()
    texts = np.split(free, np.flatnonzero(starts)[1:])
    left = [
        len(word) for word, text in zip(words, texts, strict=False) if text.any() and not word[0]
    ]
    assert all(length > rest for length in left)


@pytest.mark.parametrize("whole_words", [False, True])
def test_eighty_ten_ten_of_fifteen_in_a_hundred(whole_words):
    text = b"a bc def, ghij. " * 32
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    starts = BERT.word_starts(tokens) if whole_words else None
    rng, kinds, places, changed = generator(), np.zeros(3), np.zeros(len(tokens)), []
    for _ in range(400):
        inputs, targets, weights = masked_lm(tokens, rng, vocabulary=BERT, starts=starts)
        assert weights.sum() == round(0.15 * 512)
        at = weights == 1
        places += at
        hidden, same = inputs[at] == MASK, inputs[at] == targets[at]
        kinds += [hidden.sum(), (~hidden & ~same).sum(), same.sum()]
        changed += inputs[at][~hidden & ~same].tolist()
    total = kinds.sum()
    # A random token is the true one once in 256 times.
    for share, count in zip((0.8, 0.1 * 255 / 256, 0.1 + 0.1 / 256), kinds, strict=True):
        assert abs(count - share * total) < 4 * np.sqrt(total * share * (1 - share))
    assert abs(places / 400 - 0.15).max() < (0.15 if whole_words else 0.08)
    assert len(set(changed)) == 256


def test_words_may_begin_anywhere_that_the_caller_says():
    tokens = np.arange(10, dtype=np.int32)
    starts = np.arange(10) % 5 == 0
    _, _, weights = masked_lm(tokens, generator(), vocabulary=BERT, starts=starts)
    assert weights.sum() == 5  # Two of them would do, but the shortest word has five.
    assert weights[:5].sum() in (0, 5)


@given(
    document=pieces,
    other=pieces,
    seed=seeds,
    context_length=st.integers(5, 50),
    whole=st.booleans(),
)
def test_a_pair_is_two_stretches_of_text_in_their_frame(
    document, other, seed, context_length, whole
):
    row = next_sentence(
        document,
        other,
        generator(seed),
        vocabulary=BERT,
        context_length=context_length,
        whole_words=whole,
    )
    assert row.padding_mask is not None
    assert row.token_types is not None
    assert row.next_sentence is not None
    assert {array.shape for array in row[:5] if array is not None} == {(context_length,)}
    assert row.next_sentence.shape == ()
    assert row.next_sentence.dtype == row.token_types.dtype == np.int32
    used = int(row.padding_mask.sum())
    assert row.padding_mask[:used].all()
    targets = row.targets[:used]
    frame = np.flatnonzero(targets > 255)
    assert targets[frame].tolist() == [BEGIN, END, END]
    assert (frame[0], frame[2]) == (0, used - 1)
    first, second = targets[1 : frame[1]], targets[frame[1] + 1 : -1]
    assert min(len(first), len(second)) > 0
    assert row.token_types.tolist() == [0] * (frame[1] + 1) + [1] * (used - frame[1] - 1) + [0] * (
        context_length - used
    )
    assert not row.loss_weights[used:].any()
    assert not row.loss_weights[frame].any()
    assert row.loss_weights.sum() > 0
    assert not row.tokens[used:].any()
    assert not row.targets[used:].any()
    assert bytes(first.astype(np.uint8)) in bytes(document.astype(np.uint8))
    origin = other if row.next_sentence else document
    assert bytes(second.astype(np.uint8)) in bytes(origin.astype(np.uint8))
    if not row.next_sentence and len(document) + 3 <= context_length:
        assert [*first, *second] == document.tolist()


def pair(n: int, m: int, context_length: int, seed: int) -> Batch:
    # Told apart by their bytes: the document counts up, the other one is above it.
    document, other = np.arange(n, dtype=np.int32), np.arange(128, 128 + m, dtype=np.int32)
    return next_sentence(
        document, other, generator(seed), vocabulary=BERT, context_length=context_length
    )


def test_half_of_the_seconds_follow_and_lengths_do_not_tell():
    lengths: tuple[list[int], list[int]] = [], []
    for seed in range(1000):
        row = pair(40, 60, 64, seed)
        assert row.token_types is not None
        second = row.targets[(row.token_types == 1) & (row.targets < 256)]
        assert row.next_sentence is not None
        label = int(row.next_sentence)
        assert (second[0] >= 128) == label
        assert (np.diff(second) == 1).all()
        lengths[label].append(len(second))
    assert abs(len(lengths[0]) - 500) < 4 * np.sqrt(250)
    means, spread = [np.mean(found) for found in lengths], np.std(lengths[0])
    assert abs(means[0] - means[1]) < 4 * spread * np.sqrt(2 / 500)


def one_by_one(n: int, m: int, room: int) -> tuple[int, int]:
    """How many tokens BERT's loop leaves of each."""
    while n + m > room:
        n, m = (n - 1, m) if n > m else (n, m - 1)
    return n, m


def test_a_pair_loses_as_many_tokens_as_in_berts_loop():
    for n in range(1, 12):
        for m in range(1, 12):
            for room in range(2, 25):
                first, second = np.arange(n), np.arange(m)
                parts = shortened(first, second, room, generator())
                assert tuple(map(len, parts)) == one_by_one(n, m, room)


def test_a_pair_loses_tokens_at_both_ends():
    starts = [shortened(np.arange(30), np.arange(5), 15, generator(s))[0][0] for s in range(400)]
    assert abs(np.mean(starts) - 10) < 4 * np.sqrt(20 / 4 / 400)
    assert abs(np.var(starts) - 20 / 4) < 1.5


def test_what_cannot_be_is_one_sentence():
    tokens = np.arange(9, dtype=np.int32)
    with pytest.raises(InputError, match=r"rate is 1.5; it must be above 0 and at most 1\."):
        masked_lm(tokens, generator(), vocabulary=BERT, rate=1.5)
    bare = vocabulary(ByteTokenizer(), ())
    with pytest.raises(InputError, match="made without mask"):
        masked_lm(tokens, generator(), vocabulary=bare)
    with pytest.raises(InputError, match="made without begin"):
        next_sentence(tokens, tokens, generator(), vocabulary=bare, context_length=9)
    with pytest.raises(InputError, match="has 1 tokens and the other one 9"):
        next_sentence(tokens[:1], tokens, generator(), vocabulary=BERT, context_length=9)
    with pytest.raises(InputError, match=r"context_length is 4; .* needs at least 5"):
        next_sentence(tokens, tokens, generator(), vocabulary=BERT, context_length=4)
