"""Rows to batches: batch n is a function of the rows, the batch size, the seed and n.

Grain shuffles by an index permutation, so that step n is found without reading what precedes it,
and the iterator's state is small. The hosts of a run split each batch among them: their number
changes neither the batches nor their order.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import grain
import numpy as np
from grain.experimental import (
    ConcatThenSplitIterDataset,
    FirstFitPackIterDataset,
    FlatMapIterDataset,
    FlatMapTransform,
)

from gptjax.config import DataConfig, InputError
from gptjax.data.batch import Batch
from gptjax.data.corpus import Predicted, Sources
from gptjax.data.objectives.packing import OPEN_ROWS, PackedTokens, cut
from gptjax.data.objectives.rows import Bucket, finisher, window
from gptjax.data.objectives.vocabulary import Vocabulary
from gptjax.data.sources import Documents
from gptjax.data.tokenizers import Tokenizer

ENDLESS = 1 << 48
"""Rows of an endless dataset: Grain's own infinite length is too large for batches of one."""
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
"""One thread prefetches batches: on two cores, more are slower."""


class Stage(NamedTuple):
    """Weights of the sources from a batch on."""

    first: int
    """The batch, counted from 0."""
    weights: tuple[float, ...]


def bits_per_byte(predicted: Predicted, loss: float) -> float:
    """A validation loss in nats per token as bits per byte, comparable across tokenizers."""
    return loss * predicted.tokens / predicted.bytes / math.log(2)


