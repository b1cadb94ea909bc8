"""Interventions: ablation, activation patching and steering at hook points.

    here = probe.where(model, "z", tokens.shape, layers=[5], heads=[1])
    probe.observe(model, tokens, interventions={"z": probe.zero(here)}).logits

An `Intervention` is an argument of the forward pass; the model does not change.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from gptjax.config import InputError
from gptjax.layers.hooks import ENCODER, Intervention, check_hook_points, hook_points
from gptjax.models.build import LanguageModel, split
from gptjax.probe.observation import as_arrays, run

Metric = Callable[[Float[Array, "B T V"]], Float[Array, ""]]
"""Logits → one number, by functions that JAX can trace."""


def check_numbers(name: str, numbers: Sequence[int], count: int) -> list[int]:
    """The numbers as a list, each from 0 to `count` - 1.

    Raises:
      InputError: one out of range.
    """
    for number in numbers:
        if not 0 <= number < count:
            raise InputError(f"{name} has {number}: it must be between 0 and {count - 1}.")
    return list(map(int, numbers))


def where(
    model: LanguageModel,
    hook_point: str,
    shape: tuple[int, int],
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Bool[np.ndarray, "..."]:
    """The mask of a hook point's array that selects layers, positions, keys and heads.

    It is True where all selections hold; None selects everything.

    Args:
      model: of the hook point.
      hook_point: one of `hook_points`.
      shape: [B, T] of the tokens; of the source for the encoder's hook points, and for the keys and
        values of cross-attention.
      layers: their numbers, from 0.
      positions: of query tokens; at `key` and `value`, of key tokens.
      keys: key positions, at `scores` and `attention`; below the length in `shape`.
      heads: their numbers; at `key` and `value`, of key/value heads.

    Returns:
      Boolean, with the axes of the hook point; axes without a selection have size 1.

    Raises:
      InputError: an unknown hook point, a layer, position or head out of range, or a selection
        along an axis that the hook point does not have.
    """
    check_hook_points(model.config, [hook_point])
    config, axes = model.config, hook_points(model.config)[hook_point]
    encoders = hook_point.startswith(ENCODER) and config.encoder_depth
    sizes = {
        "L": config.encoder_depth if encoders else config.depth,
        "T": shape[1],
        "S": shape[1],
        "N": config.heads,
        "K": config.actual_kv_heads,
    }
    position_axis = "T" if "T" in axes else "S"
    head_axis = "K" if "K" in axes else "N"
    chosen = {"L": ("layers", layers), position_axis: ("positions", positions)}
    chosen[head_axis] = ("heads", heads)
    if keys is not None:
        chosen["S"] = ("keys", keys)
    found = np.ones((1,) * len(axes), bool)
    for axis, (name, numbers) in chosen.items():
        if numbers is None:
            continue
        if axis not in axes or (name == "keys" and "T" not in axes):
            raise InputError(f"{name} must be None: {hook_point} has the axes {axes}.")
        of_axis = np.isin(np.arange(sizes[axis]), check_numbers(name, numbers, sizes[axis]))
        found = found & np.expand_dims(
            of_axis, [i for i, other in enumerate(axes) if other != axis]
        )
    return found


def zero(where: Any) -> Intervention:
    """Zero ablation: the activation is 0 where the mask is True."""
    return replace(where, 0.0)


def replace(where: Any, value: Any) -> Intervention:
    """Replace the activation by `value` where the mask is True.

    With the activation of another run it is activation patching (Vig et al. 2020; Meng et al.
    2022); with a mean over rows and positions, mean ablation. `value` has the axes of the hook
    point, or broadcasts to them.
    """
    where, value = jnp.asarray(where), jnp.asarray(value, jnp.float32)
    return Intervention(1 - where.astype(jnp.float32), jnp.where(where, value, 0))


def add(where: Any, vector: Any) -> Intervention:
    """Steering: add `vector`, broadcast to the hook point's axes, where the mask is True."""
    where = jnp.asarray(where)
    vector = jnp.asarray(vector, jnp.float32)
    return Intervention(jnp.ones(where.shape, jnp.float32), jnp.where(where, vector, 0))


