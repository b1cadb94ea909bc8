"""A sparse mixture of experts: each token goes to a few of many feed-forward layers.

Shazeer et al. 2017; the softmax before the choice and the balancing loss as in the Switch
Transformer (Fedus et al. 2022, equation 4), the weights of the chosen made to sum to 1 as in
Mixtral (Jiang et al. 2024), the router's z-loss from ST-MoE (Zoph et al. 2022, equation 5). What
GPT-4 is made of has not been published; nothing here claims to be it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import TransformerConfig
from gptjax.config.values import GATES
from gptjax.layers.hooks import NO_HOOKS, Hooks
from gptjax.layers.linear import DEFAULT_STD, Linear
from gptjax.layers.mlp import activate
from gptjax.parallel.sharding import auto_mesh, gathered, mesh_axes, parameter_spec, spec


class RouterLosses(NamedTuple):
    """What keeps a router useful, a sequence: [B] each, summed over layers."""

    balance: jax.Array
    """1 a layer where every expert gets the same share of tokens, more where some are favoured."""
    z: jax.Array
    """Mean squared log-partition of the router's logits."""


class MoE(nnx.Module):
    """E MLPs side by side, and the router that chooses among them."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        count, width, hidden = config.num_experts, config.width, config.actual_mlp_dim
        residual_std = DEFAULT_STD / math.sqrt(2 * config.depth)
        self.router = Linear((width,), (count,), axes="--", bias=False, rngs=rngs)
        self.up = ExpertLinear(count, width, hidden, axes="EDF", rngs=rngs)
        gated = config.activation in GATES
        self.gate = ExpertLinear(count, width, hidden, axes="EDF", rngs=rngs) if gated else None
        self.down = ExpertLinear(count, hidden, width, axes="EFD", std=residual_std, rngs=rngs)
        self.config = config

    def __call__(self, x: jax.Array, hook: Hooks = NO_HOOKS) -> tuple[jax.Array, RouterLosses]:
        """[B, T, D] → [B, T, D] and the router's losses.

        In training a `capacity_factor` above 0 drops what an expert gets beyond its capacity, in
        the order of the sequence.
        """
        config = self.config
        count, chosen = config.num_experts, config.experts_per_token
        logits = self.router(x.astype(jnp.float32))
        probability = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probability, chosen)
        weights /= weights.sum(axis=-1, keepdims=True)
        assigned = jax.nn.one_hot(experts, count, dtype=jnp.float32)
        if hook.training and config.capacity_factor:
            capacity = math.ceil(config.capacity_factor * experts.size / count)
            flat = assigned.reshape(-1, count)
            place = (jnp.cumsum(flat, axis=0) * flat).sum(axis=-1).reshape(experts.shape)
            weights = jnp.where(place <= capacity, weights, 0)
        gate = None if self.gate is None else self.gate(x.dtype)
        kernels = _Kernels(self.up(x.dtype), gate, self.down(x.dtype))
        mixed = _mix_on_shares(x, experts, weights, kernels, config.activation)

        share = assigned.sum(axis=2).mean(axis=1) / chosen
        balance = count * (share * probability.mean(axis=1)).sum(axis=-1)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean(axis=-1)
        return hook("mlp_output", mixed.astype(x.dtype)), RouterLosses(balance, z)


class _Kernels(NamedTuple):
    """The matrices of all experts, or of those that a device has."""

    up: Any
    """[E, D, F]."""
    gate: Any
    """[E, D, F], or None."""
    down: Any
    """[E, F, D]."""


def _mix_on_shares(x, experts, weights, kernels: _Kernels, activation: str) -> jax.Array:
    """`_mix` here, or on each device of a mesh with the experts that it has.

    Devices along the mesh axis `expert` bring their tokens together, each feeds them to its own
    experts, and what they add is summed where the tokens came from. That moves as many numbers as
    there are tokens on those devices, whatever the router does.
    """
    if auto_mesh() is None:
        return _mix(x, experts, weights, kernels, activation)
    rows = spec("BTD", x.shape)
    together = "expert" in mesh_axes(rows)
    own, split = (mesh_axes(parameter_spec(letter)) for letter in "EF")

    def share(x, experts, weights, kernels: _Kernels):
        if together:
            x, experts, weights = jax.lax.all_gather((x, experts, weights), "expert", tiled=True)
        first = jax.lax.axis_index(own) * len(kernels.up) if own else 0
        mixed = _mix(x, experts - first, weights, kernels, activation)
        if together:
            mixed = jax.lax.psum_scatter(mixed, "expert", tiled=True)
        others = split if together else own + split
        return jax.lax.psum(mixed, others) if others else mixed

    into, out_of = parameter_spec("E-F"), parameter_spec("EF-")
    gate = None if kernels.gate is None else into
    return jax.shard_map(
        share,
        in_specs=(rows, rows, rows, _Kernels(into, gate, out_of)),
        out_specs=rows,
        check_vma=False,
    )(x, experts, weights, kernels)


def _mix(x, experts, weights, kernels: _Kernels, activation: str) -> jax.Array:
    """What the experts 0 … E - 1 make of tokens, weighted; others' numbers add nothing.

    The tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), so that
    none is dropped, whatever the balance.

    Args:
      x: [B, T, D].
      experts: [B, T, chosen].
      weights: [B, T, chosen].
      kernels: of E experts.
      activation: as `TransformerConfig.activation`.

    Returns:
      [B, T, D].
    """
    count, chosen = len(kernels.up), experts.shape[-1]
    mine = (experts >= 0) & (experts < count)
    numbers = jnp.where(mine, experts, count).ravel()
    order = jnp.argsort(numbers, stable=True)
    sizes = jnp.bincount(numbers, length=count).astype(jnp.int32)
    tokens = x.reshape(-1, x.shape[-1])[order // chosen]
    tokens = jnp.where(mine.ravel()[order, None], tokens, 0)
    gate = None if kernels.gate is None else jax.lax.ragged_dot(tokens, kernels.gate, sizes)
    fed = activate(activation, jax.lax.ragged_dot(tokens, kernels.up, sizes), gate)
    fed = jax.lax.ragged_dot(fed, kernels.down, sizes)
    fed = fed[jnp.argsort(order)].reshape(*experts.shape, -1)
    return (fed * jnp.where(mine, weights, 0)[..., None]).sum(axis=2)


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
        kernel = std * jax.random.normal(rngs.params(), (count, fan_in, fan_out), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.axes = axes

    def __call__(self, dtype: Any) -> jax.Array:
        """[E, in, out], as products read it."""
        return gathered(self.kernel.astype(dtype), self.axes)
