"""Multi-head attention with its projections (Vaswani et al. 2017, section 3.2.2)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gptjax.config import TransformerConfig
from gptjax.layers.attention import flash
from gptjax.layers.attention.cache import KVCache
from gptjax.layers.attention.masks import AttentionMask
from gptjax.layers.attention.reference import (
    NORMALIZERS,
    attention_scores,
    biased,
    weighted_values,
)
from gptjax.layers.attention.xla import attend
from gptjax.layers.hooks import NO_HOOKS, Hooks
from gptjax.layers.linear import DEFAULT_STD, Linear, project
from gptjax.layers.norms import RMSNorm
from gptjax.layers.positions import rotate


class AttentionInputs(NamedTuple):
    """The inputs of attention besides the residual stream, the same for all blocks of a kind."""

    mask: AttentionMask
    """Which keys each query attends to."""
    bias: Float[Array, "#B N T S"] | None = None
    """Added to the scores."""
    angles: Float[Array, "#B T pairs"] | None = None
    """The rotary angles of the positions; None: no rotary embedding."""
    cache_index: Int[Array, "*B"] | int | None = None
    """The cache slot of the first position, a scalar or one per row [B]; None without a cache."""
    layer: Int[Array, ""] | int | None = None
    """The block's index, counted from 0, for what depends on depth."""


