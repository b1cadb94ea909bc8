"""Rounds of several runners in turn, each in a process of its own, so that ratios can be quoted."""

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

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


def timed_rounds(
    runners: dict[str, Callable[[], RunSteps]], parameters: int, steps: int, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the seconds of each runner's first round, and those per step in each further round.

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
    for connection in connections.values():
        connection.send(False)
    return first, seconds
