"""The Transformer: an encoder and a decoder (Vaswani et al. 2017)."""

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, PyTree

from gptjax.config import TransformerConfig
from gptjax.layers.dropout import split_key
from gptjax.layers.hooks import ENCODER, capture_functions, split_encoder
from gptjax.layers.inputs import Cache, Inputs
from gptjax.layers.norms import Norm
from gptjax.layers.stack import BlockStack, StackOutput
from gptjax.models.language_model import LanguageModel


class EncoderDecoder(LanguageModel):
    """An encoder and a decoder with cross-attention, which share one embedding.

    The encoder's hook points begin with `encoder_`; with a cache they do not exist.
    """

    takes = ("padding_mask", "source", "source_mask", "cache", "layers")

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        depth = config.encoder_depth or config.depth
        self.encoder = BlockStack(config, depth=depth, causal=False, rngs=rngs)
        self.decoder = BlockStack(config, depth=config.depth, causal=True, cross=True, rngs=rngs)

    @property
    def final_norm(self) -> Norm | None:
        """The norm after the decoder's last block, if there is one."""
        return self.decoder.norm

    def encode(self, inputs: Inputs) -> StackOutput:
        """The encoder's output for `inputs.tokens`; hook points are named without prefix here."""
        self.check(inputs)
        embedding_key, blocks_key = split_key(inputs.key, 2)
        return self.encoder(self.embed(inputs, embedding_key), inputs, key=blocks_key)

    def forward(self, inputs: Inputs) -> StackOutput:
        """The decoder's hidden states after its final norm."""
        encoder_key, embedding_key, blocks_key = split_key(inputs.key, 3)
        encoder_capture, capture = split_encoder(capture_functions(inputs.capture))
        encoder_interventions, interventions = split_encoder(dict(inputs.interventions or {}))
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

    def decoding_layers(self) -> list[PyTree]:
        """The parameters of each block used in decoding, not stacked."""
        return self.decoder.layers()

    def empty_cache(
        self,
        source: Int[Array | np.ndarray, "B S"],
        source_mask: Bool[Array | np.ndarray, "B S"] | None = None,
    ) -> Cache:
        """A cache for one target of up to `context_length` tokens per row of `source`."""
        memory = self.encode(Inputs(source, padding_mask=source_mask)).hidden
        return self.decoder.empty_cache(len(source), memory)