def training_batches(
    buckets: Sequence[Bucket],
    weights: Sequence[float] = (),
    *,
    stages: Sequence[Stage] = (),
    batch_size: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator of one host's part of each batch, reshuffled each epoch.

    With weights, sources are interleaved evenly in these shares, each in epochs of its own;
    without, all their rows make one epoch. A batch has rows of one bucket; buckets alternate in
    proportion to their sizes. Grain keeps shares to a hundredth of the smallest. In a later stage
    each source goes on where it was.

    The iterator's `get_state()` is its position among the batches; `set_state()` restores it.

    Args:
      buckets: from a `Corpus`.
      weights: share of each source.
      stages: later weights, in order.
      batch_size: rows per batch, over all hosts.
      seed: of the order and of the objective's randomness.
      host: the index of this host.
      hosts: number of hosts; a divisor of `batch_size`.

    Raises:
      InputError: hosts that do not divide the batch.
    """
    _check_hosts(batch_size, hosts)
    taken = [[0] * len(bucket.sources) for bucket in buckets]
    parts: list[grain.MapDataset] = []
    firsts = [0, *(stage.first for stage in stages), ENDLESS]
    every = [weights, *(stage.weights for stage in stages)]
    for number, of_stage in enumerate(every):
        shares = _shares(buckets, of_stage)
        turns = [sum(of_sources) for of_sources in shares]
        batched = []
        for bucket, of_sources, begin in zip(buckets, shares, taken, strict=True):
            if not sum(of_sources):
                continue
            ranges = map(grain.MapDataset.range, bucket.bounds, bucket.bounds[1:])
            numbers = _endless(list(ranges), of_sources if of_stage else (), seed, begin)
            if bucket.random:
                # An index's random numbers are those of its stage.
                rows = numbers.seed(seed + number).random_map(bucket.row)
                rows = rows.batch(batch_size // hosts)
            else:  # Grain's overhead per row exceeds the row's own time.
                rows = numbers.batch(batch_size // hosts).map(functools.partial(_made, bucket))
            batched.append(rows[host::hosts])
        kept = [turn for turn in turns if turn]
        part = batched[0] if len(batched) == 1 else grain.MapDataset.mix(batched, kept)
        count = firsts[number + 1] - firsts[number]
        parts.append(part if number == len(stages) else part[:count])
        if number < len(stages):
            of_buckets = _taken(turns, count)
            for begin, of_sources, batches in zip(taken, shares, of_buckets, strict=True):
                more = _taken(of_sources, batches * batch_size)
                begin[:] = [rows + further for rows, further in zip(begin, more, strict=True)]
    dataset = parts[0] if len(parts) == 1 else grain.MapDataset.concatenate(parts)
    return iter(dataset.to_iter_dataset(READ_OPTIONS))


def made_batches(
    make: Callable[[np.random.Generator], Batch], *, seed: int
) -> grain.DatasetIterator:
    """An endless iterator of batches, each made by `make` from a random generator of its own."""
    numbers = grain.MapDataset.range(ENDLESS).seed(seed)
    made = numbers.random_map(lambda _, generator: make(generator))
    return iter(made.to_iter_dataset(READ_OPTIONS))


def streamed_batches(
    sources: Sources,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    data: DataConfig,
    context_length: int,
    *,
    batch_size: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
) -> grain.DatasetIterator:
    """Like `training_batches`, tokenised on the fly: documents are shuffled, encoded and packed.

    Every host encodes all documents and keeps its rows, so that here too the batches do not depend
    on the number of hosts. Weights are shares of the documents. Pairs longer than `context_length`
    are left out, the others padded to it.
    """
    _check_hosts(batch_size, hosts)
    rows = batch_size // hosts
    # Two epochs of the source with the smallest share.
    shares = [weight / sum(data.weights) for weight in data.weights]
    patience = 2 * sum(map(len, sources.train)) / min(shares, default=1)

    def of_host(batch: Batch) -> Batch:
        return batch.apply(lambda array: array[host * rows : (host + 1) * rows])

    if sources.train_targets:
        parts = zip(sources.train, sources.train_targets, strict=True)
        encoded = [grain.MapDataset.source(_EncodedPairs(tokenizer, *pair)) for pair in parts]
        dataset = _endless(encoded, data.weights, seed)
        fitting = dataset.filter(
            _Fitting(lambda pair: all(0 < len(text) < context_length for text in pair), patience)
        )
        streamed = fitting.to_iter_dataset(READ_OPTIONS)
    else:
        framed = data.packing == "first_fit" and data.objective != "causal"
        end = None if framed else tokenizer.end_token
        each = (_Encoded(tokenizer, documents, end) for documents in sources.train)
        encoded = [grain.MapDataset.source(documents) for documents in each]
        dataset = _endless(encoded, data.weights, seed)
        fewest = 2 if data.objective == "causal" and data.packing == "first_fit" else 1
        fitting = dataset.filter(_Fitting(lambda tokens: len(tokens) >= fewest, patience))
        streamed = _packed(fitting, data, context_length, vocabulary)
    finish = finisher(data, context_length, vocabulary)
    batches = streamed.seed(seed).random_map(finish).batch(batch_size).map(of_host)
    return _Streamed(iter(batches))


class _Fitting:
    """Whether an element is usable; raises after `most` unusable ones, instead of searching on."""

    def __init__(self, fits: Callable[[Any], bool], most: float):
        self._fits = fits
        self._most = most
        self._missed = 0

    def __call__(self, element: Any) -> bool:
        fits = self._fits(element)
        self._missed = 0 if fits else self._missed + 1
        if self._missed > self._most:
            raise InputError("data.source: no training document is usable for a row.")
        return fits


class _Streamed(grain.DatasetIterator[Batch]):
    """Accepts a state that went through JSON, which turns the tuples Grain needs into lists."""

    def __init__(self, batches: grain.DatasetIterator):
        super().__init__(batches)
        self._batches = batches

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(_with_tuples(state))


def _with_tuples(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _with_tuples(value) for name, value in state.items()}
    return tuple(map(_with_tuples, state)) if isinstance(state, list | tuple) else state


def _made(bucket: Bucket, numbers: np.ndarray) -> Batch:
    return Batch.stack([bucket.row(number) for number in numbers.tolist()])


def _check_hosts(batch_size: int, hosts: int) -> None:
    if batch_size % hosts:
        raise InputError(
            f"train.batch_size is {batch_size}: it must be a multiple of the {hosts} hosts."
        )


def _endless(
    sources: Sequence[grain.MapDataset],
    weights: Sequence[float],
    seed: int,
    begin: Sequence[int] | None = None,
) -> grain.MapDataset:
    """The elements of the sources, shuffled and repeated without end.

    With weights, each source without the first `begin` of its elements.
    """
    if weights:
        each, kept = [], []
        firsts = begin or [0] * len(sources)
        for source, weight, first in zip(sources, weights, firsts, strict=True):
            if weight and len(source):
                repeated = _repeated(source.seed(seed).shuffle())
                each.append(repeated[first:] if first else repeated)
                kept.append(weight)
        return grain.MapDataset.mix(each, kept)
    return _repeated(grain.MapDataset.concatenate(sources).seed(seed).shuffle())


def _repeated(dataset: grain.MapDataset) -> grain.MapDataset:
    return dataset.repeat(-(-ENDLESS // len(dataset)))


def _taken(weights: Sequence[float], count: int) -> list[int]:
    """How many of the first `count` elements of Grain's mixture are of each source."""
    labelled = {
        number: grain.MapDataset.range(ENDLESS).map(functools.partial(_labelled, number))
        for number, weight in enumerate(weights)
        if weight
    }
    if not labelled:
        return [0] * len(weights)
    mixed = grain.MapDataset.mix([*labelled.values()], [weight for weight in weights if weight])
    taken: dict[int, int] = {}
    while len(taken) < len(labelled):  # The next element of a source tells how many were before.
        number, index = cast(tuple[int, int], mixed[count])
        taken.setdefault(number, index)
        count += 1
    return [taken.get(number, 0) for number in range(len(weights))]


def _labelled(number: int, index: int) -> tuple[int, int]:
    return number, index


def _shares(buckets: Sequence[Bucket], weights: Sequence[float]) -> list[list[float]]:
    """[buckets][sources]: shares of rows, by size or, within each source, of its weight."""
    sizes = np.array([[len(source) for source in bucket.sources] for bucket in buckets], float)
    if weights:
        sizes = sizes / sizes.sum(axis=0) * weights
    return sizes.tolist()


class _Encoded:
    """The tokens of documents, encoded on access."""

    def __init__(self, tokenizer: Tokenizer, documents: Documents, end: int | None):
        self._tokenizer = tokenizer
        self._documents = documents
        self._end = np.array([] if end is None else [end], np.int32)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> np.ndarray:
        text = self._documents[index]
        (tokens,) = self._tokenizer.encode_documents([text])
        return np.append(tokens, self._end) if text else tokens


class _EncodedPairs:
    """The tokens of documents and their targets, encoded on access."""

    def __init__(self, tokenizer: Tokenizer, source: Documents, target: Documents):
        self._tokenizer = tokenizer
        self._source = source
        self._target = target

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        texts = [self._source[index], self._target[index]]
        source, target = self._tokenizer.encode_documents(texts)
        return source, target


def _packed(
    documents: grain.MapDataset, data: DataConfig, context_length: int, vocabulary: Vocabulary
) -> grain.IterDataset:
    """Windows or packed rows of streamed documents, as `finisher` takes them."""
    length, overlap = window(data, context_length)
    if data.packing == "split":
        whole = documents.map(lambda tokens: {"tokens": tokens}).to_iter_dataset(READ_OPTIONS)
        parts = ConcatThenSplitIterDataset(whole, length_struct={"tokens": length - overlap})
        return _Overlapping(parts.map(lambda row: row["tokens"]), overlap)
    frame = (
        None
        if data.objective == "causal"
        else (vocabulary.needed("begin"), vocabulary.needed("end"))
    )
    pieces = FlatMapIterDataset(
        documents.to_iter_dataset(READ_OPTIONS), _Pieces(length, overlap, frame)
    )
    rows = FirstFitPackIterDataset(
        pieces,
        length_struct={"tokens": context_length, "targets": context_length},
        num_packing_bins=OPEN_ROWS,
    )
    names = ("tokens", "targets", "tokens_segment_ids", "tokens_positions")
    return rows.map(lambda row: PackedTokens(*(row[name] for name in names)))


class _Overlapping(grain.IterDataset[np.ndarray]):
    """Each part of a text, followed by the first `overlap` tokens of the next."""

    def __init__(self, parts: grain.IterDataset[np.ndarray], overlap: int):
        super().__init__(parts)
        self._overlap = overlap

    def __iter__(self) -> "_OverlappingIterator":
        return _OverlappingIterator(iter(self._parent), self._overlap)


class _OverlappingIterator(grain.DatasetIterator[np.ndarray]):
    """Reads one part ahead; its state is the position of the part it returns next."""

    def __init__(self, parts: grain.DatasetIterator[np.ndarray], overlap: int):
        super().__init__(parts)
        self._overlap = overlap
        self._position = parts.get_state()
        self._part: np.ndarray | None = None

    def __next__(self) -> np.ndarray:
        part = next(self._parent) if self._part is None else self._part
        self._position = self._parent.get_state()
        self._part = following = next(self._parent)
        return np.concatenate([part, following[: self._overlap]])

    def get_state(self) -> dict[str, Any]:
        return self._position

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)
        self._position, self._part = state, None


