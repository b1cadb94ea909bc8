"""Layers as the stages of a pipeline: each device has some, and a batch passes them in parts.

GPipe (Huang et al. 2019), written as Xu et al. 2021 (GSPMD, section 3.3) do: all stages are one
vectorised stage whose parameters and inputs lie along the mesh axis `pipeline`, and what leaves a
stage is rotated to the next one. While the first part has not reached the last stage, and once the
last part has left the first, stages run idle: the bubble.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import InputError
from gptjax.parallel.sharding import BATCH, auto_mesh, constrain

PARTS_A_STAGE = 4
"""Of a batch where nothing else is asked: a bubble of at most a fifth (Huang et al., section 2)."""

RunTurn = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any]]
"""(a turn's parameters, x, what belongs to its rows, its keys) → (x, other outputs, a turn of p
layers giving [p, B, ...])."""


def stages() -> int:
    """Stages of the pipeline that the program being traced is parted into; 1 without one."""
    mesh = auto_mesh()
    return 1 if mesh is None else dict(mesh.shape)["pipeline"]


def microbatches(rows: int, asked: int, mesh: Mapping[str, int]) -> int:
    """Parts in which `rows` pass the stages: `asked`, or by default about 4 a stage.

    Args:
      rows: of a batch, or of the parts that it is computed in.
      asked: `TransformerConfig.microbatches`, 0 for the default.
      mesh: devices along each axis.

    Raises:
      InputError: more parts than there are, or parts that the mesh cannot split any more.
    """
    split = math.prod(mesh[name] for name in BATCH)
    possible = [n for n in range(1, rows // split + 1) if rows % (n * split) == 0]
    if asked and asked not in possible:
        raise InputError(
            f"TransformerConfig.microbatches is {asked}: of {rows} rows on {split} parts of the "
            f"mesh it must be one of {', '.join(map(str, possible))}."
        )
    return asked or max(n for n in possible if n <= PARTS_A_STAGE * mesh["pipeline"])


def bubble(stages: int, microbatches: int) -> float:
    """The share of the time in which a stage runs idle (Huang et al. 2019, section 2.2)."""
    return (stages - 1) / (microbatches + stages - 1)


def run_stages(
    turn: RunTurn, stacks: list[Any], x: jax.Array, rows: Any, own: Any, *, asked: int
) -> tuple[jax.Array, Any]:
    """Thread x through all turns of the stacks, as the stages of a pipeline.

    Args:
      turn: p layers.
      stacks: their parameters, [turns, ...] arrays.
      x: [B, T, D].
      rows: what belongs to the rows of x, arrays [B, ...], or [1, ...] where it is the same to all.
      own: what is each layer's own, [turns, p, ...]; its `key` is the dropout's, or None.
      asked: microbatches, 0 for the default.

    Returns:
      x behind the last layer, and the turns' other outputs, [turns, p, B, ...].
    """
    mesh = auto_mesh()
    assert mesh is not None
    sizes = dict(mesh.shape)
    count, batch = sizes["pipeline"], len(x)
    turns = len(jax.tree.leaves(stacks)[0])
    if turns % count:
        raise InputError(
            f"The {turns} groups of layers that run together are no multiple of the {count} stages "
            "of the pipeline: choose another depth, remat_layers or pipeline."
        )
    parts = microbatches(batch, asked, sizes)
    entering = _parted(x, parts)
    leaves, structure = jax.tree.flatten(rows)
    split = [leaf.shape[0] == batch for leaf in leaves]
    leaves = [
        _parted(leaf, parts) if mine else leaf for leaf, mine in zip(leaves, split, strict=True)
    ]
    by_stage = jax.tree.map(
        lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), (list(stacks), own)
    )

    def stage(given: Any, x: jax.Array, part: jax.Array) -> tuple[jax.Array, Any]:
        of_part = [leaf[part] if mine else leaf for leaf, mine in zip(leaves, split, strict=True)]

        def next_turn(x: jax.Array, given: Any) -> tuple[jax.Array, Any]:
            params, own = given
            if own.key is not None:
                own = own._replace(key=jax.vmap(jax.random.fold_in, (0, None))(own.key, part))
            return turn(params, x, structure.unflatten(of_part), own)

        return jax.lax.scan(next_turn, x, given)

    all_stages = jax.vmap(stage, spmd_axis_name="pipeline")

    def tick(x: jax.Array, time: jax.Array) -> tuple[jax.Array, Any]:
        x = jnp.roll(x, 1, axis=0).at[0].set(entering[jnp.minimum(time, parts - 1)])
        part = jnp.clip(time - jnp.arange(count), 0, parts - 1)
        x, outputs = all_stages(by_stage, constrain(x, "LBtD"), part)
        return x, (x[-1], outputs)

    empty = jnp.zeros((count, *entering.shape[1:]), x.dtype)
    ticks = jnp.arange(parts + count - 1)
    _, (left, outputs) = jax.lax.scan(tick, empty, ticks)

    def by_layer(leaf: jax.Array) -> jax.Array:
        """[ticks, stages, turns a stage, p, rows, ...] → [turns, p, B, ...]."""
        part, number = jnp.arange(parts)[:, None], jnp.arange(count)
        leaf = jnp.moveaxis(leaf[part + number, number], 0, 4)
        return leaf.reshape(-1, leaf.shape[2], batch, *leaf.shape[5:])

    return constrain(_joined(left[count - 1 :]), "BtD"), jax.tree.map(by_layer, outputs)


def _parted(array: jax.Array, parts: int) -> jax.Array:
    """[B, ...] → [parts, B / parts, ...]; every part has rows of every device."""
    return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)


def _joined(parts: jax.Array) -> jax.Array:
    """Back from `_parted`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
