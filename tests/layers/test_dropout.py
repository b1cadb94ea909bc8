"""What is dropped: how much, how independently, and the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.layers.dropout import Dropout, dropout
from gptjax.parallel.keys import random_key

SHAPE = (40_000, 32)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_elements_are_dropped_independently_and_the_rest_scaled(rate):
    kept = np.asarray(dropout(jnp.ones(SHAPE), rate, random_key(3)))
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / np.float32(1 - rate))}
    # Each sum of n independent standardised numbers, over √n, is a standard normal one.
    drawn = ((kept > 0) - (1 - rate)) / np.sqrt(rate * (1 - rate))
    rows, columns = SHAPE
    pairs = (drawn.T @ drawn)[np.triu_indices(columns, 1)] / np.sqrt(rows)
    neighbours = (drawn[1:] * drawn[:-1]).sum(axis=0) / np.sqrt(rows)
    for normal in (
        drawn.sum(axis=0) / np.sqrt(rows),
        drawn.sum(axis=1) / np.sqrt(columns),
        pairs,
        neighbours,
        (drawn[:, 2:] * drawn[:, 1:-1] * drawn[:, :-2]).sum(axis=0) / np.sqrt(rows),
    ):
        assert np.abs(normal).max() < 5.5
        assert abs(normal.std() - 1) < 5 / np.sqrt(2 * normal.size)


def test_the_mask_follows_the_key_alone_on_one_device_and_on_eight():
    x = jnp.ones((16, 4, 32))
    alone = dropout(x, 0.3, random_key(1))
    assert (alone != dropout(x, 0.3, random_key(2))).any()
    assert (alone[0] != alone[1]).any()
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    parts = jax.device_put(x, NamedSharding(mesh, P("data", "tensor")))
    sharded = jax.jit(dropout, static_argnums=1)(parts, 0.3, random_key(1))
    np.testing.assert_array_equal(sharded, alone)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(dropout(x, 0.3, random_key(1)), alone)


def test_the_numbers_of_a_seed_stay():
    """A change here changes the losses of every run with dropout."""
    kept = Dropout.drawn(random_key(0), (2, 32), 0.5)(jnp.ones((2, 32))) > 0
    said = [hex(int("".join("01"[int(each)] for each in row), 2)) for row in kept]
    assert said == ["0xd7caca56", "0xe6703a35"]