def replace_each(
    model: LanguageModel,
    tokens: Any,
    hook_point: str,
    wheres: Any,
    metric: Metric,
    *,
    value: Any = 0.0,
    at_a_time: int | None = None,
    **inputs: Any,
) -> Float[Array, " C"]:
    """The metric of C runs, in each of which `value` replaces the activation at one mask.

    They are one vmapped call, or several of `at_a_time` runs to save memory.

    Args:
      model: of any family.
      tokens: [B, T].
      hook_point: one of `hook_points`.
      wheres: [C, ...], C masks of `where`.
      metric: of the logits.
      value: as in `replace`.
      at_a_time: runs per vmapped call; None is all.
      inputs: as `observe`.

    Returns:
      [C].

    Raises:
      InputError: as `observe`.
    """
    tokens, inputs = as_arrays(model, tokens, inputs, [hook_point])
    graphdef, params = split(model)
    value, wheres = jnp.asarray(value, jnp.float32), jnp.asarray(wheres)
    size = at_a_time or len(wheres)
    return _replace_each(graphdef, hook_point, metric, size, params, tokens, wheres, value, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _replace_each(graphdef, hook_point, metric, size, params, tokens, wheres, value, inputs):
    model = nnx.merge(graphdef, params)

    def measured(where: jax.Array) -> jax.Array:
        interventions = {hook_point: replace(where, value)}
        return metric(run(model, tokens, (), interventions, inputs).logits)

    return jax.lax.map(measured, wheres, batch_size=size)


def _one_at_a_time(first: int, second: int, axes: tuple[int, int], rank: int) -> np.ndarray:
    """[first · second, ...]: masks of `rank` axes, each True at one index pair of two axes."""
    each = np.eye(first * second, dtype=bool).reshape(-1, first, second)
    return np.expand_dims(each, [1 + i for i in range(rank) if i not in axes])


def ablate_heads(
    model: LanguageModel, tokens: Any, metric: Metric, *, value: Any = 0.0, **options: Any
) -> Float[Array, "L N"]:
    """The metric with each head's z (its weighted values) replaced by `value`.

    `value` 0 is zero ablation; `z.mean((1, 2), keepdims=True)`, mean ablation. `options` are those
    of `replace_each`.
    """
    depth, heads = model.config.depth, model.config.heads
    wheres = _one_at_a_time(depth, heads, (0, 3), 5)
    measured = replace_each(model, tokens, "z", wheres, metric, value=value, **options)
    return measured.reshape(depth, heads)


def patch_heads(
    model: LanguageModel, tokens: Any, z: Any, metric: Metric, **options: Any
) -> Float[Array, "L N"]:
    """The metric with each head's z patched from another run, [L, B, T, N, H]."""
    return ablate_heads(model, tokens, metric, value=z, **options)


def ablate_mlp(
    model: LanguageModel, tokens: Any, metric: Metric, *, value: Any = 0.0, **options: Any
) -> Float[Array, " L"]:
    """The metric with each MLP's output replaced by `value`."""
    wheres = _one_at_a_time(model.config.depth, 1, (0, 1), 4)
    return replace_each(model, tokens, "mlp_output", wheres, metric, value=value, **options)


def patch_positions(
    model: LanguageModel,
    tokens: Any,
    activations: Any,
    metric: Metric,
    *,
    hook_point: str = "residual",
    **options: Any,
) -> Float[Array, "L T"]:
    """The metric with activations patched from another run, in one layer and position each.

    `activations` are the other run's: `captured[hook_point]`, [L, B, T, ...].
    """
    axes = hook_points(model.config).get(hook_point, "LBTD")
    depth, length = np.shape(activations)[0], np.shape(activations)[axes.index("T")]
    wheres = _one_at_a_time(depth, length, (0, axes.index("T")), len(axes))
    measured = replace_each(model, tokens, hook_point, wheres, metric, value=activations, **options)
    return measured.reshape(depth, length)
