"""Pipeline parallelism: layers are divided into stages, and a batch into microbatches.

GPipe (Huang et al. 2019), in the formulation of Xu et al. 2021 (GSPMD, section 3.3): all stages are
one vectorised stage whose parameters and inputs are sharded over the mesh axis `pipeline`, and a
stage's output is rotated to the next stage. Until the first microbatch reaches the last stage, and
after the last microbatch leaves the first, stages are idle: the bubble.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gptjax.config import InputError
from gptjax.parallel.sharding import BATCH, auto_mesh, constrain

MICROBATCHES_PER_STAGE = 4
"""The default: a bubble of at most a fifth (Huang et al., section 2)."""

RunGroup = Callable[[PyTree, jax.Array, PyTree, PyTree], tuple[jax.Array, PyTree]]
"""(parameters of a group of p layers, x, the inputs shared by all layers, the layers' own inputs) →
(x, other outputs [p, B, ...])."""


def stages() -> int:
    """The number of pipeline stages of the program being traced; 1 without a pipeline."""
    mesh = auto_mesh()
    return 1 if mesh is None else dict(mesh.shape)["pipeline"]


def microbatches(rows: int, requested: int, mesh: Mapping[str, int]) -> int:
    """The number of microbatches: `requested`, or by default about 4 per stage.

    Args:
      rows: of a batch, or of one step of gradient accumulation.
      requested: `TransformerConfig.microbatches`, 0 for the default.
      mesh: devices along each axis.

    Raises:
      InputError: a number by which the rows cannot be divided on this mesh.
    """
    shards = math.prod(mesh[name] for name in BATCH)
    possible = [n for n in range(1, rows // shards + 1) if rows % (n * shards) == 0]
    if requested and requested not in possible:
        raise InputError(
            f"TransformerConfig.microbatches is {requested}: with {rows} rows in {shards} shards "
            f"it must be one of {', '.join(map(str, possible))}."
        )
    return requested or max(n for n in possible if n <= MICROBATCHES_PER_STAGE * mesh["pipeline"])


def bubble(stages: int, microbatches: int) -> float:
    """The fraction of time in which a stage is idle (Huang et al. 2019, section 2.2)."""
    return (stages - 1) / (microbatches + stages - 1)


def run_stages(
    run_group: RunGroup,
    stacks: list[PyTree],
    x: Float[Array, "B T D"],
    shared: PyTree,
    by_layer: Any,
    *,
    requested: int,
) -> tuple[Float[Array, "B T D"], PyTree]:
    """Apply all groups of layers to x, as the stages of a pipeline.

    Args:
      run_group: p consecutive layers.
      stacks: the parameters, [groups, ...] arrays.
      x: the first layer's input.
      shared: further inputs, the same for all layers: arrays [B, ...] or [1, ...].
      by_layer: the inputs that differ by layer, [groups, p, ...]; `key` is dropout's, or None.
      requested: microbatches, 0 for the default.

    Returns:
      The last layer's output, and the groups' other outputs, [groups, p, B, ...].

    Raises:
      InputError: groups that cannot be divided equally over the stages.
    """
    mesh = auto_mesh()
    assert mesh is not None
    sizes = dict(mesh.shape)
    count, batch = sizes["pipeline"], len(x)
    groups = len(jax.tree.leaves(stacks)[0])
    if groups % count:
        raise InputError(
            f"The number of layer groups is {groups}: it must be a multiple of the {count} stages. "
            "Choose another depth, remat_layers or mesh.pipeline."
        )
    parts = microbatches(batch, requested, sizes)
    inputs = _split_rows(x, parts)
    leaves, structure = jax.tree.flatten(shared)
    has_rows = [leaf.shape[0] == batch for leaf in leaves]
    leaves = [
        _split_rows(leaf, parts) if split else leaf
        for leaf, split in zip(leaves, has_rows, strict=True)
    ]
    by_stage = jax.tree.map(
        lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), (list(stacks), by_layer)
    )

    def stage(of_stage: PyTree, x: jax.Array, part: jax.Array) -> tuple[jax.Array, PyTree]:
        of_part = [
            leaf[part] if split else leaf for leaf, split in zip(leaves, has_rows, strict=True)
        ]

        def next_group(x: jax.Array, group: PyTree) -> tuple[jax.Array, PyTree]:
            params, by_layer = group
            if by_layer.key is not None:
                keys = jax.vmap(jax.random.fold_in, (0, None))(by_layer.key, part)
                by_layer = by_layer._replace(key=keys)
            return run_group(params, x, structure.unflatten(of_part), by_layer)

        return jax.lax.scan(next_group, x, of_stage)

    all_stages = jax.vmap(stage, spmd_axis_name="pipeline")

    def tick(x: jax.Array, time: jax.Array) -> tuple[jax.Array, PyTree]:
        x = jnp.roll(x, 1, axis=0).at[0].set(inputs[jnp.minimum(time, parts - 1)])
        part = jnp.clip(time - jnp.arange(count), 0, parts - 1)
        x, outputs = all_stages(by_stage, constrain(x, "LBtD"), part)
        return x, (x[-1], outputs)

    zeros = jnp.zeros((count, *inputs.shape[1:]), x.dtype)
    ticks = jnp.arange(parts + count - 1)
    _, (last, outputs) = jax.lax.scan(tick, zeros, ticks)

    def in_order(leaf: jax.Array) -> jax.Array:
        """[ticks, stages, groups per stage, p, rows, ...] → [groups, p, B, ...]."""
        part, index = jnp.arange(parts)[:, None], jnp.arange(count)
        leaf = jnp.moveaxis(leaf[part + index, index], 0, 4)
        return leaf.reshape(-1, leaf.shape[2], batch, *leaf.shape[5:])

    return constrain(_join_rows(last[count - 1 :]), "BtD"), jax.tree.map(in_order, outputs)


def _split_rows(array: jax.Array, parts: int) -> jax.Array:
    """[B, ...] → [parts, B / parts, ...]; every part has rows of every device."""
    return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)


def _join_rows(parts: jax.Array) -> jax.Array:
    """The inverse of `_split_rows`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
