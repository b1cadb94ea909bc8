"""A Transformer block: attention and an MLP, each added to the residual stream.

residual.py has the placement of the norms (`norm_placement`).
"""

from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float

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
    """The inputs of a block besides the residual stream."""

    attention: AttentionInputs
    """Of self-attention."""
    cross: AttentionInputs
    """Of cross-attention."""
    memory: Float[Array, "B S D"] | None = None
    """The encoder's output; None if the cache holds its keys and values."""


class BlockCache(NamedTuple):
    """The keys and values of one block in decoding, stored as [B, K, S, H] (`KVCache.swapped`)."""

    kv: KVCache
    """Of the sequence, for self-attention."""
    memory: KVCache | None
    """Of the encoder's output, for cross-attention; it never changes."""

    @classmethod
    def of(cls, kv: KVCache | None, memory: KVCache | None) -> "BlockCache | None":
        """The block's cache, or None without one."""
        return None if kv is None else cls(kv, memory)


class Block(nnx.Module):
    """Self-attention, cross-attention in an encoder-decoder's decoder, and an MLP."""

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
        x: Float[Array, "B T D"],
        inputs: BlockInputs,
        *,
        cache: BlockCache | None = None,
        hook: Hooks = NO_HOOKS,
    ) -> tuple[Float[Array, "B T D"], BlockCache | None, RouterLosses | None]:
        """The residual stream after the block, the updated cache, and the router's losses.

        Args:
          x: the residual stream.
          inputs: masks, position biases, rotary angles, the encoder's output.
          cache: keys and values of earlier tokens.
          hook: capture, interventions and dropout.
        """
        kv, memory = cache or (None, None)
        x = hook("residual", x)
        attention, cross, mlp = map(self.residual, ("attention", "cross_attention", "mlp"))
        read = attention.read(x)
        attention_output, kv = self.attention(read, inputs.attention, cache=kv, hook=hook)
        if self.placement.parallel:
            mlp_output, losses = self.mlp(read if self.placement.shared else mlp.read(x), hook)
            return attention.add(x, attention_output, mlp_output), BlockCache.of(kv, memory), losses
        x = attention.add(x, attention_output)
        if self.cross_attention is not None:
            memory_kv = self.memory_kv(inputs.memory) if memory is None else memory.swapped()
            cross_output, _ = self.cross_attention(
                cross.read(x), inputs.cross, kv=memory_kv, hook=hook.within(CROSS)
            )
            x = cross.add(x, cross_output)
        mlp_output, losses = self.mlp(mlp.read(x), hook)
        return mlp.add(x, mlp_output), BlockCache.of(kv, memory), losses

    def memory_kv(self, memory: Float[Array, "B S D"] | None) -> KVCache:
        """Keys and values of the encoder's output, for cross-attention."""
        assert memory is not None
        assert self.cross_attention is not None
        return KVCache(*self.cross_attention.heads(memory, "key", "value"))

    def residual(self, layer: str) -> Residual:
        """The residual connection around "attention", "cross_attention" or "mlp"."""
        norm, norm_after = getattr(self, f"{layer}_norm"), getattr(self, f"{layer}_norm_after")
        return Residual(self.placement, norm or _identity, norm_after or _identity)


def _identity(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x
