"""Tokens to batches: the batch at step n follows from the tokens, the sizes, the seed and n alone.

Text is cut into windows of `context` tokens that do not overlap, so that an epoch predicts every
token once, but for a rest shorter than a window; each epoch has its own order.
"""

import hashlib
import math
from typing import NamedTuple

import grain
import numpy as np

from gptjax.config import DataConfig, InputError
from gptjax.data.batch import Batch
from gptjax.data.tokenizers import Tokenizer


class Corpus(NamedTuple):
    """A tokenised text in its two parts."""

    train: np.ndarray
    """Token ids, int32."""
    validation: np.ndarray
    """Token ids, int32; the text's last part."""
    validation_bytes: int
    """UTF-8 bytes of the validation tokens that are predicted: all but the first."""
    fingerprint: str
    """SHA-256 of the text: another text is another run."""


def bits_per_byte(corpus: Corpus, loss: float) -> float:
    """A validation loss in nats a token as bits a byte, which no tokenizer can flatter."""
    predictions = len(corpus.validation) - 1
    return loss * predictions / corpus.validation_bytes / math.log(2)


def tokenize(text: str, tokenizer: Tokenizer, config: DataConfig, context: int) -> Corpus:
    """Split `text` by characters, the first part for training, and encode both parts.

    Raises:
      InputError: a part too short for one window of `context` tokens.
    """
    border = int(len(text) * (1 - config.validation_fraction))
    train, validation = tokenizer.encode(text[:border]), tokenizer.encode(text[border:])
    if len(train) <= context:
        raise InputError(
            f"The training part has {len(train)} tokens; a context of {context} needs at least "
            f"{context + 1}."
        )
    if len(validation) < 2:
        raise InputError(
            f"The validation part (data.validation_fraction {config.validation_fraction}) has "
            f"{len(validation)} tokens; it needs at least 2."
        )
    # A first token that is not the text's beginning is the first byte of a longer character.
    first = tokenizer.decode(validation[:1])
    first_bytes = len(first.encode("utf-8")) if text.startswith(first, border) else 1
    validation_bytes = len(text[border:].encode("utf-8")) - first_bytes
    fingerprint = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return Corpus(train, validation, validation_bytes, fingerprint)


class Windows(grain.sources.RandomAccessDataSource):
    """Consecutive windows of `context` tokens and their successors, as unbatched `Batch`es."""

    def __init__(self, tokens: np.ndarray, context: int):
        self._tokens = tokens
        self._context = context

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._context

    def __getitem__(self, index: int) -> Batch:
        start = index * self._context
        window = self._tokens[start : start + self._context + 1]
        return Batch(window[:-1], window[1:], np.ones(self._context, np.float32))


def training_batches(
    tokens: np.ndarray, *, context: int, batch_size: int, seed: int
) -> grain.DatasetIterator:
    """Batches without end, shuffled anew each epoch.

    The iterator's `get_state()` is its place among the batches, and `set_state()` goes there.
    """
    windows = grain.MapDataset.source(Windows(tokens, context)).seed(seed).shuffle().repeat()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(windows.batch(batch_size).to_iter_dataset(options))


def evaluation_batches(tokens: np.ndarray, *, context: int, batch_size: int) -> list[Batch]:
    """All of `tokens`, each predicted once; the rest of the last batch is padding of weight 0."""
    predictions = len(tokens) - 1
    rows = -(-predictions // context)
    shape = (-(-rows // batch_size), batch_size, context)

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, math.prod(shape) - predictions)).reshape(shape)

    weights = padded(np.ones(predictions, np.float32))
    parts = zip(padded(tokens[:-1]), padded(tokens[1:]), weights, strict=True)
    return [Batch(*part) for part in parts]
