"""A sparse mixture of experts: each token is routed to the top k of E MLPs.

Shazeer et al. 2017; the softmax before the top k and the load-balancing loss as in the Switch
Transformer (Fedus et al. 2022, equation 4), the weights of the top k renormalised to sum to 1 as in
Mixtral (Jiang et al. 2024), the router's z-loss from ST-MoE (Zoph et al. 2022, equation 5). GPT-4's
architecture has not been published; nothing here claims to be it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptjax.config import TransformerConfig
from gptjax.config.values import GATES
from gptjax.layers.hooks import NO_HOOKS, Hooks
from gptjax.layers.linear import DEFAULT_STD, Linear
from gptjax.layers.mlp import activate
from gptjax.parallel.sharding import auto_mesh, gathered, mesh_axes, parameter_spec, spec


class RouterLosses(NamedTuple):
    """The auxiliary losses of a router, per sequence; of a model, summed over layers."""

    balance: Float[Array, " B"]
    """Load balancing: 1 per layer if experts get equal shares of the tokens, more otherwise."""
    z: Float[Array, " B"]
    """z-loss: the mean squared logsumexp of the router's logits."""


class MoE(nnx.Module):
    """E expert MLPs, and a router that weights the top k of them for each token."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        count, width, hidden = config.num_experts, config.width, config.actual_mlp_dim
        residual_std = DEFAULT_STD / math.sqrt(2 * config.depth)
        self.router = Linear((width,), (count,), axes="--", bias=False, rngs=rngs)
        self.up = ExpertLinear(count, width, hidden, axes="EDF", rngs=rngs)
        gated = config.activation in GATES
        self.gate = ExpertLinear(count, width, hidden, axes="EDF", rngs=rngs) if gated else None
        self.down = ExpertLinear(count, hidden, width, axes="EFD", std=residual_std, rngs=rngs)
        self.config = config

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "B T D"], hook: Hooks = NO_HOOKS
    ) -> tuple[Float[Array, "B T D"], RouterLosses]:
        """The weighted sum of the chosen experts' outputs, and the router's losses.

        In training, a `capacity_factor` above 0 drops the tokens beyond an expert's capacity, in
        sequence order.
        """
        config = self.config
        count, k = config.num_experts, config.experts_per_token
        logits = self.router(x.astype(jnp.float32))
        probability = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probability, k)
        weights /= weights.sum(axis=-1, keepdims=True)
        assigned = jax.nn.one_hot(experts, count, dtype=jnp.float32)
        if hook.training and config.capacity_factor:
            capacity = math.ceil(config.capacity_factor * experts.size / count)
            flat = assigned.reshape(-1, count)
            rank = (jnp.cumsum(flat, axis=0) * flat).sum(axis=-1).reshape(experts.shape)
            weights = jnp.where(rank <= capacity, weights, 0)
        gate = None if self.gate is None else self.gate(x.dtype)
        kernels = _Kernels(self.up(x.dtype), gate, self.down(x.dtype))
        mixed = _sharded_mixture(x, experts, weights, kernels, config.activation)

        share = assigned.sum(axis=2).mean(axis=1) / k
        balance = count * (share * probability.mean(axis=1)).sum(axis=-1)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean(axis=-1)
        return hook("mlp_output", mixed.astype(x.dtype)), RouterLosses(balance, z)


class _Kernels(NamedTuple):
    """The kernels of all experts, or of one device's."""

    up: Float[Array, "E D F"]
    gate: Float[Array, "E D F"] | None
    down: Float[Array, "E F D"]


def _sharded_mixture(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    kernels: _Kernels,
    activation: str,
) -> Float[Array, "B T D"]:
    """`_mixture`; on a mesh each device computes its own experts.

    Tokens are all-gathered along the mesh axis `expert`, each device applies its experts, and the
    results are reduce-scattered to the tokens' devices. The traffic is proportional to the number
    of tokens on those devices, whatever the routing.
    """
    if auto_mesh() is None:
        return _mixture(x, experts, weights, kernels, activation)
    tokens = spec("BTD", x.shape)
    gathers = "expert" in mesh_axes(tokens)
    expert_axes, mlp_axes = (mesh_axes(parameter_spec(letter)) for letter in "EF")

    def local_mixture(x, experts, weights, kernels: _Kernels):
        if gathers:
            x, experts, weights = jax.lax.all_gather((x, experts, weights), "expert", tiled=True)
        first = jax.lax.axis_index(expert_axes) * len(kernels.up) if expert_axes else 0
        mixed = _mixture(x, experts - first, weights, kernels, activation)
        if gathers:
            mixed = jax.lax.psum_scatter(mixed, "expert", tiled=True)
        summed = mlp_axes if gathers else expert_axes + mlp_axes
        return jax.lax.psum(mixed, summed) if summed else mixed

    up, down = parameter_spec("E-F"), parameter_spec("EF-")
    # `_Kernels` of specs instead of arrays.
    specs: tuple = (up, None if kernels.gate is None else up, down)
    return jax.shard_map(
        local_mixture,
        in_specs=(tokens, tokens, tokens, _Kernels(*specs)),
        out_specs=tokens,
        check_vma=False,
    )(x, experts, weights, kernels)


def _mixture(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    kernels: _Kernels,
    activation: str,
) -> Float[Array, "B T D"]:
    """The weighted sum of the outputs of experts 0 … E - 1; other indices contribute nothing.

    Tokens are sorted by expert and multiplied in groups (`jax.lax.ragged_dot`), so that none is
    dropped, whatever the balance.

    Args:
      x: the tokens.
      experts: the indices of each token's top k experts.
      weights: their weights.
      kernels: of E experts.
      activation: as `TransformerConfig.activation`.
    """
    count, k = len(kernels.up), experts.shape[-1]
    local = (experts >= 0) & (experts < count)
    indices = jnp.where(local, experts, count).ravel()
    order = jnp.argsort(indices, stable=True)
    sizes = jnp.bincount(indices, length=count).astype(jnp.int32)
    tokens = x.reshape(-1, x.shape[-1])[order // k]
    tokens = jnp.where(local.ravel()[order, None], tokens, 0)
    gate = None if kernels.gate is None else jax.lax.ragged_dot(tokens, kernels.gate, sizes)
    hidden = activate(activation, jax.lax.ragged_dot(tokens, kernels.up, sizes), gate)
    output = jax.lax.ragged_dot(hidden, kernels.down, sizes)
    output = output[jnp.argsort(order)].reshape(*experts.shape, -1)
    return (output * jnp.where(local, weights, 0)[..., None]).sum(axis=2)


class ExpertLinear(nnx.Module):
    """One matrix per expert, without biases."""

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

    def __call__(self, dtype: DTypeLike) -> Float[Array, "E fan_in fan_out"]:
        """The kernels in `dtype`, whole along D."""
        return gathered(self.kernel.astype(dtype), self.axes)
