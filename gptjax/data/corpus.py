"""From a data config to training and validation rows."""

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from gptjax.config import DataConfig, InputError, TransformerConfig
from gptjax.data.objectives.pairs import bucket_lengths, pair_lengths, pair_rows
from gptjax.data.objectives.rows import (
    Bucket,
    joins_documents,
    objective_vocabulary,
    text_rows,
    window,
)
from gptjax.data.objectives.vocabulary import Vocabulary
from gptjax.data.sources import Documents, open_source
from gptjax.data.sources.protocol import EncodedDocuments
from gptjax.data.sources.text import Whole
from gptjax.data.storage.cache import open_store
from gptjax.data.storage.store import TokenStore
from gptjax.data.tokenizers import LEARNT, Tokenizer, train_tokenizer
from gptjax.data.tokenizers.protocol import REPLACEMENT

LEARNING_CHARACTERS = 1 << 26
"""About the most characters a tokenizer is trained on: evenly spaced documents of a larger text."""
SAMPLED_DOCUMENTS = 1000
"""Documents whose mean length estimates how many that is."""


class Sources(NamedTuple):
    """The opened sources of a run, and the targets of pairs."""

    train: list[Documents]
    train_targets: list[Documents]
    validation: list[Documents]
    validation_targets: list[Documents]

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all sources and targets."""
        each = [[documents.fingerprint for documents in part] for part in self]
        return hashlib.sha256(json.dumps(each).encode()).hexdigest()

    @property
    def several(self) -> bool:
        """Whether a part has more than one document; the pieces of a long file count as one."""
        counts = (sum(map(_texts, part)) for part in (self.train, self.validation))
        return max(counts) > 1


class Predicted(NamedTuple):
    """Size of the text that an evaluation predicts, for bits per byte."""

    tokens: int
    bytes: int
    """UTF-8 bytes of these tokens' text."""


class Corpus(NamedTuple):
    """A run's data."""

    train: list[Bucket]
    """Training rows, one bucket per shape; empty where text is tokenised on the fly."""
    validation: list[Bucket]
    """Held-out rows."""
    vocabulary: Vocabulary
    """The tokenizer's, extended by what the objective needs."""
    stores: list[TokenStore]
    """Training tokens, one store per source and then per target."""
    predicted: Predicted | None
    """For the validation part; None unless the objective predicts whole texts (causal)."""

    @property
    def train_tokens(self) -> int:
        """Number of training tokens; 0 where text is tokenised on the fly."""
        return sum(len(store.tokens) for store in self.stores)


def open_sources(data: DataConfig) -> Sources:
    """Open the sources, and hold out the last part of each for validation.

    A source of several documents is split between documents, a single document between characters.

    Raises:
      InputError: what `open_source` raises, pairs with different numbers of documents, or a source
        that cannot be split.
    """
    train, targets = _opened(data.source), _opened(data.target)
    validation, validation_targets = _opened(data.validation), _opened(data.validation_target)
    for sources, its_targets in (train, targets), (validation, validation_targets):
        for source, target in zip(sources, its_targets, strict=False):
            if len(source) != len(target):
                raise InputError(
                    f"data.target: {target.name} has {len(target)} documents where {source.name} "
                    f"has {len(source)}."
                )
    if validation:
        return Sources(train, targets, validation, validation_targets)
    for documents in train if targets else ():
        if len(documents) == 1:
            raise InputError(
                f"data.source: {documents.name} is a single document, and {data.objective} trains "
                "on some pairs and validates on others; see #documents=line."
            )
    split = [_split(documents, data) for documents in train]
    split_targets = [_split(documents, data) for documents in targets]
    first, last = ([pair[half] for pair in split] for half in (0, 1))
    first_targets, last_targets = ([pair[half] for pair in split_targets] for half in (0, 1))
    return Sources(first, first_targets, last, last_targets)


def learn_tokenizer(data: DataConfig, sources: Sources) -> Tokenizer:
    """The tokenizer that the config names, trained on the sources where it needs training.

    Bytes and characters get an end token where several documents are read one after another, or
    where their ends are predicted.

    Raises:
      InputError: see `train_tokenizer`.
    """
    kind, _, _ = data.tokenizer.partition(":")
    every = [documents for part in sources for documents in part]
    text = ""
    if kind == "characters":
        characters: set[str] = set()
        for documents in every:
            for number in range(len(documents)):
                characters.update(documents[number])
        text = "".join(sorted(characters))
    elif kind in LEARNT:
        text = "\n".join(text for documents in every for text in _sample(documents, len(every)))
    ends = sources.several and (joins_documents(data) or data.objective == "causal")
    return train_tokenizer(data.tokenizer, text, ends=ends)


def open_corpus(
    sources: Sources, tokenizer: Tokenizer, data: DataConfig, model: TransformerConfig
) -> Corpus:
    """Tokenise what is not in the cache yet, and cut it into rows.

    Raises:
      InputError: an objective the model cannot be trained on, a part that fills no row, and what
        `open_store` raises.
    """
    vocabulary = objective_vocabulary(data, model, tokenizer)
    if sources.several and joins_documents(data) and tokenizer.end_token is None:
        print(
            f"data.tokenizer: {tokenizer.name} has no end token, so that documents run together, "
            "each predicted from the one before it; take a tokenizer that has one, such as bpe:SIZE"
            " or gpt2:PATH, or for causal and masked_lm data.packing first_fit.",
            file=sys.stderr,
        )
    with _cache_directory(data.cache) as directory:

        def stores(part: Iterable[Documents]) -> list[TokenStore]:
            return [open_store(documents, tokenizer, directory) for documents in part]

        validation = stores(sources.validation)
        train = [] if data.streaming else stores(sources.train)
        targets = [] if data.streaming else stores(sources.train_targets)
        if data.objective == "sequence_to_sequence":
            edges = [model.context_length]
            if train:
                lengths = map(pair_lengths, train, targets)
                edges = bucket_lengths(
                    np.concatenate(list(lengths)), data.buckets, model.context_length
                )
            train_rows = pair_rows(train, targets, edges, vocabulary)
            validation_targets = stores(sources.validation_targets)
            validation_rows = pair_rows(validation, validation_targets, edges, vocabulary)
        else:
            train_rows = [text_rows(train, data, model.context_length, vocabulary)]
            validation_rows = [
                text_rows(validation, data, model.context_length, vocabulary, rest=True)
            ]
    _check_rows(train_rows, sources.train, train, "training", data, model.context_length)
    _check_rows(
        validation_rows, sources.validation, validation, "validation", data, model.context_length
    )
    predicted = None
    if data.objective == "causal":
        predicted = _predicted(validation, tokenizer, whole=data.packing == "split")
    return Corpus(train_rows, validation_rows, vocabulary, [*train, *targets], predicted)


