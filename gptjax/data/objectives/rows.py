"""Rows of a batch, for each objective.

| `data.objective` | a row reads | family |
|---|---|---|
| causal | T + 1 tokens; the last is only a target | decoder, recurrent |
| masked_lm | T - 2 tokens between `begin` and `end` | encoder |
| next_sentence | a piece of a document, half of the time with one from another | encoder |
| prefix | T tokens, split in two | encoder_decoder |
| span_corruption | as many tokens as make a source of at most T | encoder_decoder |
| sequence_to_sequence | a document and its target | encoder_decoder |
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, assert_never

import numpy as np

from gptjax.config import DataConfig, InputError, TransformerConfig
from gptjax.config.values import Family, Objective, exhaustive
from gptjax.data.batch import Batch
from gptjax.data.objectives.masking import FRAME, masked_lm, next_sentence
from gptjax.data.objectives.packing import (
    PIECE,
    PackedRows,
    PackedTokens,
    Pieces,
    Windows,
    cut,
    plan,
)
from gptjax.data.objectives.seq2seq import (
    prefix,
    span_corruption,
    span_input,
    span_lengths,
    span_sentinels,
    teacher_forcing,
)
from gptjax.data.objectives.vocabulary import Vocabulary, vocabulary
from gptjax.data.storage.cache import kept
from gptjax.data.storage.store import Mapped, TokenStore
from gptjax.data.tokenizers import Tokenizer

FAMILIES: dict[str, tuple[Family, ...]] = exhaustive(
    Objective,
    {
        "causal": ("decoder", "recurrent"),
        "masked_lm": ("encoder",),
        "next_sentence": ("encoder",),
        "prefix": ("encoder_decoder",),
        "span_corruption": ("encoder_decoder",),
        "sequence_to_sequence": ("encoder_decoder",),
    },
)
"""The families that can be trained on each objective."""

Finish = Callable[..., Batch]
"""(tokens read, rng if the objective is random) → a row of a batch: its arrays without axis B."""


class Bucket:
    """Rows of one shape, numbered consecutively over all sources."""

    def __init__(self, sources: Sequence[Any], finish: Finish, *, random: bool):
        """Take the sources' elements, `finish` to make a row of one, and whether it is random."""
        self.sources = sources
        self.random = random
        self._finish = finish
        self.bounds = [0, *itertools.accumulate(map(len, sources))]
        """The number of each source's first row, then the total."""

    def __len__(self) -> int:
        return self.bounds[-1]

    def row(self, number: int, rng: np.random.Generator | None = None) -> Batch:
        """Row `number`: the arrays of a batch without their axis B."""
        source = bisect.bisect_right(self.bounds, number) - 1
        element = self.sources[source][number - self.bounds[source]]
        return self._finish(element, rng) if self.random else self._finish(element)


class Window(NamedTuple):
    """The window of concatenated documents that a row reads."""

    length: int
    """Tokens."""
    overlap: int
    """Tokens that the next row reads again."""


def check_objective(data: DataConfig, model: TransformerConfig) -> None:
    """Check that the model can be trained on `data.objective`.

    Raises:
      InputError: it cannot.
    """
    families = FAMILIES[data.objective]
    if model.family not in families:
        fitting = [name for name, fits in FAMILIES.items() if model.family in fits]
        raise InputError(
            f"data.objective is {data.objective!r}, for {' or '.join(families)}: a model of the "
            f"family {model.family} takes {' or '.join(fitting)}."
        )
    if data.objective == "next_sentence" and (
        model.token_types < 2 or model.encoder_heads != "pretraining"
    ):
        raise InputError(
            "data.objective is 'next_sentence': the model needs model.token_types 2 and "
            f"model.encoder_heads pretraining, not {model.token_types} and {model.encoder_heads}."
        )


def joins_documents(data: DataConfig) -> bool:
    """Whether a row may span several documents."""
    apart = data.objective in ("next_sentence", "sequence_to_sequence")
    return data.packing == "split" and not apart


def objective_vocabulary(
    data: DataConfig, model: TransformerConfig, tokenizer: Tokenizer
) -> Vocabulary:
    """The tokenizer's vocabulary, extended by the special tokens that the objective needs.

    Raises:
      InputError: a model that cannot be trained on `data.objective`.
    """
    check_objective(data, model)
    match data.objective:
        case "causal":
            return vocabulary(tokenizer, ())
        case "masked_lm" | "next_sentence":
            return vocabulary(tokenizer, ("begin", "end", "mask"))
        case "sequence_to_sequence" | "prefix":
            return vocabulary(tokenizer, ("begin", "end"))
        case "span_corruption":
            length = window(data, model.context_length).length
            sentinels = span_sentinels(length, data.mask_rate, data.mean_span)
            return vocabulary(tokenizer, ("begin", "end"), sentinels)
        case unknown:
            assert_never(unknown)


