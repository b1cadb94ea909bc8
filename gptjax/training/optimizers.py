"""Optimizers and schedules, and the rules of which parameter gets what.

The rules go by a leaf's name, not by its rank: stacked biases are matrices too.

| leaf | decays | Muon |
|---|---|---|
| `kernel` of a block or an LSTM | yes | yes, but the router's |
| `kernel` elsewhere | yes | no |
| `table` of an embedding or the head | yes | no |
| `scale`, `bias` | no | no |
"""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from gptjax.config import InputError, OptimizerConfig

INPUT_AXES = {"output": 2, "compress_key": 3, "compress_value": 3}
"""Of the kernels with more than one axis of inputs, how many they have."""
NESTEROV_BETA = 0.95
"""Muon's momentum (Jordan 2024)."""


def learning_rate_schedule(
    config: OptimizerConfig, peak: float | jax.Array, steps: int
) -> optax.Schedule:
    """Step → learning rate: a linear warm-up to `peak`, then what `config.schedule` names.

    Sources: cosine, Loshchilov & Hutter 2017; wsd (warm-up, stable, decay), Hu et al. 2024.

    Raises:
      InputError: a warm-up that leaves no step after it.
    """
    warmup, final = config.warmup_steps, config.final_fraction * peak
    if warmup >= steps:
        raise InputError(
            f"OptimizerConfig.warmup_steps is {warmup}: it must be below train.steps {steps}."
        )
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup, config.final_fraction)
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay = round(config.decay_fraction * (steps - warmup))
        after = optax.linear_schedule(peak, final, decay, steps - warmup - decay)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def build_optimizer(
    config: OptimizerConfig,
    steps: int,
    learning_rate: float | jax.Array | None = None,
    rate_factors: Any = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan 2024) with AdamW for all but matrices.

    Args:
      config: which, and how.
      steps: of the whole run.
      learning_rate: the peak of AdamW's, where one program trains at several; None takes the
        config's.
      rate_factors: what AdamW's learning rate is multiplied by, a tree like the parameters of
        numbers (`gptjax.mup`); None is 1. The weight decay does not change.

    Raises:
      InputError: a warm-up as long as the run, or factors for Muon.
    """
    if rate_factors is not None and config.name != "adamw":
        raise InputError(
            f"OptimizerConfig.name is {config.name!r}: it must be adamw for learning rates that "
            "follow the width (muP), of which Muon's matrices need none, having been "
            "orthogonalised."
        )
    peak = config.learning_rate if learning_rate is None else learning_rate
    adamw_rate = learning_rate_schedule(config, peak, steps)
    if config.name == "adamw":
        # The factors come before the decay, so that in a step a weight loses the same share of
        # itself at every width: decay is of the weight's own size, which no width has to correct.
        adam = optax.scale_by_adam(
            b1=config.beta1, b2=config.beta2, eps=config.epsilon, mu_dtype=config.moments
        )
        update = optax.chain(
            adam if rate_factors is None else optax.chain(adam, _multiplied_by(rate_factors)),
            optax.add_decayed_weights(config.weight_decay, mask=decays),
            optax.scale_by_learning_rate(adamw_rate),
        )
    else:
        update = muon(
            learning_rate_schedule(config, config.muon_learning_rate, steps),
            beta=NESTEROV_BETA,
            eps=config.epsilon,
            mu_dtype=config.moments,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=adamw_rate,
            muon_weight_dimension_numbers=muon_dimensions,
        )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, update)


def _multiplied_by(factors: Any) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda update, factor: factor * update, updates, factors)
    )


def decays(params: Any) -> Any:
    """The tree of `params` with True where weight decay applies."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "table"), params
    )


def muon_dimensions(params: Any) -> Any:
    """The tree of `params` with the axes that Muon multiplies along, None where AdamW updates.

    A layer's kernel is [L, ...inputs, ...outputs], an expert's [L, E, input, output]: L and E count
    matrices.
    """

    def dimensions(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        names = [key.key for key in path]
        layered = "blocks" in names or "layers" in names
        if not layered or names[-1] != "kernel" or "router" in names:
            return None
        if names[-2] in INPUT_AXES:
            inputs = tuple(range(1, 1 + INPUT_AXES[names[-2]]))
        else:
            inputs = (leaf.ndim - 2,) if "feedforward" in names else (1,)
        return MuonDimensionNumbers(inputs, tuple(range(inputs[-1] + 1, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(dimensions, params)
