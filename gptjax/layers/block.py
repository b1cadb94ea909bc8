"""One Transformer block: attention and a feed-forward layer, each added to the residual stream.

| `norm_placement` | the stream after a layer f | source |
|---|---|---|
| pre | x + f(norm(x)) | GPT-2 (Radford et al. 2019, section 2.3) |
| post | norm(x + f(x)) | Vaswani et al. 2017, section 3.1; BERT, GPT-1 |
| sandwich | x + norm(f(norm(x))) | CogView (Ding et al. 2021); Gemma 2 |
| parallel | x + attention(norm(x)) + feedforward(norm'(x)) | GPT-NeoX (Black et al. 2022) |
| parallel_shared | x + attention(norm(x)) + feedforward(norm(x)) | GPT-J (Wang 2021) |
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import TransformerConfig
from gptjax.layers.attention.flash import Sight
from gptjax.layers.attention.module import Attention, KVCache
from gptjax.layers.dropout import dropout, split_key
from gptjax.layers.hooks import CROSS, UNTAPPED, Taps
from gptjax.layers.mlp import FeedForward
from gptjax.layers.moe import Experts, RouterLosses
from gptjax.layers.norms import build_norm
from gptjax.parallel.sharding import constrain


class View(NamedTuple):
    """What attention is told beside its inputs, the same for all blocks of a kind."""

    mask: jax.Array
    """[B or 1, T, S], True where a query may look."""
    bias: jax.Array | None
    """[B or 1, N, T, S], added to the scores."""
    angles: jax.Array | None
    """[B or 1, T, R / 2], the rotary angles of the queries."""
    memory_mask: jax.Array | None
    """[B or 1, 1, S'], True at the tokens of the other sequence that exist."""
    sight: Sight | None = None
    """The rule that `mask` follows where no cache is; None if there is none."""
    memory_sight: Sight | None = None
    """The rule that `memory_mask` follows."""


class BlockCache(NamedTuple):
    """What a block keeps between steps of decoding.

    Heads come before places, [B, K, S, H], as products read them: they copy nothing.
    """

    own: KVCache
    """Of the sequence itself."""
    memory: KVCache | None
    """Of the other sequence that cross-attention looks at; it never changes."""


class Block(nnx.Module):
    """Attention, in a decoder with an encoder cross-attention, and the feed-forward layer."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: str = "full",
        cross: bool = False,
        rngs: nnx.Rngs,
    ):
        sandwich = config.norm_placement == "sandwich"
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, compressed=attention == "compressed", rngs=rngs)
        self.attention_norm_after = build_norm(config) if sandwich else None
        self.cross_norm = build_norm(config) if cross else None
        self.cross_attention = Attention(config, rngs=rngs) if cross else None
        self.cross_norm_after = build_norm(config) if cross and sandwich else None
        shared = config.norm_placement == "parallel_shared"
        self.feedforward_norm = None if shared else build_norm(config)
        self.feedforward = (Experts if config.experts else FeedForward)(config, rngs=rngs)
        self.feedforward_norm_after = build_norm(config) if sandwich else None
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        view: View,
        *,
        memory: jax.Array | None = None,
        cache: BlockCache | None = None,
        start: jax.Array | int = 0,
        key: jax.Array | None = None,
        taps: Taps = UNTAPPED,
    ) -> tuple[jax.Array, BlockCache | None, RouterLosses | None]:
        """One layer of the stack.

        Args:
          x: [B, T, D].
          view: masks, biases and angles.
          memory: [B, S', D], the encoder's output; with a cache, its keys and values are there.
          cache: of the tokens before x's.
          start: where x's first token belongs in the cache, a number or [B].
          key: dropout key; None drops nothing.
          taps: what is looked at or changed.

        Returns:
          The stream after the block [B, T, D], the cache with x in it, and the losses of the router
          of a mixture of experts.
        """
        x = taps("residual", checkpoint_name(x, "residual"))
        keys = split_key(key, 5)
        rate, parallel = self.config.dropout, "parallel" in self.config.norm_placement

        normed = self._before(self.attention_norm, x)
        queries, seen = self.attention.projected(normed, view.angles)
        reach = None
        if cache is not None:
            reach = jnp.max(start) + x.shape[1]
            seen = cache.own.swapped().write(seen, start)
            cache = cache._replace(own=seen.swapped())
        attended = self.attention(
            queries,
            seen,
            mask=view.mask,
            sight=view.sight,
            bias=view.bias,
            reach=reach,
            key=keys[0],
            taps=taps,
        )
        attended = dropout(attended, rate, keys[1])
        if parallel:
            middle = x
        else:
            middle = self._after(self.attention_norm, self.attention_norm_after, x, attended)

        if self.cross_attention is not None:
            normed = self._before(self.cross_norm, middle)
            if cache is not None and cache.memory is not None:
                seen = cache.memory.swapped()
            else:
                assert memory is not None
                seen = self.cross_attention.keys_values(memory)
            crossed = self.cross_attention(
                self.cross_attention.queries(normed),
                seen,
                mask=view.memory_mask,
                sight=view.memory_sight,
                key=keys[2],
                taps=taps.within(CROSS),
            )
            crossed = dropout(crossed, rate, keys[3])
            middle = self._after(self.cross_norm, self.cross_norm_after, middle, crossed)

        if self.feedforward_norm is not None:
            normed = self._before(self.feedforward_norm, middle)
        fed, losses = self._feed(normed, taps, training=key is not None)
        fed = dropout(fed, rate, keys[4])
        if parallel:
            after = constrain(x + attended + fed, "BtD")
        else:
            after = self._after(self.feedforward_norm, self.feedforward_norm_after, middle, fed)
        return after, cache, losses

    def _feed(
        self, x: jax.Array, taps: Taps, *, training: bool
    ) -> tuple[jax.Array, RouterLosses | None]:
        losses = None
        if isinstance(self.feedforward, Experts):
            fed, losses = self.feedforward(x, training=training)
        else:
            fed = self.feedforward(x, taps)
        return taps("feedforward", fed), losses

    def _before(self, norm, x: jax.Array) -> jax.Array:
        """What a layer reads of the stream."""
        return constrain(x if self.config.norm_placement == "post" else norm(x), "BtD")

    def _after(self, norm, norm_after, x: jax.Array, added: jax.Array) -> jax.Array:
        """The stream with what a layer adds."""
        if self.config.norm_placement == "post":
            return constrain(norm(x + added), "BtD")
        return constrain(x + (added if norm_after is None else norm_after(added)), "BtD")
