"""Interventions: what becomes of the logits if something inside is changed.

    here = probe.where(model, "z", tokens.shape, layers=[5], heads=[1])
    probe.observe(model, tokens, interventions={"z": probe.zero(here)}).logits

An `Intervention` is a value that is passed to the forward pass; the model is what it was.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.config import InputError
from gptjax.layers.hooks import ENCODER, Intervention, check_hook_points, hook_points
from gptjax.models.build import LanguageModel, split
from gptjax.probe.observation import as_arrays, run

Metric = Callable[[jax.Array], jax.Array]
"""Logits [B, T, V] → one number, by functions that JAX can trace."""


def check_numbers(name: str, numbers: Sequence[int], count: int) -> list[int]:
    """The numbers, if there are such.

    Raises:
      InputError: one that is not below `count`.
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
) -> np.ndarray:
    """True where all of what is named meets; what is None is everywhere.

    Args:
      model: whose place it is.
      hook_point: one of `hook_points`.
      shape: [B, T] of the tokens at the place: of the source where it is the encoder's, or the keys
        and values of cross-attention.
      layers: their numbers, from 0.
      positions: places of tokens: those that look, or of keys and values those that are looked at.
      keys: places that are looked at, of `scores` and `attention`; as many as `shape` has.
      heads: their numbers; of `key` and `value`, of key heads.

    Returns:
      Boolean, with the axes of the place; those of which nothing is named are 1.

    Raises:
      InputError: a place, layer, position or head that is not there, or that it has no axis for.
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
    """Zero ablation: the place is 0 there."""
    return replace(where, 0.0)


def replace(where: Any, value: Any) -> Intervention:
    """The place is `value` there.

    That of another run is a patch (Vig et al. 2020; Meng et al. 2022); the mean over rows and
    positions of many a mean ablation. `value` has the axes of the place, or 1.
    """
    where, value = jnp.asarray(where), jnp.asarray(value, jnp.float32)
    return Intervention(1 - where.astype(jnp.float32), jnp.where(where, value, 0))


def add(where: Any, vector: Any) -> Intervention:
    """Steering: `vector`, which broadcasts against the place, is added there."""
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
) -> jax.Array:
    """The metric of many runs, in each of which the place is `value` at one of `wheres`.

    They are one vmapped call, or several of `at_a_time` if they would take too much memory.

    Args:
      model: of any family.
      tokens: [B, T].
      hook_point: one of `hook_points`.
      wheres: [C, ...], what `where` gives, C times.
      metric: what is asked of the logits.
      value: as in `replace`.
      at_a_time: runs of one call; None is all.
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
    """[first · second, ...] of `rank` axes, each True at one place of two axes."""
    each = np.eye(first * second, dtype=bool).reshape(-1, first, second)
    return np.expand_dims(each, [1 + i for i in range(rank) if i not in axes])


def ablate_heads(
    model: LanguageModel, tokens: Any, metric: Metric, *, value: Any = 0.0, **how: Any
) -> jax.Array:
    """The metric with each head's z (its weighted values) replaced by `value`: [L, N].

    `value` 0 is zero ablation; `z.mean((1, 2), keepdims=True)`, mean ablation. `how` is what
    `replace_each` takes.
    """
    depth, heads = model.config.depth, model.config.heads
    wheres = _one_at_a_time(depth, heads, (0, 3), 5)
    measured = replace_each(model, tokens, "z", wheres, metric, value=value, **how)
    return measured.reshape(depth, heads)


def patch_heads(model: LanguageModel, tokens: Any, z: Any, metric: Metric, **how: Any) -> jax.Array:
    """The metric with each head's z that of another run, [L, B, T, N, H]: [L, N]."""
    return ablate_heads(model, tokens, metric, value=z, **how)


def ablate_mlp(
    model: LanguageModel, tokens: Any, metric: Metric, *, value: Any = 0.0, **how: Any
) -> jax.Array:
    """The metric with what each MLP adds replaced by `value`: [L]."""
    wheres = _one_at_a_time(model.config.depth, 1, (0, 1), 4)
    return replace_each(model, tokens, "mlp_output", wheres, metric, value=value, **how)


def patch_positions(
    model: LanguageModel,
    tokens: Any,
    activations: Any,
    metric: Metric,
    *,
    hook_point: str = "residual",
    **how: Any,
) -> jax.Array:
    """The metric with a place's array that of another run, in one layer and one position: [L, T].

    `activations` are the other run's: `captured[hook_point]`, [L, B, T, ...].
    """
    axes = hook_points(model.config).get(hook_point, "LBTD")
    depth, length = np.shape(activations)[0], np.shape(activations)[axes.index("T")]
    wheres = _one_at_a_time(depth, length, (0, axes.index("T")), len(axes))
    measured = replace_each(model, tokens, hook_point, wheres, metric, value=activations, **how)
    return measured.reshape(depth, length)
