"""Attention in XLA: the reference with a custom backward pass."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from gptjax.layers.attention.reference import (
    Normalizer,
    attention_scores,
    attention_weights,
    biased,
    masked_softmax,
    weighted_values,
)
from gptjax.layers.dropout import Dropout


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #T S"] | None,
    bias: Float[Array, "#B N T S"] | None,
    scale: float,
    softcap: float,
    normalize: Normalizer = masked_softmax,
    dropout: Dropout | None = None,
) -> Float[Array, "B T N H"]:
    """`weighted_values(attention_weights(…), value)`, with the arguments of `attention_weights`.

    `dropout` is that of the weights [B, N, T, S]. With a softmax the backward pass is written out;
    other normalizers use autodiff.
    """
    if normalize is masked_softmax:
        return attend_by_softmax(query, key, value, mask, bias, dropout, scale, softcap)
    how = {"scale": scale, "softcap": softcap, "normalize": normalize}
    weights = attention_weights(query, key, mask, bias, **how)
    weights = weights if dropout is None else dropout(weights)
    return checkpoint_name(weighted_values(weights, value), "attention")


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_by_softmax(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #T S"] | None,
    bias: Float[Array, "#B N T S"] | None,
    dropout: Dropout | None,
    scale: float,
    softcap: float,
) -> Float[Array, "B T N H"]:
    """`attend` with a softmax and a custom backward pass.

    With autodiff, XLA on a CPU recomputes the softmax inside the products of the backward pass.
    """
    return _attend_forward(query, key, value, mask, bias, dropout, scale, softcap)[0]


def _attend_forward(query, key, value, mask, bias, dropout, scale, softcap):
    scores = attention_scores(query, key, scale)
    slope = 1 - jnp.square(jnp.tanh(scores / softcap)) if softcap else None
    weights = masked_softmax(biased(scores, bias, softcap), mask)
    dropped = weights if dropout is None else dropout(weights)
    z = checkpoint_name(weighted_values(dropped, value), "attention")
    return z, (query, key, value, bias, dropout, weights, slope, z)


def _attend_backward(scale, softcap, residuals, gradient):
    query, key, value, bias, dropout, weights, slope, z = residuals
    batch, queries, heads, width = query.shape
    groups = (key.shape[2], heads // key.shape[2])
    by_group = gradient.reshape(batch, queries, *groups, width)
    weights_gradient = jnp.einsum(
        "btkgh,bskh->bkgts", by_group, value, preferred_element_type=jnp.float32
    ).reshape(weights.shape)
    dropped = weights
    if dropout is not None:
        dropped, weights_gradient = dropout(weights), dropout(weights_gradient)
    # The softmax's gradient subtracts each row's Σ_s weights · weights_gradient, which equals
    # Σ_h z · gradient and is cheaper to compute that way (as in FlashAttention).
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
    by_group_weights = dropped.astype(gradient.dtype).reshape(by_group_scores.shape)
    by_group_query = query.reshape(batch, queries, *groups, width)
    return (
        jnp.einsum("bkgts,bskh->btkgh", by_group_scores, key).reshape(query.shape),
        jnp.einsum("bkgts,btkgh->bskh", by_group_scores, by_group_query),
        jnp.einsum("bkgts,btkgh->bskh", by_group_weights, by_group),
        None,
        bias_gradient,
        None,
    )


attend_by_softmax.defvjp(_attend_forward, _attend_backward)
