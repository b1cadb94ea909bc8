"""The key/value cache: keys and values of the tokens before, kept between steps of decoding."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Keys and values; in decoding, those of all tokens so far."""

    key: jax.Array
    """[B, S, K, H], or [L, B, S, K, H] for a stack of layers."""
    value: jax.Array
    """As `key`."""

    def write(self, new: "KVCache", index: jax.Array | int) -> "KVCache":
        """The cache of one layer with `new` [B, T, K, H] from slot `index` on, a number or [B]."""
        batch, _, heads, _ = self.key.shape
        indices = jnp.repeat(jnp.broadcast_to(index, batch), heads)

        def write_rows(slots: jax.Array, new: jax.Array) -> jax.Array:
            # Batch and heads as one axis are what XLA multiplies; with two, it would write the
            # whole cache once more for its products on a CPU.
            slots, new = (
                x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (slots, new)
            )
            update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
            written = jax.vmap(update)(slots, new, indices)
            return written.reshape(batch, heads, *written.shape[1:]).swapaxes(1, 2)

        return KVCache(write_rows(self.key, new.key), write_rows(self.value, new.value))

    def swapped(self) -> "KVCache":
        """[B, S, K, H] ↔ [B, K, S, H], which is how a cache is stored: products copy nothing."""
        return KVCache(self.key.swapaxes(1, 2), self.value.swapaxes(1, 2))
