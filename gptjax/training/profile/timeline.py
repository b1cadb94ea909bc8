"""The time of each instruction of a program, from a trace of JAX's profiler (XPlane)."""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from gptjax.config import InputError

STEPS = "train"
"""JAX's annotation of a step, under which XProf groups what belongs to it."""
WAIT = "Wait for results"
"""The annotation of the host's waiting for results."""
WAITS = "Wait for "
"""How names of waiting begin, ours and JAX's, which waits to start a program behind another."""
OTHER_PROGRAMS = ""
"""The name of what runs on a device and is no instruction of the program: copies, other programs"""
GPU = re.compile(r"/device:GPU:(\d+)")
CPU = "/host:CPU"
ENDS = "end: "
"""How the event begins that tells when a CPU's instruction has ended: one whose work other threads
do, as a matrix product, returns at once."""


class _Event(NamedTuple):
    """An event of a trace, nanoseconds."""

    gpu: str | None
    """The number of the GPU; None of the host."""
    name: str
    start: float
    end: float
    stats: dict[str, Any]


class Operation(NamedTuple):
    """An instruction's execution, nanoseconds."""

    start: float
    end: float
    name: str
    link: object = None
    """What the event of its end has too, on a CPU."""


class Timeline(NamedTuple):
    """Seconds of a device from the first step to the last, the mean over devices."""

    instructions: dict[str, float]
    """By the instruction's name. Where several run at once, each has its share of the time."""
    host: float
    """Nothing runs on the device, and the host is at work: it has not started the next program."""
    idle: float
    """Nothing runs on the device, and the host waits for it."""


def read_timeline(trace: Path, module: str, containers: Container[str]) -> Timeline:
    """Reads the trace of a program on CPUs or GPUs.

    Args:
      trace: the directory that JAX's profiler has written.
      module: the name of the HLO module, `jit_train_step`.
      containers: instructions that only run others: loops, conditionals, calls.

    Raises:
      InputError: a trace without any instruction of the program.
    """
    operations: dict[str, list[Operation]] = {}
    steps, waits = [], []
    ended: dict[object, float] = {}
    for event in _events(trace):
        if event.name == STEPS:
            steps.append(event.start)
        elif event.name.startswith(WAITS):
            waits.append(Operation(event.start, event.end, WAIT))
        elif event.name.startswith(ENDS):
            ended[event.stats.get("_c", event.name)] = event.end
        elif ran := _ran(event, module):
            device, one = ran
            if one.name not in containers:
                operations.setdefault(device, []).append(one)
    found = any(one.name != OTHER_PROGRAMS for ran in operations.values() for one in ran)
    if not found or not steps:
        raise InputError(f"{trace} has no instruction of {module}: it is made on CPUs and GPUs.")
    each = []
    for ran in operations.values():
        whole = [one._replace(end=max(one.end, ended.get(one.link, 0.0))) for one in ran]
        each.append(_shares(whole, waits, min(steps)))
    count = len(each)
    names = {name for one in each for name in one.instructions}
    return Timeline(
        {name: sum(one.instructions.get(name, 0.0) for one in each) / count for name in names},
        sum(one.host for one in each) / count,
        sum(one.idle for one in each) / count,
    )


def _events(trace: Path) -> list[_Event]:
    """The events of the host's threads and of GPUs' streams."""
    events: list[_Event] = []
    paths = sorted(trace.rglob("*.xplane.pb"))
    planes = ProfileData.from_file(str(paths[-1])).planes if paths else ()
    with warnings.catch_warnings():
        # JAX 0.12's type of an event's stats has no module, of which Python 3.12 warns.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in planes:
            gpu = GPU.fullmatch(plane.name)
            for line in plane.lines if gpu or plane.name == CPU else ():
                if gpu and not line.name.startswith("Stream"):
                    continue  # Derived from the streams.
                events += [
                    _Event(
                        gpu[1] if gpu else None,
                        event.name,
                        event.start_ns,
                        event.start_ns + event.duration_ns,
                        dict(event.stats),
                    )
                    for event in line.events
                ]
    return events


def _ran(event: _Event, module: str) -> tuple[str, Operation] | None:
    """The device and the execution of an instruction; None of other events."""
    stats, name = event.stats, event.stats.get("hlo_op")
    if event.gpu is None and name is None:
        return None
    device = event.gpu or str(stats.get("device_ordinal", 0))
    own = str(name) if name and stats.get("hlo_module") == module else OTHER_PROGRAMS
    return device, Operation(event.start, event.end, own, stats.get("_p"))


def _shares(operations: list[Operation], waits: list[Operation], begin: float) -> Timeline:
    """The time of a device since `begin`, divided among what runs at each moment."""
    end = max(operation.end for operation in operations)
    seconds: defaultdict[str, float] = defaultdict(float)
    running: Counter[str] = Counter()
    host = idle = 0.0
    now, waiting = begin, 0
    for time, change, name in _edges([*operations, *waits]):
        passed = 1e-9 * (min(time, end) - now)
        if passed > 0:
            if running:
                for one, count in running.items():
                    seconds[one] += passed * count / running.total()
            elif waiting:
                idle += passed
            else:
                host += passed
            now = time
        if name == WAIT:
            waiting += change
            continue
        running[name] += change
        if not running[name]:
            del running[name]
    return Timeline(dict(seconds), host, idle)


def _edges(operations: Iterable[Operation]) -> Iterator[tuple[float, int, str]]:
    """When each operation starts (1) and ends (-1), in order."""
    starts = [(one.start, 1, one.name) for one in operations]
    ends = [(one.end, -1, one.name) for one in operations]
    yield from sorted(starts + ends, key=lambda edge: edge[0])
