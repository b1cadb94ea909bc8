"""Matrices in the form that decoding reads, [outputs, inputs], rounded to int8 or not.

A token's products read a matrix once, and on a CPU fastest if what one output needs lies together.

int8 is a byte per weight where reading the weights is what takes the time. It is symmetric, with
one scale per output (Krishnamoorthi 2018, section 3.1): a weight is near scale · q, with q a whole
number from −127 to 127 and scale the output's largest weight / 127. The inputs of a product are
rounded too, but to two digits of base 128, since what processors are fast at is int8 times int8, of
two rows or more.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8

BY_ROW = (((1,), (1,)), ((), ()))
"""The axes of the product x Wᵀ."""
LARGEST = 127
BASE = 128
"""Of the digits of an input."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matrix:
    """The matrix of a linear layer, or of several stacked ones."""

    values: Float[Array, "*L outputs inputs"]

    @classmethod
    def of(cls, matrix: Float[Array, "*L outputs inputs"]) -> "Matrix":
        """The matrix as it is."""
        return cls(matrix)

    def products(self, x: Float[Array, "B inputs"]) -> Float[Array, "B outputs"]:
        """x Wᵀ, in the dtype of x."""
        return jax.lax.dot_general(x, self.values.astype(x.dtype), BY_ROW)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Matrix:
    """As `Matrix`, rounded to int8."""

    values: Int8[Array, "*L outputs inputs"]
    scale: Float32[Array, "*L outputs"]

    @classmethod
    def of(cls, matrix: Float[Array, "*L outputs inputs"]) -> "Int8Matrix":
        """The matrix rounded."""
        scale = jnp.abs(matrix).max(axis=-1) / LARGEST
        units = jnp.where(scale == 0, 1, scale)[..., None]
        return cls(jnp.round(matrix / units).astype(jnp.int8), scale)

    def products(self, x: Float[Array, "B inputs"]) -> Float32[Array, "B outputs"]:
        """x Wᵀ.

        Beside float32's rounding it is off by at most Σ |x| · scale / 2 for the rounded weights and
        Σ |scale · q| · max |x| / 32,512 for the rounded x, summed over the inputs.
        """
        rows = x.astype(jnp.float32)
        unit = jnp.abs(rows).max(axis=1, keepdims=True) / (LARGEST * BASE)
        whole = jnp.round(rows / jnp.where(unit == 0, 1, unit))
        high = jnp.round(whole / BASE)
        digits = jnp.concatenate([high, whole - BASE * high]).astype(jnp.int8)
        products = jax.lax.dot_general(
            digits, self.values, BY_ROW, preferred_element_type=jnp.int32
        )
        high, low = jnp.split(products.astype(jnp.float32), 2)
        return unit * self.scale * (BASE * high + low)

    def rows(self, indices: Int[Array, "*shape"]) -> Float32[Array, "*shape inputs"]:
        """The rows of the matrix at `indices`."""
        return self.values[indices] * self.scale[indices][..., None]
