"""Normalisation of the residual stream.

| `norm` | formula | source |
|---|---|---|
| layernorm | scale · (x - mean) / √(variance + ε) + bias | Ba et al. 2016, equation 4 |
| rmsnorm | scale · x / √(mean of squares + ε) | Zhang & Sennrich 2019, equation 4 |

Both run in float32. Their backward passes are written out because with autodiff XLA on a CPU fuses
the row statistics into the neighbouring matrix products and recomputes them many times.
"""

import functools
from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gptjax.config import TransformerConfig
from gptjax.parallel.platforms import as_saved, sum_rows


class LayerNorm(nnx.Module):
    """Layer normalisation of the last axis."""

    def __init__(self, width: int, *, epsilon: float, bias: bool):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes="-")
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32), axes="-") if bias else None
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """x normalised, scaled and shifted, in its dtype."""
        bias = None if self.bias is None else self.bias[...]
        return layer_norm(x, self.scale[...], bias, self.epsilon)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis; it has no bias."""

    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes="-")
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """x normalised and scaled, in its dtype."""
        return rms_norm(x, self.scale[...], self.epsilon)


Norm = LayerNorm | RMSNorm


def build_norm(config: TransformerConfig) -> Norm:
    """The norm of kind `config.norm` for the residual stream."""
    match config.norm:
        case "layernorm":
            return LayerNorm(config.width, epsilon=config.norm_epsilon, bias=config.bias)
        case "rmsnorm":
            return RMSNorm(config.width, epsilon=config.norm_epsilon)
        case unknown:
            assert_never(unknown)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*shape D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    epsilon: float,
) -> Float[Array, "*shape D"]:
    """scale · (x - mean) / √(variance + ε) + bias, over the last axis."""
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x32 - mean).mean(axis=-1, keepdims=True) + epsilon)
    y = (x32 - mean) * inverse * scale
    if bias is not None:
        y += bias
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _layer_norm_backward(_, residuals, gradient):
    x, scale, bias, mean, inverse = residuals
    x, mean, inverse, gradient = as_saved(x, mean, inverse, gradient)
    gradient = gradient.astype(jnp.float32)
    normalised = (x.astype(jnp.float32) - mean) * inverse
    scaled = gradient * scale
    centre = scaled.mean(axis=-1, keepdims=True)
    along = (scaled * normalised).mean(axis=-1, keepdims=True)
    return (
        (inverse * (scaled - centre - normalised * along)).astype(x.dtype),
        sum_rows(gradient * normalised),
        None if bias is None else sum_rows(gradient),
    )


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*shape D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "*shape D"]:
    """scale · x / √(mean of squares + ε), over the last axis."""
    return _rms_norm_forward(x, scale, epsilon)[0]


def _rms_norm_forward(x, scale, epsilon):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale).astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(_, residuals, gradient):
    x, scale, inverse = residuals
    x, inverse, gradient = as_saved(x, inverse, gradient)
    gradient = gradient.astype(jnp.float32)
    normalised = x.astype(jnp.float32) * inverse
    scaled = gradient * scale
    along = (scaled * normalised).mean(axis=-1, keepdims=True)
    return (
        (inverse * (scaled - normalised * along)).astype(x.dtype),
        sum_rows(gradient * normalised),
    )


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
