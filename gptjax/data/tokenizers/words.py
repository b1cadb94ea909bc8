"""Word boundaries among tokens, from two tables over the vocabulary.

A token continues the word of the token before it if both allow it: the former joins to the left,
the latter to the right. Vocabularies that mark words are read by their marks:

| vocabulary | joins to the left | joins to the right |
|---|---|---|
| WordPiece | a piece that starts with ## | every piece |
| GPT-1's BPE | every piece | a piece that does not end in </w> |
| all others | a piece whose first character is a letter | one whose last character is one |

A letter here is a Unicode letter, mark or number. Any other token is a word of its own: a space, a
punctuation mark, and also a Chinese character, as in BERT (google-research/bert, tokenization.py).
Some tokens start or end within a multi-byte character: its parts stay together. If only its first
byte is known, a character counts as what most characters with that byte are; if only its last byte
is known, it counts as a letter, so that with bytes an "a" joins a non-ASCII sign before it.
"""

import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class WordEdges(NamedTuple):
    """Which tokens join into words."""

    before: np.ndarray
    """[V], bool: the token may continue the previous token's word."""
    behind: np.ndarray
    """[V], bool: the token's word may continue in the next token."""

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """[T] → [T], bool: whether each token starts a word; the first always does."""
        starts = np.ones(len(tokens), bool)
        starts[1:] = ~(self.before[tokens[1:]] & self.behind[tokens[:-1]])
        return starts


def edges_of_text(pieces: Iterable[bytes]) -> WordEdges:
    """The edges of tokens given as UTF-8 bytes, by the last row of the table above."""
    texts = [piece.decode("utf-8", "surrogateescape") for piece in pieces]
    before = [bool(text) and _opens_in_a_word(text[0]) for text in texts]
    behind = [bool(text) and _ends_in_a_word(text[-1]) for text in texts]
    return WordEdges(np.array(before, bool), np.array(behind, bool))


def _opens_in_a_word(character: str) -> bool:
    byte = _stray_byte(character)
    if byte is None:
        return _is_letter(character)
    # 0x80 to 0xBF continue a character. Chinese ones start with 0xE4 to 0xE9, and 0xC2, 0xE2,
    # 0xE3 and 0xEE or above start more signs than letters.
    return byte < 0xC0 or 0xC3 <= byte <= 0xE1 or 0xEA <= byte <= 0xED


def _ends_in_a_word(character: str) -> bool:
    return _stray_byte(character) is not None or _is_letter(character)


def _stray_byte(character: str) -> int | None:
    """The byte of an incomplete character, which `surrogateescape` maps to U+DC80 to U+DCFF."""
    point = ord(character)
    return point - 0xDC00 if 0xDC80 <= point <= 0xDCFF else None


def _is_letter(character: str) -> bool:
    """Whether `character` joins others into words."""
    if character.isascii():
        return character.isalnum()
    kind = unicodedata.category(character)[0]
    return kind in "LMN" and not unicodedata.name(character, "").startswith("CJK ")
