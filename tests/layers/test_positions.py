import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.layers.positions import (
    alibi_bias,
    alibi_slopes,
    relative_buckets,
    rotary_angles,
    rotate,
    sinusoidal,
)

BASE = 10_000.0
PAIRINGS = pytest.mark.parametrize("pairing", ["half", "interleaved"])


def test_angles_are_those_of_the_paper():
    angles = rotary_angles(jnp.arange(3), 4, BASE)
    np.testing.assert_allclose(angles[2], [2, 2 * BASE**-0.5], rtol=1e-6)


@PAIRINGS
@pytest.mark.parametrize("turning", [8, 4])
def test_a_rotated_product_depends_on_the_distance_alone(pairing, turning):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(query_position, key_position):
        turned = [
            rotate(x, rotary_angles(jnp.array([[position]]), turning, BASE), pairing)
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float(jnp.vdot(*turned))

    assert np.isclose(score(3, 1), score(12, 10), atol=1e-5)
    assert not np.isclose(score(3, 1), score(3, 2), atol=1e-3)


@PAIRINGS
def test_rotation_keeps_lengths_and_leaves_position_zero_alone(pairing):
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 8))
    turned = rotate(x, rotary_angles(jnp.arange(4)[None], 6, BASE), pairing)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])


def test_a_quarter_turn_takes_each_channel_to_its_partner():
    x = jnp.arange(1.0, 5).reshape(1, 1, 1, 4)
    turn = jnp.full((1, 1, 2), math.pi / 2)
    np.testing.assert_allclose(rotate(x, turn, "half").ravel(), [-3, -4, 1, 2], atol=1e-6)
    np.testing.assert_allclose(rotate(x, turn, "interleaved").ravel(), [-2, 1, -4, 3], atol=1e-6)


def test_sinusoids_are_those_of_the_paper():
    table = sinusoidal(jnp.arange(50), 6, "interleaved")
    for position, channel in ((0, 0), (7, 2), (49, 4)):
        angle = position / BASE ** (channel / 6)
        np.testing.assert_allclose(table[position, channel], math.sin(angle), atol=1e-5)
        np.testing.assert_allclose(table[position, channel + 1], math.cos(angle), atol=1e-5)
    halves = sinusoidal(jnp.arange(50), 6, "half")
    np.testing.assert_array_equal(halves, table[:, jnp.array([0, 2, 4, 1, 3, 5])])


def test_slopes_are_those_of_the_paper_and_of_bloom():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    bias = alibi_bias(jnp.array([[[0, -1], [3, 2]]]), 2)
    np.testing.assert_allclose(bias[0, 0], -(2.0**-4) * np.array([[0, -1], [3, 2]]))


def test_buckets_are_exact_when_near_and_logarithmic_when_far():
    distance = jnp.array([-3, 0, 1, 15, 16, 31, 127, 128, 5000])
    causal = relative_buckets(distance, bidirectional=False)
    np.testing.assert_array_equal(causal, [0, 0, 1, 15, 16, 21, 31, 31, 31])
    both_ways = relative_buckets(jnp.array([-200, -1, 0, 1, 7, 8, 200]), bidirectional=True)
    np.testing.assert_array_equal(both_ways, [31, 17, 0, 1, 7, 8, 15])
