"""Rounds of several runners in turn, each in a process of its own, so that ratios can be quoted."""

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import jax
from torch_baselines import RunSteps

from gptjax.parallel.sharding import configure_cpu


def serve(
    runner: Callable[[], RunSteps], parameters: int, steps: int, connection: Connection
) -> None:
    """Run one runner in this process, one round per request; answers with seconds.

    The first answer, before any request, is the seconds of a first round.
    """
    # Several processes share a GPU's memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    configure_cpu(parameters)
    run = runner()
    start = time.perf_counter()
    run(steps)
    gc.disable()
    connection.send(time.perf_counter() - start)
    while connection.recv():
        start = time.perf_counter()
        run(steps)
        connection.send((time.perf_counter() - start) / steps)
    connection.send(gpu_peak())


def gpu_peak() -> int:
    """Returns the most bytes that this process has taken of a GPU's memory; 0 without one."""
    if torch := sys.modules.get("torch"):
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def timed_rounds(
    runners: dict[str, Callable[[], RunSteps]], parameters: int, steps: int, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, int]]:
    """Returns the seconds of each runner's first round, those per step in each further, its peak.

    The runners take turns. Each has a process of its own, so that threads and memory are separate.
    """
    spawn = multiprocessing.get_context("spawn")
    connections, first = {}, {}
    for name, runner in runners.items():
        connections[name], other = spawn.Pipe()
        # PyTorch runs with its defaults.
        own = 0 if "torch" in name else parameters
        spawn.Process(target=serve, args=(runner, own, steps, other), daemon=True).start()
        first[name] = connections[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, connection in connections.items():
            connection.send(True)
            seconds[name].append(connection.recv())
    peaks = {}
    for name, connection in connections.items():
        connection.send(False)
        peaks[name] = connection.recv()
    return first, seconds, peaks
