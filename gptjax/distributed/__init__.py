"""Multi-process runs, usually one process per host: joining, checks and barriers.

    with distributed.joined(config):
        ...

initialises JAX for all processes; on one machine without a launcher it does nothing. The processes
differ little: each reads its rows of a batch, and only process 0 prints and writes, except for
checkpoints, which all write.
"""

import contextlib
import os
import secrets
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from gptjax.config import InputError, to_dict, whole_number
from gptjax.distributed.cluster import ProcessInfo, find_process, free_port, has_tpu, interface
from gptjax.distributed.handshake import CHALLENGE_BYTES
from gptjax.distributed.membership import END, Coordinator, Member
from gptjax.distributed.report import check_same, code_hash, devices, versions
from gptjax.system.exits import Exit

__all__ = [
    "agreed_stop",
    "code_hash",
    "devices",
    "is_first",
    "joined",
    "leave_at_once",
    "meet",
    "versions",
    "waited",
]

START = "GPTJAX_START_SECONDS"
"""The environment variable with the time limit for all processes to join, seconds."""
START_SECONDS = 300
MEET_SECONDS = 1800
"""Time limit for what others wait for while one process works, such as sampling at the end."""
HEARTBEAT_SECONDS = 100
"""Time after which JAX aborts all processes of a run if one hangs."""
ADDRESS_BYTES = 64

_member: Member | None = None


def is_first() -> bool:
    """Whether this is process 0, which prints and writes."""
    return _member is None or _member.process.index == 0


def meet(name: str, value: Any = None, seconds: float = MEET_SECONDS) -> list[Any]:
    """Barrier and all-gather: wait for all processes, and return the value (JSON) of each.

    Raises:
      InputError: processes that did not arrive in time, by number and host.
    """
    return [value] if _member is None else _member.gather(name, value, seconds)


def waited() -> float:
    """Seconds for which this process has waited for others in `meet` and when it joined."""
    return 0.0 if _member is None else _member.waited


def agreed_stop(step: int, signal: int | None) -> int | None:
    """The signal for which all processes stop at `step`; to be called at every step."""
    return signal if _member is None else _member.agreed_stop(step, signal)


@contextlib.contextmanager
def joined(config: Any = None) -> Iterator[None]:
    """Initialise JAX as one of a run's processes; at the end, wait for the others.

    To be entered before JAX's devices are used. Checks that all processes have the same `config`,
    code, versions and devices. While it is open, the exit of another process ends this one with a
    message and `Exit.LOST`, and only process 0 writes to standard output.

    Raises:
      InputError: a coordinator that is not reached in `GPTJAX_START_SECONDS` (300), a process that
        is missing or differs, or invalid environment variables.
    """
    process = find_process(os.environ)
    if process is None and not has_tpu(os.environ):
        yield
        return
    import jax  # Not above: a single-machine command without JAX must not wait for its import.

    seconds = _start_seconds()
    # Otherwise each host would have one device per core, and experiments would choose again.
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        os.environ["JAX_NUM_CPU_DEVICES"] = "1"
        jax.config.update("jax_num_cpu_devices", 1)
    # JAX's own would keep SIGTERM from ending a process that is not training yet.
    jax.config.update("jax_enable_preemption_service", False)
    with contextlib.ExitStack() as stack:
        if process is None:
            if _tpu_alone(seconds):
                yield
                return
            process = _tpu_process(stack)
        elif process.index == 0:
            port = int(process.address.rpartition(":")[2])
            _coordinate(stack, process.count, process.secret, interface(process.address), port)
        if process.index:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        member = stack.enter_context(_joining(Member(process, seconds, _end)))
        _check_hosts(member, config, seconds)
        yield
        member.gather(END, None, MEET_SECONDS)


@contextlib.contextmanager
def _joining(member: Member) -> Iterator[Member]:
    """Register `member` for this process; an exception inside is reported to the others."""
    global _member
    import jax

    _member = member
    try:
        yield member
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            member.blame()
        member.leave(str(error) or type(error).__name__)
        raise
    finally:
        member.close()


def _check_hosts(member: Member, config: Any, seconds: int) -> None:
    """Compare config, code and versions; initialise JAX; compare devices."""
    import jax

    process, same = member.process, {"code": code_hash()[:12], "versions": versions()}
    if config is not None:
        same["config"] = to_dict(config)
    own = {"host": socket.gethostname(), "port": free_port(), "same": same}
    reports = member.gather("the start", own, seconds)
    hosts = [report["host"] for report in reports]
    check_same("the same config, code and versions", hosts, [report["same"] for report in reports])
    if not jax.distributed.is_initialized():
        # JAX's own service has no authentication: it, too, listens on as few interfaces as it can.
        where = interface(process.address)
        jax.distributed.initialize(
            f"{process.address.rpartition(':')[0]}:{reports[0]['port']}",
            process.count,
            process.index,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            coordinator_bind_address=f"{where}:{reports[0]['port']}" if where else None,
        )
    there = member.gather("the start of the devices", {"devices": devices()}, seconds)
    check_same("the same devices", hosts, there)
    print(f"{process.count} processes, each with {devices()}.")


def _tpu_alone(seconds: int) -> bool:
    """Initialise JAX on TPUs, which find each other; True if this host is the only one."""
    import jax

    try:
        jax.distributed.initialize(initialization_timeout=seconds)
    except ValueError:  # No other hosts are known, as in a notebook.
        return True
    return jax.process_count() == 1


def _tpu_process(stack: contextlib.ExitStack) -> ProcessInfo:
    """This process of a TPU slice; process 0 broadcasts its address over the TPUs.

    It broadcasts the secret too, which only the TPUs' own network carries.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    index, count = jax.process_index(), jax.process_count()
    known = np.zeros(ADDRESS_BYTES + CHALLENGE_BYTES, np.uint8)
    if index == 0:
        host, secret = _own_address(), secrets.token_bytes(CHALLENGE_BYTES)
        address = f"{host}:{_coordinate(stack, count, secret, host).port}".encode()
        known[: len(address)] = np.frombuffer(address, np.uint8)
        known[ADDRESS_BYTES:] = np.frombuffer(secret, np.uint8)
    known = bytes(multihost_utils.broadcast_one_to_all(known))
    address, secret = known[:ADDRESS_BYTES].rstrip(b"\0"), known[ADDRESS_BYTES:]
    return ProcessInfo(index, count, address.decode(), secret)


def _coordinate(
    stack: contextlib.ExitStack, count: int, secret: bytes, host: str, port: int = 0
) -> Coordinator:
    return stack.enter_context(contextlib.closing(Coordinator(count, secret, host, port)))


def _own_address() -> str:
    """This machine's address in its network; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]


def _start_seconds() -> int:
    value = os.environ.get(START, str(START_SECONDS))
    seconds = whole_number(value)
    if not seconds:
        raise InputError(f"{START} is {value!r}: it must be a whole number above 0.")
    return seconds


def leave_at_once(error: BaseException) -> None:
    """Exit without JAX's shutdown barrier, which aborts if a process does not arrive.

    Does nothing on one machine.
    """
    jax = sys.modules.get("jax")  # If JAX was never imported, nothing was joined.
    if jax is None or not jax.distributed.is_initialized():
        return
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def _end(sentence: str) -> None:
    """Exit at once, whatever this process waits for: it would wait forever."""
    assert _member is not None
    again = "the same command resumes from the last checkpoint"
    print(
        f"{sentence}; process {_member.process.index} stops, {again}.", file=sys.stderr, flush=True
    )
    os._exit(Exit.LOST)
