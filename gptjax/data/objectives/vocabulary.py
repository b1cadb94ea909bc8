"""The tokens that a model needs beside those of its tokenizer.

Bytes, characters, GPT-1's vocabulary and GPT-2's have no token that begins a text, none that hides
one, and no sentinels; an objective that asks for them gets ids from the tokenizer's `vocab_size`
on, so that the model has more rows than the tokenizer has tokens.

Padding needs no id: a place with `valid` False is not looked at and one with weight 0 not
predicted, so that 0 stands there, whichever token that is.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from gptjax.config import InputError, near_names
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.words import WordEdges

NAMES = ("begin", "end", "mask")
"""What may be needed, in the order in which the missing ones get their ids; sentinels follow."""


class Vocabulary(NamedTuple):
    """A tokenizer's tokens and those that were added to them: V in all."""

    size: int
    """V, the rows that a model needs."""
    begin: int | None
    """Before a text, or what an encoder-decoder writes first; None where it was not asked for."""
    end: int | None
    """Behind a text; None likewise, as is the next one."""
    mask: int | None
    """In the place of a token that is to be found."""
    sentinels: tuple[int, ...]
    """In the place of the first span that is to be found, the second, and so on."""
    special: np.ndarray
    """[V], bool: the token stands for no text. The unknown token does: for text that it hides."""
    ordinary: np.ndarray
    """int32, ids in order: the tokens that stand for text."""
    edges: WordEdges
    """Which tokens join which in a word; a special one joins none."""

    def word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """[T] → [T], bool: whether each token begins a word (tokenizers/words.py)."""
        return self.edges.starts(tokens)

    def needed(self, name: str) -> int:
        """The id of `name`, one of `NAMES`.

        Raises:
          InputError: a vocabulary that was made without.
        """
        token = getattr(self, name)
        if token is None:
            raise InputError(f"The vocabulary was made without {name}, which is needed here.")
        return token


def vocabulary(tokenizer: Tokenizer, needed: Collection[str], sentinels: int = 0) -> Vocabulary:
    """The tokens of `tokenizer` and those that it lacks of `needed`, which are among `NAMES`.

    T5 has its sentinels at the end of its tokenizer's vocabulary, the first one last; here they
    come after it, in order, whether or not the tokenizer has some of its own.

    Raises:
      InputError: an unknown name, or fewer than no sentinels.
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
    # Only now, as a padding of the tables by False is what the added tokens need.
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
