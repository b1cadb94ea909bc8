"""BERT: a bidirectional encoder (Devlin et al. 2018)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from gptjax.config import TransformerConfig
from gptjax.config.values import ENCODER_HEADS
from gptjax.layers.dropout import split_key
from gptjax.layers.inputs import Inputs
from gptjax.layers.linear import Linear
from gptjax.layers.mlp import gelu
from gptjax.layers.norms import LayerNorm, Norm
from gptjax.layers.stack import BlockStack, StackOutput
from gptjax.models.language_model import LanguageModel


class Encoder(LanguageModel):
    """Embeddings, blocks of bidirectional attention and MLPs, and BERT's heads."""

    takes = ("padding_mask", "segment_ids", "token_types", "positions")

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = (config.width,)
        self.encoder = BlockStack(config, depth=config.depth, causal=False, rngs=rngs)
        heads = ENCODER_HEADS[config.encoder_heads]
        if "pooler" in heads:
            self.pooler = Linear(width, width, axes="D-", bias=True, rngs=rngs)
        if "masked_lm" in heads:
            self.masked_lm = Linear(width, width, axes="D-", bias=True, rngs=rngs)
            self.masked_lm_norm = LayerNorm(config.width, epsilon=config.norm_epsilon, bias=True)
        if "next_sentence" in heads:
            self.next_sentence = Linear(width, (2,), axes="D-", bias=True, rngs=rngs)

    @property
    def final_norm(self) -> Norm | None:
        """The norm after the last block, if there is one."""
        return self.encoder.norm

    def forward(self, inputs: Inputs) -> StackOutput:
        """The hidden states before the heads."""
        embedding_key, blocks_key = split_key(inputs.key, 2)
        return self.encoder(self.embed(inputs, embedding_key), inputs, key=blocks_key)

    def readout(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """BERT's transform before the masked-LM head: linear, GELU, LayerNorm (released code)."""
        if "masked_lm" not in ENCODER_HEADS[self.config.encoder_heads]:
            return super().readout(hidden)
        return super().readout(self.masked_lm_norm(gelu(self.masked_lm(hidden))))

    def pooled(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """BERT's pooler: tanh of a linear layer of the first token's hidden state."""
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def next_sentence_logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B 2"]:
        """Logits of next-sentence prediction: the second segment follows the first, or does not."""
        return self.next_sentence(self.pooled(hidden)).astype(jnp.float32)
