"""Cost of a checkpoint's checksums, relative to the time of writing it.

    python experiments/benchmarks/checkpoint_cost.py --mebibytes 300

Random float32 parameters and two moments of each, nearly incompressible, written several times.
Checksums are computed in the background like the rest of the writing, each process those of its own
files; the time of a whole save counts here, from its call until it is on disk. The share of CPU
time is printed too, as it hardly depends on the machine's other load.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from gptjax.training import checkpoint_files
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.step import State

ARRAYS = 12


def checkpoint_cost(mebibytes: int = 300, rounds: int = 9) -> None:
    """Write checkpoints, and print how long they and their checksums took.

    Args:
      mebibytes: Of parameters and moments together.
      rounds: Checkpoints after a first one, which is not counted.
    """
    shape = (mebibytes * (1 << 20) // (3 * 4 * ARRAYS),)
    keys = jax.random.split(jax.random.key(0), ARRAYS)
    params = {f"layer_{i}": jax.random.normal(key, shape) for i, key in enumerate(keys)}
    moments = {"mu": jax.tree.map(jnp.sin, params), "nu": jax.tree.map(jnp.square, params)}
    spent = np.zeros(2)

    def timed(make: Callable[..., None]) -> Callable[..., None]:
        def with_time(*arguments: Any) -> None:
            start = times()
            make(*arguments)
            spent[:] += times() - start

        return with_time

    checkpoint_files.list_own_files = timed(checkpoint_files.list_own_files)
    checkpoint_files.list_files = timed(checkpoint_files.list_files)
    blocked, whole, sums = [], [], []
    with tempfile.TemporaryDirectory() as directory, Checkpoints(Path(directory)) as checkpoints:
        for step in range(rounds + 1):
            spent[:], start = 0, times()
            checkpoints.save(State(jnp.int32(step), params, moments), {})
            blocked.append(times() - start)
            checkpoints.wait()
            whole.append(times() - start)
            sums.append(spent.copy())
    share, of_processor = np.median(np.stack(sums[1:]) / np.stack(whole[1:]), axis=0)
    waits, seconds, own = (np.median(seen[1:], axis=0)[0] for seen in (blocked, whole, sums))
    print(
        f"{mebibytes} MiB: {seconds:.2f} s to write, for {waits:.3f} s of which the run waits; "
        f"checksums {own * 1000:.0f} ms, {share:.1%}, {of_processor:.1%} of the CPU time."
    )


def times() -> np.ndarray:
    """Returns wall time, and CPU time of this process over all cores, seconds."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    tyro.cli(checkpoint_cost)
