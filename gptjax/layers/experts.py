"""A sparse mixture of experts: each token goes to a few of many feed-forward layers.

Shazeer et al. 2017; the softmax before the choice and the balancing loss as in the Switch
Transformer (Fedus et al. 2022, equation 4), the weights of the chosen made to sum to 1 as in
Mixtral (Jiang et al. 2024), the router's z-loss from ST-MoE (Zoph et al. 2022, equation 5). What
GPT-4 is made of has not been published; nothing here claims to be it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import TransformerConfig
from gptjax.layers.feedforward import GATES, activate
from gptjax.layers.linear import DEFAULT_STD, Linear


class RouterLosses(NamedTuple):
    """What keeps a router useful, a sequence: [B] each, summed over layers."""

    balance: jax.Array
    """1 a layer where every expert gets the same share of tokens, more where some are favoured."""
    z: jax.Array
    """Mean squared log-partition of the router's logits."""


class Experts(nnx.Module):
    """E feed-forward layers side by side, and the router that chooses among them."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        count, width, hidden = config.experts, config.width, config.hidden_width
        residual_std = DEFAULT_STD / math.sqrt(2 * config.depth)
        self.router = Linear((width,), (count,), axes="--", bias=False, rngs=rngs)
        self.up = ExpertLinear(count, width, hidden, axes="EDF", rngs=rngs)
        gated = config.feedforward in GATES
        self.gate = ExpertLinear(count, width, hidden, axes="EDF", rngs=rngs) if gated else None
        self.down = ExpertLinear(count, hidden, width, axes="EFD", std=residual_std, rngs=rngs)
        self.config = config

    def __call__(self, x: jax.Array, *, training: bool) -> tuple[jax.Array, RouterLosses]:
        """[B, T, D] → [B, T, D] and the router's losses.

        The tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), so
        that none is dropped, whatever the balance. In `training` a `capacity_factor` above 0 drops
        what an expert gets beyond its capacity, in the order of the sequence.
        """
        config = self.config
        count, chosen = config.experts, config.experts_per_token
        batch, length, width = x.shape
        logits = self.router(x.astype(jnp.float32))
        probability = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probability, chosen)
        weights /= weights.sum(axis=-1, keepdims=True)
        assigned = jax.nn.one_hot(experts, count)
        if training and config.capacity_factor:
            capacity = math.ceil(config.capacity_factor * batch * length * chosen / count)
            flat = assigned.reshape(-1, count)
            place = (jnp.cumsum(flat, axis=0) * flat).sum(axis=-1).reshape(experts.shape)
            weights = jnp.where(place <= capacity, weights, 0)

        order = jnp.argsort(experts.ravel(), stable=True)
        sizes = jnp.bincount(experts.ravel(), length=count)
        tokens = x.reshape(-1, width)[order // chosen]
        gate = None if self.gate is None else self.gate(tokens, sizes)
        fed = self.down(activate(config.feedforward, self.up(tokens, sizes), gate), sizes)
        fed = fed[jnp.argsort(order)].reshape(batch, length, chosen, width)
        mixed = (fed * weights[..., None]).sum(axis=2)

        share = assigned.sum(axis=2).mean(axis=1) / chosen
        balance = count * (share * probability.mean(axis=1)).sum(axis=-1)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean(axis=-1)
        return mixed.astype(x.dtype), RouterLosses(balance, z)


class ExpertLinear(nnx.Module):
    """One matrix an expert, without biases."""

    def __init__(
        self,
        count: int,
        fan_in: int,
        fan_out: int,
        *,
        axes: str,
        rngs: nnx.Rngs,
        std: float = DEFAULT_STD,
    ):
        kernel = std * jax.random.normal(rngs.params(), (count, fan_in, fan_out))
        self.kernel = nnx.Param(kernel, axes=axes)

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """[M, in] → [M, out]; the first sizes[0] rows by the first expert, and so on."""
        return jax.lax.ragged_dot(x, self.kernel[...].astype(x.dtype), sizes.astype(jnp.int32))
