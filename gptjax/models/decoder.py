"""GPT: a decoder-only Transformer (Radford et al. 2018, 2019). plain.py has it in one page."""

from flax import nnx
from jaxtyping import PyTree

from gptjax.config import TransformerConfig
from gptjax.layers.dropout import split_key
from gptjax.layers.inputs import Cache, Inputs
from gptjax.layers.norms import Norm
from gptjax.layers.stack import BlockStack, StackOutput
from gptjax.models.language_model import LanguageModel


class Decoder(LanguageModel):
    """Embeddings, blocks of causal attention and MLPs, a final norm and a head."""

    takes = ("padding_mask", "segment_ids", "positions", "cache", "layers")

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.decoder = BlockStack(config, depth=config.depth, causal=True, rngs=rngs)

    @property
    def final_norm(self) -> Norm | None:
        """The norm after the last block, if there is one."""
        return self.decoder.norm

    def forward(self, inputs: Inputs) -> StackOutput:
        """The hidden states after the final norm."""
        embedding_key, blocks_key = split_key(inputs.key, 2)
        return self.decoder(self.embed(inputs, embedding_key), inputs, key=blocks_key)

    def decoding_layers(self) -> list[PyTree]:
        """The parameters of each block used in decoding, not stacked."""
        return self.decoder.layers()

    def empty_cache(self, batch_size: int) -> Cache:
        """A cache for `batch_size` sequences of up to `context_length` tokens."""
        return self.decoder.empty_cache(batch_size)
