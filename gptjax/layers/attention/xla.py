"""Attention by XLA: the reference with its backward pass written out, and within a cache."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.layers.attention.cache import KVCache
from gptjax.layers.attention.reference import (
    Normalizer,
    attention_scores,
    attention_weights,
    biased,
    masked_softmax,
    weighted_values,
)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    softcap: float,
    normalize: Normalizer = masked_softmax,
) -> jax.Array:
    """`weighted_values(attention_weights(…), value)` [B, T, N, H].

    The arguments are those of `attention_weights`. The softmax's backward pass is written out; that
    of any other normalizer is autodiff's.
    """
    if normalize is masked_softmax:
        return attend_by_softmax(query, key, value, mask, bias, scale, softcap)
    how = {"scale": scale, "softcap": softcap, "normalize": normalize}
    weights = attention_weights(query, key, mask, bias, **how)
    return checkpoint_name(weighted_values(weights, value), "attention")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend_by_softmax(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    softcap: float,
) -> jax.Array:
    """`attend` with its backward pass.

    Left to autodiff, XLA recomputes the softmax on a CPU inside the products of the backward pass.
    """
    weights = attention_weights(query, key, mask, bias, scale=scale, softcap=softcap)
    return weighted_values(weights, value)


def _attend_forward(query, key, value, mask, bias, scale, softcap):
    scores = attention_scores(query, key, scale)
    slope = 1 - jnp.square(jnp.tanh(scores / softcap)) if softcap else None
    weights = masked_softmax(biased(scores, bias, softcap), mask)
    z = checkpoint_name(weighted_values(weights, value), "attention")
    return z, (query, key, value, bias, weights, slope, z)


def _attend_backward(scale, softcap, residuals, gradient):
    query, key, value, bias, weights, slope, z = residuals
    batch, queries, heads, width = query.shape
    groups = (key.shape[2], heads // key.shape[2])
    by_group = gradient.reshape(batch, queries, *groups, width)
    weights_gradient = jnp.einsum(
        "btkgh,bskh->bkgts", by_group, value, preferred_element_type=jnp.float32
    ).reshape(weights.shape)
    # Through the softmax: each row loses its mean gradient, Σ_s weights · weights_gradient, which
    # equals Σ_h z · gradient and is cheaper so.
    row_mean = jnp.einsum("btnh,btnh->bnt", z, gradient, preferred_element_type=jnp.float32)
    scores_gradient = weights * (weights_gradient - row_mean[..., None])
    bias_gradient = None
    if bias is not None:
        shared = bias.shape[0] == 1 < batch
        bias_gradient = scores_gradient.sum(0, keepdims=True) if shared else scores_gradient
    if softcap:
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


attend_by_softmax.defvjp(_attend_forward, _attend_backward)

SHORTEST_PREFIX = 128
"""The fewest slots of a cache that attention reads, where only so many are filled."""


def attend_to_prefix(
    kv_length: jax.Array,
    query: jax.Array,
    kv: KVCache,
    mask: jax.Array,
    bias: jax.Array | None,
    scale: float,
    softcap: float,
    normalize: Normalizer = masked_softmax,
) -> jax.Array:
    """`attend` to a cache of which the first `kv_length` slots are filled, [B, T, N, H].

    It reads 128, 256 … S / 4 or all S slots, whichever are enough: while a text is short, a step of
    decoding reads little beside the weights. Prefixes are copied before they are multiplied, which
    for more than a quarter takes longer than all. One program holds all the cases.
    """
    slots = kv.key.shape[1]
    sizes = [SHORTEST_PREFIX << n for n in range(slots.bit_length())]
    sizes = [size for size in sizes if size <= slots // 4] + [slots]
    by_head = kv.swapped()  # As it is stored; the other way round it would be copied.

    def attend_to(size: int) -> jax.Array:
        prefix = KVCache(by_head.key[:, :, :size], by_head.value[:, :, :size]).swapped()
        own_bias = None if bias is None else bias[..., :size]
        own_mask = mask[..., :size]
        return attend(query, *prefix, own_mask, own_bias, scale, softcap, normalize)

    case = (kv_length > jnp.array(sizes[:-1], jnp.int32)).sum()
    return jax.lax.switch(case, [functools.partial(attend_to, size) for size in sizes])
