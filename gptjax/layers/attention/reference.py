"""Scaled dot-product attention, softmax(Q Kᵀ / √H) V (Vaswani et al. 2017, equation 1).

With fewer key heads than query heads (K < N), N / K query heads share each key head (multi-query
attention, Shazeer 2019; grouped-query, Ainslie et al. 2023). `gptjax.certify` and
tests/layers/attention compare every faster implementation with this one.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from gptjax.config.values import AttentionNormalizer, exhaustive

MASKED = -1e30
"""The score of a masked key, whose weight is 0. Finite, to avoid NaN if all keys are masked."""


def attention_scores(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], scale: float
) -> Float32[Array, "B N T S"]:
    """scale · Q Kᵀ."""
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    return scale * scores.reshape(query.shape[0], query.shape[2], *scores.shape[3:])


def biased(
    scores: Float[Array, "B N T S"], bias: Float[Array, "#B N T S"] | None, softcap: float
) -> Float[Array, "B N T S"]:
    """Scores soft-capped (Gemma 2, 2024; 0: not), plus the position bias."""
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    return scores if bias is None else scores + bias


def masked_softmax(
    scores: Float[Array, "B N T S"], mask: Bool[Array, "#B #T S"] | None
) -> Float[Array, "B N T S"]:
    """softmax(scores) over the keys; 0 where `mask` is False."""
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, MASKED)
    return jax.nn.softmax(scores, axis=-1)


def masked_sigmoid(
    scores: Float[Array, "B N T S"], mask: Bool[Array, "#B #T S"] | None
) -> Float[Array, "B N T S"]:
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
"""Functions from scores and mask to attention weights."""


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #T S"] | None,
    bias: Float[Array, "#B N T S"] | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    normalize: Normalizer = masked_softmax,
) -> Float32[Array, "B N T S"]:
    """The attention weights, softmax(Q Kᵀ / √H).

    Args:
      query: queries.
      key: keys.
      mask: True where the query attends to the key; None masks nothing.
      bias: added to the scores.
      scale: of the scores; None is 1 / √H.
      softcap: scores become softcap · tanh(score / softcap); 0 leaves them.
      normalize: of `NORMALIZERS`, in place of the softmax.
    """
    scores = attention_scores(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    return normalize(biased(scores, bias, softcap), mask)


def weighted_values(
    weights: Float[Array, "B N T S"], value: Float[Array, "B S K H"]
) -> Float[Array, "B T N H"]:
    """Each head's weighted values (z)."""
    batch, heads, queries, keys = weights.shape
    grouped = weights.astype(value.dtype).reshape(batch, value.shape[2], -1, queries, keys)
    # If the einsum put the queries before the heads itself, XLA would transpose the values.
    z = jnp.einsum("bkgts,bskh->bkgth", grouped, value)
    return jnp.moveaxis(z, 3, 1).reshape(batch, queries, heads, -1)
