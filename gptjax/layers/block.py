"""One Transformer block: attention and an MLP, each added to the residual stream.

The order of norms, layers and sums (`norm_placement`) is in residual.py.
"""

from typing import NamedTuple

import jax
from flax import nnx

from gptjax.config import TransformerConfig
from gptjax.config.values import PLACEMENTS, AttentionKind
from gptjax.layers.attention.cache import KVCache
from gptjax.layers.attention.module import Attention, AttentionInputs
from gptjax.layers.hooks import CROSS, NO_HOOKS, Hooks
from gptjax.layers.mlp import MLP
from gptjax.layers.moe import MoE, RouterLosses
from gptjax.layers.norms import build_norm
from gptjax.layers.residual import Residual


class BlockInputs(NamedTuple):
    """What a block takes beside the stream."""

    attention: AttentionInputs
    """Of self-attention."""
    cross: AttentionInputs
    """Of cross-attention."""
    memory: jax.Array | None = None
    """[B, S', D], the encoder's output; None where its keys and values are in the cache."""


class BlockCache(NamedTuple):
    """What a block keeps between steps of decoding, stored as [B, K, S, H] (`KVCache.swapped`)."""

    own: KVCache
    """Of the sequence itself."""
    memory: KVCache | None
    """Of the encoder's output, which cross-attention reads; it never changes."""

    @classmethod
    def of(cls, own: KVCache | None, memory: KVCache | None) -> "BlockCache | None":
        """A cache where there is one."""
        return None if own is None else cls(own, memory)


class Block(nnx.Module):
    """Attention, in a decoder with an encoder cross-attention, and an MLP."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: AttentionKind = "full",
        cross: bool = False,
        rngs: nnx.Rngs,
    ):
        placement = PLACEMENTS[config.norm_placement]

        def norm(wanted: bool):
            return build_norm(config) if wanted else None

        first, after = placement.before or placement.of_sum, placement.after
        self.attention_norm = norm(first)
        self.attention = Attention(config, compressed=attention == "compressed", rngs=rngs)
        self.attention_norm_after = norm(after)
        self.cross_attention_norm = norm(cross and first)
        self.cross_attention = Attention(config, rngs=rngs) if cross else None
        self.cross_attention_norm_after = norm(cross and after)
        self.mlp_norm = norm(first and not placement.shared)
        self.mlp = (MoE if config.num_experts else MLP)(config, rngs=rngs)
        self.mlp_norm_after = norm(after)
        self.placement = placement

    def __call__(
        self,
        x: jax.Array,
        inputs: BlockInputs,
        *,
        cache: BlockCache | None = None,
        hook: Hooks = NO_HOOKS,
    ) -> tuple[jax.Array, BlockCache | None, RouterLosses | None]:
        """The stream [B, T, D] after the block, its cache with x in it, and its router's losses.

        Args:
          x: [B, T, D], the residual stream.
          inputs: masks, position biases, rotary angles, the encoder's output.
          cache: of the tokens before x's.
          hook: what is captured, changed and dropped.
        """
        own, memory = cache or (None, None)
        x = hook("residual", x)
        attention, cross, mlp = map(self.residual, ("attention", "cross_attention", "mlp"))
        read = attention.read(x)
        attended, own = self.attention(read, inputs.attention, cache=own, hook=hook)
        if self.placement.parallel:
            fed, losses = self.mlp(read if self.placement.shared else mlp.read(x), hook)
            return attention.add(x, attended, fed), BlockCache.of(own, memory), losses
        x = attention.add(x, attended)
        if self.cross_attention is not None:
            kv = self.memory_kv(inputs.memory) if memory is None else memory.swapped()
            crossed, _ = self.cross_attention(
                cross.read(x), inputs.cross, kv=kv, hook=hook.within(CROSS)
            )
            x = cross.add(x, crossed)
        fed, losses = self.mlp(mlp.read(x), hook)
        return mlp.add(x, fed), BlockCache.of(own, memory), losses

    def memory_kv(self, memory: jax.Array | None) -> KVCache:
        """Keys and values of the encoder's output [B, S', D] for cross-attention."""
        assert memory is not None
        assert self.cross_attention is not None
        return KVCache(*self.cross_attention.heads(memory, "key", "value"))

    def residual(self, layer: str) -> Residual:
        """The stream around "attention", "cross_attention" or "mlp"."""
        norm, norm_after = getattr(self, f"{layer}_norm"), getattr(self, f"{layer}_norm_after")
        return Residual(self.placement, norm or _identity, norm_after or _identity)


def _identity(x: jax.Array) -> jax.Array:
    return x
