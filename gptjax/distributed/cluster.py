"""The index, count and coordinator address of this process, from environment variables.

| started by | process index and count | address of process 0 |
|---|---|---|
| a person, `gptjax launch` | JAX_PROCESS_ID of JAX_NUM_PROCESSES | JAX_COORDINATOR_ADDRESS |
| Slurm's `srun` | SLURM_PROCID of SLURM_STEP_NUM_TASKS | the first host, or the same variable |
| Open MPI's `mpirun` | OMPI_COMM_WORLD_RANK of OMPI_COMM_WORLD_SIZE | the same variable |

TPU hosts are not in the table: there JAX finds the processes itself. Wherever there are several,
all need the run's secret, `GPTJAX_SECRET` (`gptjax.distributed.handshake`).
"""

import importlib.util
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gptjax.config import InputError
from gptjax.distributed.handshake import secret_of

ADDRESS = "JAX_COORDINATOR_ADDRESS"
SELF = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
LAST_PORT = 65535
SLURM_PORTS = range(20000, 30000)
"""Below Linux's ephemeral ports; one is chosen by the number of the job."""


@dataclass(frozen=True)
class ProcessInfo:
    """A process of a run."""

    index: int
    count: int
    address: str
    """HOST:PORT of process 0."""
    secret: bytes = field(repr=False)
    """The secret of the run, known to all its processes."""


def find_process(environment: Mapping[str, str]) -> ProcessInfo | None:
    """This process, from the environment; None if it is the only one, or no variable is set.

    Raises:
      InputError: a missing or invalid variable, or no secret.
    """
    names = next((names for names in (SELF, SLURM, OPEN_MPI) if names[0] in environment), None)
    if names in (None, SELF) and any(name in environment for name in (*SELF, ADDRESS)):
        missing = [name for name in (*SELF, ADDRESS) if name not in environment]
        if missing:
            present = [name for name in (*SELF, ADDRESS) if name in environment]
            raise InputError(
                f"{' and '.join(present)} {'is' if len(present) == 1 else 'are'} set, but not "
                f"{' and '.join(missing)}: set all three or none."
            )
    if names is None or names[1] not in environment:
        return None  # For example the batch script of Slurm, which is not a step.
    index, count = (_number(environment, name) for name in names)
    if index >= count:
        raise InputError(f"{names[0]} is {index}: it must be below {names[1]}, which is {count}.")
    if count == 1:
        return None
    return ProcessInfo(index, count, _address(environment, names), secret_of(environment))


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise InputError(f"{name} is {value!r}: it must be a whole number.")
    return int(value)


def _address(environment: Mapping[str, str], names: tuple[str, str]) -> str:
    if ADDRESS in environment:
        address = environment[ADDRESS]
        matched = re.fullmatch(r".+:(\d{1,5})", address)
        if not matched or int(matched[1]) > LAST_PORT:
            raise InputError(f"{ADDRESS} is {address!r}: it must be HOST:PORT.")
        return address
    if names == OPEN_MPI:
        raise InputError(
            f"Open MPI started this, but {ADDRESS} is not set: mpirun -x {ADDRESS}=HOST:PORT with "
            "the host of rank 0."
        )
    job, step = (_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = SLURM_PORTS[(job + 97 * step) % len(SLURM_PORTS)]
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if not nodes:
        raise InputError("SLURM_STEP_NODELIST is '': it must name the hosts of the step.")
    return f"{first_host(nodes)}:{port}"


def first_host(nodes: str) -> str:
    """The first host of a Slurm host list: gpu003 of `gpu[003-005,9],login`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes + ",").partition(",")[0]


def interface(address: str) -> str:
    """The IPv4 address on which to listen for connections to HOST:PORT; "" is all interfaces.

    It is that of HOST if HOST names this machine. All interfaces are used if it does not, as behind
    a forwarded port, or if the hosts file maps this machine's name to a loopback address, which
    other machines cannot reach.
    """
    host = address.rpartition(":")[0]
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        with socket.socket() as trial:
            trial.bind((found, 0))
    except OSError:
        return ""
    named = host == "localhost" or host == found
    return str(found) if named or not ipaddress.ip_address(found).is_loopback else ""


def free_port() -> int:
    """A TCP port that is not in use."""
    with socket.socket() as unused:
        unused.bind(("", 0))
        return unused.getsockname()[1]


def has_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips and libtpu, and JAX_PLATFORMS allows them."""
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
