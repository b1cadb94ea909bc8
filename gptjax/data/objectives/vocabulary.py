"""A model's vocabulary: the tokenizer's tokens and the special tokens that an objective adds.

Bytes, characters, GPT-1's vocabulary and GPT-2's have no begin token, no mask token and no
sentinels; an objective that needs them gets ids from the tokenizer's `vocab_size` on, so that the
model has more rows than the tokenizer has tokens.

Padding needs no id: it is never attended to (`padding_mask` False) nor predicted (loss weight 0),
so that it holds 0, whichever token that is.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from gptjax.config import InputError, near_names
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.words import WordEdges

NAMES = ("begin", "end", "mask")
"""Tokens that may be added, in the order of their new ids; sentinels follow."""


class Vocabulary(NamedTuple):
    """A tokenizer's tokens and the added ones: V in all."""

    size: int
    """V, the rows of a model's embedding."""
    begin: int | None
    """Before a text, or an encoder-decoder's first input token; None unless requested."""
    end: int | None
    """After a text; None unless requested."""
    mask: int | None
    """Replaces a token that is to be predicted; None unless requested."""
    sentinels: tuple[int, ...]
    """Replace the first span that is to be predicted, the second, and so on."""
    special: np.ndarray
    """[V], bool: the token stands for no text. The unknown token does, and is not special."""
    ordinary: np.ndarray
    """int32, ascending ids of the tokens that stand for text."""
    edges: WordEdges
    """Which tokens join into words; special ones join none."""

    def word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """[T] → [T], bool: whether each token starts a word (tokenizers/words.py)."""
        return self.edges.starts(tokens)

    def needed(self, name: str) -> int:
        """The id of `name`, one of `NAMES`.

        Raises:
          InputError: a vocabulary made without it.
        """
        token = getattr(self, name)
        if token is None:
            raise InputError(f"The vocabulary was made without {name}, which is needed here.")
        return token


def vocabulary(tokenizer: Tokenizer, needed: Collection[str], sentinels: int = 0) -> Vocabulary:
    """The vocabulary of `tokenizer`, extended by what it lacks of `needed` (names in `NAMES`).

    T5 has its sentinels at the end of its tokenizer's vocabulary, the first one last; here they
    follow the vocabulary, in order, whether or not the tokenizer has some of its own.

    Raises:
      InputError: an unknown name, or a negative number of sentinels.
    """
    for name in needed:
        if name not in NAMES:
            raise InputError(f"Unknown special token {name!r}: {near_names(name, NAMES)}")
    if sentinels < 0:
        raise InputError(f"sentinels is {sentinels}; it must be at least 0.")
    size = tokenizer.vocab_size
    own, ids = dict(tokenizer.special), dict[str, int | None].fromkeys(NAMES)
    if "start" in own:
        own["begin"] = own["start"]
    for name in NAMES:
        if name in needed:
            ids[name] = own.get(name, size)
            size += ids[name] == size
    first, size = size, size + sentinels
    special = np.arange(size) >= tokenizer.vocab_size
    special[[token for name, token in tokenizer.special.items() if name != "unknown"]] = True
    # The added tokens join no word: their entries are False.
    added = (0, size - tokenizer.vocab_size)
    edges = WordEdges(*(np.pad(table, added) & ~special for table in tokenizer.word_edges()))
    return Vocabulary(
        size=size,
        begin=ids["begin"],
        end=ids["end"],
        mask=ids["mask"],
        sentinels=tuple(range(first, size)),
        special=special,
        ordinary=np.flatnonzero(~special).astype(np.int32),
        edges=edges,
    )
