"""Dropout with an explicit key.

What is dropped follows from the key by counters: two random words of each row, drawn by JAX's
Threefry, are hashed with the index of the element in its row. So the mask is the same on every
platform and mesh, costs a tenth of a Threefry number per element, and a kernel that never holds a
whole row (gptjax/layers/attention/triton.py) computes its part of it, and that again backwards.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Key, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Which elements of an array [*rows, C] are dropped."""

    words: Any  # UInt32[Array, "2 *rows"], but a placeholder where JAX rebuilds a tree.
    """Random words of each row, uint32 [2, *rows]."""
    rate: float = dataclasses.field(metadata={"static": True})
    """The probability of being dropped, below 1."""

    @classmethod
    def drawn(cls, key: Key[Array, ""], shape: tuple[int, ...], rate: float) -> "Dropout":
        """That of an array of this shape."""
        return cls(jax.random.bits(key, (2, *shape[:-1]), jnp.uint32), rate)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """`x` [*rows, C] with the dropped elements zero, the others scaled by 1 / (1 - rate)."""
        first, second = self.words[..., None]
        keep = kept(first, second, jnp.arange(x.shape[-1]), self.rate)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def kept(
    first: UInt32[Array, "*#shape"],
    second: UInt32[Array, "*#shape"],
    column: Integer[Array, "*#shape"],
    rate: float,
) -> Bool[Array, "*shape"]:
    """Whether an element is kept, by the two words of its row and its index there.

    The hash is MurmurHash3's finalizer (Appleby 2011) of a Weyl sequence, as in SplitMix (Steele
    et al. 2014), with the second word added midway. Its last step, a shift to the right, is left
    out, since a comparison is decided by the high bits.
    """
    mixed = first + column.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B) + second
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return mixed >= jnp.uint32(rate * 2**32)


def dropout(
    x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "*shape"]:
    """Zero each element of `x` with probability `rate`, and scale the rest by 1 / (1 - rate).

    Without a key there is no dropout. Source: Srivastava et al. 2014, in the inverted form, which
    needs no scaling in evaluation.
    """
    return x if key is None or rate == 0 else Dropout.drawn(key, x.shape, rate)(x)


def split_key(key: Key[Array, ""] | None, count: int) -> tuple[Key[Array, ""] | None, ...]:
    """`count` independent keys; `count` times None if there is no key."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
