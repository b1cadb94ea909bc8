import jax
import jax.numpy as jnp
import numpy as np

from gptjax.layers.attention import KVCache, attend, attention_weights, causal_mask, mix


def inputs(length: int = 5, seen: int = 5):
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, length, 3, 4))
    key, value = (jax.random.normal(k, (2, seen, 3, 4)) for k in keys[1:3])
    gradient = jax.random.normal(keys[3], (2, length, 3, 4))
    return query, key, value, gradient


def test_weights_are_a_softmax_over_what_the_mask_shows():
    query, key, _, _ = inputs()
    weights = np.asarray(attention_weights(query, key, causal_mask(jnp.arange(5), jnp.arange(5))))
    batch, head, place = 1, 2, 3
    scores = [query[batch, place, head] @ key[batch, s, head] / 2 for s in range(place + 1)]
    expected = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(weights[batch, head, place, : place + 1], expected, rtol=1e-5)
    assert (weights[batch, head, place, place + 1 :] == 0).all()


def test_attend_and_its_backward_pass_equal_autodiff_of_the_reference():
    query, key, value, gradient = inputs(length=3, seen=5)
    mask = causal_mask(jnp.arange(2, 5), jnp.arange(5))

    def reference(query, key, value):
        return mix(attention_weights(query, key, mask), value)

    expected, expected_vjp = jax.vjp(reference, query, key, value)
    output, vjp = jax.vjp(lambda *qkv: attend(*qkv, mask), query, key, value)
    np.testing.assert_allclose(output, expected, atol=1e-6)
    for ours, theirs in zip(vjp(gradient), expected_vjp(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_cache_holds_what_was_written_where_it_was_written():
    cache = KVCache(jnp.zeros((2, 6, 3, 4)), jnp.zeros((2, 6, 3, 4)))
    _, key, value, _ = inputs(seen=2)
    written = cache.write(key, value, 3)
    np.testing.assert_array_equal(written.key[:, 3:5], key)
    np.testing.assert_array_equal(written.value[:, 3:5], value)
    assert (written.key[:, :3] == 0).all()
    assert (written.key[:, 5:] == 0).all()
