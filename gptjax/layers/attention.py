"""Attention: who may look where (masks), how much (weights), and what is then read (mixture).

Source: Vaswani et al. 2017, section 3.2. Masks are boolean, True where a query may look.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import TransformerConfig
from gptjax.layers.dropout import dropout
from gptjax.layers.linear import DEFAULT_STD, Linear
from gptjax.layers.positions import rotate


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, for decoding a token at a time."""

    key: jax.Array
    """[B, S, N, H], or [L, B, S, N, H] for a stack of layers."""
    value: jax.Array
    """As `key`."""

    def write(self, key: jax.Array, value: jax.Array, position: jax.Array | int) -> "KVCache":
        """The cache of one layer with `key` and `value` [B, T, N, H] at `position` onwards."""
        return KVCache(
            jax.lax.dynamic_update_slice_in_dim(self.key, key, position, axis=1),
            jax.lax.dynamic_update_slice_in_dim(self.value, value, position, axis=1),
        )


def causal_mask(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """[T] and [S] → [T, S]: a query sees the keys at its own position and before."""
    return query_positions[:, None] >= key_positions[None, :]


def attention_weights(query: jax.Array, key: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(Q Kᵀ / √H): query [B, T, N, H], key [B, S, N, H], mask [T, S] → [B, N, T, S] float32.

    Equation 1 of the paper without its last product; what `capture="attention"` shows.
    """
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    scores /= math.sqrt(query.shape[-1])
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)


def mix(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Each query's mixture of values: [B, N, T, S] and [B, S, N, H] → [B, T, N, H]."""
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(value.dtype), value)


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """`mix(attention_weights(query, key, mask), value)`, with its backward pass written out.

    Left to autodiff, XLA recomputes the softmax on a CPU inside the products of the backward pass.

    Args:
      query: [B, T, N, H].
      key: [B, S, N, H].
      value: [B, S, N, H].
      mask: [T, S], True where a query may look.

    Returns:
      [B, T, N, H].
    """
    return mix(attention_weights(query, key, mask), value)


def _attend_forward(query, key, value, mask):
    weights = attention_weights(query, key, mask)
    mixture = mix(weights, value)
    return mixture, (query, key, value, weights, mixture)


def _attend_backward(residuals, gradient):
    query, key, value, weights, mixture = residuals
    weights_gradient = jnp.einsum(
        "btnh,bsnh->bnts", gradient, value, preferred_element_type=jnp.float32
    )
    # Through the softmax: each row loses its mean gradient, Σ_s weights · weights_gradient, which
    # equals Σ_h mixture · gradient and is cheaper so.
    row_mean = jnp.einsum("btnh,btnh->bnt", mixture, gradient, preferred_element_type=jnp.float32)
    scores_gradient = weights * (weights_gradient - row_mean[..., None])
    scores_gradient = (scores_gradient / math.sqrt(query.shape[-1])).astype(query.dtype)
    return (
        jnp.einsum("bnts,bsnh->btnh", scores_gradient, key),
        jnp.einsum("bnts,btnh->bsnh", scores_gradient, query),
        jnp.einsum("bnts,btnh->bsnh", weights.astype(gradient.dtype), gradient),
        None,
    )


attend.defvjp(_attend_forward, _attend_backward)


class Attention(nnx.Module):
    """Multi-head self-attention with its four projections."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, heads = (config.width,), (config.heads, config.head_width)
        residual_std = DEFAULT_STD / math.sqrt(2 * config.depth)
        self.query = Linear(width, heads, bias=config.bias, rngs=rngs)
        self.key = Linear(width, heads, bias=config.bias, rngs=rngs)
        self.value = Linear(width, heads, bias=config.bias, rngs=rngs)
        self.output = Linear(heads, width, bias=config.bias, std=residual_std, rngs=rngs)
        self.dropout = config.dropout

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array,
        angles: jax.Array | None = None,
        cache: KVCache | None = None,
        position: jax.Array | int = 0,
        key: jax.Array | None = None,
        return_weights: bool = False,
    ) -> tuple[jax.Array, KVCache | None, jax.Array | None]:
        """Attend from x to x, or to the cache with x written into it.

        Args:
          x: [B, T, D].
          mask: [T, S], True where a query may look; S is T, or the cache's length.
          angles: [T, H / 2], the rotary angles of x's positions; None rotates nothing.
          cache: keys and values of the earlier tokens.
          position: where x's first token belongs in the cache.
          key: dropout key; None drops nothing.
          return_weights: whether the weights are asked for.

        Returns:
          The output [B, T, D], the cache with x in it, and the weights [B, N, T, S] if asked for.
        """
        queries, keys, values = self.query(x), self.key(x), self.value(x)
        if angles is not None:
            queries, keys = rotate(queries, angles), rotate(keys, angles)
        if cache is not None:
            cache = cache.write(keys, values, position)
            keys, values = cache
        drops = key is not None and self.dropout > 0
        if not (drops or return_weights):
            return self.output(attend(queries, keys, values, mask)), cache, None
        weights = attention_weights(queries, keys, mask)
        mixture = mix(dropout(weights, self.dropout, key), values)
        return self.output(mixture), cache, weights
