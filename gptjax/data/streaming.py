"""Batches tokenised on the fly (`data.streaming`): nothing is stored, and documents are shuffled.

Every host encodes all documents and keeps its rows, so that here too the batches do not depend on
the number of hosts.
"""

from collections.abc import Callable
from typing import Any

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
from gptjax.data.corpus import Sources
from gptjax.data.objectives.packing import OPEN_ROWS, PackedTokens, cut
from gptjax.data.objectives.rows import finisher, window
from gptjax.data.objectives.vocabulary import Vocabulary
from gptjax.data.pipeline import READ_OPTIONS, check_hosts, endless
from gptjax.data.sources import Documents
from gptjax.data.tokenizers import Tokenizer


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
    check_hosts(batch_size, hosts)
    rows = batch_size // hosts
    # Two epochs of the source with the smallest share.
    shares = [weight / sum(data.weights) for weight in data.weights]
    patience = 2 * sum(map(len, sources.train)) / min(shares, default=1)

    def of_host(batch: Batch) -> Batch:
        return batch.apply(lambda array: array[host * rows : (host + 1) * rows])

    if sources.train_targets:
        parts = zip(sources.train, sources.train_targets, strict=True)
        encoded = [grain.MapDataset.source(_EncodedPairs(tokenizer, *pair)) for pair in parts]
        dataset = endless(encoded, data.weights, seed)
        fitting = dataset.filter(
            _Fitting(lambda pair: all(0 < len(text) < context_length for text in pair), patience)
        )
        streamed = fitting.to_iter_dataset(READ_OPTIONS)
    else:
        framed = data.packing == "first_fit" and data.objective != "causal"
        end = None if framed else tokenizer.end_token
        each = (_Encoded(tokenizer, documents, end) for documents in sources.train)
        encoded = [grain.MapDataset.source(documents) for documents in each]
        dataset = endless(encoded, data.weights, seed)
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
