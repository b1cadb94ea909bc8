"""Embeddings: tables of vectors, looked up by index."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gptjax.layers.linear import DEFAULT_STD
from gptjax.parallel.sharding import auto_mesh, gathered, mesh_axes, parameter_spec, spec


class Embedding(nnx.Module):
    """A table of `size` vectors of `width`, whose axes are the letters `axes`."""

    def __init__(
        self, size: int, width: int, *, axes: str, rngs: nnx.Rngs, std: float = DEFAULT_STD
    ):
        table = std * jax.random.normal(rngs.params(), (size, width), jnp.float32)
        self.table = nnx.Param(table, axes=axes)
        self.axes = axes

    def __call__(self, indices: jax.Array, dtype: str = "float32") -> jax.Array:
        """[...] → [..., D] of `dtype`; an index outside the table yields NaN."""
        if self.axes == "VD" and auto_mesh() is not None:
            return _look_up_on_shares(self.table[...], indices, dtype)
        known = jnp.where(indices < 0, self.table.shape[0], indices)
        return jnp.take(gathered(self.table.astype(dtype), self.axes), known, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up_on_shares(table: jax.Array, indices: jax.Array, dtype: str) -> jax.Array:
    """Table [V, D] and indices [B, T] → [B, T, D], on the devices of a mesh.

    Each looks up what is in its part of the vocabulary; sums of zeros and one vector then go where
    the tokens belong. Left to it, the compiler brings the table together, and its gradient.
    """
    rows, there, vocabulary, scattered = _places(indices.shape)

    def look_up(table, indices):
        own, mine = _own(indices, len(table), vocabulary)
        vectors = jnp.where(mine[..., None], table[jnp.where(mine, own, 0)], 0)
        if scattered:
            return jax.lax.psum_scatter(vectors, vocabulary, scatter_dimension=1, tiled=True)
        return jax.lax.psum(vectors, vocabulary) if vocabulary else vectors

    whole = gathered(table.astype(dtype), "VD")
    vectors = jax.shard_map(
        look_up, in_specs=(P(vocabulary), rows), out_specs=there, check_vma=False
    )(whole, indices)
    known = (indices >= 0) & (indices < len(table))
    return jnp.where(known[..., None], vectors, jnp.nan)


def _look_up_forward(table, indices, dtype):
    return _look_up_on_shares(table, indices, dtype), (table, indices)


def _look_up_backward(_, residuals, gradient):
    table, indices = residuals
    rows, there, vocabulary, scattered = _places(indices.shape)
    parted = mesh_axes(parameter_spec("D"))
    within = tuple(name for name in parted if name in mesh_axes(rows))
    others = tuple(name for name in mesh_axes(rows) if name not in parted)

    def add_up(indices, gradient):
        if scattered:
            gradient = jax.lax.all_gather(gradient, vocabulary, axis=1, tiled=True)
        size = len(table) // (jax.lax.axis_size(vocabulary) if vocabulary else 1)
        own, mine = _own(indices, size, vocabulary)
        added = jnp.zeros((size, table.shape[1]), table.dtype)
        added = added.at[jnp.where(mine, own, size)].add(gradient.astype(table.dtype), mode="drop")
        added = added.astype(gradient.dtype)  # As the gradients of products, which are sent so.
        if within:
            added = jax.lax.psum_scatter(added, within, scatter_dimension=1, tiled=True)
        added = jax.lax.psum(added, others) if others else added
        # XLA for TPUs fails where an accumulated sum is converted right after it is made.
        return jax.lax.optimization_barrier(added).astype(table.dtype)

    summed = jax.shard_map(
        add_up, in_specs=(rows, there), out_specs=P(vocabulary, within), check_vma=False
    )(indices, gradient)
    return summed, None


_look_up_on_shares.defvjp(_look_up_forward, _look_up_backward)


def _places(shape: tuple[int, ...]) -> tuple[P, P, tuple[str, ...], bool]:
    """How indices [B, T] and their vectors are parted, over what the vocabulary is, and whether
    the tokens of the vectors are parted over that too."""
    vocabulary = mesh_axes(parameter_spec("V"))
    there = spec("BtD", (*shape, 1))
    scattered = bool(vocabulary) and set(vocabulary) <= set(mesh_axes(there))
    return (
        spec("BT", shape),
        there if scattered else spec("BTD", (*shape, 1)),
        vocabulary,
        scattered,
    )


def _own(indices, size: int, vocabulary: tuple[str, ...]):
    """The places of indices in this device's part of a table, and which of them are in it."""
    own = indices - (size * jax.lax.axis_index(vocabulary) if vocabulary else 0)
    return own, (own >= 0) & (own < size)
