"""Optimizers and learning rate schedules, and which parameters decay or get Muon.

| `optimizer.name` | the update's direction | source |
|---|---|---|
| adamw | first moment over the root of the second, both bias-corrected | Loshchilov & Hutter 2019 |
| nadamw | the same with Nesterov's momentum | Dozat 2016 |
| adabelief | adamw with the second moment of the gradient's deviation | Zhuang et al. 2020 |
| radam | adamw, rectified for the variance of its early steps | Liu et al. 2020 |
| lion | the sign of an interpolated momentum | Chen et al. 2023 |
| rmsprop | the gradient over the root of the second moment | Hinton 2012 |
| sgd | the momentum | Sutskever et al. 2013 |
| muon | of matrices: the momentum, orthogonalised; of all else: adamw | Jordan 2024 |

All but Muon are Optax's, and all have decoupled weight decay. Leaves are told apart by name, not by
rank: stacked biases are matrices too.

| leaf | weight decay | Muon |
|---|---|---|
| `kernel` of a block or an LSTM | yes | yes, except the router's |
| `kernel` elsewhere | yes | no |
| `table` of an embedding or the head | yes | no |
| `scale`, `bias` | no | no |
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gptjax.config import InputError, OptimizerConfig
from gptjax.config.values import Dtype, MuDtype, OptimizerName, exhaustive
from gptjax.training.loss_scale import with_loss_scale
from gptjax.training.losses import Params

INPUT_AXES = {"output": 2, "compress_key": 3, "compress_value": 3}
"""The number of input axes of kernels that have more than one."""
MUON_MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_EPSILON = 1e-7
"""Muon's constants (Jordan 2024)."""
MU_DTYPES = exhaustive(MuDtype, {"float32": jnp.float32, "bfloat16": jnp.bfloat16})


class MatrixAxes(NamedTuple):
    """The axes of a kernel that are a matrix's rows and columns; other axes count matrices."""

    reduction_axis: tuple[int, ...]
    """The input axes."""
    output_axis: tuple[int, ...]
    """The output axes, the last ones."""


def learning_rate_schedule(
    config: OptimizerConfig, peak: float | Float[Array, ""], steps: int
) -> optax.Schedule:
    """Step → learning rate: linear warm-up to `peak`, then the schedule `config.schedule`.

    Sources: cosine, Loshchilov & Hutter 2017; wsd (warm-up, stable, decay), Hu et al. 2024.

    Raises:
      InputError: a warm-up that leaves no step after it.
    """
    warmup, final = config.warmup(steps), config.min_lr_ratio * peak
    if warmup >= steps:
        raise InputError(
            f"OptimizerConfig.warmup_steps is {warmup}: it must be below train.steps {steps}."
        )
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, steps - warmup, config.min_lr_ratio)
        case "constant":
            after = optax.constant_schedule(peak)
        case "wsd":
            decay = round(config.decay_fraction * (steps - warmup))
            after = optax.linear_schedule(peak, final, decay, steps - warmup - decay)
        case unknown:
            assert_never(unknown)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def build_optimizer(
    config: OptimizerConfig,
    steps: int,
    learning_rate: float | Float[Array, ""] | None = None,
    rate_factors: Params | None = None,
    *,
    dtype: Dtype = "float32",
) -> optax.GradientTransformation:
    """The optimizer: clipping, the direction of `config.name`, decoupled decay, learning rate.

    Muon's update is that of Jordan's code (github.com/KellerJordan/Muon, `muon.py`): Nesterov
    momentum without bias correction, `orthogonalised`, decoupled weight decay. Differences: the
    Newton-Schulz iteration runs in float32 instead of bfloat16; a kernel with more than two axes is
    a matrix of all its inputs by all its outputs, one for each layer and expert, and so is the
    scale of its update; gradients are clipped first, to `clip_norm`; and all else gets the AdamW of
    `name="adamw"` with the config's hyperparameters (in Jordan's code betas of 0.9 and 0.95,
    epsilon 1e-10 and no decay). optax.contrib.muon corrects the momentum's bias, with different
    factors for its two terms, and gives all else Nesterov's Adam.

    Args:
      config: the optimizer and its hyperparameters.
      steps: of the whole run.
      learning_rate: the peak, where one program trains at several; None takes the config's.
      rate_factors: multipliers of AdamW's learning rate, a tree like the parameters of numbers
        (`gptjax.runs.mup`); None is 1. The weight decay does not change.
      dtype: the model's compute dtype; float16 scales the loss (`gptjax.training.loss_scale`).

    Raises:
      InputError: a warm-up as long as the run, or factors for Muon.
    """
    if rate_factors is not None and config.name != "adamw":
        raise InputError(
            f"OptimizerConfig.name is {config.name!r}: it must be adamw for learning rates that "
            "scale with the width (muP), whose factors are Adam's."
        )
    peak = config.learning_rate if learning_rate is None else learning_rate
    # The factors come before the decay, so that weight decay per step is the same at every width:
    # it is proportional to the weight, and needs no correction.
    direction = DIRECTIONS[config.name](config)
    if rate_factors is not None:
        direction = optax.chain(direction, _scale_by_factors(rate_factors))
    update = optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate_schedule(config, peak, steps)),
    )
    if config.name == "muon":
        rate = learning_rate_schedule(config, config.muon_learning_rate, steps)
        update = optax.partition({"muon": _muon(config, rate), "adamw": update}, _partition)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    optimizer = optax.chain(*clip, update)
    return with_loss_scale(optimizer) if dtype == "float16" else optimizer


