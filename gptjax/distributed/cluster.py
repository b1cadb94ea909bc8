"""Which process of a run this is, and where all of them meet, from the environment alone.

| started by | who it is | where process 0 listens |
|---|---|---|
| a person, `gptjax launch` | JAX_PROCESS_ID of JAX_NUM_PROCESSES | JAX_COORDINATOR_ADDRESS |
| Slurm's `srun` | SLURM_PROCID of SLURM_STEP_NUM_TASKS | the first host, or the same variable |
| Open MPI's `mpirun` | OMPI_COMM_WORLD_RANK of OMPI_COMM_WORLD_SIZE | the same variable |

TPU hosts are in no line: there JAX asks the machine itself. Wherever there are several processes,
all have the run's secret, `GPTJAX_SECRET` (`gptjax.distributed.handshake`).
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
"""Below those that Linux gives to connections; the number of the job chooses one."""


@dataclass(frozen=True)
class Place:
    """A process among those of a run."""

    index: int
    count: int
    address: str
    """HOST:PORT of process 0."""
    secret: bytes = field(repr=False)
    """What all processes of the run know."""


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place of this process; None where it is the only one, or where nothing tells.

    Raises:
      InputError: a variable that is missing beside another one, or has no sense; no secret.
    """
    names = next((names for names in (SELF, SLURM, OPEN_MPI) if names[0] in environment), None)
    if names in (None, SELF) and any(name in environment for name in (*SELF, ADDRESS)):
        missing = [name for name in (*SELF, ADDRESS) if name not in environment]
        if missing:
            there = [name for name in (*SELF, ADDRESS) if name in environment]
            raise InputError(
                f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} set, but not "
                f"{' and '.join(missing)}: set all three or none."
            )
    if names is None or names[1] not in environment:
        return None  # The script that Slurm starts, say, which is no step of its own.
    index, count = (_number(environment, name) for name in names)
    if index >= count:
        raise InputError(f"{names[0]} is {index}: it must be below {names[1]}, which is {count}.")
    if count == 1:
        return None
    return Place(index, count, _address(environment, names), secret_of(environment))


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
    """The first of Slurm's list of hosts: `gpu[003-005,9],login` begins with gpu003."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes + ",").partition(",")[0]


def interface(address: str) -> str:
    """The IPv4 address to listen on for those who come to HOST:PORT; "" is all of this machine's.

    This machine's own where HOST is a name of it that others resolve too. Where it is not, as
    behind a forwarded port, or where the hosts file gives this machine's name a loopback address,
    which nobody else reaches, all are listened on.
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
    """A port that nobody listens on."""
    with socket.socket() as unheard:
        unheard.bind(("", 0))
        return unheard.getsockname()[1]


def has_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips, the library that drives them, and is to use them."""
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
