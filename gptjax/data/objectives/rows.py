"""What a row of a batch is made of, for each objective.

| `data.objective` | a row reads | family |
|---|---|---|
| causal | T + 1 tokens, the last one of which is only predicted | decoder, recurrent |
| masked_lm | T - 2 tokens between `begin` and `end` | encoder |
| next_sentence | a piece of a document, half of the time with one of another | encoder |
| prefix | T tokens, parted in two | encoder_decoder |
| span_corruption | as many tokens as leave a source of T | encoder_decoder |
| sequence_to_sequence | a document and what it is to become | encoder_decoder |
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
"""Which models can be asked what."""

Finish = Callable[..., Batch]
"""(what is read, randomness where it draws any) → a row of a batch: its arrays without axis B."""


class Bucket:
    """Rows of the same shape, numbered through one source after the other."""

    def __init__(self, sources: Sequence[Any], finish: Finish, *, random: bool):
        """Take what `finish` is given, by number of each source, and whether it draws anything."""
        self.sources = sources
        self.random = random
        self._finish = finish
        self.bounds = [0, *itertools.accumulate(map(len, sources))]
        """Of each source the number of its first row, and behind the last one's last."""

    def __len__(self) -> int:
        return self.bounds[-1]

    def row(self, number: int, rng: np.random.Generator | None = None) -> Batch:
        """A row: the arrays of a batch without their axis B."""
        source = bisect.bisect_right(self.bounds, number) - 1
        element = self.sources[source][number - self.bounds[source]]
        return self._finish(element, rng) if self.random else self._finish(element)


class Window(NamedTuple):
    """What a row reads of documents that stand one after another."""

    length: int
    """Tokens."""
    overlap: int
    """Tokens that the next row reads once more."""


def check_objective(data: DataConfig, model: TransformerConfig) -> None:
    """Refuse a model that cannot be asked `data.objective`.

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
    """Whether a row may run on from one document into the next."""
    apart = data.objective in ("next_sentence", "sequence_to_sequence")
    return data.packing == "split" and not apart


def objective_vocabulary(
    data: DataConfig, model: TransformerConfig, tokenizer: Tokenizer
) -> Vocabulary:
    """The tokenizer's tokens, and those that the objective needs beside them.

    Raises:
      InputError: a model that cannot be asked `data.objective`.
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
    """What a row reads.

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


def finisher(data: DataConfig, context_length: int, words: Vocabulary) -> Finish:
    """What makes a row of what was read."""
    masking = {"rate": data.mask_rate, "whole_words": data.whole_words}
    framed = {"words": words, "context_length": context_length}
    lengths = {"source_length": context_length, "target_length": context_length}
    match data.objective:
        case "causal":
            return functools.partial(causal_row, context_length=context_length)
        case "masked_lm":
            return functools.partial(masked_row, **framed, **masking)
        case "next_sentence":
            return functools.partial(pair_row, **framed, **masking)
        case "sequence_to_sequence":
            return functools.partial(translated_row, words=words, length=context_length)
        case "prefix":
            return functools.partial(parted_row, words=words, part=prefix, **lengths)
        case "span_corruption":
            spans = {"rate": data.mask_rate, "mean_span": data.mean_span}
            read = window(data, context_length).length
            lengths["target_length"] = 1 + span_lengths(read, **spans)[1]
            part = functools.partial(span_corruption, vocabulary=words, **spans)
            return functools.partial(parted_row, words=words, part=part, **lengths)
        case unknown:
            assert_never(unknown)


def causal_row(
    read: np.ndarray | PackedTokens, rng: np.random.Generator | None = None, *, context_length: int
) -> Batch:
    """Each token predicts the next one: of a window [T + 1 or less], or within packed documents."""
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
    words: Vocabulary,
    context_length: int,
    rate: float,
    whole_words: bool,
) -> Batch:
    """Masked tokens are to be found: of a window [T - 2 or less], or in packed documents."""
    packed = read if isinstance(read, PackedTokens) else framed(read, words, context_length)
    inputs, targets, weights = masked_lm(
        packed.tokens,
        rng,
        vocabulary=words,
        starts=words.word_starts(packed.tokens) if whole_words else None,
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
    words: Vocabulary,
    context_length: int,
    rate: float,
    whole_words: bool,
) -> Batch:
    """A piece of a document in two, or its beginning and a piece of another document."""
    number, pieces = read
    return next_sentence(
        pieces.tokens(number),
        pieces.tokens(pieces.of_another_document(number, rng)),
        rng,
        vocabulary=words,
        context_length=context_length,
        rate=rate,
        whole_words=whole_words,
    )


def parted_row(
    read: np.ndarray,
    rng: np.random.Generator,
    *,
    words: Vocabulary,
    part: Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]],
    source_length: int,
    target_length: int,
) -> Batch:
    """A text that `part` makes a source and a target of."""
    source, target = part(read, rng)
    lengths = {"source_length": source_length, "target_length": target_length}
    return teacher_forcing(source, target, vocabulary=words, **lengths)


def translated_row(
    read: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator | None = None,
    *,
    words: Vocabulary,
    length: int,
) -> Batch:
    """A document and what it is to become, both padded to `length`."""
    source, target = read
    lengths = {"source_length": length, "target_length": length}
    return teacher_forcing(source, target, vocabulary=words, **lengths)


def framed(tokens: np.ndarray, words: Vocabulary, context_length: int) -> PackedTokens:
    """A row of one piece, framed."""
    frame = words.needed("begin"), words.needed("end")
    return PackedRows(tokens, np.array([(0, len(tokens), 0)], PIECE), context_length, frame)[0]


def text_rows(
    stores: Sequence[TokenStore],
    data: DataConfig,
    context_length: int,
    words: Vocabulary,
    *,
    rest: bool = False,
) -> Bucket:
    """The rows of every objective but sequence_to_sequence.

    Args:
      stores: one for each source.
      data: says which rows.
      context: T.
      words: from `objective_vocabulary`.
      rest: whether what fills no row is a row with padding, where the objective allows it.
    """
    match data.packing:
        case "split":
            make = _document_pieces if data.objective == "next_sentence" else _windows
        case "first_fit":
            make = functools.partial(_packed, words=words)
        case unknown:
            assert_never(unknown)
    sources = [make(store, data, context_length, rest=rest) for store in stores]
    return Bucket(sources, finisher(data, context_length, words), random=data.objective != "causal")


def _windows(store: TokenStore, data: DataConfig, context_length: int, *, rest: bool) -> Windows:
    length, overlap = window(data, context_length)
    rest = rest and data.objective in ("causal", "masked_lm")
    return Windows(store.tokens, length, length - overlap, rest=rest)


def _packed(
    store: TokenStore, data: DataConfig, context_length: int, *, words: Vocabulary, rest: bool
) -> PackedRows:
    """Rows of whole documents; there is no rest, as padding is part of the rows."""
    length, overlap = window(data, context_length)
    causal = data.objective == "causal"
    frame = None if causal else (words.needed("begin"), words.needed("end"))

    def make() -> Iterator[np.ndarray]:
        # A causal model is to predict a document's end; a frame has an end of its own.
        blocks = store.blocks(ends=causal)
        pieces = (cut(starts, lengths, length, overlap=overlap) for starts, lengths in blocks)
        return plan(pieces, context_length, context_length - length)

    planned = kept(store, f"rows-{data.objective}-{context_length}", PIECE, make)
    return PackedRows(store.tokens, planned, context_length, frame)


class DocumentPieces:
    """Pieces of documents, each of at least two tokens, of which pairs are made."""

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
        """The number of a piece of another document than that of piece `number`."""
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
