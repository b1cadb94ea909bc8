"""The tokenizer protocol, and streaming of decoded text."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np

from gptjax.data.tokenizers.words import WordEdges

REPLACEMENT = "\ufffd"
"""The Unicode replacement character, for what cannot be decoded."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    """Its kind, and after a colon the size that it was trained to."""
    vocab_size: int
    """Vocabulary size (V): one more than the largest id."""
    special: Mapping[str, int] = MappingProxyType({})
    """Ids of the special tokens that the vocabulary has.

    | name | token |
    |---|---|
    | begin | before a text: <s>, BERT's [CLS] |
    | end | after a text: </s>, BERT's [SEP], GPT-2's <\\|endoftext\\|> |
    | pad | fills a row |
    | mask | replaces a token that a masked language model predicts |
    | unknown | for what the vocabulary lacks |
    | start | first input of an encoder-decoder's decoder, where not begin: Marian's <pad> |
    """
    declared: Mapping[str, int] = MappingProxyType({})
    """Those of `special` that are declared only in other files than the tokenizer's."""

    @property
    def end_token(self) -> int | None:
        """The token that ends a document; None where the vocabulary has none."""
        return self.special.get("end")

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of `save()` and `declared`: equal fingerprints encode equally."""
        return fingerprint_of(self.save(), self.declared)

    def encode(self, text: str) -> np.ndarray:
        """Token ids [T], int32.

        Text never yields special tokens, not even "</s>" or "<|endoftext|>".

        Raises:
          InputError: a character missing from a vocabulary without an unknown token.
        """
        ...

    def encode_prompt(self, text: str) -> np.ndarray:
        """Token ids [T], int32, of a text to be continued: without tokens after it.

        Raises:
          InputError: as `encode`.
        """
        return self.encode(text)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids [T], int32, of each text, without the template's tokens around it.

        Raises:
          InputError: as `encode`.
        """
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids [T]; bytes that are not UTF-8 become U+FFFD.

        So do the unknown token and ids beyond the vocabulary, since a model may have more rows than
        the tokenizer has tokens. The other special tokens decode to nothing.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token below `vocab_size`, possibly part of a character."""
        ...

    def word_edges(self) -> WordEdges:
        """Which tokens join into words (words.py); computed at each call.

        The entries of special tokens are meaningless.
        """
        ...

    def save(self) -> bytes:
        """The content of the one file that `load_tokenizer` reads it back from."""
        ...


def fingerprint_of(content: bytes, declared: Mapping[str, int]) -> str:
    """The fingerprint of a tokenizer with this `save()` and `declared`."""
    other = json.dumps(dict(declared), sort_keys=True).encode() if declared else b""
    return hashlib.sha256(content + other).hexdigest()


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yields text as its tokens arrive; a character is held back until all its bytes are there.

    Text that ends in U+FFFD may be the start of a character, so it waits for the next tokens. The
    tokens shown last are decoded again with those that follow, as some tokenizers put spaces
    between words but not before the first.
    """
    shown: list[int] = []
    held: list[int] = []
    text = ""
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(shown + held)[len(tokenizer.decode(shown)) :]
        if text and not text.endswith(REPLACEMENT):
            yield text
            shown, held, text = held, [], ""
    if text:
        yield text