def window(data: DataConfig, context_length: int) -> Window:
    """The window that a row reads.

    Raises:
      InputError: a context too short for the objective.
    """
    length, overlap = context_length, 0
    match data.objective:
        case "causal":
            length, overlap = context_length + 1, 1
        case "masked_lm":
            length = context_length - 2
        case "next_sentence":
            length = context_length - FRAME
        case "span_corruption":
            most = context_length - 1
            length = span_input(most, most, data.mask_rate, data.mean_span)
        case "sequence_to_sequence" | "prefix":
            pass
        case unknown:
            assert_never(unknown)
    if length - overlap < 1 or (data.objective in ("next_sentence", "prefix") and length < 2):
        raise InputError(
            f"model.context_length is {context_length}: too short for {data.objective}."
        )
    return Window(length, overlap)


def finisher(data: DataConfig, context_length: int, vocabulary: Vocabulary) -> Finish:
    """The function that makes a row from the tokens read."""
    masking = {"rate": data.mask_rate, "whole_words": data.whole_words}
    framed = {"vocabulary": vocabulary, "context_length": context_length}
    lengths = {"source_length": context_length, "target_length": context_length}
    match data.objective:
        case "causal":
            return functools.partial(causal_row, context_length=context_length)
        case "masked_lm":
            return functools.partial(masked_row, **framed, **masking)
        case "next_sentence":
            return functools.partial(pair_row, **framed, **masking)
        case "sequence_to_sequence":
            return functools.partial(translated_row, vocabulary=vocabulary, length=context_length)
        case "prefix":
            return functools.partial(split_row, vocabulary=vocabulary, split=prefix, **lengths)
        case "span_corruption":
            spans = {"rate": data.mask_rate, "mean_span": data.mean_span}
            read = window(data, context_length).length
            lengths["target_length"] = 1 + span_lengths(read, **spans)[1]
            split = functools.partial(span_corruption, vocabulary=vocabulary, **spans)
            return functools.partial(split_row, vocabulary=vocabulary, split=split, **lengths)
        case unknown:
            assert_never(unknown)


def causal_row(
    read: np.ndarray | PackedTokens, rng: np.random.Generator | None = None, *, context_length: int
) -> Batch:
    """Next-token prediction in a window [T + 1 or less] or within packed documents."""
    if isinstance(read, PackedTokens):
        weights = (read.segment_ids > 0).astype(np.float32)
        return Batch(
            read.tokens,
            read.targets,
            weights,
            segment_ids=read.segment_ids,
            positions=read.positions,
        )
    weights = np.ones(context_length, np.float32)
    lacking = context_length + 1 - len(read)
    if lacking:
        read, weights[context_length - lacking :] = np.pad(read, (0, lacking)), 0
    return Batch(read[:-1], read[1:], weights)


def masked_row(
    read: np.ndarray | PackedTokens,
    rng: np.random.Generator,
    *,
    vocabulary: Vocabulary,
    context_length: int,
    rate: float,
    whole_words: bool,
) -> Batch:
    """Masked language modelling of a window [T - 2 or less] or of packed documents."""
    packed = read if isinstance(read, PackedTokens) else framed(read, vocabulary, context_length)
    inputs, targets, weights = masked_lm(
        packed.tokens,
        rng,
        vocabulary=vocabulary,
        starts=vocabulary.word_starts(packed.tokens) if whole_words else None,
        rate=rate,
        frozen=packed.segment_ids == 0,
    )
    return Batch(
        inputs, targets, weights, segment_ids=packed.segment_ids, positions=packed.positions
    )


def pair_row(
    read: "tuple[int, DocumentPieces]",
    rng: np.random.Generator,
    *,
    vocabulary: Vocabulary,
    context_length: int,
    rate: float,
    whole_words: bool,
) -> Batch:
    """Next-sentence prediction: two parts of a piece, or its start and another document's piece."""
    number, pieces = read
    return next_sentence(
        pieces.tokens(number),
        pieces.tokens(pieces.of_another_document(number, rng)),
        rng,
        vocabulary=vocabulary,
        context_length=context_length,
        rate=rate,
        whole_words=whole_words,
    )


def split_row(
    read: np.ndarray,
    rng: np.random.Generator,
    *,
    vocabulary: Vocabulary,
    split: Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]],
    source_length: int,
    target_length: int,
) -> Batch:
    """A text that `split` turns into source and target, for teacher forcing."""
    source, target = split(read, rng)
    lengths = {"source_length": source_length, "target_length": target_length}
    return teacher_forcing(source, target, vocabulary=vocabulary, **lengths)


