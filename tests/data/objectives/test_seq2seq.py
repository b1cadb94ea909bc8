"""What an encoder-decoder is asked, over any tokens and seeds (hypothesis)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import InputError
from gptjax.data.objectives.seq2seq import (
    prefix,
    span_corruption,
    span_input,
    span_lengths,
    span_sentinels,
    teacher_forcing,
)
from gptjax.data.objectives.vocabulary import vocabulary
from gptjax.data.tokenizers import ByteTokenizer

T5 = vocabulary(ByteTokenizer(), ("begin", "end"), sentinels=70)
BEGIN, END, FIRST = 256, 257, 258

seeds = st.integers(0, 2**32)
texts = st.lists(st.integers(0, 255), min_size=2, max_size=60).map(
    lambda ids: np.array(ids, np.int32)
)
rates = st.sampled_from([0.01, 0.15, 0.5, 0.99])
means = st.sampled_from([1.0, 2.5, 3.0, 10.0])


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def filled(source: np.ndarray, target: np.ndarray) -> list[int]:
    """The text that was corrupted: each sentinel of the source as the target has it."""
    at = np.flatnonzero(target >= FIRST)
    spans = dict(zip(target[at].tolist(), np.split(target, at)[1:], strict=True))
    text: list[int] = []
    for token in source.tolist():
        text += spans[token][1:].tolist() if token >= FIRST else [token]
    return text


@given(tokens=texts, seed=seeds, rate=rates, mean_span=means)
def test_corrupted_spans_can_be_filled_in_again(tokens, seed, rate, mean_span):
    options = {"rate": rate, "mean_span": mean_span}
    given_tokens = tokens.tolist()
    source, target = span_corruption(tokens, generator(seed), vocabulary=T5, **options)
    assert filled(source, target) == given_tokens == tokens.tolist()
    assert source.dtype == target.dtype == np.int32
    assert (len(source), len(target)) == span_lengths(len(tokens), **options)
    # The sentinels are there in order, none of them next to another.
    spans = (target >= FIRST).sum() - 1
    assert source[source >= FIRST].tolist() == list(range(FIRST, FIRST + spans))
    assert target[target >= FIRST].tolist() == list(range(FIRST, FIRST + spans + 1))
    assert (np.diff(np.flatnonzero(source >= FIRST)) > 1).all()
    assert (np.diff(np.flatnonzero(target >= FIRST)) > 1).all()
    assert target[0] >= FIRST
    assert spans + 1 == span_sentinels(len(tokens), **options)
    assert target[-1] == FIRST + spans
    again = span_corruption(tokens, generator(seed), vocabulary=T5, **options)
    assert [part.tolist() for part in again] == [source.tolist(), target.tolist()]


def test_fifteen_in_a_hundred_are_taken_in_spans_of_three():
    # As T5's own: 568 tokens make the source of 512 (with its end) that it was trained with.
    assert span_lengths(568) == (568 - 85 + 28, 85 + 28 + 1)
    assert span_input(511, 114) == 568
    places = np.zeros(100)
    for seed in range(2000):
        source, _ = span_corruption(np.arange(100, dtype=np.int32), generator(seed), vocabulary=T5)
        kept = source[source < FIRST]
        assert len(kept) == 85
        places[kept] += 1
    # The first is always kept and the last always taken; between them no place is favoured much.
    assert places[0] == 2000
    assert places[99] == 0
    assert abs(places[10:90] / 2000 - 0.85).max() < 0.05


@given(source=st.integers(2, 400), target=st.integers(3, 400), rate=rates, mean_span=means)
def test_the_largest_text_that_fits(source, target, rate, mean_span):
    n = span_input(source, target, rate, mean_span)
    fits = [
        span_lengths(size, rate, mean_span)[0] <= source
        and span_lengths(size, rate, mean_span)[1] <= target
        for size in (n, n + 1, n + 2, n + 10)
    ]
    assert fits == [True, False, False, False]


@given(tokens=texts, seed=seeds)
def test_a_prefix_and_its_rest_are_the_text(tokens, seed):
    source, target = prefix(tokens, generator(seed))
    assert np.concatenate([source, target]).tolist() == tokens.tolist()
    assert min(len(source), len(target)) > 0
    assert len(prefix(tokens, generator(seed))[0]) == len(source)


def test_every_place_of_a_prefix_is_as_likely():
    rng = generator()
    lengths = [len(prefix(np.arange(5), rng)[0]) for _ in range(4000)]
    assert np.bincount(lengths)[0] == 0
    assert abs(np.bincount(lengths)[1:] - 1000).max() < 4 * np.sqrt(750)


@given(source=texts, target=texts, more=st.integers(0, 9))
def test_teacher_forcing_predicts_the_target_and_its_end_alone(source, target, more):
    source_length, target_length = len(source) + 1 + more, len(target) + 1 + 2 * more
    row = teacher_forcing(
        source, target, vocabulary=T5, source_length=source_length, target_length=target_length
    )
    assert row.source is not None
    assert row.source_mask is not None
    assert row.source[row.source_mask].tolist() == [*source, END]
    assert row.source.shape == (source_length,)
    assert not row.source[~row.source_mask].any()
    predicted = row.loss_weights == 1
    assert row.targets[predicted].tolist() == [*target, END]
    assert row.tokens[predicted].tolist() == [BEGIN, *target]
    assert predicted[: len(target) + 1].all()
    assert row.tokens.shape == row.targets.shape == row.loss_weights.shape == (target_length,)
    padded = ~predicted
    for array in (row.loss_weights, row.tokens, row.targets):
        assert not array[padded].any()
    assert row.loss_weights.dtype == np.float32
    assert row.tokens.dtype == row.targets.dtype == row.source.dtype == np.int32


def test_what_cannot_be_is_one_sentence():
    tokens = np.arange(60, dtype=np.int32)
    few = vocabulary(ByteTokenizer(), ["end"], sentinels=3)
    with pytest.raises(InputError, match="has 3 sentinels; 3 spans of 60 tokens need 4"):
        span_corruption(tokens, generator(), vocabulary=few)
    with pytest.raises(InputError, match="text has 1 tokens; span corruption needs at least 2"):
        span_corruption(tokens[:1], generator(), vocabulary=T5)
    with pytest.raises(InputError, match=r"rate is 1.0; it must be above 0 and below 1"):
        span_lengths(60, rate=1.0)
    with pytest.raises(InputError, match=r"mean_span is 0.5; it must be at least 1"):
        span_lengths(60, mean_span=0.5)
    with pytest.raises(InputError, match="source of 1 and a target of 9 tokens are too short"):
        span_input(1, 9)
    with pytest.raises(InputError, match="text has 1 tokens; a prefix needs at least 2"):
        prefix(tokens[:1], generator())
    with pytest.raises(InputError, match=r"target has 60 tokens; .* target_length 60 has room for"):
        teacher_forcing(tokens, tokens, vocabulary=T5, source_length=61, target_length=60)
    with pytest.raises(InputError, match="made without begin"):
        teacher_forcing(tokens, tokens, vocabulary=few, source_length=61, target_length=61)
