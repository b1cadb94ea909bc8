"""Embedding tables, looked up by index."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptjax.layers.linear import DEFAULT_STD
from gptjax.layers.matrices import Int8Matrix
from gptjax.parallel.sharding import auto_mesh, gathered, mesh_axes, parameter_spec, spec


class Embedding(nnx.Module):
    """A table of `size` vectors of `width` channels; `axes` are the letters of its two axes."""

    def __init__(
        self, size: int, width: int, *, axes: str, rngs: nnx.Rngs, std: float = DEFAULT_STD
    ):
        table = std * jax.random.normal(rngs.params(), (size, width), jnp.float32)
        self.table = nnx.Param(table, axes=axes)
        self.axes = axes

    def __call__(
        self, indices: Int[Array | np.ndarray, "*shape"], dtype: str = "float32"
    ) -> Float[Array, "*shape D"]:
        """The vectors at `indices`, in `dtype`; NaN for an index outside the table."""
        if self.axes == "VD" and auto_mesh() is not None:
            return _sharded_lookup(self.table[...], indices, dtype)
        table = self.table.get_value()
        if isinstance(table, Int8Matrix):
            return table.rows(jnp.asarray(indices)).astype(dtype)
        known = jnp.where(indices < 0, self.table.shape[0], indices)
        return jnp.take(gathered(self.table.astype(dtype), self.axes), known, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sharded_lookup(
    table: Float[Array, "V D"], indices: Int[Array | np.ndarray, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """The lookup over a mesh, with the vocabulary sharded.

    Each device looks up the indices in its shard of the vocabulary and yields zeros for others; the
    sum over devices is reduced, or reduce-scattered to the tokens' devices. The compiler by itself
    would all-gather the table and its gradient.
    """
    index_spec, vector_spec, vocabulary, scattered = _shardings(indices.shape)

    def look_up(table, indices):
        local, inside = _local(indices, len(table), vocabulary)
        vectors = jnp.where(inside[..., None], table[jnp.where(inside, local, 0)], 0)
        if scattered:
            return jax.lax.psum_scatter(vectors, vocabulary, scatter_dimension=1, tiled=True)
        return jax.lax.psum(vectors, vocabulary) if vocabulary else vectors

    whole = gathered(table.astype(dtype), "VD")
    vectors = jax.shard_map(
        look_up, in_specs=(P(vocabulary), index_spec), out_specs=vector_spec, check_vma=False
    )(whole, indices)
    known = (indices >= 0) & (indices < len(table))
    return jnp.where(known[..., None], vectors, jnp.nan)


def _sharded_lookup_forward(table, indices, dtype):
    return _sharded_lookup(table, indices, dtype), (table, indices)


def _sharded_lookup_backward(_, residuals, gradient):
    table, indices = residuals
    index_spec, vector_spec, vocabulary, scattered = _shardings(indices.shape)
    channels = mesh_axes(parameter_spec("D"))
    within = tuple(name for name in channels if name in mesh_axes(index_spec))
    others = tuple(name for name in mesh_axes(index_spec) if name not in channels)

    def add_up(indices, gradient):
        if scattered:
            gradient = jax.lax.all_gather(gradient, vocabulary, axis=1, tiled=True)
        size = len(table) // (jax.lax.axis_size(vocabulary) if vocabulary else 1)
        local, inside = _local(indices, size, vocabulary)
        rows = jnp.where(inside, local, size)
        added = jnp.zeros((size, table.shape[1]), table.dtype)
        added = added.at[rows].add(gradient.astype(table.dtype), mode="drop")
        added = added.astype(gradient.dtype)  # Sent in this dtype, as the products' gradients are.
        if within:
            added = jax.lax.psum_scatter(added, within, scatter_dimension=1, tiled=True)
        added = jax.lax.psum(added, others) if others else added
        # XLA for TPUs fails if an accumulated sum is cast right after its accumulation.
        return jax.lax.optimization_barrier(added).astype(table.dtype)

    summed = jax.shard_map(
        add_up,
        in_specs=(index_spec, vector_spec),
        out_specs=P(vocabulary, within),
        check_vma=False,
    )(indices, gradient)
    return summed, None


_sharded_lookup.defvjp(_sharded_lookup_forward, _sharded_lookup_backward)


def _shardings(shape: tuple[int, ...]) -> tuple[P, P, tuple[str, ...], bool]:
    """The specs of indices [B, T] and of their vectors [B, T, D], the mesh axes over which the
    vocabulary is sharded, and whether the vectors' tokens are sharded over them too."""
    vocabulary = mesh_axes(parameter_spec("V"))
    between_layers = spec("BtD", (*shape, 1))
    scattered = bool(vocabulary) and set(vocabulary) <= set(mesh_axes(between_layers))
    return (
        spec("BT", shape),
        between_layers if scattered else spec("BTD", (*shape, 1)),
        vocabulary,
        scattered,
    )


def _local(indices, size: int, vocabulary: tuple[str, ...]):
    """Indices relative to this device's shard of a table, and which of them lie in it."""
    local = indices - (size * jax.lax.axis_index(vocabulary) if vocabulary else 0)
    return local, (local >= 0) & (local < size)
