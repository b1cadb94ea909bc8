"""muP: a learning rate that is best at a small width is about best at a large one.

The maximal update parametrisation (Yang et al. 2022, Tensor Programs V) says how the scale of the
initial parameters and of their updates must change with the width for every activation to change
by as much in a step as it does in a narrow model. Here the narrow model is the *base*, at which
nothing changes, and Adam is the optimizer; with r the sizes of the real model over the base's:

| leaf | initial value times | learning rate times |
|---|---|---|
| kernel | √(1 / r of inputs) · min(1, √(r of outputs / r of inputs)) | 1 / r of inputs |
| query's kernel and bias, or its norm | √(1 / r of head width), besides | the same, besides |
| a token embedding that is multiplied by √D | √(1 / r of D) | √(1 / r of D) |
| other tables, biases, norms | 1 | 1 |

and the head's input is multiplied by 1 / r of D, whether its table is the embedding or not (table 8
of the paper).

The first line is the spectral condition (Yang, Simon & Bernstein 2023) for one step of Adam. Where
both sides of a kernel grow alike it is the column of hidden weights in the paper's table 3, where
outputs do not grow, as a router's, that of output weights. The query's is the 1 / H of the paper's
attention in the place of 1 / √H: Adam's update does not depend on the gradient's scale, so that a
multiplier of a leaf is the same as both factors of it.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from gptjax.config import InputError, TransformerConfig
from gptjax.layers.linear import Linear
from gptjax.layers.moe import ExpertLinear
from gptjax.models.build import Params, build, parameter_axes


class Factors(NamedTuple):
    """What a model's parameters are multiplied by; trees like theirs, of numbers."""

    initial: Params
    """Their initial values."""
    rate: Params
    """Their learning rates: `rate_factors` of `build_optimizer`."""

    def drawn(self, params: Params) -> Params:
        """The initial values in the place of `params`, newly drawn for no base."""
        return jax.tree.map(lambda factor, leaf: factor * leaf, self.initial, params)


def scaled(config: TransformerConfig, base: TransformerConfig) -> TransformerConfig:
    """`config` with the head's multiplier for the base `base`: the model to be trained."""
    scale = base.width / config.width
    if config.tie_embeddings:
        scale /= _embedding_factor(config, base)
    return dataclasses.replace(config, logit_scale=scale * config.logit_scale)


def factors(config: TransformerConfig, base: TransformerConfig) -> Factors:
    """The factors of each parameter of the model `config`, all 1 where `base` is as wide.

    Raises:
      InputError: a base with other layers.
    """
    axes = parameter_axes(config)
    if jax.tree.structure(axes) != jax.tree.structure(parameter_axes(base)):
        raise InputError(
            f"The base of muP, of width {base.width}, has other parameters than the model of width "
            f"{config.width}: they must differ in sizes alone."
        )
    fans, base_fans = _fans(config), _fans(base)
    looks = "query_norm" if config.qk_norm else "query"
    attention = config.actual_head_dim / base.actual_head_dim
    attention **= -0.5 if config.attention_scaled else -1

    def of_leaf(path: tuple[Any, ...], _: str) -> tuple[float, float]:
        names = tuple(key.key for key in path)
        initial = rate = 1.0
        if names in fans:
            inputs, outputs = (
                fan / at for fan, at in zip(fans[names], base_fans[names], strict=True)
            )
            initial = inputs**-0.5 * min(1.0, (outputs / inputs) ** 0.5)
            rate = 1 / inputs
        multiplier = 1.0
        if names == ("embedding", "table"):
            multiplier = _embedding_factor(config, base)
        elif names[-2:-1] == (looks,):
            multiplier = attention
        return multiplier * initial, multiplier * rate

    pairs = jax.tree_util.tree_map_with_path(of_leaf, axes)
    return Factors(*jax.tree.transpose(jax.tree.structure(axes), jax.tree.structure((0, 0)), pairs))


def _fans(config: TransformerConfig) -> dict[tuple[Any, ...], tuple[int, int]]:
    """How many inputs and outputs each kernel has, by its path; an expert counts for itself."""
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    fans = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            fans[*path, "kernel"] = math.prod(module.inputs), math.prod(module.outputs)
        elif isinstance(module, ExpertLinear):
            fans[*path, "kernel"] = module.kernel.shape[-2:]
    return fans


def _embedding_factor(config: TransformerConfig, base: TransformerConfig) -> float:
    """Undoes what √D adds to the token embedding with the width."""
    return math.sqrt(base.width / config.width) if config.embedding_scaled else 1.0
