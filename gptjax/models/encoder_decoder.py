"""The Transformer: an encoder and a decoder (Vaswani et al. 2017)."""

from typing import Any

import jax
from flax import nnx

from gptjax.config import TransformerConfig
from gptjax.layers.dropout import split_key
from gptjax.layers.hooks import ENCODER, by_part, kept_of
from gptjax.layers.inputs import Inputs
from gptjax.layers.stack import BlockStack, StackOutput
from gptjax.models.language_model import LanguageModel


class EncoderDecoder(LanguageModel):
    """Two stacks of blocks, the decoder's with cross-attention; one embedding for all.

    The encoder's hook points begin with `encoder_`; with a cache they do not exist.
    """

    takes = ("padding_mask", "source", "source_mask", "cache", "layers")

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        depth = config.encoder_depth or config.depth
        self.encoder = BlockStack(config, depth=depth, causal=False, rngs=rngs)
        self.decoder = BlockStack(config, depth=config.depth, causal=True, cross=True, rngs=rngs)

    @property
    def final_norm(self) -> Any:
        """The norm behind the decoder's last block, where there is one."""
        return self.decoder.norm

    def encode(self, inputs: Inputs) -> StackOutput:
        """The encoder's output for its `tokens`; its hook points have their plain names."""
        self.check(inputs)
        embedding_key, blocks_key = split_key(inputs.key, 2)
        return self.encoder(self.embed(inputs, embedding_key), inputs, key=blocks_key)

    def forward(self, inputs: Inputs) -> StackOutput:
        """Everything before the head."""
        encoder_key, embedding_key, blocks_key = split_key(inputs.key, 3)
        encoder_capture, capture = by_part(kept_of(inputs.capture))
        encoder_interventions, interventions = by_part(dict(inputs.interventions or {}))
        memory, captured = None, {}
        if inputs.cache is None:
            assert inputs.source is not None
            encoded = self.encode(
                Inputs(
                    inputs.source,
                    padding_mask=inputs.source_mask,
                    key=encoder_key,
                    capture=encoder_capture,
                    interventions=encoder_interventions,
                )
            )
            memory, captured = encoded.hidden, encoded.captured
        inputs = inputs._replace(capture=capture, interventions=interventions)
        output = self.decoder(
            self.embed(inputs, embedding_key), inputs, key=blocks_key, memory=memory
        )
        captured = {ENCODER + name: x for name, x in captured.items()}
        return output._replace(captured=output.captured | captured)

    def decoding_layers(self) -> list[Any]:
        """The parameters of each block that decoding runs through, not stacked."""
        return self.decoder.layers()

    def empty_cache(self, source: jax.Array, source_mask: jax.Array | None = None) -> Any:
        """A cache for one target of up to `context` tokens for each row of `source` [B, S]."""
        memory = self.encode(Inputs(source, padding_mask=source_mask)).hidden
        return self.decoder.empty_cache(len(source), memory)
