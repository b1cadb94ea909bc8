"""A batch of a training step."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # Grain's workers import this module, and must not start JAX.
    import jax

    Array = np.ndarray | jax.Array


class Batch(NamedTuple):
    """The arrays of one training step; NumPy's until the step takes them."""

    tokens: "Array"
    """[B, T], int32."""
    targets: "Array"
    """[B, T], int32: the token to predict at each position."""
    loss_weights: "Array"
    """[B, T], float32: how much each prediction counts in the loss; 0 on padding."""
    padding_mask: "Array | None" = None
    """[B, T], bool: False at padding, which is masked out as a key."""
    token_types: "Array | None" = None
    """[B, T], int32: BERT's segment of each token, A (0) or B (1)."""
    source: "Array | None" = None
    """[B, S], int32: the encoder's input."""
    source_mask: "Array | None" = None
    """[B, S], bool: False at the source's padding."""
    segment_ids: "Array | None" = None
    """[B, T], int32: the document of each token in a packed row, from 1, and 0 at padding; tokens
    attend within their own document."""
    positions: "Array | None" = None
    """[B, T], int32: the position of each token in its document."""
    next_sentence: "Array | None" = None
    """[B], int32: 0 where the second segment follows the first in the text, else 1 (BERT)."""

    @classmethod
    def causal(cls, rows: np.ndarray, weights: np.ndarray | None = None) -> "Batch":
        """A batch for next-token prediction from rows [B, T + 1] of tokens.

        `weights` [B, T] are the loss weights of tokens 1 … T; None is 1 for all.
        """
        rows = np.asarray(rows, np.int32)
        weights = np.ones(rows[:, 1:].shape) if weights is None else weights
        return cls(rows[:, :-1], rows[:, 1:], np.asarray(weights, np.float32))

    @classmethod
    def stack(cls, rows: "Sequence[Batch]") -> "Batch":
        """Stack rows, whose arrays lack the axis B, into a batch."""
        columns = zip(*rows, strict=True)
        arrays = [None if column[0] is None else np.stack(column) for column in columns]
        return cls._make(arrays)

    def apply(self, function: "Callable[[Array], Array]") -> "Batch":
        """The batch with `function` applied to each array."""
        return Batch._make(None if array is None else function(array) for array in self)

    def inputs(self) -> "dict[str, Array]":
        """The model's inputs other than tokens, by the names of its arguments."""
        given = {name: getattr(self, name) for name in INPUTS}
        return {name: array for name, array in given.items() if array is not None}


INPUTS = ("padding_mask", "token_types", "source", "source_mask", "segment_ids", "positions")
"""The fields of a `Batch` that are passed to a model by name."""
