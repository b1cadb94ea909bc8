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
    ) -> tuple[jax.Array, jax.Array, KVCache | None]:
        """Attend from x to x, or to the cache with x written into it.

        Args:
          x: [B, T, D].
          mask: [T, S], True where a query may look; S is T, or the cache's length.
          angles: [T, H / 2], the rotary angles of x's positions; None rotates nothing.
          cache: keys and values of the earlier tokens.
          position: where x's first token belongs in the cache.
          key: dropout key; None drops nothing.

        Returns:
          The output [B, T, D], the attention weights [B, N, T, S], and the cache with x in it.
        """
        queries, keys, values = self.query(x), self.key(x), self.value(x)
        if angles is not None:
            queries, keys = rotate(queries, angles), rotate(keys, angles)
        if cache is not None:
            cache = cache.write(keys, values, position)
            keys, values = cache
        weights = attention_weights(queries, keys, mask)
        mixture = mix(dropout(weights, self.dropout, key), values)
        return self.output(mixture), weights, cache
