"""The position-wise MLP (feed-forward network, Vaswani et al. 2017, section 3.3).

| `activation` | formula | source |
|---|---|---|
| relu | max(0, x) | Vaswani et al. 2017, equation 2 |
| relu2 | max(0, x)² | Primer (So et al. 2021) |
| gelu | x Φ(x), exact | Hendrycks & Gimpel 2016; BERT |
| gelu_tanh | x Φ(x), the tanh approximation | GPT-1, GPT-2 |
| silu | x σ(x) | Hendrycks & Gimpel 2016 |
| swiglu, geglu, geglu_tanh | silu, gelu or gelu_tanh of gate(x), times up(x) | Shazeer 2020 |

With `num_experts`, each token is routed to some of E MLPs: moe.py.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gptjax.config import TransformerConfig
from gptjax.config.values import GATES, Activation, exhaustive
from gptjax.layers.hooks import NO_HOOKS, PRE_ACTIVATION, Hooks
from gptjax.layers.linear import DEFAULT_STD, Linear, project
from gptjax.parallel.platforms import by_platform


class MLP(nnx.Module):
    """down(activation(up(x))), or down(activation(gate(x)) · up(x)), at each position."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, mlp_dim = (config.width,), (config.actual_mlp_dim,)
        residual_std = DEFAULT_STD / math.sqrt(2 * config.depth)
        self.up = Linear(width, mlp_dim, axes="DF", bias=config.bias, rngs=rngs)
        self.gate = (
            Linear(width, mlp_dim, axes="DF", bias=config.bias, rngs=rngs)
            if config.activation in GATES
            else None
        )
        self.down = Linear(mlp_dim, width, axes="FD", bias=config.bias, std=residual_std, rngs=rngs)
        self.activation = config.activation

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "B T D"], hook: Hooks = NO_HOOKS
    ) -> tuple[Float[Array, "B T D"], None]:
        """The MLP's output, and None in place of `MoE`'s router losses."""
        layers = [self.up] if self.gate is None else [self.up, self.gate]
        up, *gate = (hook(PRE_ACTIVATION, y) for y in project(x, *layers))
        activated = hook("activation", activate(self.activation, up, *gate))
        return hook("mlp_output", self.down(activated)), None


def activate(
    name: str, up: Float[Array, "*shape F"], gate: Float[Array, "*shape F"] | None = None
) -> Float[Array, "*shape F"]:
    """activation(up), or activation(gate) · up, of the activation called `name`."""
    if gate is None:
        return ACTIVATIONS[name](up)
    return ACTIVATIONS[GATES[name]](gate) * up


def relu2(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Squared ReLU, max(0, x)²."""
    return jnp.square(jax.nn.relu(x))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU, x Φ(x), exact."""
    return jax.nn.gelu(x, approximate=False)


_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


@jax.custom_vjp
def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU by the tanh approximation, ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))).

    The forward pass saves the derivative, so that the backward pass is one product: XLA would fuse
    the tanh into the weight gradients and recompute it for each use. On GPUs it saves x alone, from
    which the backward pass computes the derivative.
    """
    return _gelu_tanh_and_derivative(x)[0]


def _gelu_tanh_and_derivative(x):
    if x.dtype == jnp.float16:  # In which x² is infinite from 256 on, and the slope 0 · ∞.
        wide = _gelu_tanh_and_derivative(x.astype(jnp.float32))
        return tuple(y.astype(x.dtype) for y in wide)
    square = jnp.square(x)
    tanh = jnp.tanh(_SQRT_2_OVER_PI * x * (1 + _CUBIC * square))
    slope = _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * square)
    derivative = 0.5 * (1 + tanh + x * (1 - jnp.square(tanh)) * slope)
    return 0.5 * x * (1 + tanh), derivative


def _gelu_tanh_forward(x):
    return by_platform(x, gpu=lambda x: (gelu_tanh(x), x), other=_gelu_tanh_and_derivative)


def _gelu_tanh_backward(saved, gradient):
    return (by_platform(saved, gradient, gpu=_gelu_tanh_gradient, other=jnp.multiply),)


def _gelu_tanh_gradient(x, gradient):
    # Without the barrier XLA shares the forward pass's tanh, and keeps that instead.
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    return _gelu_tanh_and_derivative(x)[1] * gradient


gelu_tanh.defvjp(_gelu_tanh_forward, _gelu_tanh_backward)

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu2": relu2,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": jax.nn.silu,
}
exhaustive(Activation, ACTIVATIONS | GATES)
