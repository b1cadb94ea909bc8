import itertools
import json
import math
from collections.abc import Iterable

import numpy as np
import pytest

from gptjax.config import DataConfig, InputError
from gptjax.data.pipeline import (
    Batch,
    Windows,
    bits_per_byte,
    evaluation_batches,
    tokenize,
    training_batches,
)
from gptjax.data.tokenizers import ByteTokenizer, CharacterTokenizer, train_tokenizer

CONTEXT, BATCH_SIZE, WINDOWS = 4, 3, 12
TOKENS = np.arange(100, 100 + WINDOWS * CONTEXT + 1, dtype=np.int32)
"""Every token is its own, so that a token tells its place; an epoch is 12 windows, 4 batches."""


def _batches(seed: int = 0, tokens: np.ndarray = TOKENS):
    return training_batches(tokens, context=CONTEXT, batch_size=BATCH_SIZE, seed=seed)


def _take(batches: Iterable[Batch], count: int) -> list[list[list[int]]]:
    return [batch.tokens.tolist() for batch in itertools.islice(batches, count)]


def test_the_first_part_is_for_training_and_the_last_for_validation():
    text = "abcdefghij" * 10
    tokenizer = ByteTokenizer()
    corpus = tokenize(text, tokenizer, DataConfig(validation_fraction=0.25), context=8)
    assert tokenizer.decode(corpus.train) == text[:75]
    assert tokenizer.decode(corpus.validation) == text[75:]
    assert corpus.train.dtype == corpus.validation.dtype == np.int32


def test_no_token_straddles_the_border():
    text = "中文" * 100 + "x"
    corpus = tokenize(text, ByteTokenizer(), DataConfig(validation_fraction=0.3), context=8)
    joined = ByteTokenizer().decode(corpus.train) + ByteTokenizer().decode(corpus.validation)
    assert joined == text


def test_another_text_has_another_fingerprint():
    first, same, other = (
        tokenize(text, ByteTokenizer(), DataConfig(), context=8).fingerprint
        for text in ("a" * 100, "a" * 100, "a" * 99 + "b")
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("length", "context", "sentence"),
    [
        (100, 90, "The training part has 90 tokens; a context of 90 needs at least 91."),
        (2, 128, "The training part has 1 tokens; a context of 128 needs at least 129."),
        (1, 1, "The training part has 0 tokens; a context of 1 needs at least 2."),
        (
            9,
            7,
            "The validation part (data.validation_fraction 0.1) has 1 tokens; it needs at least 2.",
        ),
    ],
)
def test_a_text_too_short_for_the_context_is_one_sentence(length, context, sentence):
    with pytest.raises(InputError) as error:
        tokenize("a" * length, ByteTokenizer(), DataConfig(), context)
    assert str(error.value) == sentence


def test_the_shortest_text_is_one_window_and_one_prediction():
    corpus = tokenize("a" * 100, ByteTokenizer(), DataConfig(), context=89)
    assert len(Windows(corpus.train, 89)) == 1
    config = DataConfig(validation_fraction=0.02)
    assert len(tokenize("a" * 100, ByteTokenizer(), config, context=4).validation) == 2


def test_bits_per_byte_of_a_hand_case():
    # Validation is "中文ab": four characters, eight bytes, of which the first character is given.
    text = "中文ab" * 10
    config = DataConfig(validation_fraction=0.1)
    characters = tokenize(text, CharacterTokenizer.train(text), config, context=4)
    assert len(characters.validation) == 4
    assert characters.validation_bytes == 5
    # 3 predictions of ln 2 nats are 3 bits, over 5 bytes.
    assert bits_per_byte(characters, math.log(2)) == pytest.approx(3 / 5)


@pytest.mark.parametrize("spec", ["bytes", "sentencepiece:265"])
def test_a_first_character_of_several_tokens_counts_by_the_byte(spec):
    # Validation is "é…b": the first token is the first byte of é, the rest is to be predicted.
    text = "ab" * 40 + "ab" * 9 + "éb"
    config = DataConfig(validation_fraction=0.02)
    corpus = tokenize(text, train_tokenizer(spec, "ab" * 200), config, context=4)
    assert len(corpus.validation) == 3
    assert corpus.validation_bytes == 2
    assert bits_per_byte(corpus, math.log(2)) == pytest.approx(1.0)


