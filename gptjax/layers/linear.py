"""Linear layers, which hold nearly all parameters."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gptjax.layers.matrices import Int8Matrix, Matrix
from gptjax.parallel.platforms import sum_rows
from gptjax.parallel.sharding import auto_mesh, constrain, gathered

DEFAULT_STD = 0.02
"""Standard deviation of GPT-2's initialisation (its released code, `model.py`)."""


class Linear(nnx.Module):
    """y = x W + b, contracting the axes `inputs` and producing the axes `outputs`.

    The kernel keeps its axes separate (query is [D, N, H], not [D, N·H]), so that sharding rules
    and optimizers can name them. The product itself runs on flat matrices, [tokens, in] × [in,
    out]: with [B, T, D] the weight gradient contracts two axes, which XLA compiles for a CPU into a
    transposing copy that costs more than the product. In a partitioned program axes are not
    flattened, since two sharded axes cannot be merged into one.

    `axes` are the letters of the kernel's axes, by which `gptjax.parallel.sharding` shards it; "-"
    is never sharded.
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

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x W + b, [..., *inputs] → [..., *outputs], in the dtype of `x`."""
        if auto_mesh() is not None:
            kernel = gathered(self.kernel.astype(x.dtype), self.axes)
            y = jnp.tensordot(x, kernel, len(self.inputs))
            return y if self.bias is None else y + self.bias.astype(x.dtype)
        leading = x.shape[: x.ndim - len(self.inputs)]
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        kernel = self.kernel.get_value()
        if isinstance(kernel, Matrix | Int8Matrix):
            y = kernel.products(x.reshape(-1, fan_in)).astype(x.dtype)
        else:
            y = x.reshape(-1, fan_in) @ kernel.reshape(fan_in, fan_out).astype(x.dtype)
        if self.bias is not None:
            y = add_bias(y, self.bias.reshape(fan_out))
        return y.reshape(*leading, *self.outputs)


@jax.custom_vjp
def add_bias(y: Float[Array, "M F"], bias: Float[Array, " F"]) -> Float[Array, "M F"]:
    """y + bias, in the dtype of `y`; the bias's gradient is by `sum_rows`."""
    return y + bias.astype(y.dtype)


def _add_bias_forward(y, bias):
    return add_bias(y, bias), None


def _add_bias_backward(_, gradient):
    return gradient, sum_rows(gradient).astype(jnp.float32)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def project(x: Float[Array, "B T D"], *layers: Linear) -> tuple[Float[Array, "B T ..."], ...]:
    """The outputs of several layers of the same input x.

    Under tensor parallelism tokens are sharded between layers, all-gathered for these products, and
    all-gathered again in the backward pass (Korthikanti et al. 2022, section 4.2.2). The gradients
    with respect to x are summed over devices once for all layers.
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
    # Gathers x only once the gradients are known, and keeps no gathered copy of the forward pass.
    x, gradients = jax.lax.optimization_barrier((x, gradients))
    whole = constrain(x, "BTD")
    x_gradient = jnp.zeros_like(x)
    for gradient, kernel in zip(gradients, kernels, strict=True):
        outputs = tuple(range(2, gradient.ndim)), tuple(range(1, kernel.ndim))
        x_gradient += jnp.tensordot(gradient, kernel, outputs)
    kernel_gradients = tuple(
        jnp.tensordot(whole, gradient, ((0, 1), (0, 1))) for gradient in gradients
    )
    return constrain(x_gradient, "BtD"), kernel_gradients


_products.defvjp(_products_forward, _products_backward)
