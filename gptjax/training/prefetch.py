"""Batches on their devices, ahead of the step that takes them."""

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
"""Batches on the devices beside the one that is in use."""


class DevicePrefetch:
    """The batches of an iterator, each split over the devices of a mesh.

    Every process gives its own rows, and together they are the batch. The place that `get_state`
    tells is that of the next batch to be taken, whatever lies ahead on the devices.
    """

    def __init__(self, batches: grain.DatasetIterator, mesh: Mesh):
        self._batches = batches
        self._mesh = mesh
        self._hosts = own_rows(mesh)["hosts"]
        self._ahead: collections.deque[tuple[Any, Batch]] = collections.deque()
        self.waited = 0.0
        """Seconds spent in waiting for batches and in sending them off."""

    def __next__(self) -> Batch:
        self._fill(AHEAD + 1)
        return self._ahead.popleft()[1]

    def peek(self) -> Batch:
        """The batch that is next, which stays so."""
        self._fill(1)
        return self._ahead[0][1]

    def get_state(self) -> dict[str, Any]:
        """The place of the next batch."""
        return self._ahead[0][0] if self._ahead else self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place that `get_state` told."""
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
        """The whole batch, of which these are this process's rows."""
        return jax.tree.map(self._placed, rows)

    def _placed(self, rows: np.ndarray) -> jax.Array:
        shape = (len(rows) * self._hosts, *rows.shape[1:])
        sharding = batch_sharding(self._mesh, shape)
        return jax.make_array_from_process_local_data(sharding, rows, shape)


def own_rows(mesh: Mesh) -> dict[str, int]:
    """This process's share of every batch, as the parameters `host` and `hosts` of the batches.

    Raises:
      InputError: a mesh without a device of some process, or with processes that share some of
        their rows but not all.
    """
    parts = math.prod(mesh.shape[name] for name in BATCH)
    indices = batch_sharding(mesh, (parts,)).devices_indices_map((parts,))
    held: list[set[int]] = [set() for _ in range(jax.process_count())]
    for device, (part,) in indices.items():
        held[device.process_index].add(part.start or 0)
    return share_of(held, jax.process_index())


def share_of(held: Sequence[set[int]], process: int) -> dict[str, int]:
    """The same, from the parts of a batch that each process's devices hold.

    Processes with the same parts, as those that share heads, read the same rows.
    """
    if not all(held):
        raise InputError(
            f"The mesh has no device of process {held.index(set())}: all need one, so "
            "train.batch_size must be a multiple of what the devices make of it."
        )
    groups = sorted({frozenset(parts) for parts in held}, key=min)
    if len(set().union(*groups)) < sum(map(len, groups)):
        raise InputError(
            "The mesh gives processes some rows in common and others not: tensor x sequence x "
            "pipeline must divide the devices of a process, or be a multiple of them."
        )
    return {"host": groups.index(frozenset(held[process])), "hosts": len(groups)}
