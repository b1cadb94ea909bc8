"""What happens inside a model in training (`--train.watch`).

Every `train.watch_every` steps a program of its own makes the step's gradient and update once more
and reads the activations of some rows of its batch; the step itself stays as it is. The scalars are
written with those of the step:

| scalars | |
|---|---|
| parameters/, gradients/, updates/ | norms, before clipping and after the optimizer |
| activations: `gptjax.runs.activations` | of the hook points of each layer |

Each is of a layer, `gradients/decoder.0`, or of what is outside the layers, `gradients/embedding`.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from gptjax.data.batch import Batch
from gptjax.training.leaves import by_name
from gptjax.training.losses import LossFunction, Params
from gptjax.training.step import State, lower, mean_gradient

Measured = dict[str, Float[Array, "*L"]]
"""By name: of each layer [L], or of the model."""
Activations = Callable[[Params, Batch, str | None], dict[str, Measured]]
"""(parameters, batch, mesh axis) → statistics of activations over the whole batch."""
IN_LAYERS = re.compile(r"(?:(\w+)\.blocks|(layers))\.(?:(\d+)\.)?.+")
"""The name of a leaf with an axis of layers: the stack, and the kind if kinds take turns."""


def norms_by_layer(tree: PyTree) -> Measured:
    """The norm of each layer's leaves, by stack, and of the other modules' leaves, by module.

    Args:
      tree: parameters, or a tree like theirs.
    """
    squares: dict[str, dict[int, Any]] = defaultdict(dict)
    for name, leaf in by_name(tree).items():
        layer = IN_LAYERS.fullmatch(name)
        owner = name.rpartition(".")[0] if layer is None else layer[1] or layer[2]
        kind = int(layer[3] or 0) if layer else 0
        axes = range(1 if layer else 0, leaf.ndim)
        square = jnp.square(leaf.astype(jnp.float32)).sum(tuple(axes))
        squares[owner][kind] = squares[owner].get(kind, 0) + square
    # Layer i · p + k is the i-th of kind k.
    return {
        owner: jnp.sqrt(jnp.stack([of[kind] for kind in sorted(of)], axis=-1).reshape(-1))
        if next(iter(of.values())).ndim
        else jnp.sqrt(of[0])
        for owner, of in squares.items()
    }


def watch_step(
    state: State,
    batches: Batch,
    part: Int[Array, "2"] | None = None,
    axis: str | None = None,
    *,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    activations: Activations | None,
    seed: int = 0,
    grad_accumulation: int = 1,
) -> dict[str, Measured]:
    """What is measured of the step that `state` and the batch would make, by kind.

    With `part`, `batches` is a stack, of which the first batch of the part is taken.
    """
    batch = batches
    if part is not None:
        batch = jax.tree.map(lambda array: array[part[0]], batches)
    _, gradients = mean_gradient(state, batch, loss, seed, grad_accumulation, axis)
    updates, _ = optimizer.update(gradients, state.optimizer, state.params)
    inside = {} if activations is None else activations(state.params, batch, axis)
    return {
        "parameters": norms_by_layer(state.params),
        "gradients": norms_by_layer(gradients),
        "updates": norms_by_layer(updates),
        **inside,
    }


def lower_watch_step(
    state: State, batch: Batch, *, mesh: Mesh, stacked: bool, **how: Any
) -> jax.stages.Lowered:
    """`watch_step` for `state` and `batch` (arrays or their shapes), which are not donated."""
    part = (jax.ShapeDtypeStruct((2,), jnp.int32),) if stacked else ()
    return lower(functools.partial(watch_step, **how), mesh, state, batch, *part)


def scalars_of(measured: dict[str, Measured]) -> dict[str, float]:
    """The names and values that trackers write: `gradients/decoder.0`."""
    values = {}
    for kind, of in measured.items():
        for owner, value in of.items():
            array = np.asarray(value)
            if array.ndim == 0:
                values[f"{kind}/{owner}"] = float(array)
            for layer, number in enumerate(array.reshape(-1) if array.ndim else ()):
                values[f"{kind}/{owner}.{layer}"] = float(number)
    return values
