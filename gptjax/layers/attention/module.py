"""Multi-head attention with its projections (Vaswani et al. 2017, section 3.2.2)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

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
from gptjax.layers.attention.xla import attend, attend_to_prefix
from gptjax.layers.hooks import NO_HOOKS, Hooks
from gptjax.layers.linear import DEFAULT_STD, Linear, project
from gptjax.layers.norms import RMSNorm
from gptjax.layers.positions import rotate


class AttentionInputs(NamedTuple):
    """What attention takes beside the stream, the same for all blocks of a kind."""

    mask: AttentionMask
    """Which keys each query attends to."""
    bias: jax.Array | None = None
    """[B or 1, N, T, S], added to the scores."""
    angles: jax.Array | None = None
    """[B or 1, T, R / 2], the rotary angles of the positions; None rotates nothing."""
    cache_index: Any = None
    """The slot of a cache that the first position takes, a number or [B]; None without one."""
    layer: jax.Array | int | None = None
    """The block's number from 0, for what depends on depth."""


class Attention(nnx.Module):
    """Multi-head attention: self-attention, or from x to the keys and values of another sequence.

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

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        *,
        kv: KVCache | None = None,
        cache: KVCache | None = None,
        hook: Hooks = NO_HOOKS,
    ) -> tuple[jax.Array, KVCache | None]:
        """The output of all heads [B, T, D], and the cache with the keys and values of x.

        Args:
          x: [B, T, D], normalised where the placement says so.
          inputs: mask, position bias, rotary angles, and where x begins in the cache.
          kv: keys and values [B, S, K, H] of another sequence (cross-attention); None takes x's.
          cache: keys and values of the tokens before, stored as [B, K, S, H].
          hook: what is captured, changed and dropped.
        """
        if kv is None:
            key, value, query = self.heads(x, "key", "value", "query", angles=inputs.angles)
            kv = KVCache(key, value)
        else:
            (query,) = self.heads(x, "query")
        kv_length = None
        if cache is not None:
            kv = cache.swapped().write(kv, inputs.cache_index)
            cache, kv_length = kv.swapped(), jnp.max(inputs.cache_index) + x.shape[1]
        query, kv = hook("query", query), KVCache(hook("key", kv.key), hook("value", kv.value))
        z = hook("z", self.attend(query, kv, inputs, kv_length, hook))
        return hook("attention_output", self._output(z, hook)), cache

    def heads(
        self, x: jax.Array, *parts: str, angles: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Of x [B, T, D] those of query, key and value that are named: [B, T, N or K, H] each.

        Queries and keys are normalised (QK-norm) and rotated by `angles`, where there are any.
        """

        def placed(part: str, heads: jax.Array) -> jax.Array:
            if part == "value":
                return heads
            if self.config.qk_norm:
                heads = (self.query_norm if part == "query" else self.key_norm)(heads)
            return heads if angles is None else rotate(heads, angles, self.config.pairing)

        projected = project(x, *(getattr(self, part) for part in parts))
        return tuple(placed(part, heads) for part, heads in zip(parts, projected, strict=True))

    def attend(
        self,
        query: jax.Array,
        kv: KVCache,
        inputs: AttentionInputs,
        kv_length: jax.Array | None,
        hook: Hooks,
    ) -> jax.Array:
        """softmax(Q Kᵀ / √H) V, [B, T, N, H], by the fastest way that computes what is asked.

        Scores and weights exist in no fast path: where they are captured, changed or dropped, they
        are computed step by step. `kv_length` slots of a cache are filled; None is no cache.
        """
        config, mask = self.config, inputs.mask
        keys, values = self._compress(kv) if self.compressed else kv
        scale = config.actual_head_dim**-0.5 if config.attention_scaled else 1.0
        softcap, kernel = config.attention_softcap, config.attention_kernel
        normalize = NORMALIZERS[config.attention_normalizer]
        if hook.need("scores", "attention"):
            scores = biased(attention_scores(query, keys, scale), inputs.bias, softcap)
            scores = self._hooked("scores", scores, kv, hook)
            weights = normalize(scores, mask.array)
            weights = hook.dropped("attention", self._hooked("attention", weights, kv, hook))
            return checkpoint_name(weighted_values(weights, values), "attention")
        if mask.rule is not None and kv_length is None and flash.takes(kernel, query, keys):
            return flash.attend_by(kernel, query, keys, values, mask.rule, scale, softcap)
        how = inputs.bias, scale, softcap, normalize
        if kv_length is None or self.compressed or mask.array is None:
            return attend(query, keys, values, mask.array, *how)
        return attend_to_prefix(kv_length, query, kv, mask.array, *how)

    def _hooked(self, name: str, x: jax.Array, kv: KVCache, hook: Hooks) -> jax.Array:
        """The hook point `name` with x [B, N, T, S].

        Layers are stacked in what is captured, so that compressed attention's 1 + S // c columns
        are the first of S there, the others 0.
        """
        columns = x.shape[-1]
        missing = max(kv.key.shape[1] - columns, 0)
        padded = jnp.pad(x, ((0, 0),) * 3 + ((0, missing),)) if missing else x
        return hook.observed(name, padded)[..., :columns]

    def _output(self, z: jax.Array, hook: Hooks) -> jax.Array:
        """[B, T, N, H] → [B, T, D]; head by head where that is asked for."""
        if not hook.need("head_output"):
            return self.output(z)
        kernel = self.output.kernel.astype(z.dtype)
        output = hook("head_output", jnp.einsum("btnh,nhd->btnd", z, kernel)).sum(axis=2)
        return (
            output if self.output.bias is None else output + self.output.bias.astype(output.dtype)
        )

    def _compress(self, kv: KVCache) -> KVCache:
        """[B, S, K, H] → [B, 1 + S // c, K, H]: an empty key, then a convolution of stride c."""

        def joined(slots: jax.Array, convolution: Linear) -> jax.Array:
            batch, length, *head = slots.shape
            stride = self.config.compression
            groups = slots[:, : length // stride * stride].reshape(batch, -1, stride, *head)
            empty = jnp.zeros((batch, 1, *head), slots.dtype)
            return jnp.concatenate([empty, convolution(groups)], axis=1)

        return KVCache(joined(kv.key, self.compress_key), joined(kv.value, self.compress_value))
