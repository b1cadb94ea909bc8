"""Bytes and characters: tokenizers that learn no pieces."""

import json
from collections.abc import Iterable

import numpy as np

from gptjax.config import InputError
from gptjax.data.tokenizers.protocol import REPLACEMENT, Tokenizer
from gptjax.data.tokenizers.words import WordEdges, edges_of_text

NO_BYTE = 0xFF
"""Never occurs in UTF-8, so it decodes to U+FFFD."""


class ByteTokenizer(Tokenizer):
    """The 256 bytes: any text, no training, no unknowns."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes [T], int32."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of bytes [T]."""
        return bytes(min(int(token), NO_BYTE) for token in tokens).decode("utf-8", "replace")

    def word_edges(self) -> WordEdges:
        """Which bytes join which in a word."""
        return edges_of_text(bytes([byte]) for byte in range(self.vocab_size))

    def save(self) -> bytes:
        """Nothing is learnt, so nothing is kept."""
        return b""


class CharacterTokenizer(Tokenizer):
    """One token a character, in code point order, as nanoGPT's character data set has it."""

    name = "characters"

    def __init__(self, characters: str):
        self.characters = characters
        self.vocab_size = len(characters)
        self._points = np.array([ord(character) for character in characters], np.uint32)

    @classmethod
    def train(cls, text: str) -> "CharacterTokenizer":
        """The characters that occur in `text`."""
        return cls("".join(sorted(set(text))))

    @classmethod
    def from_saved(cls, content: bytes) -> "CharacterTokenizer":
        """The tokenizer whose `save` gave `content`.

        Raises:
          ValueError: other content.
        """
        try:
            characters = json.loads(content)
        except ValueError as error:
            raise ValueError("does not hold the characters of a tokenizer") from error
        if not isinstance(characters, str):
            raise ValueError("does not hold the characters of a tokenizer")
        return cls(characters)

    def encode(self, text: str) -> np.ndarray:
        """Places in the sorted characters [T], int32."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        places = np.searchsorted(self._points, points).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self._points[places] != points)
        if unknown.size:
            character, at = chr(points[unknown[0]]), unknown[0]
            raise InputError(
                f"The tokenizer has no token for {character!r} (character {at} of the text): "
                f"it knows the {self.vocab_size} characters of its training text."
            )
        return places.astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters of places [T]."""
        known = self.vocab_size
        return "".join(self.characters[token] if token < known else REPLACEMENT for token in tokens)

    def word_edges(self) -> WordEdges:
        """Which characters join which in a word."""
        # A text may have lone surrogates, which UTF-8 proper refuses.
        return edges_of_text(one.encode("utf-8", "surrogatepass") for one in self.characters)

    def save(self) -> bytes:
        """The characters, as JSON."""
        return json.dumps(self.characters, ensure_ascii=False).encode("utf-8")
