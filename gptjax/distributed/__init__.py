"""One run in many processes, usually one a host: who they are, and that all of them are there.

    with distributed.joined(config):
        ...

initialises JAX for all of them; on one machine without a launcher it does nothing. What the
processes of a run do differently is little: each reads its rows of a batch, and process 0 alone
prints and writes, but for checkpoints, which all write.
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
from gptjax.distributed.cluster import Place, find_place, free_port, has_tpu, interface
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
]

START = "GPTJAX_START_SECONDS"
"""The environment variable with the time that all processes have to come to the start."""
START_SECONDS = 300
MEET_SECONDS = 1800
"""For what one process does and others wait for, as drawing samples at the end."""
HEARTBEAT_SECONDS = 100
"""After which JAX aborts all processes of a run where one stands still."""
ADDRESS_BYTES = 64

_member: Member | None = None


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return _member is None or _member.place.index == 0


def meet(name: str, value: Any = None, seconds: float = MEET_SECONDS) -> list[Any]:
    """Wait until all processes are here, and get the value (JSON) that each brought.

    Raises:
      InputError: processes that did not come in time, by number and host.
    """
    return [value] if _member is None else _member.gather(name, value, seconds)


def agreed_stop(step: int, signal: int | None) -> int | None:
    """The signal for which all processes stop at `step`, whoever got it; called at every step."""
    return signal if _member is None else _member.agreed_stop(step, signal)


@contextlib.contextmanager
def joined(config: Any = None) -> Iterator[None]:
    """Initialise JAX as one of a run's processes, and part from the others at the end.

    To be entered before anything touches JAX's devices. Checks that all processes have the same
    `config`, code, versions and devices. While it is open, the end of another process ends this
    one with a sentence and `Exit.LOST`, and only process 0 writes to standard output.

    Raises:
      InputError: a coordinator that is not reached in `GPTJAX_START_SECONDS` (300), a process that
        is missing or differs, or variables that make no sense.
    """
    place = find_place(os.environ)
    if place is None and not has_tpu(os.environ):
        yield
        return
    import jax  # Not above: a command on one machine that needs no JAX does not wait for it.

    seconds = _start_seconds()
    # Without it each host would have as many as it has cores, and experiments would choose anew.
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        os.environ["JAX_NUM_CPU_DEVICES"] = "1"
        jax.config.update("jax_num_cpu_devices", 1)
    # JAX's own keeps SIGTERM from ending a process that is not training yet.
    jax.config.update("jax_enable_preemption_service", False)
    with contextlib.ExitStack() as stack:
        if place is None:
            if _tpu_alone(seconds):
                yield
                return
            place = _tpu_place(stack)
        elif place.index == 0:
            port = int(place.address.rpartition(":")[2])
            _coordinate(stack, place.count, place.secret, interface(place.address), port)
        if place.index:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        member = stack.enter_context(_joining(Member(place, seconds, _end)))
        _check_hosts(member, config, seconds)
        yield
        member.gather(END, None, MEET_SECONDS)


@contextlib.contextmanager
def _joining(member: Member) -> Iterator[Member]:
    """Make it this process's; where it stops with a mistake the others are told."""
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
    """Compare what can be compared before JAX is initialised; initialise it; compare devices."""
    import jax

    place, same = member.place, {"code": code_hash()[:12], "versions": versions()}
    if config is not None:
        same["config"] = to_dict(config)
    own = {"host": socket.gethostname(), "port": free_port(), "same": same}
    reports = member.gather("the start", own, seconds)
    hosts = [report["host"] for report in reports]
    check_same("the same config, code and versions", hosts, [report["same"] for report in reports])
    if not jax.distributed.is_initialized():
        # JAX's own service asks nobody who he is: it, too, listens no wider than it must.
        where = interface(place.address)
        jax.distributed.initialize(
            f"{place.address.rpartition(':')[0]}:{reports[0]['port']}",
            place.count,
            place.index,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            coordinator_bind_address=f"{where}:{reports[0]['port']}" if where else None,
        )
    there = member.gather("the start of the devices", {"devices": devices()}, seconds)
    check_same("the same devices", hosts, there)
    print(f"{place.count} processes, each with {devices()}.")


def _tpu_alone(seconds: int) -> bool:
    """Initialise JAX where there are TPUs, which asks the machine; whether its host is alone."""
    import jax

    try:
        jax.distributed.initialize(initialization_timeout=seconds)
    except ValueError:  # The machine knows of no others: a notebook's, say.
        return True
    return jax.process_count() == 1


def _tpu_place(stack: contextlib.ExitStack) -> Place:
    """Where JAX itself found the other hosts: process 0 says over the TPUs where it listens.

    It draws the secret, too, which the network of the TPUs alone carries.
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
    return Place(index, count, address.decode(), secret)


def _coordinate(
    stack: contextlib.ExitStack, count: int, secret: bytes, host: str, port: int = 0
) -> Coordinator:
    return stack.enter_context(contextlib.closing(Coordinator(count, secret, host, port)))


def _own_address() -> str:
    """The address that other machines of the network know this one by; nothing is sent."""
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
    """Leave without JAX's parting, which waits for all and aborts where one does not come.

    Does nothing on one machine.
    """
    jax = sys.modules.get("jax")  # What was not imported has joined nothing.
    if jax is None or not jax.distributed.is_initialized():
        return
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def _end(sentence: str) -> None:
    """End this process at once, whatever it waits for: it would wait for ever."""
    assert _member is not None
    again = "the same command goes on from the last checkpoint"
    print(f"{sentence}; process {_member.place.index} stops, {again}.", file=sys.stderr, flush=True)
    os._exit(Exit.LOST)
