"""Normalisation of the residual stream.

| `norm` | formula | source |
|---|---|---|
| layernorm | scale · (x - mean) / √(variance + ε) + bias | Ba et al. 2016, equation 4 |
| rmsnorm | scale · x / √(mean of squares + ε) | Zhang & Sennrich 2019, equation 4 |

Both run in float32. Their backward passes are written out because XLA, left to autodiff, fuses the
row statistics into the neighbouring matrix products on a CPU and computes them again and again.
"""

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-5
"""Added to the variance; GPT-2's value."""


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis."""

    def __init__(self, width: int, *, bias: bool, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., D]."""
        return layer_norm(x, self.scale[...], None if self.bias is None else self.bias[...])


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis; it has no bias."""

    def __init__(self, width: int, *, bias: bool, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., D]."""
        return rms_norm(x, self.scale[...])


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[..., D] with scale and bias [D] → [..., D]."""
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x32 - mean).mean(axis=-1, keepdims=True) + EPSILON)
    y = (x32 - mean) * inverse * scale
    if bias is not None:
        y += bias
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _layer_norm_backward(residuals, gradient):
    x, scale, bias, mean, inverse = residuals
    gradient = gradient.astype(jnp.float32)
    normalised = (x.astype(jnp.float32) - mean) * inverse
    scaled = gradient * scale
    centre = scaled.mean(axis=-1, keepdims=True)
    along = (scaled * normalised).mean(axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return (
        (inverse * (scaled - centre - normalised * along)).astype(x.dtype),
        (gradient * normalised).sum(axis=rows),
        None if bias is None else gradient.sum(axis=rows),
    )


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """[..., D] with scale [D] → [..., D]."""
    return _rms_norm_forward(x, scale)[0]


def _rms_norm_forward(x, scale):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + EPSILON)
    return (x32 * inverse * scale).astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(residuals, gradient):
    x, scale, inverse = residuals
    gradient = gradient.astype(jnp.float32)
    normalised = x.astype(jnp.float32) * inverse
    scaled = gradient * scale
    along = (scaled * normalised).mean(axis=-1, keepdims=True)
    return (
        (inverse * (scaled - normalised * along)).astype(x.dtype),
        (gradient * normalised).sum(axis=tuple(range(x.ndim - 1))),
    )


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
