"""Attention as its paper has it: softmax(Q Kᵀ / √H) V (Vaswani et al. 2017, equation 1).

With fewer key heads than query heads (K < N), each key head serves N / K queries (Shazeer 2019;
Ainslie et al. 2023). Every faster implementation is held to this one, by `gptjax.certify` and by
tests/layers/attention.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.config.values import AttentionNormalizer, exhaustive

MASKED = -1e30
"""The score of a masked key: its weight is 0. Finite, so that a query without keys is not NaN."""


def attention_scores(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """scale · Q Kᵀ: query [B, T, N, H], key [B, S, K, H] → [B, N, T, S], float32."""
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    return scale * scores.reshape(query.shape[0], query.shape[2], *scores.shape[3:])


def biased(scores: jax.Array, bias: jax.Array | None, softcap: float) -> jax.Array:
    """Scores [B, N, T, S], capped softly (Gemma 2, 2024; 0 does not), plus the position bias."""
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    return scores if bias is None else scores + bias


def masked_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Scores [B, N, T, S] as weights; 0 where `mask` [B or 1, T, S] is False."""
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, MASKED)
    return jax.nn.softmax(scores, axis=-1)


def masked_sigmoid(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """σ(score - log n) for the n keys that the query attends to (Ramapuram et al. 2024, §3)."""
    if mask is None:
        return jax.nn.sigmoid(scores - math.log(scores.shape[-1]))
    keys = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    weights = jax.nn.sigmoid(scores - jnp.log(keys)[:, None])
    return jnp.where(mask[:, None], weights, 0)


Normalizer = Callable[[jax.Array, jax.Array | None], jax.Array]
"""(scores [B, N, T, S], mask [B or 1, T, S] or None) → weights [B, N, T, S]."""

NORMALIZERS: dict[str, Normalizer] = exhaustive(
    AttentionNormalizer, {"softmax": masked_softmax, "sigmoid": masked_sigmoid}
)
"""What makes weights of scores."""


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    normalize: Normalizer = masked_softmax,
) -> jax.Array:
    """softmax(Q Kᵀ / √H): equation 1 without its last product.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      mask: [B or 1, T, S], True where the query attends to the key; None masks nothing.
      bias: [B or 1, N, T, S], added to the scores.
      scale: of the scores; None is 1 / √H.
      softcap: scores become softcap · tanh(score / softcap); 0 leaves them.
      normalize: what makes weights of scores, of `NORMALIZERS`.

    Returns:
      [B, N, T, S], float32.
    """
    scores = attention_scores(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    return normalize(biased(scores, bias, softcap), mask)


def weighted_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Weights [B, N, T, S] times values [B, S, K, H] → [B, T, N, H], the heads' z."""
    batch, heads, queries, keys = weights.shape
    grouped = weights.astype(value.dtype).reshape(batch, value.shape[2], -1, queries, keys)
    # With the queries before the heads at once, XLA would transpose the values instead.
    z = jnp.einsum("bkgts,bskh->bkgth", grouped, value)
    return jnp.moveaxis(z, 3, 1).reshape(batch, queries, heads, -1)
