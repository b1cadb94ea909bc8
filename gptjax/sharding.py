"""Devices: how many there are, and which part of a batch each one takes."""

import ctypes
import os
import sys

import jax
from jax.sharding import AxisType, Mesh

DATA = "data"
"""The mesh axis over which a batch is split."""
MOST_CPU_DEVICES = 8
"""Each device holds the whole training state, so a machine of 100 cores gets this many."""
MOST_SPLIT_PARAMETERS = 32_000_000
"""On 2 cores 10.7 million gain from two devices and 67 million lose (experiments/benchmark.py)."""
LARGEST_RECYCLED_BLOCK = 32 * 2**20
"""Bytes; a larger block goes back to the system as soon as glibc's `free` has it (mallopt(3))."""
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def configure_cpu(parameters: int) -> None:
    """Fit JAX's CPU backend to a model of so many parameters, before anything else touches JAX.

    **Devices.** XLA runs a CPU program one operation at a time and splits each over the cores; for
    a small model the splitting costs more than the operation. As devices the cores each run their
    share of the batch from end to end and meet only to add gradients up: a step of the smallest
    model of experiments/benchmark.py takes about two thirds of the time. A large model gets one
    device on all cores: adding up its gradients would cost more. Where `JAX_NUM_CPU_DEVICES` is
    set, that number stands.

    **Memory.** A program's temporary memory, the gradients among it, is one block a run. Where it
    is large, glibc would return it after each step, and the next would fault it in again page by
    page: 0.15 million faults a step for 10.7 million parameters, a fifth of its time. There malloc
    is told to keep what is freed, in one arena; for small models that is slower and not done.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        devices = min(cores or 1, MOST_CPU_DEVICES) if parameters <= MOST_SPLIT_PARAMETERS else 1
        jax.config.update("jax_num_cpu_devices", devices)
    gradient_bytes = 4 * parameters
    if sys.platform == "linux" and gradient_bytes > LARGEST_RECYCLED_BLOCK:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_TRIM_THRESHOLD, -1)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_ARENA_MAX, 1)


def data_mesh(batch_size: int) -> Mesh:
    """A mesh with the axis `data`, over as many devices as share `batch_size` evenly."""
    count = max(n for n in range(1, jax.device_count() + 1) if batch_size % n == 0)
    return jax.make_mesh((count,), (DATA,), (AxisType.Auto,), devices=jax.devices()[:count])
