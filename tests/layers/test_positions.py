import jax
import jax.numpy as jnp
import numpy as np

from gptjax.layers.positions import ROTARY_BASE, rotary_angles, rotate


def test_angles_are_those_of_the_paper():
    angles = rotary_angles(jnp.arange(3), 4)
    np.testing.assert_allclose(angles[2], [2, 2 * ROTARY_BASE**-0.5], rtol=1e-6)


def test_a_rotated_product_depends_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(query_position, key_position):
        turned = [
            rotate(x, rotary_angles(jnp.array([position]), 8))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float(jnp.vdot(*turned))

    assert np.isclose(score(3, 1), score(12, 10), atol=1e-5)
    assert not np.isclose(score(3, 1), score(3, 2), atol=1e-3)


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 8))
    turned = rotate(x, rotary_angles(jnp.arange(4), 8))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
