"""Batches on their devices, ahead of the step that takes them."""

import collections
import time
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from gptjax.data.batch import Batch
from gptjax.sharding import batch_sharding

AHEAD = 2
"""Batches on the devices beside the one that is in use."""


class Feed:
    """The batches of an iterator, each split over the devices of a mesh.

    Every process gives its own rows, and together they are the batch. The place that `get_state`
    tells is that of the next batch to be taken, whatever lies ahead on the devices.
    """

    def __init__(self, batches: grain.DatasetIterator, mesh: Mesh):
        self._batches = batches
        self._mesh = mesh
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
            batch = jax.tree.map(self._on_devices, rows)
            self._ahead.append((state, batch))
        self.waited += time.perf_counter() - start

    def _on_devices(self, rows: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(batch_sharding(self._mesh, rows.shape), rows)