def _adam(config: OptimizerConfig, *, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.scale_by_adam(
        config.beta1,
        config.beta2,
        config.epsilon,
        mu_dtype=MU_DTYPES[config.mu_dtype],
        nesterov=nesterov,
    )


DIRECTIONS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = exhaustive(
    OptimizerName,
    {
        "adamw": _adam,
        "nadamw": functools.partial(_adam, nesterov=True),
        "adabelief": lambda c: optax.scale_by_belief(c.beta1, c.beta2, c.epsilon),
        "radam": lambda c: optax.scale_by_radam(c.beta1, c.beta2, c.epsilon),
        "lion": lambda c: optax.scale_by_lion(c.beta1, c.beta2, MU_DTYPES[c.mu_dtype]),
        "rmsprop": lambda c: optax.scale_by_rms(c.beta2, c.epsilon),
        "sgd": lambda c: optax.trace(c.beta1, accumulator_dtype=MU_DTYPES[c.mu_dtype]),
        "muon": _adam,  # For all but the matrices.
    },
)
"""The direction of an update, before weight decay and learning rate, by optimizer."""


def _muon(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon, for matrices alone."""
    return optax.chain(
        # Jordan's momentum buffer averages the gradients; optax.trace sums them.
        optax.trace(MUON_MOMENTUM, nesterov=True, accumulator_dtype=MU_DTYPES[config.mu_dtype]),
        optax.scale(1 - MUON_MOMENTUM),
        optax.stateless(
            lambda updates, _: jax.tree.map(orthogonalised, updates, muon_dimensions(updates))
        ),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(rate),
    )


def orthogonalised(update: Float[Array, "..."], dimensions: MatrixAxes) -> Float[Array, "..."]:
    """Each matrix U S Vᵀ of `update` replaced by about U Vᵀ, times √max(1, outputs / inputs).

    The quintic Newton-Schulz iteration of Jordan 2024 brings singular values near 1, not to it.

    Args:
      update: [..., *inputs, *outputs], of which the leading axes count matrices.
      dimensions: the input and output axes.
    """
    inputs, outputs = (math.prod(update.shape[axis] for axis in axes) for axes in dimensions)
    x = update.reshape(-1, inputs, outputs)
    x = (
        x if inputs <= outputs else x.mT
    )  # So that the Gram matrices have the size of the shorter side.
    x /= jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + NEWTON_SCHULZ_EPSILON
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS

    def iteration(_: int, x: jax.Array) -> jax.Array:
        gram = x @ x.mT
        return a * x + (b * gram + c * gram @ gram) @ x

    # A loop, because XLA fuses iterations into each other and rounds them differently.
    x = jax.lax.fori_loop(0, NEWTON_SCHULZ_STEPS, iteration, x)
    x = x if inputs <= outputs else x.mT
    return max(1.0, outputs / inputs) ** 0.5 * x.reshape(update.shape)


def _scale_by_factors(factors: Params) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda update, factor: factor * update, updates, factors)
    )


def decays(params: Params) -> Params:
    """The weight decay mask: the tree of `params` with True where it applies."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "table"), params
    )


def _partition(params: Params) -> Params:
    """The tree of `params` with the label, "muon" or "adamw", of the update of each."""
    return jax.tree.map(
        lambda _, dimensions: "adamw" if dimensions is None else "muon",
        params,
        muon_dimensions(params),
    )


def muon_dimensions(params: optax.Params) -> Params:
    """The tree of `params` with the matrix axes of those that Muon updates, None for AdamW.

    A layer's kernel is [L, ...inputs, ...outputs], an expert's [L, E, input, output]: L and E count
    matrices.
    """

    def dimensions(path: tuple[Any, ...], leaf: jax.Array) -> MatrixAxes | None:
        names = [key.key for key in path]
        layered = "blocks" in names or "layers" in names
        if not layered or names[-1] != "kernel" or "router" in names:
            return None
        if names[-2] in INPUT_AXES:
            inputs = tuple(range(1, 1 + INPUT_AXES[names[-2]]))
        else:
            inputs = (leaf.ndim - 2,) if "mlp" in names else (1,)
        return MatrixAxes(inputs, tuple(range(inputs[-1] + 1, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(dimensions, params)
