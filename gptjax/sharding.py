"""Devices: how many there are, and which part of a batch each one takes."""

import os

import jax
from jax.sharding import AxisType, Mesh

DATA = "data"
"""The mesh axis over which a batch is split."""
MOST_CPU_DEVICES = 8
"""Each device holds the whole training state, so a machine of 100 cores gets this many."""
MOST_SPLIT_PARAMETERS = 32_000_000
"""On 2 cores 10.7 million gain from two devices and 67 million lose (experiments/benchmark.py)."""


def one_device_per_core() -> None:
    """Make JAX see each CPU core as a device; call it before anything else touches JAX.

    XLA runs a CPU program one operation at a time and splits each over the cores; for a small
    model the splitting costs more than the operation. As devices the cores each run their share of
    the batch from end to end and meet only to add gradients up: a step of the smallest model of
    experiments/benchmark.py takes about two thirds of the time. Where `JAX_NUM_CPU_DEVICES` is set,
    that number stands.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", min(cores or 1, MOST_CPU_DEVICES))


def data_mesh(batch_size: int, parameters: int) -> Mesh:
    """A mesh with the axis `data`, over as many devices as share `batch_size` evenly.

    On a CPU a model of many `parameters` gets one device, which runs on all cores: adding up its
    gradients would cost more than splitting small operations does.
    """
    on_cpu = jax.devices()[0].platform == "cpu"
    most = 1 if on_cpu and parameters > MOST_SPLIT_PARAMETERS else jax.device_count()
    count = max(n for n in range(1, most + 1) if batch_size % n == 0)
    return jax.make_mesh((count,), (DATA,), (AxisType.Auto,), devices=jax.devices()[:count])
