"""BERT: a bidirectional encoder (Devlin et al. 2018)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import TransformerConfig
from gptjax.config.values import ENCODER_HEADS
from gptjax.layers.dropout import split_key
from gptjax.layers.inputs import Inputs
from gptjax.layers.linear import Linear
from gptjax.layers.mlp import gelu
from gptjax.layers.norms import LayerNorm
from gptjax.layers.stack import BlockStack, StackOutput
from gptjax.models.language_model import LanguageModel


class Encoder(LanguageModel):
    """Embeddings, blocks whose tokens attend to both sides, and BERT's heads."""

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
    def final_norm(self) -> Any:
        """The norm behind the last block, where there is one."""
        return self.encoder.norm

    def forward(self, inputs: Inputs) -> StackOutput:
        """Everything before the heads."""
        embedding_key, blocks_key = split_key(inputs.key, 2)
        return self.encoder(self.embed(inputs, embedding_key), inputs, key=blocks_key)

    def readout(self, hidden: jax.Array) -> jax.Array:
        """[..., D] → [..., D]: what BERT does before its masked-LM head (its released code)."""
        if "masked_lm" not in ENCODER_HEADS[self.config.encoder_heads]:
            return super().readout(hidden)
        return super().readout(self.masked_lm_norm(gelu(self.masked_lm(hidden))))

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] → [B, D]: tanh of a linear layer of the first token."""
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def next_sentence_logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] → [B, 2], float32: the second segment follows the first, or does not."""
        return self.next_sentence(self.pooled(hidden)).astype(jnp.float32)
