"""The model, loss and optimizer of a config, as pure functions; nothing is computed yet.

Runs (`run`), trials in notebooks (`trial`) and ensembles of seeds (`ensembles`) are built on it.
"""

import dataclasses
from typing import NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gptjax.config import ExperimentConfig, TransformerConfig
from gptjax.layers.attention.kernels import resolve_kernel, target
from gptjax.models.build import Params, abstract, build, parameter_axes, split
from gptjax.parallel.keys import random_key
from gptjax.runs.activations import activations
from gptjax.runs.mup import Factors, factors, scaled
from gptjax.training.losses import LossFunction, training_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.watch import Activations


class Assembly(NamedTuple):
    """A model, its loss and its optimizer, all pure functions of parameters."""

    config: ExperimentConfig
    """The run's config; with `mup_base`, its model has muP's logit multiplier."""
    graphdef: nnx.GraphDef
    """The model's structure: `nnx.merge(graphdef, params)` is the model."""
    axes: Params
    """The letters of each parameter's axes, by which a mesh shards them."""
    loss: LossFunction
    mup: Factors | None
    activations: Activations | None
    """What `--train.watch` measures inside the model; None in a pipeline, whose stages capture
    nothing."""
    lines: list[str]
    """Lines for the log: the attention kernel chosen."""

    def init(self, key: jax.Array | None = None) -> Params:
        """Initial parameters from `key`; None is the key of `train.seed`."""
        key = random_key(self.config.train.seed) if key is None else key
        params = split(build(self.config.model, rngs=nnx.Rngs(key)))[1]
        return params if self.mup is None else self.mup.scale_initial(params)

    def optimizer(
        self, learning_rate: float | Float[Array, ""] | None = None
    ) -> optax.GradientTransformation:
        """The optimizer, at the given peak learning rate; None is the config's."""
        rates = self.mup and self.mup.rate
        config = self.config
        return build_optimizer(
            config.optimizer, config.train.steps, learning_rate, rates, dtype=config.model.dtype
        )


def assemble(
    config: ExperimentConfig,
    mesh: Mesh | None = None,
    *,
    mup_base: TransformerConfig | None = None,
) -> Assembly:
    """The model, loss and optimizer of a config.

    Args:
      config: with the size of the vocabulary.
      mesh: the devices, for which the fastest attention kernel is chosen; None takes XLA's.
      mup_base: the model of the width at which the learning rate was tuned, from which muP
        transfers it to the width of `config`; None is without muP.

    Raises:
      InputError: an attention kernel that the devices do not have, or a base that differs in more
        than sizes.
    """
    mup = None
    if mup_base is not None:
        mup = factors(config.model, mup_base)
        config = dataclasses.replace(config, model=scaled(config.model, mup_base))
    model, lines = config.model, []
    if mesh is not None:
        model, lines = resolve_kernel(model, *target(mesh), sequence=mesh.shape["sequence"])
    graphdef, _ = abstract(model)
    loss = training_loss(graphdef, config.train)
    staged = mesh is not None and mesh.shape["pipeline"] > 1
    inside = None if staged else activations(graphdef, config.model)
    if staged and config.train.watch:
        lines.append("Watched are norms alone: the stages of a pipeline capture no activations.")
    return Assembly(config, graphdef, parameter_axes(config.model), loss, mup, inside, lines)
