"""Batches: the same at every start, from any place, whatever the number of hosts."""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable
from typing import Any

import grain
import jax
import numpy as np
import pytest

from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    MeshConfig,
    TrainConfig,
    TransformerConfig,
)
from gptjax.data import pipeline
from gptjax.data.batch import Batch
from gptjax.data.corpus import Predicted, open_corpus, open_sources
from gptjax.data.objectives.packing import Windows
from gptjax.data.objectives.rows import FAMILIES, Bucket, causal_row
from gptjax.data.pipeline import (
    EvaluationBatches,
    Stage,
    bits_per_byte,
    made_batches,
    training_batches,
)
from gptjax.data.streaming import streamed_batches
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.parallel.sharding import build_mesh
from gptjax.runs.data import open_data

CONTEXT, BATCH_SIZE, WINDOWS = 4, 3, 12
TOKENS = np.arange(WINDOWS * CONTEXT + 1, dtype=np.uint16)
LONG = 16
"""The context of the rows of every objective."""


def rows(*sources: np.ndarray, rest: bool = False) -> Bucket:
    windows = [Windows(tokens, CONTEXT + 1, CONTEXT, rest=rest) for tokens in sources]
    return Bucket(windows, functools.partial(causal_row, context_length=CONTEXT), random=False)


def batches_of(
    *sources: np.ndarray, seed: int = 0, weights: tuple[float, ...] = ()
) -> grain.DatasetIterator:
    return training_batches([rows(*sources)], weights, batch_size=BATCH_SIZE, seed=seed)


def take(batches: Iterable[Batch], count: int) -> list[list[list[int]]]:
    return [batch.tokens.tolist() for batch in itertools.islice(batches, count)]


