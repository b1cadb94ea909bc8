"""muP: the best learning rate of a narrow model is about the best of a wide one.

The maximal update parametrisation (Yang et al. 2022, Tensor Programs V) scales the initial
parameters and their updates with the width so that a step changes every activation by as much as in
a narrow model. Here the narrow model is the *base*, whose multipliers are all 1, and Adam is the
optimizer; with r the ratio of the model's sizes to the base's:

| leaf | multiplier of the initial value | multiplier of the learning rate |
|---|---|---|
| kernel | √(1 / r of inputs) · min(1, √(r of outputs / r of inputs)) | 1 / r of inputs |
| query's kernel and bias, or its norm | √(1 / r of head dim), in addition | the same, in addition |
| a token embedding that is multiplied by √D | √(1 / r of D) | √(1 / r of D) |
| other tables, biases, norms | 1 | 1 |

and the head's input is multiplied by 1 / r of D, whether embeddings are tied or not (table 8 of the
paper).

The first line is the spectral condition (Yang, Simon & Bernstein 2023) for one step of Adam. Where
both sides of a kernel grow alike it is the hidden weights' column of the paper's table 3; where
outputs do not grow, as a router's, the output weights'. The query's line is the paper's 1 / H of
attention instead of 1 / √H: Adam's update does not depend on the gradient's scale, so a multiplier
of a leaf's value is equivalent to both multipliers here.
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
    """muP's multipliers, trees of numbers in the structure of the parameters."""

    initial: Params
    """Of the initial values."""
    rate: Params
    """Of the learning rates: `rate_factors` of `build_optimizer`."""

    def scale_initial(self, params: Params) -> Params:
        """The initial parameters of muP, from standard initial parameters `params`."""
        return jax.tree.map(lambda factor, leaf: factor * leaf, self.initial, params)


def scaled(config: TransformerConfig, base: TransformerConfig) -> TransformerConfig:
    """The config to train: `config` with muP's logit multiplier for the base `base`."""
    scale = base.width / config.width
    if config.tie_embeddings:
        scale /= _embedding_factor(config, base)
    return dataclasses.replace(config, logit_scale=scale * config.logit_scale)


def factors(config: TransformerConfig, base: TransformerConfig) -> Factors:
    """muP's multipliers for each parameter of the model `config`, all 1 if `base` is as wide.

    Raises:
      InputError: a base with other layers.
    """
    axes = parameter_axes(config)
    if jax.tree.structure(axes) != jax.tree.structure(parameter_axes(base)):
        raise InputError(
            f"The base of muP, of width {base.width}, has other parameters than the model of width "
            f"{config.width}: they must differ only in sizes."
        )
    fans, base_fans = _fans(config), _fans(base)
    query = "query_norm" if config.qk_norm else "query"
    attention = config.actual_head_dim / base.actual_head_dim
    attention **= -0.5 if config.attention_scaled else -1

    def of_leaf(path: tuple[Any, ...], _: str) -> tuple[float, float]:
        names = tuple(key.key for key in path)
        initial = rate = 1.0
        if names in fans:
            inputs, outputs = (
                fan / base_fan for fan, base_fan in zip(fans[names], base_fans[names], strict=True)
            )
            initial = inputs**-0.5 * min(1.0, (outputs / inputs) ** 0.5)
            rate = 1 / inputs
        multiplier = 1.0
        if names == ("embedding", "table"):
            multiplier = _embedding_factor(config, base)
        elif names[-2:-1] == (query,):
            multiplier = attention
        return multiplier * initial, multiplier * rate

    pairs = jax.tree_util.tree_map_with_path(of_leaf, axes)
    return Factors(*jax.tree.transpose(jax.tree.structure(axes), jax.tree.structure((0, 0)), pairs))


def _fans(config: TransformerConfig) -> dict[tuple[Any, ...], tuple[int, int]]:
    """Fan-in and fan-out of each kernel, by its path; those of an expert are its own."""
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    fans = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            fans[*path, "kernel"] = math.prod(module.inputs), math.prod(module.outputs)
        elif isinstance(module, ExpertLinear):
            fans[*path, "kernel"] = module.kernel.shape[-2:]
    return fans


def _embedding_factor(config: TransformerConfig, base: TransformerConfig) -> float:
    """The multiplier that cancels the growth of √D, by which token embeddings are scaled."""
    return math.sqrt(base.width / config.width) if config.embedding_scaled else 1.0