def test_every_token_is_predicted_once_an_epoch_by_the_one_before_it():
    epoch = list(itertools.islice(_batches(), WINDOWS // BATCH_SIZE))
    tokens = np.concatenate([batch.tokens.ravel() for batch in epoch])
    targets = np.concatenate([batch.targets.ravel() for batch in epoch])
    assert sorted(targets) == TOKENS[1:].tolist()
    np.testing.assert_array_equal(targets, tokens + 1)
    for batch in epoch:
        np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        np.testing.assert_array_equal(batch.weights, np.ones((BATCH_SIZE, CONTEXT), np.float32))
        assert batch.tokens.shape == (BATCH_SIZE, CONTEXT)
        assert batch.tokens.dtype == batch.targets.dtype == np.int32
        assert batch.weights.dtype == np.float32


@pytest.mark.parametrize("extra", [1, CONTEXT - 1])
def test_a_rest_shorter_than_a_window_is_left_out(extra):
    longer = np.append(TOKENS, np.arange(extra, dtype=np.int32))
    assert len(Windows(longer, CONTEXT)) == WINDOWS
    assert _take(_batches(tokens=longer), 4) == _take(_batches(), 4)


def test_batches_follow_from_tokens_sizes_and_seed_alone():
    assert _take(_batches(seed=3), 9) == _take(_batches(seed=3), 9)


def test_another_seed_gives_another_order():
    assert _take(_batches(seed=0), 4) != _take(_batches(seed=1), 4)


def test_each_epoch_has_an_order_of_its_own():
    batches = _batches()
    first, second, third = (_take(batches, 4) for _ in range(3))
    assert first != second != third != first
    for epoch in (first, second, third):
        assert sorted(np.ravel(epoch)) == TOKENS[:-1].tolist()


def test_the_order_is_not_the_texts():
    starts = [row[0] for batch in _take(_batches(), 4) for row in batch]
    assert starts != sorted(starts)


def test_windows_fewer_than_a_batch_still_fill_it():
    short = TOKENS[: 2 * CONTEXT + 1]
    (batch,) = _take(_batches(tokens=short), 1)
    assert np.shape(batch) == (BATCH_SIZE, CONTEXT)


@pytest.mark.parametrize("place", [0, 1, 3, 4, 6])
def test_a_saved_place_resumes_exactly_after_json(place):
    straight = _take(_batches(), 12)
    batches = _batches()
    _take(batches, place)
    state = json.loads(json.dumps(batches.get_state()))
    resumed = _batches()
    resumed.set_state(state)
    assert _take(resumed, 12 - place) == straight[place:]


def test_the_place_can_be_set_back_on_the_same_iterator():
    batches = _batches()
    start = batches.get_state()
    first = _take(batches, 5)
    batches.set_state(start)
    assert _take(batches, 5) == first


@pytest.mark.parametrize("length", [2, 4, 5, 6, 12, 13, 14, 25, 26])
def test_evaluation_predicts_every_token_once(length):
    tokens = np.arange(1, length + 1, dtype=np.int32)
    batches = evaluation_batches(tokens, context=4, batch_size=3)
    assert all(batch.tokens.shape == (3, 4) for batch in batches)
    weights = np.concatenate([batch.weights.ravel() for batch in batches])
    assert set(weights) <= {0.0, 1.0}
    given = np.concatenate([batch.tokens.ravel() for batch in batches])[weights == 1]
    predicted = np.concatenate([batch.targets.ravel() for batch in batches])[weights == 1]
    np.testing.assert_array_equal(given, tokens[:-1])
    np.testing.assert_array_equal(predicted, tokens[1:])


def test_evaluation_pads_only_what_the_last_batch_lacks():
    batches = evaluation_batches(np.arange(14, dtype=np.int32), context=4, batch_size=3)
    weights = [batch.weights for batch in batches]
    assert [float(weight.sum()) for weight in weights] == [12.0, 1.0]
    assert weights[0].dtype == np.float32
    assert batches[0].tokens.dtype == batches[0].targets.dtype == np.int32
    np.testing.assert_array_equal(weights[1].ravel(), [1] + 11 * [0])
