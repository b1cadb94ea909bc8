"""Statistics of the activations that `--train.watch` follows.

| scalars of each layer | |
|---|---|
| residual/, attention_output/, mlp_output/ | root mean square of the hook point |
| largest_score/ | largest attention score; of causal attention, of keys that are not later |
| attention_entropy/ | entropy of the attention weights, nats, mean over heads and queries |
| dead_units/ | share of the MLP's hidden units that never exceed `DEAD` of the layer's largest |
| **of the model** | |
| token_entropy/model | entropy of the predicted distribution, nats, mean over tokens |

Cross-attention has `cross_largest_score/` and so on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gptjax.config import TransformerConfig
from gptjax.data.batch import Batch
from gptjax.layers.hooks import CROSS, ENCODER, hook_points
from gptjax.models.build import Params
from gptjax.training.watch import Activations, Measured

TOKENS = 4096
"""Tokens whose activations are read, on each device: whole rows, at least one."""
DEAD = 1e-3


class Statistic(NamedTuple):
    """A number of each layer, from the array at a hook point."""

    name: str
    of_rows: Callable[[jax.Array, bool], jax.Array]
    """(the array of a layer, whether attention there is causal) → what devices combine."""
    combine: Callable[[jax.Array, str], jax.Array]
    """Over the devices of a mesh axis."""
    of_layers: Callable[[jax.Array], jax.Array]
    """What was combined, [L, ...] → [L]."""


def _entropy(weights: Float[Array, "*shape S"]) -> Float[Array, "*shape"]:
    return -(weights * jnp.log(jnp.where(weights > 0, weights, 1))).sum(-1)


def _largest(scores: Float[Array, "B N T S"], causal: bool) -> Float[Array, ""]:
    if causal and scores.shape[-2] == scores.shape[-1]:  # Compressed keys are fewer.
        scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
    return scores.max()


def _dead(largest: Float[Array, "L F"]) -> Float[Array, " L"]:
    return (largest <= DEAD * largest.max(axis=-1, keepdims=True)).mean(axis=-1)


def _mean_square(x: jax.Array, _: bool) -> jax.Array:
    return jnp.square(x.astype(jnp.float32)).mean()


def _itself(x: jax.Array) -> jax.Array:
    return x


STATISTICS = {
    **{
        name: Statistic(name, _mean_square, jax.lax.pmean, jnp.sqrt)
        for name in ("residual", "attention_output", "mlp_output")
    },
    "scores": Statistic("largest_score", _largest, jax.lax.pmax, _itself),
    "attention": Statistic(
        "attention_entropy", lambda w, _: _entropy(w).mean(), jax.lax.pmean, _itself
    ),
    "activation": Statistic(
        "dead_units", lambda a, _: jnp.abs(a).max(axis=(0, 1)), jax.lax.pmax, _dead
    ),
}
"""By hook point."""


def activations(graphdef: nnx.GraphDef, config: TransformerConfig) -> Activations:
    """(parameters, batch, mesh axis) → the statistics of the first rows of the batch."""
    points = {name: found for name in hook_points(config) if (found := _statistic(config, name))}

    def measure(params: Params, batch: Batch, axis: str | None) -> dict[str, Measured]:
        rows = max(1, TOKENS // batch.tokens.shape[1])
        batch = jax.tree.map(lambda array: array[:rows], batch)
        model: Any = nnx.merge(graphdef, params)
        capture = {
            name: lambda x, of=one.of_rows, causal=causal: of(x, causal)
            for name, (_, _, one, causal) in points.items()
        }
        output = model.hidden(batch.tokens, capture=capture, **batch.inputs())
        entropy = _entropy(jax.nn.softmax(model.unembed(model.readout(output.hidden)))).mean()
        entropy = entropy if axis is None else jax.lax.pmean(entropy, axis)
        measured: dict[str, Measured] = {"token_entropy": {"model": entropy}}
        for name, (kind, stack, one, _) in points.items():
            value = output.captured[name]
            value = value if axis is None else one.combine(value, axis)
            measured.setdefault(kind, {})[stack] = one.of_layers(value)
        return measured

    return measure


def _statistic(config: TransformerConfig, point: str) -> tuple[str, str, Statistic, bool] | None:
    """The scalars' kind, the stack of layers, the statistic, and whether attention is causal."""
    in_encoder = point.startswith(ENCODER) or config.family == "encoder"
    own = point.removeprefix(ENCODER)
    cross = CROSS if own.startswith(CROSS) else ""
    statistic = STATISTICS.get(own.removeprefix(CROSS))
    if statistic is None:
        return None
    stack = "layers" if config.family == "recurrent" else "encoder" if in_encoder else "decoder"
    return cross + statistic.name, stack, statistic, not in_encoder and not cross
