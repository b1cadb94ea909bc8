"""What a tokenizer is, and how its text streams."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np

from gptjax.data.tokenizers.words import WordEdges

REPLACEMENT = "\ufffd"
"""The character for what is no text."""


class Tokenizer(Protocol):
    """What the rest of gptjax asks of a tokenizer."""

    name: str
    """Its kind, and behind a colon the size that it was trained to."""
    vocab_size: int
    """Rows that a model needs for it (V): one more than the largest id."""
    special: Mapping[str, int] = MappingProxyType({})
    """Ids of the tokens that stand for no text, as far as the vocabulary has them.

    | name | token |
    |---|---|
    | begin | before a text: <s>, BERT's [CLS] |
    | end | behind a text: </s>, BERT's [SEP], GPT-2's <\\|endoftext\\|> |
    | pad | fills a row |
    | mask | hides a token that a masked language model is to find |
    | unknown | for what the vocabulary lacks |
    | start | an encoder-decoder writes it first, where that is not begin: Marian's <pad> |
    """
    declared: Mapping[str, int] = MappingProxyType({})
    """Those of `special` that only files beside the tokenizer's own name."""

    @property
    def end_token(self) -> int | None:
        """The token that ends a document; None where the vocabulary has none."""
        return self.special.get("end")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what `save` gives and of `declared`: equal fingerprints encode equally."""
        return fingerprint_of(self.save(), self.declared)

    def encode(self, text: str) -> np.ndarray:
        """Token ids [T], int32.

        What a user types is text: "</s>" or "<|endoftext|>" never becomes the special token.

        Raises:
          InputError: a character that the vocabulary lacks, and for which it has no unknown token.
        """
        ...

    def encode_prompt(self, text: str) -> np.ndarray:
        """Token ids [T], int32, of a text that is to be continued: nothing stands behind it.

        Raises:
          InputError: as `encode`.
        """
        return self.encode(text)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids [T], int32, of each text, without what a template puts around one.

        Raises:
          InputError: as `encode`.
        """
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids [T]; bytes that are not UTF-8 become U+FFFD.

        So do the unknown token and ids past the vocabulary, as a model may have more rows than the
        tokenizer has tokens. The other special tokens have no text.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """What a token below `vocab_size` stands for, which may be a part of a character."""
        ...

    def word_edges(self) -> WordEdges:
        """Which tokens join which in a word, as words.py has it; computed anew at each call.

        Of a special token it says nothing that counts.
        """
        ...

    def save(self) -> bytes:
        """All that `load_tokenizer` needs, as the content of one file."""
        ...


def fingerprint_of(learnt: bytes, declared: Mapping[str, int]) -> str:
    """The fingerprint of a tokenizer with this `save` and this `declared`."""
    beside = json.dumps(dict(declared), sort_keys=True).encode() if declared else b""
    return hashlib.sha256(learnt + beside).hexdigest()


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text as its tokens arrive; a character is held back until all its bytes are there.

    What ends in U+FFFD may be the beginning of a character, so it waits for the tokens after it.
    The tokens shown last are decoded again with those that follow, as some tokenizers put a space
    between words, and none before the first one.
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
