import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.layers.matrices import Int8Matrix

RANDOM = np.random.default_rng(0)


def test_weights_are_rounded_to_the_nearest_of_255_values():
    matrix = RANDOM.normal(size=(5, 64)) * 10.0 ** np.arange(-3, 2)[:, None]
    matrix[2] = 0
    rounded = Int8Matrix.of(jnp.array(matrix, jnp.float32))
    error = np.abs(np.asarray(rounded.rows(jnp.arange(5))) - matrix)
    assert rounded.values.dtype == jnp.int8
    assert (error <= (1 + 1e-5) * np.abs(matrix).max(axis=1, keepdims=True) / 254).all()
    assert (error[2] == 0).all()


INPUTS = {
    "normal": RANDOM.normal(size=(3, 96)),
    "one outlier": RANDOM.normal(size=(3, 96)) + 1e4 * (np.arange(96) == 7),
    "tiny": 1e-20 * RANDOM.normal(size=(3, 96)),
    "one value": np.full((1, 96), -0.3),
    "zeros": np.zeros((2, 96)),
}


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_products_are_within_their_bound(x):
    """Of matrices at random, and of one whose weights all lie halfway between two values."""
    for matrix in (RANDOM.normal(size=(40, 96)), np.where(np.arange(96) == 0, 127, 5.4999)[None]):
        rounded = Int8Matrix.of(jnp.array(matrix, jnp.float32))
        scale = np.asarray(rounded.scale, np.float64)
        values = np.abs(np.asarray(rounded.values, np.float64)) * scale[:, None]
        size, largest = np.abs(x), np.abs(x).max(axis=1, keepdims=True)
        of_weights = size.sum(axis=1, keepdims=True) * scale / 2
        of_inputs = values.sum(axis=1) * largest / 32_512
        error = np.abs(np.asarray(rounded.products(jnp.array(x, jnp.float32))) - x @ matrix.T)
        rounding = 1e-5 * size @ np.abs(matrix).T
        assert (error <= of_weights + of_inputs + rounding).all()
