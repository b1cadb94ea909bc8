"""Attention: who may look where (masks), how much (weights), and what is then read (mixture).

| `attention` | a query sees | source |
|---|---|---|
| full | every key, or every earlier one where it is causal | Vaswani et al. 2017, section 3.2 |
| local | the keys of a window that ends at (or, if not causal, surrounds) it | Child et al. 2019 |
| compressed | joined groups of earlier keys | Liu et al. 2018, section 4.2.3 (DMCA) |

Masks are boolean, True where a query may look. With fewer key heads than query heads (K < N), each
key head serves N / K queries (Shazeer 2019; Ainslie et al. 2023).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import TransformerConfig
from gptjax.layers.attention import flash
from gptjax.layers.dropout import dropout
from gptjax.layers.hooks import UNTAPPED, Taps
from gptjax.layers.linear import DEFAULT_STD, Linear, project
from gptjax.layers.norms import RMSNorm
from gptjax.layers.positions import rotate
from gptjax.parallel.sharding import constrain

MASKED = -1e30
"""A score that no softmax sees; finite, so that a query without any key yields no NaN."""


class KVCache(NamedTuple):
    """Keys and values that queries look at; in decoding, those of the tokens seen so far."""

    key: jax.Array
    """[B, S, K, H], or [L, B, S, K, H] for a stack of layers."""
    value: jax.Array
    """As `key`."""

    def write(self, new: "KVCache", start: jax.Array | int) -> "KVCache":
        """The cache of one layer with `new` [B, T, K, H] from place `start` (a row: [B]) on."""
        batch, _, heads, _ = self.key.shape
        starts = jnp.repeat(jnp.broadcast_to(start, batch), heads)

        def write_rows(places: jax.Array, new: jax.Array) -> jax.Array:
            # Batch and heads as one axis are what XLA multiplies; with two, it would write the
            # whole cache once more for its products on a CPU.
            places, new = (
                x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (places, new)
            )
            update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
            written = jax.vmap(update)(places, new, starts)
            return written.reshape(batch, heads, *written.shape[1:]).swapaxes(1, 2)

        return KVCache(write_rows(self.key, new.key), write_rows(self.value, new.value))

    def swapped(self) -> "KVCache":
        """Places and heads exchanged: [B, S, K, H] ↔ [B, K, S, H]."""
        return KVCache(self.key.swapaxes(1, 2), self.value.swapaxes(1, 2))


def attention_mask(
    distance: jax.Array,
    *,
    causal: bool,
    window: int = 0,
    valid: jax.Array | None = None,
    documents: jax.Array | None = None,
) -> jax.Array:
    """Who may look where, [B or 1, T, S].

    Args:
      distance: [B or 1, T, S], position of the query less position of the key.
      causal: whether later keys are hidden.
      window: distances of this and more are hidden; 0 hides none.
      valid: [B, S], False at keys that are padding.
      documents: [B, S], S being T: which of a row's documents each token is of; others are hidden.
    """
    mask = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window:
        mask &= jnp.abs(distance) < window
    if documents is not None:
        mask &= documents[:, :, None] == documents[:, None]
    return mask if valid is None else mask & valid[:, None]


def compressed_mask(positions: jax.Array, keys: int, compression: int) -> jax.Array:
    """Queries at `positions` [B or 1, T] see the groups that end at or before them.

    Of `keys` places, each `compression` are a group; an empty key that all may see comes first, so
    that the first queries have something to look at. [B or 1, T, 1 + keys // compression].
    """
    last = jnp.arange(keys // compression) * compression + compression - 1
    last = jnp.concatenate([jnp.full(1, -1), last])
    return positions[..., None] >= last


def attention_scores(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """scale · Q Kᵀ: query [B, T, N, H], key [B, S, K, H] → [B, N, T, S], float32."""
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    return scale * scores.reshape(query.shape[0], query.shape[2], *scores.shape[3:])


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float = 0.0,
) -> jax.Array:
    """softmax(Q Kᵀ / √H): equation 1 of the paper without its last product.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      mask: [B or 1, T, S]; None hides nothing.
      bias: [B or 1, N, T, S], added to the scores.
      scale: of the scores; None is 1 / √H.
      cap: scores are bounded by cap · tanh(score / cap) (Gemma 2, 2024); 0 does not.

    Returns:
      [B, N, T, S], float32.
    """
    scores = attention_scores(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    return masked_softmax(_biased(scores, bias, cap), mask)


def _biased(scores, bias, cap):
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    return scores if bias is None else scores + bias


def masked_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Scores [B, N, T, S] as weights, none of them where `mask` [B or 1, T, S] is False."""
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, MASKED)
    return jax.nn.softmax(scores, axis=-1)


