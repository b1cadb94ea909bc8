"""Dropout with an explicit key."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of `x` and scale the rest by 1 / (1 - rate); off without a key.

    Source: Srivastava et al. 2014, in the inverted form that leaves evaluation untouched.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, parts: int) -> tuple[jax.Array | None, ...]:
    """`parts` independent keys, or as many times no key."""
    return (None,) * parts if key is None else tuple(jax.random.split(key, parts))