def assert_same(first: Batch, second: Batch) -> None:
    for name, one, other in zip(first._fields, first, second, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_every_token_is_predicted_once_an_epoch_by_the_one_before_it():
    epoch = list(itertools.islice(batches_of(TOKENS), WINDOWS // BATCH_SIZE))
    tokens = np.concatenate([batch.tokens.ravel() for batch in epoch])
    targets = np.concatenate([batch.targets.ravel() for batch in epoch])
    assert sorted(targets) == TOKENS[1:].tolist()
    np.testing.assert_array_equal(targets, tokens + 1)
    for batch in epoch:
        assert batch.tokens.shape == (BATCH_SIZE, CONTEXT)
        assert batch.tokens.dtype == batch.targets.dtype == np.int32
        np.testing.assert_array_equal(
            batch.loss_weights, np.ones((BATCH_SIZE, CONTEXT), np.float32)
        )


def test_another_seed_gives_another_order():
    assert take(batches_of(TOKENS, seed=0), 4) != take(batches_of(TOKENS, seed=1), 4)


def test_each_epoch_has_an_order_of_its_own():
    batches = batches_of(TOKENS)
    first, second, third = (take(batches, 4) for _ in range(3))
    assert first != second != third != first
    for epoch in (first, second, third):
        assert sorted(np.ravel(epoch)) == TOKENS[:-1].tolist()
    starts = [row[0] for batch in first for row in batch]
    assert starts != sorted(starts)


def test_rows_fewer_than_a_batch_still_fill_it():
    (batch,) = take(batches_of(TOKENS[: 2 * CONTEXT + 1]), 1)
    assert np.shape(batch) == (BATCH_SIZE, CONTEXT)


def test_the_place_can_be_set_back_on_the_same_iterator():
    batches = batches_of(TOKENS)
    start = batches.get_state()
    first = take(batches, 5)
    batches.set_state(start)
    assert take(batches, 5) == first


def test_sources_without_weights_are_one_epoch():
    other = TOKENS[: 6 * CONTEXT + 1] + 100
    epoch = take(batches_of(TOKENS, other), (WINDOWS + 6) // BATCH_SIZE)
    assert sorted(np.ravel(epoch)) == [*TOKENS[:-1].tolist(), *other[:-1].tolist()]


def test_weights_are_the_shares_of_the_rows():
    other = TOKENS[: 2 * CONTEXT + 1] + 100
    batches = take(batches_of(TOKENS, other, weights=(1, 3)), 40)
    of_other = [row[0] >= 100 for batch in batches for row in batch]
    assert np.mean(of_other) == 0.75
    # Evenly spread, each source in epochs of its own.
    assert all(2 <= sum(of_other[start : start + 4]) <= 4 for start in range(0, 120, 4))
    firsts = collections.Counter(row[0] for batch in batches for row in batch)
    assert {firsts[start] for start in other[:-1:CONTEXT].tolist()} == {45}
    assert {firsts[start] for start in TOKENS[:-1:CONTEXT].tolist()} <= {2, 3}


@pytest.mark.slow
def test_weights_hold_within_buckets_too():
    # The first source has 8 short rows and 2 long ones, the second 3 and 6.
    def bucket(length: int, *sizes: int) -> Bucket:
        sources = [np.full((size, length), number) for number, size in enumerate(sizes)]
        return Bucket(sources, lambda row: Batch(row, row, np.ones(length)), random=False)

    buckets = [bucket(3, 8, 3), bucket(5, 2, 6)]
    batches = training_batches(buckets, (3, 1), batch_size=1, seed=0)
    found = collections.Counter(
        (batch.tokens.shape[1], int(batch.tokens[0, 0]))
        for batch in itertools.islice(batches, 1200)
    )
    # Three quarters and one quarter of all, and each source's rows as often as each other.
    expected = {(3, 0): 720, (5, 0): 180, (3, 1): 100, (5, 1): 200}
    for kind, times in expected.items():
        assert found[kind] == pytest.approx(times, rel=0.02)


STAGED = (Stage(7, (0.0, 1.0)), Stage(9, (1.0, 1.0)))


def staged(stages=STAGED, weights=(1.0, 3.0), **how) -> grain.DatasetIterator:
    other = TOKENS[: 8 * CONTEXT + 1] + 100
    order = {"batch_size": BATCH_SIZE, "seed": 5} | how
    return training_batches([rows(TOKENS, other)], weights, stages=stages, **order)


def test_a_stage_has_its_weights_and_each_source_goes_on():
    batches, plain = take(staged(), 30), take(staged(()), 30)
    assert batches[:7] == plain[:7]  # Up to the stage nothing changes.
    of_other = [[row[0] >= 100 for row in batch] for batch in batches]
    assert np.mean(of_other[:7]) == pytest.approx(0.75, abs=0.05)
    assert np.mean(of_other[7:9]) == 1
    assert np.mean(of_other[9:]) == pytest.approx(0.5, abs=0.02)
    for first in (0, 100):  # Each source's rows are those of its own epochs, in order.
        own = [row for batch in batches for row in batch if (row[0] >= 100) == bool(first)]
        alone = take(staged((), (1.0, 1e-9) if not first else (1e-9, 1.0)), 40)
        expected = [row for batch in alone for row in batch if (row[0] >= 100) == bool(first)]
        assert own == expected[: len(own)]


def test_a_staged_mixture_resumes_and_is_split_among_hosts():
    batches = staged()
    expected = [next(batches) for _ in range(14)]
    for done in (3, 6, 7, 8, 9, 12):
        before = staged()
        for _ in range(done):
            next(before)
        again = staged()
        again.set_state(json.loads(json.dumps(before.get_state())))
        assert_same(next(again), expected[done])
    halves = [staged(batch_size=6, host=host, hosts=2) for host in (0, 1)]
    whole = staged(batch_size=6)
    for _ in range(14):
        parts = [next(half).tokens for half in halves]
        assert sorted(np.concatenate(parts).tolist()) == sorted(next(whole).tokens.tolist())


def test_a_stage_begins_with_the_batch_of_its_step(tmp_path):
    paths = [tmp_path / f"{letter}.txt" for letter in "ab"]
    for path in paths:
        path.write_text(path.stem * 2000)
    config = ExperimentConfig(
        model=TransformerConfig(depth=1, width=16, heads=2, context_length=8),
        data=DataConfig(
            source=tuple(map(str, paths)), weights=(1.0, 1.0), stages=("3:0,1", "5:1,0")
        ),
        train=TrainConfig(steps=6, batch_size=4),
    )
    data = open_data(config, tmp_path / "run")
    batches, _ = data.batches(build_mesh(MeshConfig(), 4, tuple(jax.devices()[:1])))
    tokens = [np.ravel(batch.tokens) for batch in itertools.islice(batches, 6)]
    letters = ["".join(sorted({chr(token) for token in of_step})) for of_step in tokens]
    assert letters == ["ab", "ab", "b", "b", "a", "a"]


def test_stages_hold_within_buckets_too():
    def bucket(length: int, *sizes: int) -> Bucket:
        sources = [np.full((size, length), number) for number, size in enumerate(sizes)]
        return Bucket(sources, lambda row: Batch(row, row, np.ones(length)), random=False)

    # The second source has no short rows: in a stage of its own, no short batches.
    buckets = [bucket(3, 8, 0), bucket(5, 2, 6)]
    stages = [Stage(100, (0.0, 1.0)), Stage(150, (3.0, 1.0))]
    batches = training_batches(buckets, (3, 1), stages=stages, batch_size=1, seed=0)
    found = [
        (batch.tokens.shape[1], int(batch.tokens[0, 0])) for batch in itertools.islice(batches, 350)
    ]
    assert set(found[100:150]) == {(5, 1)}
    for part in (found[:100], found[150:]):
        counts = collections.Counter(part)
        for kind, share in {(3, 0): 0.6, (5, 0): 0.15, (5, 1): 0.25}.items():
            assert counts[kind] / len(part) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("threads", [0, 3])
def test_the_number_of_reading_threads_changes_nothing(threads, monkeypatch):
    expected = take(batches_of(TOKENS), 20)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    monkeypatch.setattr(pipeline, "READ_OPTIONS", options)
    assert take(batches_of(TOKENS), 20) == expected


def test_weights_change_no_order_within_a_source():
    other = TOKENS[: 8 * CONTEXT + 1] + 100

    def of_other(weights) -> list:
        taken = take(batches_of(TOKENS, other, weights=weights), 12)
        return [row for batch in taken for row in batch if row[0] >= 100]

    often, seldom = of_other((1, 3)), of_other((3, 1))
    assert often[: len(seldom)] == seldom


def test_hosts_that_cannot_part_a_batch_are_refused():
    with pytest.raises(InputError) as error:
        training_batches([rows(TOKENS)], batch_size=3, seed=0, host=1, hosts=2)
    assert str(error.value) == "train.batch_size is 3: it must be a multiple of the 2 hosts."


@pytest.mark.parametrize("length", [2, 4, 5, 6, 12, 13, 14, 25, 26])
def test_evaluation_predicts_every_token_once(length):
    tokens = np.arange(1, length + 1, dtype=np.uint8)
    batches = EvaluationBatches([rows(tokens, rest=True)], BATCH_SIZE)
    found = [batches[index] for index in range(len(batches))]
    assert all(batch.tokens.shape == (3, 4) for batch in found)
    weights = np.concatenate([batch.loss_weights.ravel() for batch in found])
    assert set(weights) <= {0.0, 1.0}
    given = np.concatenate([batch.tokens.ravel() for batch in found])[weights == 1]
    predicted = np.concatenate([batch.targets.ravel() for batch in found])[weights == 1]
    np.testing.assert_array_equal(given, tokens[:-1])
    np.testing.assert_array_equal(predicted, tokens[1:])


def test_evaluation_pads_only_what_the_last_batch_lacks():
    batches = EvaluationBatches([rows(np.arange(14, dtype=np.uint8), rest=True)], BATCH_SIZE)
    weights = [batches[index].loss_weights for index in range(len(batches))]
    assert [float(weight.sum()) for weight in weights] == [12.0, 1.0]
    np.testing.assert_array_equal(weights[1].ravel(), [1] + 11 * [0])


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("length", [14, 40])
def test_the_hosts_of_an_evaluation_have_its_rows_among_them(length, hosts):
    bucket = [rows(np.arange(length, dtype=np.uint8), rest=True)]
    shares = [EvaluationBatches(bucket, 4, host, hosts) for host in range(hosts)]
    batches = EvaluationBatches(bucket, 4)
    assert {len(share) for share in shares} == {len(batches)}
    for index in range(len(batches)):
        whole, *parts = (each[index] for each in (batches, *shares))
        joined = Batch.stack([row for part in parts for row in unstacked(part)])
        np.testing.assert_array_equal(joined.loss_weights, whole.loss_weights)
        filled = whole.loss_weights > 0
        np.testing.assert_array_equal(joined.tokens[filled], whole.tokens[filled])
        np.testing.assert_array_equal(joined.targets[filled], whole.targets[filled])
    with pytest.raises(InputError, match="multiple of the 3 hosts"):
        EvaluationBatches(bucket, 4, 0, 3)


def unstacked(batch: Batch) -> list[Batch]:
    return [batch.apply(lambda array, row=row: array[row]) for row in range(len(batch.tokens))]


def test_bits_per_byte_of_a_hand_case():
    # 3 predictions of ln 2 nats are 3 bits, over 5 bytes.
    assert bits_per_byte(Predicted(tokens=3, bytes=5), np.log(2)) == pytest.approx(3 / 5)


KINDS = [
    {"objective": "causal"},
    {"objective": "causal", "packing": "first_fit"},
    {"objective": "causal", "weights": (1.0, 2.5)},
    {"objective": "masked_lm", "whole_words": True},
    {"objective": "masked_lm", "packing": "first_fit"},
    {"objective": "next_sentence"},
    {"objective": "prefix"},
    {"objective": "span_corruption"},
    {"objective": "sequence_to_sequence", "buckets": 2},
]
STREAMED = [kind for kind in KINDS if kind["objective"] != "next_sentence"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[str, str]:
    """Two sources of documents of all lengths, empty ones among them."""
    directory = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(5)
    for name in ("first", "second"):
        lines = [
            "word " * (int(size) // 5) + "x" * (int(size) % 5) for size in rng.integers(0, 40, 60)
        ]
        (directory / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return f"{directory}/first.txt#documents=line", f"{directory}/second.txt#documents=line"


def batches_for(texts, kind: dict[str, Any], *, streaming: bool, **order) -> grain.DatasetIterator:
    """The batches that a config asks for, opened anew."""
    pairs = kind["objective"] == "sequence_to_sequence"
    several = "weights" in kind
    data = DataConfig(
        source=texts if several else texts[:1],
        target=texts[1:] if pairs else (),
        streaming=streaming,
        **kind,
    )
    more = {}
    if kind["objective"] == "next_sentence":
        more = {"token_types": 2, "encoder_heads": "pretraining"}
    family = FAMILIES[kind["objective"]][0]
    model = TransformerConfig(family=family, context_length=LONG, **more)
    sources, tokenizer = open_sources(data), ByteTokenizer()
    corpus = open_corpus(sources, tokenizer, data, model)
    order = {"batch_size": 4, "seed": 7, **order}
    if streaming:
        return streamed_batches(sources, tokenizer, corpus.vocabulary, data, LONG, **order)
    return training_batches(corpus.train, data.weights, **order)


def named(kind) -> str:
    return "-".join(map(str, kind.values()))


@pytest.mark.parametrize(
    ("kind", "streaming"),
    [*((kind, False) for kind in KINDS), *((kind, True) for kind in STREAMED)],
    ids=[*map(named, KINDS), *(f"{named(kind)}-streamed" for kind in STREAMED)],
)
def test_any_place_and_any_number_of_hosts_give_the_same_batches(texts, kind, streaming):
    make = functools.partial(batches_for, texts, kind, streaming=streaming)
    straight = make()
    states, expected = [], []
    for _ in range(40):  # More than an epoch.
        states.append(json.dumps(straight.get_state()))
        expected.append(next(straight))
    assert max(map(len, states)) < 1000

    for place in (0, 1, 17, 38):
        resumed = make()
        resumed.set_state(json.loads(states[place]))
        for step in (place, place + 1):
            assert_same(next(resumed), expected[step])

    for hosts in (2, 4):
        each = [make(host=host, hosts=hosts) for host in range(hosts)]
        for step in range(3):
            parts = [next(host) for host in each]
            for rows, host in zip(np.split(np.arange(4), hosts), parts, strict=True):
                mine = expected[step].apply(lambda array, rows=rows: array[rows])
                assert_same(host, mine)
        # From that place on with another number of hosts, whichever of them kept it.
        state = json.loads(json.dumps(each[-1].get_state()))
        fewer = make(host=1, hosts=2)
        fewer.set_state(state)
        half = expected[3].apply(lambda array: array[2:])
        assert_same(next(fewer), half)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_nothing_is_trained_on_padding_and_seeds_differ(texts, kind):
    batches = batches_for(texts, kind, streaming=False)
    for batch in itertools.islice(batches, 12):
        assert (batch.loss_weights > 0).any()
        if batch.segment_ids is not None:
            assert not batch.loss_weights[batch.segment_ids == 0].any()
        if batch.padding_mask is not None:
            assert not batch.loss_weights[~batch.padding_mask].any()
        if batch.source_mask is not None:
            ends = batch.loss_weights.sum(axis=1).astype(int)
            for row, end in zip(batch.loss_weights, ends, strict=True):
                np.testing.assert_array_equal(row, np.arange(len(row)) < end)
    other = next(batches_for(texts, kind, streaming=False, seed=8))
    again = next(batches_for(texts, kind, streaming=False))
    assert other.tokens.shape != again.tokens.shape or (other.tokens != again.tokens).any()


def test_documents_none_of_which_is_of_use_are_one_sentence(tmp_path):
    (tmp_path / "text.txt").write_text("a\n\nb\nc\n")
    (tmp_path / "valid.txt").write_text("abc\ndef\n")
    path, valid = (f"{tmp_path}/{name}.txt#documents=line" for name in ("text", "valid"))
    data = DataConfig(source=(path,), validation=(valid,), packing="first_fit", streaming=True)
    sources, tokenizer = open_sources(data), ByteTokenizer()
    corpus = open_corpus(sources, tokenizer, data, TransformerConfig(context_length=LONG))
    rest = {"batch_size": 4, "seed": 0}
    words = corpus.vocabulary
    with pytest.raises(InputError, match=r"^data.source: no training document is usable "):
        next(streamed_batches(sources, tokenizer, words, data, LONG, **rest))
    # One after another they are a text.
    split = dataclasses.replace(data, packing="split")
    seen = {*next(streamed_batches(sources, tokenizer, words, split, LONG, **rest)).tokens.ravel()}
    assert seen == {*b"abc"}


def test_an_epoch_on_the_fly_has_every_document_once(texts):
    kind = {"objective": "causal", "packing": "first_fit"}
    streamed = batches_for(texts, kind, streaming=True, batch_size=1)
    documents = (open_sources(DataConfig(source=texts[:1])).train)[0]
    bytes_in_all = sum(max(len(documents[i]) - 1, 0) for i in range(len(documents)))
    seen = 0
    while seen < bytes_in_all:
        seen += int(next(streamed).loss_weights.sum())
    # The rows that are packed together hold one epoch's end and the next one's beginning.
    assert seen < 1.2 * bytes_in_all


def test_windows_on_the_fly_predict_every_token(texts):
    streamed = batches_for(texts, {"objective": "causal"}, streaming=True)
    found = list(itertools.islice(streamed, 25))  # More than an epoch.
    tokens, targets = (
        np.concatenate([getattr(batch, name).ravel() for batch in found])
        for name in ("tokens", "targets")
    )
    np.testing.assert_array_equal(tokens[1:], targets[:-1])


def test_windows_of_a_text_on_the_fly_are_those_of_a_cache(tmp_path):
    text = "one text, of which no token is left out " * 9
    (tmp_path / "text.txt").write_text(text)
    kind, source = {"objective": "causal"}, (f"{tmp_path}/text.txt",)
    streamed = batches_for(source, kind, streaming=True, batch_size=1)
    cached = batches_for(source, kind, streaming=False, batch_size=1)
    count = (len(text) * 9 // 10 - 1) // LONG

    def windows(batches: Iterable[Batch]) -> list[bytes]:
        taken = itertools.islice(batches, count)
        return sorted(bytes([*batch.tokens[0], batch.targets[0, -1]]) for batch in taken)

    assert windows(streamed) == windows(cached)


def test_each_token_of_a_causal_batch_is_predicted_from_those_before_it():
    rows = np.arange(15).reshape(3, 5)
    batch = Batch.causal(rows)
    np.testing.assert_array_equal(batch.tokens, rows[:, :-1])
    np.testing.assert_array_equal(batch.targets, rows[:, 1:])
    np.testing.assert_array_equal(batch.loss_weights, np.ones((3, 4)))
    assert [array.dtype for array in batch[:3]] == [np.int32, np.int32, np.float32]
    assert batch.inputs() == {}
    weights = rows[:, 1:] % 2
    np.testing.assert_array_equal(Batch.causal(rows, weights).loss_weights, weights)


def drawn(generator: np.random.Generator) -> Batch:
    return Batch.causal(generator.integers(1000, size=(2, 5)))


def test_made_batches_follow_from_the_seed_and_go_on_from_their_place():
    straight = made_batches(drawn, seed=0)
    first = take(straight, 3)
    assert first[0] != first[1] != first[2]
    assert take(made_batches(drawn, seed=0), 3) == first
    assert take(made_batches(drawn, seed=1), 3) != first
    state = json.loads(json.dumps(straight.get_state()))
    following = take(straight, 3)
    resumed = made_batches(drawn, seed=0)
    resumed.set_state(state)
    assert take(resumed, 3) == following
