"""The LSTM language model (Zaremba et al. 2014), the baseline that the Transformer displaced."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from gptjax.config import TransformerConfig
from gptjax.layers.dropout import split_key
from gptjax.layers.hooks import Hooks
from gptjax.layers.inputs import Cache, Inputs
from gptjax.layers.lstm import LSTM, initial_state
from gptjax.layers.norms import Norm, build_norm
from gptjax.layers.stack import (
    LayerInputs,
    StackOutput,
    run_layers,
    stacked,
    stacked_caches,
    unstacked,
)
from gptjax.models.language_model import LanguageModel


class Recurrent(LanguageModel):
    """A stack of LSTMs between the embedding and the head of the other families.

    Padding leaves the state unchanged; at the first token of each packed document it is reset to 0.
    """

    takes = ("padding_mask", "segment_ids", "positions", "cache", "layers")

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.layers = stacked(functools.partial(_build_lstm, config), config.depth, rngs)
        self.norm = build_norm(config) if config.final_norm else None

    @property
    def final_norm(self) -> Norm | None:
        """The norm after the last layer, if there is one."""
        return self.norm

    def forward(self, inputs: Inputs) -> StackOutput:
        """The hidden states after the final norm; `inputs.positions` are accepted and not used."""
        config, segment_ids = self.config, inputs.segment_ids
        embedding_key, layers_key = split_key(inputs.key, 2)
        x = self.embed(Inputs(inputs.tokens), embedding_key)
        graphdef, params = nnx.split(self.layers, nnx.Param)
        reset = None
        if segment_ids is not None:
            reset = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0

        def run(_: int, params: PyTree, x: jax.Array, shared: PyTree, own: LayerInputs):
            padding_mask, reset = shared
            hook = Hooks(inputs.capture, own.interventions)
            x, state = nnx.merge(graphdef, params)(
                hook("residual", x),
                own.cache,
                padding_mask=padding_mask,
                reset=reset,
                key=own.key,
            )
            return x, state, hook.captured

        states = self.empty_cache(len(inputs.tokens)) if inputs.cache is None else inputs.cache
        x, states, captured = run_layers(
            run,
            [params],
            x,
            (inputs.padding_mask, reset),
            config=config,
            depth=config.depth,
            cache=states,
            key=layers_key,
            interventions=inputs.interventions,
            layers=inputs.layers,
        )
        hidden = x if self.norm is None else self.norm(x)
        return StackOutput(hidden, None if inputs.cache is None else states, captured, None)

    def decoding_layers(self) -> list[PyTree]:
        """The parameters of each LSTM."""
        return unstacked([nnx.state(self.layers, nnx.Param)], self.config.depth)

    def empty_cache(self, batch_size: int) -> Cache:
        """The zero states of all layers, for `batch_size` sequences."""
        states = [initial_state(self.config, batch_size) for _ in range(self.config.depth)]
        return stacked_caches(self.config, states)


def _build_lstm(config: TransformerConfig, rngs: nnx.Rngs) -> LSTM:
    return LSTM(config, rngs=rngs)
