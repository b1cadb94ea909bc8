"""The key/value cache: keys and values of earlier tokens, kept between decoding steps."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class KVCache(NamedTuple):
    """Keys and values; in decoding, of all tokens so far. Stacked over layers, L comes first."""

    key: Float[Array, "*L B S K H"]
    value: Float[Array, "*L B S K H"]

    def write(self, new: "KVCache", index: Int[Array, "*B"] | int) -> "KVCache":
        """One layer's cache with `new` [B, T, K, H] written from slot `index` on.

        The slot is a scalar, or one per row [B].
        """
        batch, _, heads, _ = self.key.shape
        indices = jnp.repeat(jnp.broadcast_to(index, batch), heads)

        def write_rows(slots: jax.Array, new: jax.Array) -> jax.Array:
            # XLA multiplies batch and heads as one axis; if they were two here, it would copy the
            # whole cache for its products on a CPU.
            slots, new = (
                x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (slots, new)
            )
            update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
            written = jax.vmap(update)(slots, new, indices)
            return written.reshape(batch, heads, *written.shape[1:]).swapaxes(1, 2)

        return KVCache(write_rows(self.key, new.key), write_rows(self.value, new.value))

    def resized(self, slots: int) -> "KVCache":
        """The cache [..., K, S, H] with `slots` slots: its first ones, or zeros after its own."""

        def resized(leaf: jax.Array) -> jax.Array:
            missing = max(slots - leaf.shape[-2], 0)
            kept = leaf[..., :slots, :]
            return jnp.pad(kept, [*[(0, 0)] * (leaf.ndim - 2), (0, missing), (0, 0)])

        return KVCache(resized(self.key), resized(self.value))

    def swapped(self) -> "KVCache":
        """[B, S, K, H] ↔ [B, K, S, H], the layout in which a cache is stored, free of copies in
        products."""
        return KVCache(self.key.swapaxes(1, 2), self.value.swapaxes(1, 2))
