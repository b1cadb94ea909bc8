"""The feed-forward layer: what a token does with what attention brought it.

| `feedforward` | activation | source |
|---|---|---|
| relu | max(0, x) | Vaswani et al. 2017, equation 2 |
| relu2 | max(0, x)² | Primer (So et al. 2021) |
| gelu | x Φ(x), exact | Hendrycks & Gimpel 2016; BERT |
| gelu_tanh | the tanh approximation of it | GPT-1, GPT-2 |
| silu | x σ(x) | Hendrycks & Gimpel 2016 |
| swiglu, geglu, geglu_tanh | silu, gelu or gelu_tanh of a gate, times up | Shazeer 2020 |

With `experts`, each token goes to some of E such layers: experts.py.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import TransformerConfig
from gptjax.layers.hooks import UNTAPPED, Taps
from gptjax.layers.linear import DEFAULT_STD, Linear, project
from gptjax.parallel.sharding import constrain


class FeedForward(nnx.Module):
    """down(activation(up(x))), or down(activation(gate(x)) · up(x)), token by token."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, hidden = (config.width,), (config.hidden_width,)
        residual_std = DEFAULT_STD / math.sqrt(2 * config.depth)
        self.up = Linear(width, hidden, axes="DF", bias=config.bias, rngs=rngs)
        self.gate = (
            Linear(width, hidden, axes="DF", bias=config.bias, rngs=rngs)
            if config.feedforward in GATES
            else None
        )
        self.down = Linear(hidden, width, axes="FD", bias=config.bias, std=residual_std, rngs=rngs)
        self.activation = config.feedforward

    def __call__(self, x: jax.Array, taps: Taps = UNTAPPED) -> jax.Array:
        """[B, T, D] → [B, T, D]; `taps` say what is looked at or changed."""
        layers = [self.up] if self.gate is None else [self.up, self.gate]
        up, *gate = (checkpoint_name(y, "feedforward") for y in project(x, *layers))
        fed = activate(self.activation, up, gate[0] if gate else None)
        return self.down(taps("activation", constrain(fed, "BTF")))


def activate(name: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The activation called `name` of `up` [..., F], or of `gate` [..., F] times `up`."""
    if gate is None:
        return ACTIVATIONS[name](up)
    return ACTIVATIONS[GATES[name]](gate) * up


def relu2(x: jax.Array) -> jax.Array:
    """The squared rectifier, max(0, x)²."""
    return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
    """The exact Gaussian error linear unit, x Φ(x)."""
    return jax.nn.gelu(x, approximate=False)


_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))).

    The forward pass keeps the derivative, so that the backward pass is one product and no tanh is
    fused into the weight gradient, once for every use.
    """
    return _gelu_tanh_forward(x)[0]


def _gelu_tanh_forward(x):
    square = jnp.square(x)
    tanh = jnp.tanh(_SQRT_2_OVER_PI * x * (1 + _CUBIC * square))
    slope = _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * square)
    derivative = 0.5 * (1 + tanh + x * (1 - jnp.square(tanh)) * slope)
    return 0.5 * x * (1 + tanh), derivative


def _gelu_tanh_backward(derivative, gradient):
    return (gradient * derivative,)


gelu_tanh.defvjp(_gelu_tanh_forward, _gelu_tanh_backward)

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu2": relu2,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": jax.nn.silu,
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
