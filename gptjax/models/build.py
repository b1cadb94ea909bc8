"""Builds a model from its config, and splits it into structure and parameters.

Models are Flax NNX modules, used functionally:

    model = build(config, rngs=nnx.Rngs(0))
    graphdef, params = split(model)
    logits = nnx.merge(graphdef, params)(tokens)

The blocks' parameters are stacked along a leading axis L.
"""

from typing import Any

from flax import nnx

from gptjax.config import TransformerConfig
from gptjax.config.values import Family, exhaustive
from gptjax.models.decoder import Decoder
from gptjax.models.encoder import Encoder
from gptjax.models.encoder_decoder import EncoderDecoder
from gptjax.models.language_model import LanguageModel
from gptjax.models.recurrent import Recurrent

Params = dict[str, Any]
"""A nested dict of arrays, or of what stands for them."""

FAMILIES: dict[str, type[LanguageModel]] = exhaustive(
    Family,
    {
        "decoder": Decoder,
        "encoder": Encoder,
        "encoder_decoder": EncoderDecoder,
        "recurrent": Recurrent,
    },
)


def build(config: TransformerConfig, *, rngs: nnx.Rngs) -> LanguageModel:
    """A newly initialised model of the family `config.family`.

    Raises:
      InputError: a config without a vocabulary size.
    """
    return FAMILIES[config.family](config, rngs=rngs)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The static structure of a model, and its parameters as a nested dict of arrays."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def abstract(config: TransformerConfig) -> tuple[nnx.GraphDef, Params]:
    """`split` without allocating the model: its static structure and its parameters' shapes."""
    return split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))


def parameter_axes(config: TransformerConfig) -> Params:
    """The letters of every parameter's axes, such as "LDNH" for the query kernels of all layers."""

    def letters(variable: nnx.Variable) -> str:
        axes = variable.get_metadata("axes")
        return "L" * (len(variable.shape) - len(axes)) + axes

    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param), extract_fn=letters)
