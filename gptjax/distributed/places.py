"""Which process of a run this is, and where all of them meet, from the environment alone.

| started by | who it is | where process 0 listens |
|---|---|---|
| a person, `gptjax launch` | JAX_PROCESS_ID of JAX_NUM_PROCESSES | JAX_COORDINATOR_ADDRESS |
| Slurm's `srun` | SLURM_PROCID of SLURM_STEP_NUM_TASKS | the first host, or the same variable |
| Open MPI's `mpirun` | OMPI_COMM_WORLD_RANK of OMPI_COMM_WORLD_SIZE | the same variable |

TPU hosts are in no line: there JAX asks the machine itself.
"""

import importlib.util
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptjax.config import InputError

ADDRESS = "JAX_COORDINATOR_ADDRESS"
SELF = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
SLURM_PORTS = range(20000, 30000)
"""Below those that Linux gives to connections; the number of the job chooses one."""


@dataclass(frozen=True)
class Place:
    """A process among those of a run."""

    index: int
    count: int
    address: str
    """HOST:PORT of process 0."""


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place of this process; None where it is the only one, or where nothing tells.

    Raises:
      InputError: a variable that is missing beside another one, or has no sense.
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
    return Place(index, count, _address(environment, names)) if count > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environment[name]):
        raise InputError(f"{name} is {environment[name]!r}: it must be a whole number.")
    return int(environment[name])


def _address(environment: Mapping[str, str], names: tuple[str, str]) -> str:
    if ADDRESS in environment:
        address = environment[ADDRESS]
        if not re.fullmatch(r".+:\d+", address):
            raise InputError(f"{ADDRESS} is {address!r}: it must be HOST:PORT.")
        return address
    if names == OPEN_MPI:
        raise InputError(
            f"Open MPI started this, but {ADDRESS} is not set: mpirun -x {ADDRESS}=HOST:PORT with "
            "the host of rank 0."
        )
    job = int(environment["SLURM_JOB_ID"]) + 97 * int(environment["SLURM_STEP_ID"])
    port = SLURM_PORTS[job % len(SLURM_PORTS)]
    return f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port}"


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: `gpu[003-005,9],login` begins with gpu003."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes + ",").partition(",")[0]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def has_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips, the library that drives them, and is to use them."""
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