def translated_row(
    read: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator | None = None,
    *,
    vocabulary: Vocabulary,
    length: int,
) -> Batch:
    """A document and its target, both padded to `length`, for teacher forcing."""
    source, target = read
    lengths = {"source_length": length, "target_length": length}
    return teacher_forcing(source, target, vocabulary=vocabulary, **lengths)


def framed(tokens: np.ndarray, vocabulary: Vocabulary, context_length: int) -> PackedTokens:
    """A row of one piece between `begin` and `end`."""
    frame = vocabulary.needed("begin"), vocabulary.needed("end")
    return PackedRows(tokens, np.array([(0, len(tokens), 0)], PIECE), context_length, frame)[0]


def text_rows(
    stores: Sequence[TokenStore],
    data: DataConfig,
    context_length: int,
    vocabulary: Vocabulary,
    *,
    rest: bool = False,
) -> Bucket:
    """The rows of every objective but sequence_to_sequence.

    Args:
      stores: one for each source.
      data: says which rows.
      context_length: T.
      vocabulary: from `objective_vocabulary`.
      rest: whether an incomplete last row is kept, padded, where the objective allows it.
    """
    match data.packing:
        case "split":
            make = _document_pieces if data.objective == "next_sentence" else _windows
        case "first_fit":
            make = functools.partial(_packed, vocabulary=vocabulary)
        case unknown:
            assert_never(unknown)
    sources = [make(store, data, context_length, rest=rest) for store in stores]
    return Bucket(
        sources, finisher(data, context_length, vocabulary), random=data.objective != "causal"
    )


def _windows(store: TokenStore, data: DataConfig, context_length: int, *, rest: bool) -> Windows:
    length, overlap = window(data, context_length)
    rest = rest and data.objective in ("causal", "masked_lm")
    return Windows(store.tokens, length, length - overlap, rest=rest)


def _packed(
    store: TokenStore, data: DataConfig, context_length: int, *, vocabulary: Vocabulary, rest: bool
) -> PackedRows:
    """Rows of whole documents; `rest` has no effect, as any row may have padding."""
    length, overlap = window(data, context_length)
    causal = data.objective == "causal"
    frame = None if causal else (vocabulary.needed("begin"), vocabulary.needed("end"))

    def make() -> Iterator[np.ndarray]:
        # A causal model must predict a document's end; a frame has an end of its own.
        blocks = store.blocks(ends=causal)
        pieces = (cut(starts, lengths, length, overlap=overlap) for starts, lengths in blocks)
        return plan(pieces, context_length, context_length - length)

    planned = kept(store, f"rows-{data.objective}-{context_length}", PIECE, make)
    return PackedRows(store.tokens, planned, context_length, frame)


class DocumentPieces:
    """Pieces of documents, each of at least two tokens, for pairs of segments."""

    def __init__(self, tokens: Mapped, pieces: Pieces, document: np.ndarray):
        self._tokens = tokens
        self._pieces = pieces
        self._document = document

    def __len__(self) -> int:
        return len(self._document)

    def __getitem__(self, number: int) -> "tuple[int, DocumentPieces]":
        return number, self

    def tokens(self, number: int) -> np.ndarray:
        """A piece's tokens."""
        start, length = self._pieces.starts[number], self._pieces.lengths[number]
        return self._tokens[start : start + length].astype(np.int32)

    def of_another_document(self, number: int, rng: np.random.Generator) -> int:
        """The number of a random piece from another document than piece `number`."""
        own = self._document[number]
        first, last = (np.searchsorted(self._document, own, side) for side in ("left", "right"))
        drawn = rng.integers(len(self) - (last - first))
        return int(drawn if drawn < first else drawn + last - first)


def _document_pieces(
    store: TokenStore, data: DataConfig, context_length: int, *, rest: bool
) -> DocumentPieces:
    starts, lengths, documents = [], [], []
    most, first = window(data, context_length).length, 0
    for starting, sizes in store.blocks(ends=False):
        found = cut(starting, sizes, most)
        enough = found.lengths >= 2
        starts.append(found.starts[enough])
        lengths.append(found.lengths[enough])
        documents.append(first + np.searchsorted(starting, starts[-1], side="right"))
        first += len(starting)
    found = Pieces(np.concatenate(starts), np.concatenate(lengths))
    document = np.concatenate(documents)
    if len(np.unique(document)) < 2:
        raise InputError(
            "data.source: next_sentence needs two documents of two tokens and more in each part; "
            "see #documents=block."
        )
    return DocumentPieces(store.tokens, found, document)
