"""What a training step is given."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # Grain's workers import this module, and must not start JAX.
    import jax

    Array = np.ndarray | jax.Array


class Batch(NamedTuple):
    """What a step is given; the arrays are NumPy's until the step takes them."""

    tokens: "Array"
    """[B, T], int32."""
    targets: "Array"
    """[B, T], int32: the token to be predicted at each position."""
    loss_weights: "Array"
    """[B, T], float32: how much each prediction counts in the loss; 0 on padding."""
    padding_mask: "Array | None" = None
    """[B, T], False at padding, to which no token attends."""
    token_types: "Array | None" = None
    """[B, T], int32: BERT's segment A (0) or B (1) of each token."""
    source: "Array | None" = None
    """[B, S], int32: what an encoder-decoder reads."""
    source_mask: "Array | None" = None
    """[B, S], False at the source's padding."""
    segment_ids: "Array | None" = None
    """[B, T], int32: the document of each token in a packed row, from 1 on, and 0 at padding; a
    token attends to its own document."""
    positions: "Array | None" = None
    """[B, T], int32: of each token in its document."""
    next_sentence: "Array | None" = None
    """[B], int32: 0 where the second segment follows the first in the text, else 1 (BERT)."""

    @classmethod
    def causal(cls, rows: np.ndarray, weights: np.ndarray | None = None) -> "Batch":
        """Rows [B, T + 1] of tokens, each to be predicted from those before it.

        `weights` [B, T] are of the predictions of tokens 1 … T; None is 1 for all.
        """
        rows = np.asarray(rows, np.int32)
        weights = np.ones(rows[:, 1:].shape) if weights is None else weights
        return cls(rows[:, :-1], rows[:, 1:], np.asarray(weights, np.float32))

    @classmethod
    def stack(cls, rows: "Sequence[Batch]") -> "Batch":
        """Rows, whose arrays lack the axis B, as a batch."""
        columns = zip(*rows, strict=True)
        arrays = [None if column[0] is None else np.stack(column) for column in columns]
        return cls._make(arrays)

    def apply(self, function: "Callable[[Array], Array]") -> "Batch":
        """The batch with each of its arrays changed."""
        return Batch._make(None if array is None else function(array) for array in self)

    def inputs(self) -> "dict[str, Array]":
        """What the model is given beside the tokens, under its own names for it."""
        given = {name: getattr(self, name) for name in INPUTS}
        return {name: array for name, array in given.items() if array is not None}


INPUTS = ("padding_mask", "token_types", "source", "source_mask", "segment_ids", "positions")
"""The fields of a `Batch` that a model is given by name."""
