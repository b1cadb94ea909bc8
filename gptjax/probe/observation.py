"""One forward pass: what was asked for on the way, and what came out."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.layers.hooks import Capture, Intervention, capture_functions, check_hook_points
from gptjax.layers.inputs import Inputs
from gptjax.models.build import LanguageModel, split


class Activations(NamedTuple):
    """What a forward pass came to."""

    logits: jax.Array
    """[B, T, V], float32."""
    hidden: jax.Array
    """[B, T, D], after the final norm."""
    captured: dict[str, Any]
    """What was captured, by hook point, with the axes of `hook_points`."""


def observe(
    model: LanguageModel,
    tokens: Any,
    capture: Capture = (),
    interventions: Mapping[str, Intervention] | None = None,
    **inputs: Any,
) -> Activations:
    """Run the model, look at some places and change some.

    It is compiled; for other tokens of the same shape, and other values of the same interventions,
    the program is there already. Scores and weights are those of the attention that is written out
    (layers/attention/reference.py), whatever kernel the model was trained with.

    Args:
      model: of any family.
      tokens: [B, T].
      capture: hook points of `hook_points`; or for each what is kept of it, a function of one
        layer's array that JAX can trace: `{"attention": probe.entropy}` never holds all layers'
        weights.
      interventions: by hook point, from `zero`, `replace` and `add`.
      inputs: what the family's `hidden` takes beside tokens: `source`, `padding_mask` …

    Raises:
      InputError: tokens or places that the model does not have, or more tokens than its context.
    """
    tokens, inputs = as_arrays(model, tokens, inputs, capture, interventions)
    graphdef, params = split(model)
    kept = tuple(capture_functions(capture).items())
    return _observe(graphdef, kept, params, tokens, dict(interventions or {}), inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(graphdef, kept, params, tokens, interventions, inputs) -> Activations:
    return run(nnx.merge(graphdef, params), tokens, dict(kept), interventions, inputs)


def run(
    model: LanguageModel,
    tokens: jax.Array,
    capture: Capture,
    interventions: Mapping[str, Intervention],
    inputs: Mapping[str, Any],
) -> Activations:
    """`observe` inside a program that is being compiled."""
    output = model.hidden(tokens, capture=capture, interventions=interventions, **inputs)
    logits = model.unembed(model.readout(output.hidden))
    return Activations(logits, output.hidden, output.captured)


def as_arrays(
    model: LanguageModel, tokens: Any, inputs: Mapping[str, Any], *names: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Tokens and inputs as JAX's, once they and hook points' `names` are found to be the model's.

    Raises:
      InputError: as `observe`, or an encoder-decoder without a source.
    """
    tokens = jnp.asarray(tokens)
    arrays: dict[str, Any] = {
        name: jnp.asarray(given) for name, given in inputs.items() if given is not None
    }
    model.check(Inputs(tokens, **arrays))
    for hook_points in names:
        check_hook_points(model.config, hook_points or ())
    if "source" in arrays:
        model.check(Inputs(arrays["source"]))
    return tokens, arrays
