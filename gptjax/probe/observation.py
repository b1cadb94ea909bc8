"""One forward pass with captured activations and interventions."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gptjax.layers.hooks import Capture, Intervention, capture_functions, check_hook_points
from gptjax.layers.inputs import Inputs
from gptjax.models.build import LanguageModel, split


class Activations(NamedTuple):
    """The outputs and captured activations of a forward pass."""

    logits: Float[Array, "B T V"]
    """In float32."""
    hidden: Float[Array, "B T D"]
    """After the final norm."""
    captured: dict[str, Any]
    """Captured activations by hook point, with the axes of `hook_points`."""


def observe(
    model: LanguageModel,
    tokens: Any,
    capture: Capture = (),
    interventions: Mapping[str, Intervention] | None = None,
    **inputs: Any,
) -> Activations:
    """Run the model, capture activations at hook points, and intervene at others.

    The program is compiled once for tokens of one shape and for the same hook points. Scores and
    attention weights are computed by the reference implementation
    (layers/attention/reference.py), whatever kernel the model was trained with.

    Args:
      model: of any family.
      tokens: [B, T].
      capture: names of `hook_points`; or for each a function of one layer's array that JAX can
        trace, whose result is kept: `{"attention": probe.entropy}` never holds all layers'
        weights.
      interventions: by hook point, from `zero`, `replace` and `add`.
      inputs: further inputs of the family's `hidden`: `source`, `padding_mask` …

    Raises:
      InputError: unknown tokens or hook points, or more tokens than the context.
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
    tokens: Int[Array, "B T"],
    capture: Capture,
    interventions: Mapping[str, Intervention],
    inputs: Mapping[str, Any],
) -> Activations:
    """`observe` while tracing, without compilation."""
    output = model.hidden(tokens, capture=capture, interventions=interventions, **inputs)
    logits = model.unembed(model.readout(output.hidden))
    return Activations(logits, output.hidden, output.captured)


def as_arrays(
    model: LanguageModel, tokens: Any, inputs: Mapping[str, Any], *names: Any
) -> tuple[Int[Array, "B T"], dict[str, jax.Array]]:
    """Tokens and inputs as JAX arrays, checked with the hook point `names` against the model.

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
