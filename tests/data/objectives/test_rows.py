"""What a row is made of, by hand, and that packed documents train as if each stood alone."""

import json
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import build, split
from gptjax.config import DataConfig, TransformerConfig
from gptjax.data.batch import Batch
from gptjax.data.corpus import Text
from gptjax.data.objectives.rows import (
    DocumentPieces,
    causal_row,
    framed,
    masked_row,
    objective_vocabulary,
    text_rows,
    window,
)
from gptjax.data.objectives.vocabulary import Vocabulary
from gptjax.data.storage.cache import TokenStore, open_store
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.training.losses import token_loss

BEGIN, END, MASK = 256, 257, 258
"""What the bytes lack, in this order."""


class Several:
    """Documents in memory."""

    name = "several"

    def __init__(self, *texts: str):
        self._texts = texts
        self.fingerprint = Text(json.dumps(texts), "").fingerprint

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]


class Bytes(ByteTokenizer):
    """Bytes, of which "." ends a document."""

    special = MappingProxyType({"end": ord(".")})


def store(directory: Path, *texts: str, ends: bool = False) -> TokenStore:
    return open_store(Several(*texts), Bytes() if ends else ByteTokenizer(), directory)


def words(data: DataConfig, context_length: int, **model) -> Vocabulary:
    return objective_vocabulary(
        data, TransformerConfig(context_length=context_length, **model), ByteTokenizer()
    )


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_a_causal_row_predicts_each_successor_and_no_padding():
    row = causal_row(np.arange(5), context_length=4)
    assert (row.tokens.tolist(), row.targets.tolist()) == ([0, 1, 2, 3], [1, 2, 3, 4])
    assert row.loss_weights.tolist() == [1, 1, 1, 1]
    rest = causal_row(np.arange(1, 4), context_length=4)
    assert (rest.tokens.tolist()[:2], rest.targets.tolist()[:2]) == ([1, 2], [2, 3])
    assert rest.loss_weights.tolist() == [1, 1, 0, 0]


def test_rows_of_documents_side_by_side_by_hand(tmp_path):
    tokens = store(tmp_path, "abc", "", "d", "efghijk", "lm", ends=True)
    data = DataConfig(packing="first_fit")
    bucket = text_rows([tokens], data, 6, words(data, 6))
    rows = [bucket.row(number) for number in range(len(bucket))]
    # "abc." takes three places, "d." one, "efghijk." seven: six and one; "lm." two.
    assert [row.tokens.tolist() for row in rows] == [
        [*ids("abcdk"), 0],
        ids("efghij"),
        [*ids("lm"), 0, 0, 0, 0],
    ]
    assert [row.targets.tolist() for row in rows] == [
        [*ids("bc..."), 0],
        ids("fghijk"),
        [*ids("m."), 0, 0, 0, 0],
    ]
    assert [np.asarray(row.segment_ids).tolist() for row in rows] == [
        [1, 1, 1, 2, 3, 0],
        [1] * 6,
        [1, 1, 0, 0, 0, 0],
    ]
    assert np.asarray(rows[0].positions).tolist() == [0, 1, 2, 0, 0, 0]
    for row in rows:
        np.testing.assert_array_equal(row.loss_weights, np.asarray(row.segment_ids) > 0)


def test_a_row_that_is_to_be_unmasked_stands_in_its_frame_and_its_padding_stays():
    data = DataConfig(objective="masked_lm")
    vocabulary = words(data, 10, family="encoder")
    assert framed(np.array(ids("abcd")), vocabulary, 10).tokens.tolist() == [
        BEGIN, *ids("abcd"), END, 0, 0, 0, 0,
    ]  # fmt: skip
    hidden = np.zeros(10, bool)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        options = {"context_length": 10, "rate": 0.5, "whole_words": False}
        row = masked_row(np.array(ids("abcd")), rng, vocabulary=vocabulary, **options)
        assert row.segment_ids is not None
        assert row.segment_ids.tolist() == [1] * 6 + [0] * 4
        assert row.targets.tolist() == [BEGIN, *ids("abcd"), END, 0, 0, 0, 0]
        assert row.loss_weights.sum() == 2
        unasked = row.loss_weights == 0
        np.testing.assert_array_equal(row.tokens[unasked], row.targets[unasked])
        assert row.tokens.max() <= MASK
        hidden |= ~unasked
    assert hidden.tolist() == [False, *[True] * 4, *[False] * 5]


def test_rows_that_are_to_be_unmasked_keep_documents_apart(tmp_path):
    tokens = store(tmp_path, "abc", "", "defg", "h")
    data = DataConfig(objective="masked_lm", packing="first_fit")
    vocabulary = words(data, 8, family="encoder")
    bucket = text_rows([tokens], data, 8, vocabulary)
    rows = [bucket.row(number, np.random.default_rng(number)) for number in range(len(bucket))]
    assert [row.targets.tolist() for row in rows] == [
        [BEGIN, *ids("abc"), END, BEGIN, ord("h"), END],
        [BEGIN, *ids("defg"), END, 0, 0],
    ]
    documents = [row.segment_ids.tolist() for row in rows if row.segment_ids is not None]
    assert documents == [[1] * 5 + [2] * 3, [1] * 6 + [0] * 2]


