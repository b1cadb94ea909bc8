"""Where the words of a text begin among its tokens, by two tables over the vocabulary.

A token continues the word of the token before it where both allow it: the former joins what lies
before it, and the latter what lies behind it. Where a vocabulary marks its words, the marks say so:

| vocabulary | joins what lies before it | joins what lies behind it |
|---|---|---|
| WordPiece | a piece that starts with ## | every piece |
| GPT-1's BPE | every piece | a piece that does not end in </w> |
| all others | a piece whose first character is a letter | one whose last character is one |

A letter is here what Unicode calls a letter, a mark or a number. All else is a word by itself,
token by token: a space, a sign, and a Chinese character too, as BERT has it (google-research/bert,
tokenization.py). Some tokens end within a character of several bytes, or begin there: its parts
stay together. From its first byte alone a character is taken for what most are that begin so; from
its last byte alone for a letter, whatever it was, so that bytes join an "a" to a sign before it
that is not ASCII.
"""

import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class WordEdges(NamedTuple):
    """Which tokens join which in a word."""

    before: np.ndarray
    """[V], bool: the token may continue the word of the token before it."""
    behind: np.ndarray
    """[V], bool: the token's word may go on in the token behind it."""

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """[T] → [T], bool: whether each token begins a word; the first one always does."""
        starts = np.ones(len(tokens), bool)
        starts[1:] = ~(self.before[tokens[1:]] & self.behind[tokens[:-1]])
        return starts


def edges_of_text(pieces: Iterable[bytes]) -> WordEdges:
    """The edges of tokens that are known by their bytes of UTF-8, as the last line of the table."""
    texts = [piece.decode("utf-8", "surrogateescape") for piece in pieces]
    before = [bool(text) and _opens_in_a_word(text[0]) for text in texts]
    behind = [bool(text) and _ends_in_a_word(text[-1]) for text in texts]
    return WordEdges(np.array(before, bool), np.array(behind, bool))


def _opens_in_a_word(character: str) -> bool:
    byte = _stray_byte(character)
    if byte is None:
        return _is_letter(character)
    # 0x80 to 0xBF go on with a character. The first bytes of Chinese ones are 0xE4 to 0xE9, and
    # 0xC2, 0xE2, 0xE3 and those from 0xEE on begin more signs than letters.
    return byte < 0xC0 or 0xC3 <= byte <= 0xE1 or 0xEA <= byte <= 0xED


def _ends_in_a_word(character: str) -> bool:
    return _stray_byte(character) is not None or _is_letter(character)


def _stray_byte(character: str) -> int | None:
    """The byte that is no whole character, which `surrogateescape` has as U+DC80 to U+DCFF."""
    point = ord(character)
    return point - 0xDC00 if 0xDC80 <= point <= 0xDCFF else None


def _is_letter(character: str) -> bool:
    """Whether a word may have `character` among others."""
    if character.isascii():
        return character.isalnum()
    kind = unicodedata.category(character)[0]
    return kind in "LMN" and not unicodedata.name(character, "").startswith("CJK ")
