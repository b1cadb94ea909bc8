"""Linear layers: the matrices that hold nearly all parameters."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.parallel.sharding import auto_mesh, constrain, gathered

DEFAULT_STD = 0.02
"""Standard deviation of GPT-2's initialisation (its released code, `model.py`)."""


class Linear(nnx.Module):
    """y = x W + b, from axes `inputs` to axes `outputs`.

    The kernel keeps its axes apart (query is [D, N, H], not [D, N·H]), so that a sharding rule or
    an optimizer can name them. The product itself runs on flat matrices, [tokens, in] × [in, out]:
    with [B, T, D] the weight gradient contracts two axes, which XLA compiles for a CPU into a
    transposing copy that costs more than the product. Where the compiler parts the program, axes
    stay apart, since two that are parted make no one axis.

    `axes` are the kernel's letters, by which `gptjax.parallel.sharding` splits it; "-" is never
    split.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        axes: str,
        bias: bool,
        rngs: nnx.Rngs,
        std: float = DEFAULT_STD,
    ):
        kernel = std * jax.random.normal(rngs.params(), (*inputs, *outputs), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=axes)
        zeros = jnp.zeros(outputs, jnp.float32)
        self.bias = nnx.Param(zeros, axes=axes[len(inputs) :]) if bias else None
        self.inputs = inputs
        self.outputs = outputs
        self.axes = axes

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *inputs] → [..., *outputs], in the dtype of `x`."""
        if auto_mesh() is not None:
            kernel = gathered(self.kernel.astype(x.dtype), self.axes)
            y = jnp.tensordot(x, kernel, len(self.inputs))
            return y if self.bias is None else y + self.bias.astype(x.dtype)
        leading = x.shape[: x.ndim - len(self.inputs)]
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        y = x.reshape(-1, fan_in) @ self.kernel.reshape(fan_in, fan_out).astype(x.dtype)
        if self.bias is not None:
            y += self.bias.reshape(fan_out).astype(x.dtype)
        return y.reshape(*leading, *self.outputs)


def project(x: jax.Array, *layers: Linear) -> tuple[jax.Array, ...]:
    """x [B, T, D] through several layers that read the same.

    Where heads and channels are parted among devices, each has all tokens for its part only while
    it multiplies: between the layers they are parted, and the backward pass brings them together
    once more (Korthikanti et al. 2022, section 4.2.2). Its gradients by x are summed over devices
    once for all layers.
    """
    mesh = auto_mesh()
    if mesh is None or dict(mesh.shape)["tensor"] == 1:
        return tuple(layer(x) for layer in layers)
    kernels = tuple(gathered(layer.kernel.astype(x.dtype), layer.axes) for layer in layers)
    products = _products(x, kernels)
    return tuple(
        y if layer.bias is None else y + layer.bias.astype(x.dtype)
        for y, layer in zip(products, layers, strict=True)
    )


@jax.custom_vjp
def _products(x: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    whole = constrain(x, "BTD")
    return tuple(jnp.tensordot(whole, kernel, 1) for kernel in kernels)


def _products_forward(x, kernels):
    return _products(x, kernels), (x, kernels)


def _products_backward(residuals, gradients):
    x, kernels = residuals
    # Not before the gradients are there, and not the copy that the forward pass may have.
    x, gradients = jax.lax.optimization_barrier((x, gradients))
    whole = constrain(x, "BTD")
    x_gradient = jnp.zeros_like(x)
    for gradient, kernel in zip(gradients, kernels, strict=True):
        outputs = tuple(range(2, gradient.ndim)), tuple(range(1, kernel.ndim))
        x_gradient += jnp.tensordot(gradient, kernel, outputs)
    by_kernels = tuple(jnp.tensordot(whole, gradient, ((0, 1), (0, 1))) for gradient in gradients)
    return constrain(x_gradient, "BtD"), by_kernels


_products.defvjp(_products_forward, _products_backward)
