from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.layers.attention.cache import KVCache
from gptjax.layers.attention.masks import MaskRule, attention_mask, compressed_mask
from gptjax.layers.attention.reference import (
    attention_weights,
    masked_sigmoid,
    weighted_values,
)
from gptjax.layers.attention.xla import attend

CAUSAL = attention_mask(jnp.arange(5)[None, :, None] - jnp.arange(5), MaskRule(causal=True))


def inputs(length: int = 5, seen: int = 5, kv_heads: int = 6):
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, length, 6, 4))
    key, value = (jax.random.normal(k, (2, seen, kv_heads, 4)) for k in keys[1:3])
    gradient = jax.random.normal(keys[3], (2, length, 6, 4))
    return query, key, value, gradient


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_weights_are_a_softmax_over_what_the_mask_shows(kv_heads):
    query, key, _, _ = inputs(kv_heads=kv_heads)
    weights = np.asarray(attention_weights(query, key, CAUSAL))
    batch, head, place = 1, 4, 3
    shared = head * kv_heads // 6
    scores = [query[batch, place, head] @ key[batch, s, shared] / 2 for s in range(place + 1)]
    expected = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(weights[batch, head, place, : place + 1], expected, rtol=1e-5)
    assert (weights[batch, head, place, place + 1 :] == 0).all()


def test_scores_are_scaled_capped_and_biased_in_this_order():
    query, key, _, _ = inputs()
    bias = jax.random.normal(jax.random.key(7), (1, 6, 5, 5))
    weights = attention_weights(query, key, CAUSAL, bias, scale=2.0, softcap=3.0)
    scores = 2.0 * jnp.einsum("btnh,bsnh->bnts", query, key)
    scores = 3.0 * jnp.tanh(scores / 3.0) + bias
    expected = jax.nn.softmax(jnp.where(CAUSAL[:, None], scores, -jnp.inf))
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("bias_rows", [None, 1, 2])
def test_attend_and_its_backward_pass_equal_autodiff_of_the_reference(kv_heads, cap, bias_rows):
    query, key, value, gradient = inputs(length=3, kv_heads=kv_heads)
    mask = CAUSAL[:, 2:]
    bias = None
    if bias_rows is not None:
        bias = jax.random.normal(jax.random.key(7), (bias_rows, 6, 3, 5))

    def reference(query, key, value, bias):
        return weighted_values(
            attention_weights(query, key, mask, bias, scale=0.7, softcap=cap), value
        )

    def ours(query, key, value, bias) -> Any:
        return attend(query, key, value, mask, bias, 0.7, cap)

    expected, expected_vjp = jax.vjp(reference, query, key, value, bias)
    output, vjp = jax.vjp(ours, query, key, value, bias)
    np.testing.assert_allclose(output, expected, atol=1e-6)
    leaves = (jax.tree.leaves(vjp(gradient)), jax.tree.leaves(expected_vjp(gradient)))
    for got, wanted in zip(*leaves, strict=True):
        # Sums of up to 30 terms of order 1: 1e-6 of the largest entry.
        np.testing.assert_allclose(got, wanted, atol=1e-6 * float(1 + jnp.abs(wanted).max()))


def test_masks_hide_later_keys_distant_ones_and_padding():
    distance = jnp.arange(4)[None, :, None] - jnp.arange(4)
    valid = jnp.array([[True, True, True, False]])
    both_ways = attention_mask(distance, MaskRule(False, window=2, padding_mask=valid))[0]
    np.testing.assert_array_equal(
        both_ways, [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
    )
    causal = attention_mask(distance, MaskRule(True, window=2))[0]
    np.testing.assert_array_equal(causal, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])


def test_compressed_groups_are_seen_once_they_are_whole():
    mask = compressed_mask(jnp.arange(7)[None], 8, 3)[0]
    np.testing.assert_array_equal(
        mask,
        [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]],
    )


def test_a_query_that_sees_nothing_yields_no_nan():
    query, key, _, _ = inputs()
    weights = attention_weights(query, key, jnp.zeros((1, 5, 5), bool))
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("starts", [3, [3, 1]])
def test_the_cache_holds_what_was_written_where_it_was_written(starts):
    cache = KVCache(jnp.zeros((2, 6, 3, 4)), jnp.zeros((2, 6, 3, 4)))
    _, key, value, _ = inputs(seen=2, kv_heads=3)
    written = cache.write(KVCache(key, value), jnp.array(starts))
    for row, start in enumerate(np.broadcast_to(starts, 2)):
        np.testing.assert_array_equal(written.key[row, start : start + 2], key[row])
        np.testing.assert_array_equal(written.value[row, start : start + 2], value[row])
        assert (written.key[row, :start] == 0).all()
        assert (written.key[row, start + 2 :] == 0).all()


def test_sigmoid_attention_is_its_formula_over_the_keys_attended_to():
    scores = np.asarray(jax.random.normal(jax.random.key(3), (1, 2, 3, 3)))
    causal = np.tril(np.ones((3, 3), bool))
    weights = masked_sigmoid(jnp.asarray(scores), jnp.asarray(causal)[None])
    for query in range(3):
        keys = query + 1
        expected = 1 / (1 + np.exp(np.log(keys) - scores[0, :, query, :keys]))
        np.testing.assert_allclose(weights[0, :, query, :keys], expected, rtol=1e-5)
        assert (weights[0, :, query, keys:] == 0).all()
    np.testing.assert_allclose(
        masked_sigmoid(jnp.asarray(scores), None)[0, :, 2], weights[0, :, 2], rtol=1e-5
    )