class _Pieces(FlatMapTransform):
    """Cuts a document into pieces that fit a row, as `packing.PackedRows` does."""

    def __init__(self, length: int, overlap: int, frame: tuple[int, int] | None):
        self._length = length
        self._overlap = overlap
        self._frame = frame

    def flat_map(self, element: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The pieces of a document's tokens."""
        whole = np.zeros(1, int), np.array([len(element)])
        found = cut(*whole, self._length, overlap=self._overlap)
        pieces = []
        for start, length in zip(*found, strict=True):
            piece = element[start : start + length]
            if self._frame is None:
                pieces.append({"tokens": piece[:-1], "targets": piece[1:]})
            else:
                framed = np.concatenate([self._frame[:1], piece, self._frame[1:]])
                pieces.append({"tokens": framed, "targets": framed})
        return pieces


class EvaluationBatches:
    """All rows once, in order; the last batch of each shape is filled up with rows of weight 0.

    Each batch has the rows of one of the `hosts`, which must divide `batch_size`.

    Raises:
      InputError: hosts that do not divide the batch.
    """

    def __init__(self, buckets: Sequence[Bucket], batch_size: int, host: int = 0, hosts: int = 1):
        _check_hosts(batch_size, hosts)
        self._rows = batch_size // hosts
        self._first = host * self._rows
        self._batches = [
            (bucket, range(first, min(first + batch_size, len(bucket))))
            for bucket in buckets
            for first in range(0, len(bucket), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        bucket, numbers = self._batches[index]
        own = numbers[self._first : self._first + self._rows]
        rows = [bucket.row(number, np.random.default_rng(number)) for number in own or numbers[:1]]
        blank = rows[0]._replace(loss_weights=np.zeros_like(rows[0].loss_weights))
        return Batch.stack(rows[: len(own)] + [blank] * (self._rows - len(own)))