class Text:
    """A text as a single document."""

    def __init__(self, text: str, name: str):
        self.name = name
        self.fingerprint = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self._text = text

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        return (self._text,)[index]


class Part:
    """A range of consecutive documents."""

    def __init__(self, documents: Documents, first: int, last: int):
        self.name = documents.name
        described = json.dumps([documents.fingerprint, first, last])
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
        self.whole = documents
        self._numbers = range(first, last)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> str:
        return self.whole[self._numbers[index]]

    @property
    def encoded_by(self) -> Tokenizer | None:
        """The tokenizer of the whole's tokens, if it has them (`EncodedDocuments`)."""
        return getattr(self.whole, "encoded_by", None)

    def tokens(self, index: int) -> np.ndarray:
        """The token ids of a document, of a whole that has them."""
        return cast(EncodedDocuments, self.whole).tokens(self._numbers[index])


def _texts(documents: Documents) -> int:
    """Number of texts; the pieces of a long file count as one."""
    whole = documents.whole if isinstance(documents, Part) else documents
    return 1 if isinstance(whole, Whole) and whole.is_one_file else len(documents)


def _opened(specs: Sequence[str]) -> list[Documents]:
    return [open_source(spec) for spec in specs]


def _split(documents: Documents, data: DataConfig) -> tuple[Documents, Documents]:
    """The training and the validation part."""
    if len(documents) == 1:
        text = documents[0]
        border = int(len(text) * (1 - data.validation_fraction))
        return Text(text[:border], documents.name), Text(text[border:], documents.name)
    border = int(len(documents) * (1 - data.validation_fraction))
    border = min(max(border, 1), len(documents) - 1)
    return Part(documents, 0, border), Part(documents, border, len(documents))


def _sample(documents: Documents, sources: int) -> Iterator[str]:
    """Evenly spaced documents: the share of one of `sources` in what a tokenizer is trained on."""
    few = np.linspace(0, len(documents) - 1, min(len(documents), SAMPLED_DOCUMENTS)).astype(int)
    mean = sum(len(documents[int(number)]) for number in few) / len(few)
    count = min(len(documents), int(LEARNING_CHARACTERS / sources / max(mean, 1)) + 1)
    numbers = np.linspace(0, len(documents) - 1, count).astype(int)
    return (documents[int(number)] for number in numbers)


@contextlib.contextmanager
def _cache_directory(cache: str) -> Iterator[Path]:
    """Directory of the token stores: permanent, or temporary if `cache` is empty."""
    if cache:
        yield Path(cache)
        return
    with tempfile.TemporaryDirectory(prefix="gptjax-") as directory:
        yield Path(directory)


def _check_rows(
    buckets: Sequence[Bucket],
    documents: Sequence[Documents],
    stores: Sequence[TokenStore],
    part: str,
    data: DataConfig,
    context_length: int,
) -> None:
    """Check that every source fills at least one row.

    Raises:
      InputError: one does not.
    """
    for number, store in enumerate(stores):
        if not any(len(bucket.sources[number]) for bucket in buckets):
            lacks = f"has no pair that fits a context of {context_length} tokens"
            if data.objective != "sequence_to_sequence":
                fewest = _fewest_tokens(data, context_length, rest=part == "validation")
                lacks = (
                    f"has {len(store.tokens)} tokens and fills no row; a context of "
                    f"{context_length} needs at least {fewest}"
                )
            raise InputError(f"data.source: the {part} part of {documents[number].name} {lacks}.")


def _fewest_tokens(data: DataConfig, context_length: int, *, rest: bool) -> str:
    """The fewest tokens that make a row, in words."""
    length, overlap = window(data, context_length)
    if data.packing == "first_fit":
        return f"{overlap + 1} in a document"
    return str(overlap + 1 if rest and data.objective in ("causal", "masked_lm") else length)


def _predicted(stores: Sequence[TokenStore], tokenizer: Tokenizer, *, whole: bool) -> Predicted:
    """What an evaluation predicts: all but the first token of each source or each document."""
    tokens = size = 0
    for store in stores:
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        for number, (starts, lengths) in enumerate(store.blocks()):
            first = starts[: number == 0] if whole else starts[lengths > 0]
            counts += np.bincount(store.tokens[first], minlength=len(counts))
        first_bytes = sum(
            int(counts[token]) * _bytes_of(int(token), tokenizer)
            for token in np.flatnonzero(counts)
        )
        tokens += len(store.tokens) - int(counts.sum())
        size += store.bytes - first_bytes
    return Predicted(tokens, size)


def _bytes_of(token: int, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of a token's text; part of a character counts as one."""
    text = tokenizer.decode([token])
    return 1 if REPLACEMENT in text else len(text.encode("utf-8"))
