"""Dropout with an explicit key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def dropout(
    x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "*shape"]:
    """Zero each element of `x` with probability `rate`, and scale the rest by 1 / (1 - rate).

    Without a key there is no dropout. Source: Srivastava et al. 2014, in the inverted form, which
    needs no scaling in evaluation.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def split_key(key: Key[Array, ""] | None, count: int) -> tuple[Key[Array, ""] | None, ...]:
    """`count` independent keys; `count` times None if there is no key."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