def test_a_span_corrupted_window_fills_its_source_and_its_target(tmp_path):
    data = DataConfig(objective="span_corruption", mask_rate=0.3, mean_span=2.0)
    vocabulary = words(data, 16, family="encoder_decoder")
    length = window(data, 16).length
    bucket = text_rows([store(tmp_path, "abcdefghijklmnopqrstuvwxyz" * 3)], data, 16, vocabulary)
    assert len(bucket) == 78 // length
    for number in range(len(bucket)):
        row = bucket.row(number, np.random.default_rng(number))
        assert row.source is not None
        assert row.source_mask is not None
        assert row.source.shape == (16,)
        assert row.tokens.shape == row.targets.shape
        kept = [token for token in row.source[row.source_mask] if token < 256]
        filled = [token for token in row.targets[row.loss_weights > 0] if token < 256]
        text = ids("abcdefghijklmnopqrstuvwxyz" * 3)[number * length : (number + 1) * length]
        assert sorted(kept + filled) == sorted(text)
        assert vocabulary.sentinels[0] in row.source


def test_a_prefix_and_what_follows_are_the_window(tmp_path):
    data = DataConfig(objective="prefix")
    vocabulary = words(data, 8, family="encoder_decoder")
    bucket = text_rows([store(tmp_path, "abcdefghijklmnop" + "rest")], data, 8, vocabulary)
    assert len(bucket) == 2
    for number, text in enumerate(("abcdefgh", "ijklmnop")):
        row = bucket.row(number, np.random.default_rng(number))
        assert row.source is not None
        assert row.source_mask is not None
        both = [*row.source[row.source_mask], *row.targets[row.loss_weights > 0]]
        assert [token for token in both if token < 256] == ids(text)


def test_pieces_for_the_next_sentence_are_of_other_documents(tmp_path):
    tokens = store(tmp_path, "abcdef", "", "g", "hijklmnopq", "rs", ends=True)
    data = DataConfig(objective="next_sentence")
    model = {"family": "encoder", "token_types": 2, "encoder_heads": "pretraining"}
    bucket = text_rows([tokens], data, 9, words(data, 9, **model))
    pieces = bucket.sources[0]
    assert isinstance(pieces, DocumentPieces)
    texts = [bytes(pieces.tokens(number).tolist()).decode() for number in range(len(pieces))]
    # Pieces of six, without the end token; those of a single token are left out.
    assert texts == ["abcdef", "hijklm", "nopq", "rs"]
    rng = np.random.default_rng(0)
    others = [{pieces.of_another_document(own, rng) for _ in range(40)} for own in range(4)]
    assert others == [{1, 2, 3}, {0, 3}, {0, 3}, {0, 1, 2}]


@pytest.fixture(scope="module")
def each_token(tmp_path_factory):
    """The loss of each token of a batch, by a tiny model; one program for all the tests."""

    def make(family: Literal["decoder", "encoder"], context_length: int):
        config = TransformerConfig(
            family=family,
            context_length=context_length,
            vocab_size=259,
            depth=2,
            width=16,
            heads=2,
        )
        graphdef, params = split(build(config, rngs=nnx.Rngs(0)))
        loss = token_loss(graphdef)

        @jax.jit
        def losses(batch: Batch) -> jax.Array:
            def of_one(weights: jax.Array) -> jax.Array:
                return loss(params, batch._replace(loss_weights=weights), None).loss

            shape = batch.loss_weights.shape
            each = jnp.eye(batch.loss_weights.size).reshape(-1, *shape)
            return jax.lax.map(of_one, each).reshape(shape)

        return lambda batch: np.asarray(losses(batch))

    return make


@pytest.mark.parametrize(("objective", "family"), [("causal", "decoder"), ("masked_lm", "encoder")])
def test_another_neighbour_in_a_row_moves_no_loss(tmp_path, each_token, objective, family):
    data = DataConfig(objective=objective, packing="first_fit", mask_rate=0.3)
    texts = ["hello", "you", "are here", "and so am I"]
    losses = each_token(family, 24)

    def rows(*changed: str) -> Batch:
        bucket = text_rows([store(tmp_path, *changed)], data, 24, words(data, 24, family=family))
        return Batch.stack(
            [bucket.row(number, np.random.default_rng(7)) for number in range(len(bucket))]
        )

    batch, other = rows(*texts), rows("HELLO", *texts[1:])
    assert batch.segment_ids is not None
    assert other.segment_ids is not None
    np.testing.assert_array_equal(batch.segment_ids, other.segment_ids)
    first = np.zeros(batch.segment_ids.shape, bool)
    first[0] = batch.segment_ids[0] == 1
    assert batch.segment_ids[0].max() > 1  # It has neighbours.
    # What is drawn for a row may differ with its tokens: the same is asked of both.
    asked = np.where(first, 0, batch.loss_weights)
    tokens = np.where(first, other.tokens, batch.tokens)
    before, after = losses(batch), losses(batch._replace(tokens=tokens))
    np.testing.assert_array_equal(before[asked > 0], after[asked > 0])
    assert (
        before[first & (batch.loss_weights > 0)] != after[first & (batch.loss_weights > 0)]
    ).any()