def mix(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Each query's mixture of values: [B, N, T, S] and [B, S, K, H] → [B, T, N, H]."""
    batch, heads, queries, keys = weights.shape
    grouped = weights.astype(value.dtype).reshape(batch, value.shape[2], -1, queries, keys)
    # With the queries before the heads at once, XLA would transpose the values instead.
    mixture = jnp.einsum("bkgts,bskh->bkgth", grouped, value)
    return jnp.moveaxis(mixture, 3, 1).reshape(batch, queries, heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    cap: float,
) -> jax.Array:
    """`mix(attention_weights(…), value)` [B, T, N, H], with its backward pass written out.

    Left to autodiff, XLA recomputes the softmax on a CPU inside the products of the backward pass.
    The arguments are those of `attention_weights`.
    """
    return mix(attention_weights(query, key, mask, bias, scale=scale, cap=cap), value)


def _attend_forward(query, key, value, mask, bias, scale, cap):
    scores = attention_scores(query, key, scale)
    slope = 1 - jnp.square(jnp.tanh(scores / cap)) if cap else None
    weights = masked_softmax(_biased(scores, bias, cap), mask)
    mixture = checkpoint_name(mix(weights, value), "attention")
    return mixture, (query, key, value, bias, weights, slope, mixture)


def _attend_backward(scale, cap, residuals, gradient):
    query, key, value, bias, weights, slope, mixture = residuals
    batch, queries, heads, width = query.shape
    groups = (key.shape[2], heads // key.shape[2])
    by_group = gradient.reshape(batch, queries, *groups, width)
    weights_gradient = jnp.einsum(
        "btkgh,bskh->bkgts", by_group, value, preferred_element_type=jnp.float32
    ).reshape(weights.shape)
    # Through the softmax: each row loses its mean gradient, Σ_s weights · weights_gradient, which
    # equals Σ_h mixture · gradient and is cheaper so.
    row_mean = jnp.einsum("btnh,btnh->bnt", mixture, gradient, preferred_element_type=jnp.float32)
    scores_gradient = weights * (weights_gradient - row_mean[..., None])
    bias_gradient = None
    if bias is not None:
        shared = bias.shape[0] == 1 < batch
        bias_gradient = scores_gradient.sum(0, keepdims=True) if shared else scores_gradient
    if cap:
        scores_gradient = scores_gradient * slope
    keys = scores_gradient.shape[-1]
    by_group_scores = (scale * scores_gradient).astype(query.dtype)
    by_group_scores = by_group_scores.reshape(batch, *groups, queries, keys)
    by_group_weights = weights.astype(gradient.dtype).reshape(by_group_scores.shape)
    by_group_query = query.reshape(batch, queries, *groups, width)
    return (
        jnp.einsum("bkgts,bskh->btkgh", by_group_scores, key).reshape(query.shape),
        jnp.einsum("bkgts,btkgh->bskh", by_group_scores, by_group_query),
        jnp.einsum("bkgts,btkgh->bskh", by_group_weights, by_group),
        None,
        bias_gradient,
    )


attend.defvjp(_attend_forward, _attend_backward)

NEAREST = 128
"""The fewest places of a cache that attention looks at, of which only so many are filled."""


def attend_within(
    reach: jax.Array,
    query: jax.Array,
    seen: KVCache,
    mask: jax.Array,
    bias: jax.Array | None,
    scale: float,
    cap: float,
) -> jax.Array:
    """`attend` to a cache of which the first `reach` places are filled, [B, T, N, H].

    It looks at 128, 256 … S / 4 or all S places, whichever are enough: while a text is short, a
    step of decoding reads little beside the weights. Parts are copied before they are multiplied,
    which for more than a quarter takes longer than all. One program holds all the cases.
    """
    places = seen.key.shape[1]
    sizes = [NEAREST << n for n in range(places.bit_length()) if NEAREST << n <= places // 4]
    sizes.append(places)
    by_head = seen.swapped()  # As it is stored; the other way round it would be copied.

    def attend_to(size: int) -> jax.Array:
        near = KVCache(by_head.key[:, :, :size], by_head.value[:, :, :size]).swapped()
        near_bias = None if bias is None else bias[..., :size]
        return attend(query, near.key, near.value, mask[..., :size], near_bias, scale, cap)

    case = (reach > jnp.array(sizes[:-1], jnp.int32)).sum()
    return jax.lax.switch(case, [functools.partial(attend_to, size) for size in sizes])


class Attention(nnx.Module):
    """Multi-head attention with its projections, from x to x or from x to another sequence."""

    def __init__(self, config: TransformerConfig, *, compressed: bool = False, rngs: nnx.Rngs):
        width, heads = (config.width,), (config.heads, config.head_width)
        kv_heads = (config.key_value_heads, config.head_width)
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
            self.query_norm = RMSNorm(config.head_width, epsilon=config.norm_epsilon)
            self.key_norm = RMSNorm(config.head_width, epsilon=config.norm_epsilon)
        if compressed:
            group = (config.compression, *kv_heads)
            self.compress_key = Linear(group, kv_heads, axes="---KH", bias=bias, rngs=rngs)
            self.compress_value = Linear(group, kv_heads, axes="---KH", bias=bias, rngs=rngs)
        self.config = config
        self.compressed = compressed

    def projected(self, x: jax.Array, angles: jax.Array | None) -> tuple[jax.Array, KVCache]:
        """What x [B, T, D] looks with [B, T, N, H], and what others see of it.

        `angles` [B or 1, T, R / 2] are the rotary ones of its places; None rotates nothing.
        """
        keys, values, queries = project(x, self.key, self.value, self.query)
        return self._queries(queries, angles), self._keys_values(keys, values, angles)

    def queries(self, x: jax.Array) -> jax.Array:
        """What x [B, T, D] looks with at another sequence, [B, T, N, H]."""
        return self._queries(*project(x, self.query))

    def keys_values(self, x: jax.Array) -> KVCache:
        """What another sequence sees of x [B, S, D]."""
        return self._keys_values(*project(x, self.key, self.value))

    def _queries(self, queries, angles=None) -> jax.Array:
        if self.config.qk_norm:
            queries = self.query_norm(queries)
        if angles is not None:
            queries = rotate(queries, angles, self.config.pairing)
        return constrain(queries, "BTNH")

    def _keys_values(self, keys, values, angles=None) -> KVCache:
        if self.config.qk_norm:
            keys = self.key_norm(keys)
        if angles is not None:
            keys = rotate(keys, angles, self.config.pairing)
        return KVCache(constrain(keys, "BSKH"), constrain(values, "BSKH"))

    def __call__(
        self,
        queries: jax.Array,
        seen: KVCache,
        *,
        mask: jax.Array | None,
        sight: flash.Sight | None = None,
        bias: jax.Array | None = None,
        reach: jax.Array | None = None,
        key: jax.Array | None = None,
        taps: Taps = UNTAPPED,
    ) -> jax.Array:
        """Look at `seen`.

        Args:
          queries: [B, T, N, H].
          seen: keys and values [B, S, K, H].
          mask: [B or 1, T, S]; of compressed attention, `compressed_mask`'s.
          sight: the rule that `mask` follows, which `config.attention_kernel` needs; it is not
            asked for a cache.
          bias: [B or 1, N, T, S], added to the scores.
          reach: places of `seen` that are filled, where it is a cache; None is all.
          key: dropout key; None drops nothing.
          taps: what is looked at or changed. Scores and weights exist in no fast path: where they
            are asked for, the attention written out here is used.

        Returns:
          [B, T, D].
        """
        config = self.config
        queries = taps("query", queries)
        seen = KVCache(taps("key", seen.key), taps("value", seen.value))
        keys, values = self._compress(seen) if self.compressed else seen
        scale = config.head_width**-0.5 if config.attention_scaled else 1.0
        cap, kernel = config.attention_cap, config.attention_kernel
        mixture: Any
        if (key is not None and config.dropout > 0) or taps.ask("scores", "attention"):
            scores = _biased(attention_scores(queries, keys, scale), bias, cap)
            scores = self._tap("scores", scores, seen, taps)
            weights = self._tap("attention", masked_softmax(scores, mask), seen, taps)
            mixture = mix(dropout(weights, config.dropout, key), values)
            mixture = checkpoint_name(mixture, "attention")
        elif sight is not None and reach is None and flash.takes(kernel, queries, keys):
            mixture = flash.attend_by(kernel, queries, keys, values, sight, scale, cap)
        elif reach is None or self.compressed or mask is None:
            mixture = attend(queries, keys, values, mask, bias, scale, cap)
        else:
            mixture = attend_within(reach, queries, seen, mask, bias, scale, cap)
        mixture = taps("mixture", constrain(mixture, "BTNH"))
        return taps("attention_output", self._output(mixture, taps))

    def _tap(self, name: str, x: jax.Array, seen: KVCache, taps: Taps) -> jax.Array:
        """The place `name` with x [B, N, T, S].

        Layers are stacked in what they show, so that compressed attention's 1 + S // c columns are
        shown as the first of S, the others 0.
        """
        columns = x.shape[-1]
        missing = max(seen.key.shape[1] - columns, 0)
        return taps(name, jnp.pad(x, ((0, 0),) * 3 + ((0, missing),)) if missing else x)[
            ..., :columns
        ]

    def _output(self, mixture: jax.Array, taps: Taps) -> jax.Array:
        """[B, T, N, H] → [B, T, D]; head by head where that is asked for."""
        if not taps.ask("head_output"):
            return self.output(mixture)
        kernel = self.output.kernel.astype(mixture.dtype)
        output = taps("head_output", jnp.einsum("btnh,nhd->btnd", mixture, kernel)).sum(axis=2)
        return (
            output if self.output.bias is None else output + self.output.bias.astype(output.dtype)
        )

    def _compress(self, seen: KVCache) -> KVCache:
        """[B, S, K, H] → [B, 1 + S // c, K, H]: an empty key, then a convolution of stride c."""

        def joined(places: jax.Array, convolution: Linear) -> jax.Array:
            batch, length, *head = places.shape
            stride = self.config.compression
            groups = places[:, : length // stride * stride].reshape(batch, -1, stride, *head)
            empty = jnp.zeros((batch, 1, *head), places.dtype)
            return jnp.concatenate([empty, convolution(groups)], axis=1)

        return KVCache(joined(seen.key, self.compress_key), joined(seen.value, self.compress_value))
