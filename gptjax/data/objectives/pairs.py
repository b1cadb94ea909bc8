"""Pairs of source and target documents, bucketed by length and padded to it."""

import functools
from collections.abc import Sequence

import numpy as np

from gptjax.config import InputError
from gptjax.data.objectives.rows import Bucket, translated_row
from gptjax.data.objectives.vocabulary import Vocabulary
from gptjax.data.storage.store import TokenStore

LENGTH_STEP = 8
"""Pairs are padded to multiples of it, which suit accelerators."""


class Pairs:
    """Tokens of source and target documents, by number."""

    def __init__(self, source: TokenStore, target: TokenStore, numbers: np.ndarray):
        self._source = source
        self._target = target
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        number = int(self._numbers[index])
        return self._source.document(number), self._target.document(number)


def pair_lengths(source: TokenStore, target: TokenStore) -> np.ndarray:
    """[N]: tokens that each pair needs, the end included; 0 where source or target is empty."""
    first, second = (
        np.concatenate([lengths for _, lengths in store.blocks(ends=False)])
        for store in (source, target)
    )
    return np.where((first > 0) & (second > 0), np.maximum(first, second) + 1, 0)


def bucket_lengths(lengths: np.ndarray, buckets: int, context_length: int) -> list[int]:
    """The lengths that pairs are padded to, each for about the same number of pairs.

    Raises:
      InputError: no pair fits the context.
    """
    fitting = lengths[(lengths > 0) & (lengths <= context_length)]
    if not fitting.size:
        raise InputError(f"data.source: no pair fits a context of {context_length} tokens.")
    shares = np.quantile(fitting, np.arange(1, buckets + 1) / buckets, method="higher")
    rounded = np.minimum(-(-shares // LENGTH_STEP) * LENGTH_STEP, context_length)
    return np.unique(rounded).astype(int).tolist()


def pair_rows(
    sources: Sequence[TokenStore],
    targets: Sequence[TokenStore],
    edges: Sequence[int],
    vocabulary: Vocabulary,
) -> list[Bucket]:
    """The rows of sequence_to_sequence, one bucket per length in `edges`."""
    buckets = []
    for shorter, length in zip([0, *edges], edges, strict=False):
        pairs = []
        for source, target in zip(sources, targets, strict=True):
            lengths = pair_lengths(source, target)
            numbers = np.flatnonzero((lengths > shorter) & (lengths <= length))
            pairs.append(Pairs(source, target, numbers))
        finish = functools.partial(translated_row, vocabulary=vocabulary, length=length)
        buckets.append(Bucket(pairs, finish, random=False))
    return buckets
