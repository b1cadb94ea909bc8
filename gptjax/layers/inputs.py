"""The inputs of a forward pass, the same for all families of models."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree

from gptjax.layers.block import BlockCache
from gptjax.layers.hooks import Capture, Interventions
from gptjax.layers.lstm import LSTMState

Cache = BlockCache | LSTMState | Sequence[BlockCache] | Sequence[LSTMState]
"""The keys and values, or LSTM states, of all layers: stacked [L, ...] arrays if layers are
scanned, else one item per layer."""


class Inputs(NamedTuple):
    """Tokens and all optional inputs; a family refuses those that it does not take."""

    tokens: Int[Array | np.ndarray, "B T"]
    """Token ids."""
    padding_mask: Bool[Array | np.ndarray, "B T"] | None = None
    """False at padding, to which no token attends. With a cache only its last True counts, since
    slots after a query are masked anyway."""
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None
    """The document of each token in a packed row, 0 at padding; a token attends within its
    document. The tokens of a document are contiguous. Not with a cache."""
    token_types: Int[Array | np.ndarray, "B T"] | None = None
    """BERT's segment A or B of each token; None is the first."""
    positions: Int[Array | np.ndarray, "B T"] | None = None
    """The position of each token in its document; None counts from `cache_index`."""
    source: Int[Array | np.ndarray, "B S"] | None = None
    """The encoder's tokens; not needed with a cache, which holds its keys and values."""
    source_mask: Bool[Array | np.ndarray, "B S"] | None = None
    """False at padding of the source."""
    cache: Cache | None = None
    """From `empty_cache`, for decoding; None attends within `tokens` alone."""
    cache_index: Int[Array, "*B"] | int = 0
    """The cache slot of the first token, a scalar or one per row [B]."""
    key: Key[Array, ""] | None = None
    """Dropout key; None: no dropout."""
    capture: Capture = ()
    """Hook points to return (`gptjax.layers.hooks`); others are never stored. Or a mapping from
    names to functions whose results are kept: {"attention": lambda weights: weights[:, :1]}."""
    interventions: Interventions = None
    """By hook point, from `gptjax.probe`."""
    layers: Sequence[PyTree] | None = None
    """The parameters of each block as returned by `decoding_layers`, for callers that run the model
    many times; used by unrolled layers only."""
