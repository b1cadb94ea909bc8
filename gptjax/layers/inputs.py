"""What a forward pass takes, whatever the family of the model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from gptjax.layers.hooks import Capture, Interventions


class Inputs(NamedTuple):
    """Tokens, and all that may come with them; a family refuses what it has no use for."""

    tokens: jax.Array
    """[B, T]."""
    padding_mask: jax.Array | None = None
    """[B, T], False at padding, to which no token attends. With a cache only its last True counts,
    since slots behind a query are masked anyway."""
    segment_ids: jax.Array | None = None
    """[B, T], the document of each token in a packed row, 0 at padding; a token attends to its own
    document. The tokens of a document stand side by side. Not with a cache."""
    token_types: jax.Array | None = None
    """[B, T], BERT's segment A or B of each token; None is the first."""
    positions: jax.Array | None = None
    """[B, T], of each token in its document; None counts from `cache_index`."""
    source: jax.Array | None = None
    """[B, S], what an encoder reads; not needed with a cache, which holds its keys and values."""
    source_mask: jax.Array | None = None
    """[B, S], False at padding."""
    cache: Any = None
    """From `empty_cache`, for decoding; None attends within `tokens` alone."""
    cache_index: jax.Array | int = 0
    """The slot of the first token in the cache, a number or [B]."""
    key: jax.Array | None = None
    """Dropout key; None drops nothing."""
    capture: Capture = ()
    """Hook points to return (`gptjax.layers.hooks`); those not named are never kept. Or for each
    name what to keep of it: {"attention": lambda weights: weights[:, :1]}."""
    interventions: Interventions = None
    """By hook point, from `gptjax.probe`."""
    layers: Sequence[Any] | None = None
    """The blocks' parameters as `decoding_layers` gives them, where a caller that runs many times
    has them so; unrolled only."""
