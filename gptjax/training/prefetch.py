"""Device prefetch: batches are sharded over the devices ahead of their step."""

import collections
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gptjax.config import InputError
from gptjax.data.batch import Batch
from gptjax.parallel.sharding import BATCH, batch_sharding
from gptjax.training.dispatch import Group

AHEAD = 2
"""Stacks of batches prefetched to the devices besides the one in use."""


@dataclass
class _Stack:
    """Batches on the devices, some of them taken."""

    batches: Batch
    states: list[dict[str, Any]]
    """The iterator's state before each batch."""
    taken: int = 0


class DevicePrefetch:
    """The batches of an iterator in stacks, each sharded over the devices of a mesh.

    Every process reads its own rows of each global batch. The state that `get_state` returns is
    that of the next batch to be taken, however many are prefetched. A stack has batches of one
    shape; if those are fewer than its size, the last is repeated.
    """

    def __init__(self, batches: grain.DatasetIterator, mesh: Mesh):
        self._batches = batches
        self._mesh = mesh
        self._hosts = own_rows(mesh)["hosts"]
        self._size, self._step = 1, 0
        self._read: collections.deque[tuple[dict[str, Any], Batch]] = collections.deque()
        self._ahead: collections.deque[_Stack] = collections.deque()
        self.waited = 0.0
        """Seconds spent waiting for batches and sending them to the devices."""

    def stack(self, size: int, step: int) -> None:
        """Send batches in stacks of `size`, which end where `size` divides the step.

        `step` is the number of batches taken by the run so far; to be called before `take`.
        """
        self._size, self._step = size, step

    def tokens(self) -> int:
        """Token positions of the first global batch; to be called before `take`."""
        return self._peek().tokens.size * self._hosts

    def shapes(self) -> Batch:
        """The shapes and shardings of the first global stack; to be called before `take`."""

        def of_stack(rows: np.ndarray) -> jax.ShapeDtypeStruct:
            stacked = self._size > 1
            stack = np.broadcast_to(rows, (self._size, *rows.shape)) if stacked else rows
            shape, sharding = self._placed(stack, stacked)
            return jax.ShapeDtypeStruct(shape, rows.dtype, sharding=sharding)

        return jax.tree.map(of_stack, self._peek())

    def take(self, most: int) -> Group:
        """The next batches, at most `most`; fewer where their stack ends."""
        self._fill()
        stack = self._ahead[0]
        first = stack.taken
        stack.taken = min(first + most, len(stack.states))
        if stack.taken == len(stack.states):
            self._ahead.popleft()
        count = stack.taken - first
        part = () if self._size == 1 else (np.array([first, count], np.int32),)
        return Group(stack.batches, part, count)

    def get_state(self) -> dict[str, Any]:
        """The iterator's state at the next batch."""
        if self._ahead:
            stack = self._ahead[0]
            return stack.states[stack.taken]
        return self._read[0][0] if self._read else self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a state that `get_state` returned."""
        self._ahead.clear()
        self._read.clear()
        self._batches.set_state(state)

    def _fill(self) -> None:
        start = time.perf_counter()
        while len(self._ahead) < AHEAD + 1:
            self._ahead.append(self._next_stack())
        self.waited += time.perf_counter() - start

    def _peek(self) -> Batch:
        """This process's rows of the next batch that is not sent yet."""
        if not self._read:
            self._read.append((self._batches.get_state(), next(self._batches)))
        return self._read[0][1]

    def _next_stack(self) -> _Stack:
        shapes = _shapes(self._peek())
        states, rows = [], []
        for _ in range(self._size - self._step % self._size):
            if _shapes(self._peek()) != shapes:
                break
            state, batch = self._read.popleft()
            states.append(state)
            rows.append(batch)
        self._step += len(rows)
        if self._size == 1:
            return _Stack(self.on_devices(rows[0]), states)
        rows += rows[-1:] * (self._size - len(rows))
        return _Stack(self.on_devices(Batch.stack(rows), stacked=True), states)

    def on_devices(self, rows: Batch, *, stacked: bool = False) -> Batch:
        """The global batch, sharded, from this process's rows of it; or a stack of batches."""
        return jax.tree.map(functools.partial(self._sharded, stacked=stacked), rows)

    def _sharded(self, rows: np.ndarray, stacked: bool) -> jax.Array:
        shape, sharding = self._placed(rows, stacked)
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    def _placed(self, rows: np.ndarray, stacked: bool) -> tuple[tuple[int, ...], NamedSharding]:
        """The shape and the sharding of a global array of which this process has `rows`."""
        axis = int(stacked)
        shape = (*rows.shape[:axis], rows.shape[axis] * self._hosts, *rows.shape[axis + 1 :])
        return shape, batch_sharding(self._mesh, shape, stacked=stacked)


def _shapes(batch: Batch) -> tuple[Any, ...]:
    return tuple(None if array is None else array.shape for array in batch)


def own_rows(mesh: Mesh) -> dict[str, int]:
    """This process's rows of every batch, as the arguments `host` and `hosts` of the batches.

    Raises:
      InputError: a mesh without a device of some process, or with processes that have some but not
        all rows in common.
    """
    shards = math.prod(mesh.shape[name] for name in BATCH)
    indices = batch_sharding(mesh, (shards,)).devices_indices_map((shards,))
    held: list[set[int]] = [set() for _ in range(jax.process_count())]
    for device, (shard,) in indices.items():
        held[device.process_index].add(shard.start or 0)
    return share_of(held, jax.process_index())


def share_of(held: Sequence[set[int]], process: int) -> dict[str, int]:
    """`own_rows` from the shards of a batch that each process's devices hold.

    Processes that hold the same shards, as with tensor parallelism, read the same rows.
    """
    if not all(held):
        raise InputError(
            f"The mesh has no device of process {held.index(set())}: all need one, so "
            "train.batch_size must be a multiple of what the devices make of it."
        )
    groups = sorted({frozenset(shards) for shards in held}, key=min)
    if len(set().union(*groups)) < sum(map(len, groups)):
        raise InputError(
            "Processes of the mesh have some rows in common and others not: tensor x sequence x "
            "pipeline must divide the devices of a process, or be a multiple of them."
        )
    return {"host": groups.index(frozenset(held[process])), "hosts": len(groups)}