class Attention(nnx.Module):
    """Multi-head attention: self-attention, or cross-attention to another sequence's keys.

    MultiHead(x) = Concat(head_1 … head_N) W_O, head_i = softmax(q_i k_iᵀ / √H) v_i.
    """

    def __init__(self, config: TransformerConfig, *, compressed: bool = False, rngs: nnx.Rngs):
        width, heads = (config.width,), (config.heads, config.actual_head_dim)
        kv_heads = (config.actual_kv_heads, config.actual_head_dim)
        bias = config.bias if config.query_bias is None else config.query_bias
        output_bias = config.bias if config.output_bias is None else config.output_bias
        residual_std = DEFAULT_STD / math.sqrt(2 * config.depth)
        self.query = Linear(width, heads, axes="DNH", bias=bias, rngs=rngs)
        self.key = Linear(width, kv_heads, axes="DKH", bias=bias, rngs=rngs)
        self.value = Linear(width, kv_heads, axes="DKH", bias=bias, rngs=rngs)
        self.output = Linear(
            heads, width, axes="NHD", bias=output_bias, std=residual_std, rngs=rngs
        )
        if config.qk_norm:
            self.query_norm = RMSNorm(config.actual_head_dim, epsilon=config.norm_epsilon)
            self.key_norm = RMSNorm(config.actual_head_dim, epsilon=config.norm_epsilon)
        if compressed:
            group = (config.compression, *kv_heads)
            self.compress_key = Linear(group, kv_heads, axes="---KH", bias=bias, rngs=rngs)
            self.compress_value = Linear(group, kv_heads, axes="---KH", bias=bias, rngs=rngs)
        self.config = config
        self.compressed = compressed

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: AttentionInputs,
        *,
        kv: KVCache | None = None,
        cache: KVCache | None = None,
        hook: Hooks = NO_HOOKS,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The attention output, and the cache updated with the keys and values of x.

        Args:
          x: the layer's input, normalised in pre-norm placements.
          inputs: mask, position bias, rotary angles, and the cache slot of x's first position.
          kv: keys and values [B, S, K, H] of another sequence (cross-attention); None takes x's.
          cache: keys and values of earlier tokens, stored as [B, K, S, H].
          hook: capture, interventions and dropout.
        """
        if kv is None:
            key, value, query = self.heads(x, "key", "value", "query", angles=inputs.angles)
            kv = KVCache(key, value)
        else:
            (query,) = self.heads(x, "query")
        if cache is not None:
            assert inputs.cache_index is not None
            kv = cache.swapped().write(kv, inputs.cache_index)
            cache = kv.swapped()
        query, kv = hook("query", query), KVCache(hook("key", kv.key), hook("value", kv.value))
        z = hook("z", self.attend(query, kv, inputs, hook))
        return hook("attention_output", self._output(z, hook)), cache

    def heads(
        self,
        x: Float[Array, "B T D"],
        *parts: str,
        angles: Float[Array, "#B T pairs"] | None = None,
    ) -> tuple[Float[Array, "B T _ H"], ...]:
        """The "query", "key" or "value" projections of x, those that are named.

        Queries have N heads, keys and values K. Queries and keys are normalised (QK-norm, if the
        config has it) and rotated by `angles` (RoPE, if given).
        """

        def norm_and_rotate(part: str, heads: jax.Array) -> jax.Array:
            if part == "value":
                return heads
            if self.config.qk_norm:
                heads = (self.query_norm if part == "query" else self.key_norm)(heads)
            return heads if angles is None else rotate(heads, angles, self.config.pairing)

        projected = project(x, *(getattr(self, part) for part in parts))
        return tuple(
            norm_and_rotate(part, heads) for part, heads in zip(parts, projected, strict=True)
        )

    def attend(
        self,
        query: Float[Array, "B T N H"],
        kv: KVCache,
        inputs: AttentionInputs,
        hook: Hooks,
    ) -> Float[Array, "B T N H"]:
        """softmax(Q Kᵀ / √H) V, by the fastest implementation that fits.

        If scores or weights are captured or changed, they are computed step by step, since no fast
        path materialises them.
        """
        config, mask = self.config, inputs.mask
        keys, values = self._compress(kv) if self.compressed else kv
        scale = config.actual_head_dim**-0.5 if config.attention_scaled else 1.0
        softcap, kernel = config.attention_softcap, config.attention_kernel
        normalize = NORMALIZERS[config.attention_normalizer]
        if hook.need("scores", "attention"):
            scores = biased(attention_scores(query, keys, scale), inputs.bias, softcap)
            scores = self._observed("scores", scores, kv, hook)
            weights = normalize(scores, mask.array)
            weights = hook.dropped("attention", self._observed("attention", weights, kv, hook))
            return checkpoint_name(weighted_values(weights, values), "attention")
        batch, queries, heads, _ = query.shape
        dropout = hook.dropout("attention", (batch, heads, queries, keys.shape[1]))
        rule, options = mask.rule, (scale, softcap)
        if rule is not None and flash.takes(kernel, query, keys, rule, dropout):
            return flash.attend_by(kernel, query, keys, values, rule, *options, dropout)
        return attend(query, keys, values, mask.array, inputs.bias, *options, normalize, dropout)

    def _observed(
        self, name: str, x: Float[Array, "B N T S"], kv: KVCache, hook: Hooks
    ) -> Float[Array, "B N T S"]:
        """`hook.observed` of scores or weights, padded to S columns.

        Captured arrays are stacked over layers, so that compressed attention's 1 + S // c columns
        are followed by zeros there.
        """
        columns = x.shape[-1]
        missing = max(kv.key.shape[1] - columns, 0)
        padded = jnp.pad(x, ((0, 0),) * 3 + ((0, missing),)) if missing else x
        return hook.observed(name, padded)[..., :columns]

    def _output(self, z: Float[Array, "B T N H"], hook: Hooks) -> Float[Array, "B T D"]:
        """The output projection W_O, per head if `head_output` is captured or changed."""
        if not hook.need("head_output"):
            return self.output(z)
        kernel = self.output.kernel.astype(z.dtype)
        output = hook("head_output", jnp.einsum("btnh,nhd->btnd", z, kernel)).sum(axis=2)
        return (
            output if self.output.bias is None else output + self.output.bias.astype(output.dtype)
        )

    def _compress(self, kv: KVCache) -> KVCache:
        """A zero key and value, then a convolution of stride c: [B, 1 + S // c, K, H]."""

        def compressed(x: jax.Array, convolution: Linear) -> jax.Array:
            batch, length, *head = x.shape
            stride = self.config.compression
            groups = x[:, : length // stride * stride].reshape(batch, -1, stride, *head)
            zero = jnp.zeros((batch, 1, *head), x.dtype)
            return jnp.concatenate([zero, convolution(groups)], axis=1)

        return KVCache(
            compressed(kv.key, self.compress_key), compressed(kv.value, self.compress_value)
        )
