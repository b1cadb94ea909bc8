import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.layers.embedding import Embedding
from gptjax.layers.linear import Linear


def test_linear_contracts_its_input_axes():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    layer = Linear((3, 4), (6,), axes="DND", bias=True, rngs=nnx.Rngs(0))
    layer.bias = nnx.Param(jnp.arange(6.0))
    expected = jnp.einsum("btnh,nhd->btd", x, layer.kernel[...]) + jnp.arange(6.0)
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)


def test_linear_computes_in_the_type_of_its_input():
    layer = Linear((4,), (2, 3), axes="DNH", bias=True, rngs=nnx.Rngs(0))
    output = layer(jnp.ones((5, 4), jnp.bfloat16))
    assert (output.dtype, output.shape) == (jnp.bfloat16, (5, 2, 3))
    assert layer.kernel.dtype == jnp.float32


def test_embedding_looks_rows_up():
    embedding = Embedding(7, 3, axes="VD", rngs=nnx.Rngs(0))
    indices = jnp.array([[6, 0], [2, 2]])
    np.testing.assert_array_equal(embedding(indices), embedding.table[...][indices])
