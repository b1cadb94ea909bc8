"""Rows to batches: batch n is a function of the rows, the batch size, the seed and n.

Grain shuffles by an index permutation, so that step n is found without reading what precedes it,
and the iterator's state is small. The hosts of a run split each batch among them: their number
changes neither the batches nor their order.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import grain
import numpy as np

from gptjax.config import InputError
from gptjax.data.batch import Batch
from gptjax.data.corpus import Predicted
from gptjax.data.objectives.rows import Bucket

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
    check_hosts(batch_size, hosts)
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
            numbers = endless(list(ranges), of_sources if of_stage else (), seed, begin)
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


def _made(bucket: Bucket, numbers: np.ndarray) -> Batch:
    return Batch.stack([bucket.row(number) for number in numbers.tolist()])


def check_hosts(batch_size: int, hosts: int) -> None:
    """Check that each host has as many rows of a batch.

    Raises:
      InputError: hosts that do not divide the batch.
    """
    if batch_size % hosts:
        raise InputError(
            f"train.batch_size is {batch_size}: it must be a multiple of the {hosts} hosts."
        )


def endless(
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


class EvaluationBatches:
    """All rows once, in order; the last batch of each shape is filled up with rows of weight 0.

    Each batch has the rows of one of the `hosts`, which must divide `batch_size`.

    Raises:
      InputError: hosts that do not divide the batch.
    """

    def __init__(self, buckets: Sequence[Bucket], batch_size: int, host: int = 0, hosts: int = 1):
        check_hosts(batch_size, hosts)
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
