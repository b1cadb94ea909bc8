"""int8 weights, a byte each, for where reading the weights is what takes the time: decoding.

Symmetric, with one scale per output channel (Krishnamoorthi 2018, section 3.1): a weight is near
scale · q, with q a whole number from −127 to 127 and scale the channel's largest weight / 127. The
inputs of a product are rounded too, but to two digits of base 128, since what processors are fast
at is int8 times int8, of two rows or more.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8

LARGEST = 127
BASE = 128
"""Of the digits of an input."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Matrix:
    """The matrix of a linear layer, or of several stacked ones."""

    values: Int8[Array, "*L outputs inputs"]
    scale: Float32[Array, "*L outputs"]

    @classmethod
    def of(cls, matrix: Float[Array, "*L outputs inputs"]) -> "Int8Matrix":
        """The matrix, rounded."""
        scale = jnp.abs(matrix).max(axis=-1) / LARGEST
        units = jnp.where(scale == 0, 1, scale)[..., None]
        return cls(jnp.round(matrix / units).astype(jnp.int8), scale)

    def products(self, x: Float[Array, "*B inputs"]) -> Float32[Array, "*B outputs"]:
        """x Wᵀ.

        Beside float32's rounding it is off by at most Σ |x| · scale / 2 for the rounded weights and
        Σ |scale · q| · max |x| / 32,512 for the rounded x, summed over the inputs.
        """
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        unit = jnp.abs(rows).max(axis=1, keepdims=True) / (LARGEST * BASE)
        whole = jnp.round(rows / jnp.where(unit == 0, 1, unit))
        high = jnp.round(whole / BASE)
        digits = jnp.concatenate([high, whole - BASE * high]).astype(jnp.int8)
        by_row = (((1,), (1,)), ((), ()))
        products = jax.lax.dot_general(
            digits, self.values, by_row, preferred_element_type=jnp.int32
        )
        high, low = jnp.split(products.astype(jnp.float32), 2)
        return (unit * self.scale * (BASE * high + low)).reshape(*x.shape[:-1], -1)

    def rows(self, indices: Int[Array, "*shape"]) -> Float32[Array, "*shape inputs"]:
        """The rows of the matrix at `indices`."""
        return self.values[indices] * self.scale[indices][..., None]
