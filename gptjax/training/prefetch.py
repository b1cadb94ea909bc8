"""Device prefetch: batches are sharded over the devices ahead of their step."""

import collections
import math
import time
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config import InputError
from gptjax.data.batch import Batch
from gptjax.parallel.sharding import BATCH, batch_sharding

AHEAD = 2
"""Batches prefetched to the devices besides the one in use."""


class DevicePrefetch:
    """The batches of an iterator, each sharded over the devices of a mesh.

    Every process reads its own rows of each global batch. The state that `get_state` returns is
    that of the next batch to be taken, however many are prefetched.
    """

    def __init__(self, batches: grain.DatasetIterator, mesh: Mesh):
        self._batches = batches
        self._mesh = mesh
        self._hosts = own_rows(mesh)["hosts"]
        self._ahead: collections.deque[tuple[Any, Batch]] = collections.deque()
        self.waited = 0.0
        """Seconds spent waiting for batches and sending them to the devices."""

    def __next__(self) -> Batch:
        self._fill(AHEAD + 1)
        return self._ahead.popleft()[1]

    def peek(self) -> Batch:
        """The next batch, without taking it."""
        self._fill(1)
        return self._ahead[0][1]

    def get_state(self) -> dict[str, Any]:
        """The iterator's state at the next batch."""
        return self._ahead[0][0] if self._ahead else self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a state that `get_state` returned."""
        self._ahead.clear()
        self._batches.set_state(state)

    def _fill(self, count: int) -> None:
        start = time.perf_counter()
        while len(self._ahead) < count:
            state = self._batches.get_state()
            rows = next(self._batches)
            self._ahead.append((state, self.on_devices(rows)))
        self.waited += time.perf_counter() - start

    def on_devices(self, rows: Batch) -> Batch:
        """The global batch, sharded, from this process's rows of it."""
        return jax.tree.map(self._sharded, rows)

    def _sharded(self, rows: np.ndarray) -> jax.Array:
        shape = (len(rows) * self._hosts, *rows.shape[1:])
        sharding = batch_sharding(self._mesh, shape)
        return jax.make_array_from_process_local_data(sharding, rows, shape)


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
