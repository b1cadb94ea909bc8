"""One Transformer block: attention and a feed-forward layer, each added to the residual stream."""

from collections.abc import Collection

import jax
from flax import nnx

from gptjax.config import TransformerConfig
from gptjax.layers.attention import Attention, KVCache
from gptjax.layers.dropout import dropout, split_key
from gptjax.layers.feedforward import FeedForward
from gptjax.layers.norms import NORMS

CAPTURES = ("residual", "attention", "feedforward")
"""What a block can return: the stream that enters it [B, T, D], its attention weights
[B, N, T, S], and what its feed-forward layer adds [B, T, D]."""


class Block(nnx.Module):
    """Pre-norm block (GPT-2, Radford et al. 2019, section 2.3): x + attend(norm(x)), then MLP."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.width, bias=config.bias, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feedforward_norm = norm(config.width, bias=config.bias, rngs=rngs)
        self.feedforward = FeedForward(config, rngs=rngs)
        self.dropout = config.dropout

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array,
        angles: jax.Array | None = None,
        cache: KVCache | None = None,
        position: jax.Array | int = 0,
        key: jax.Array | None = None,
        capture: Collection[str] = (),
    ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
        """[B, T, D] → the stream after the block, its cache, and what `capture` names.

        The arguments are those of `Attention`; `capture` is a subset of `CAPTURES`.
        """
        attention_key, attended_key, feedforward_key = split_key(key, 3)
        attended, cache, weights = self.attention(
            self.attention_norm(x),
            mask=mask,
            angles=angles,
            cache=cache,
            position=position,
            key=attention_key,
            return_weights="attention" in capture,
        )
        middle = x + dropout(attended, self.dropout, attended_key)
        fed = self.feedforward(self.feedforward_norm(middle))
        captured = {"residual": x, "attention": weights, "feedforward": fed}
        after = middle + dropout(fed, self.dropout, feedforward_key)
        return after, cache, {name: captured[name] for name in capture}
