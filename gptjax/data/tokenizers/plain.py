"""Byte and character tokenizers, without learned pieces."""

import json
from collections.abc import Iterable

import numpy as np

from gptjax.config import InputError
from gptjax.data.tokenizers.protocol import REPLACEMENT, Tokenizer
from gptjax.data.tokenizers.words import WordEdges, edges_of_text

BYTES = 256
NO_BYTE = 0xFF
"""Never occurs in UTF-8, so it decodes to U+FFFD."""
ENDS = b"end"
"""Saved content of bytes with an end token."""


class ByteTokenizer(Tokenizer):
    """The 256 bytes, and with `ends` an end token: any text, no training, no unknowns."""

    name = "bytes"

    def __init__(self, *, ends: bool = False):
        self.vocab_size = BYTES + ends
        if ends:
            self.special = {"end": BYTES}

    @classmethod
    def train(cls, text: str, *, ends: bool = False) -> "ByteTokenizer":
        """All bytes, whatever `text` contains."""
        return cls(ends=ends)

    @classmethod
    def from_saved(cls, content: bytes) -> "ByteTokenizer":
        """The tokenizer whose `save` returned `content`.

        Raises:
          ValueError: other content.
        """
        if content not in (b"", ENDS):
            raise ValueError("does not say whether bytes have an end token")
        return cls(ends=content == ENDS)

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes [T], int32."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of byte ids [T]."""
        end = self.end_token
        text = bytes(min(int(token), NO_BYTE) for token in tokens if token != end)
        return text.decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The byte itself."""
        return bytes([token]) if token < BYTES else b""

    def word_edges(self) -> WordEdges:
        """Which bytes join into words."""
        end = [b""] * (self.vocab_size - BYTES)
        return edges_of_text([*(bytes([byte]) for byte in range(BYTES)), *end])

    def save(self) -> bytes:
        """Whether there is an end token; nothing else is learned."""
        return ENDS if self.special else b""


class CharacterTokenizer(Tokenizer):
    """One token per character, in code point order, as in nanoGPT's character data set.

    With `ends`, plus an end token.
    """

    name = "characters"

    def __init__(self, characters: str, *, ends: bool = False):
        self.characters = characters
        self.vocab_size = len(characters) + ends
        if ends:
            self.special = {"end": len(characters)}
        self._points = np.array([ord(character) for character in characters], np.uint32)

    @classmethod
    def train(cls, text: str, *, ends: bool = False) -> "CharacterTokenizer":
        """The characters that occur in `text`."""
        return cls("".join(sorted(set(text))), ends=ends)

    @classmethod
    def from_saved(cls, content: bytes) -> "CharacterTokenizer":
        """The tokenizer whose `save` returned `content`.

        Raises:
          ValueError: other content.
        """
        try:
            saved = json.loads(content)
            characters = saved["characters"] if (ends := isinstance(saved, dict)) else saved
        except (ValueError, LookupError) as error:
            raise ValueError("does not hold the characters of a tokenizer") from error
        if not isinstance(characters, str):
            raise ValueError("does not hold the characters of a tokenizer")
        return cls(characters, ends=ends)

    def encode(self, text: str) -> np.ndarray:
        """Indices into the sorted characters [T], int32."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        indices = np.searchsorted(self._points, points).clip(max=len(self._points) - 1)
        unknown = np.flatnonzero(self._points[indices] != points)
        if unknown.size:
            character, at = chr(points[unknown[0]]), unknown[0]
            raise InputError(
                f"The tokenizer has no token for {character!r} (character {at} of the text): "
                f"it knows the {len(self._points)} characters of its training text."
            )
        return indices.astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids [T]."""
        known, end = self.characters, self.end_token
        return "".join(
            known[token] if token < len(known) else REPLACEMENT for token in tokens if token != end
        )

    def token_bytes(self, token: int) -> bytes:
        """The character in UTF-8, with lone surrogates passed through."""
        return self.decode([token]).encode("utf-8", "surrogatepass")

    def word_edges(self) -> WordEdges:
        """Which characters join into words."""
        # A text may have lone surrogates, which UTF-8 proper refuses.
        texts = [one.encode("utf-8", "surrogatepass") for one in self.characters]
        return edges_of_text([*texts, *[b""] * (self.vocab_size - len(texts))])

    def save(self) -> bytes:
        """The characters, as JSON; in an object where there is an end token, too."""
        saved = {"characters": self.characters} if self.special else self.characters
        return json.dumps(saved, ensure_ascii=False).encode("utf-8")
