"""Commands about hosts: `doctor` checks them, `launch` starts several processes on this one."""

import platform
import socket
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gptjax import distributed
from gptjax.config import InputError
from gptjax.distributed.launch import launch as launch_processes
from gptjax.system.exits import Exit
from gptjax.system.memory import check_fits

PROCESS_BYTES = 200 << 20
"""Least memory of a process that has imported JAX and gptjax."""
DEVICE_BYTES = 1 << 20
"""Memory of a CPU device's threads and streams."""


def doctor() -> None:
    """Print versions, code and devices of this machine; on several hosts, whether they agree.

    A host that is missing or differs is named. Paste the output into bug reports.
    """
    with distributed.joined():
        own = {"host": socket.gethostname(), "devices": distributed.devices()}
        hosts = distributed.meet("the doctor", own)
        for name, version in distributed.versions().items():
            print(f"{name:8} {version}")
        print(f"{'code':8} {distributed.code_hash()[:12]}")
        print(f"{'system':8} {platform.platform()}")
        for index, host in enumerate(hosts):
            print(f"process {index} of {len(hosts)}: {host['devices']} on {host['host']}")


def launch(
    script: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT")],
    arguments: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ITS FLAGS ...]")
    ] = (),
    local: Annotated[int, tyro.conf.arg(help="Processes.")] = 2,
    devices: int = 1,
) -> None:
    """Run a script in several processes on this machine's CPU, to try out multi-host runs.

    Args:
      script: An experiment, such as experiments/quickstart.py.
      arguments: The script's own flags.
      local: Processes to start.
      devices: CPU devices per process.
    """
    for name, value in (("local", local), ("devices", devices)):
        if value < 1:
            raise InputError(f"--{name} is {value}: it must be at least 1.")
    started = f"--local {local} with --devices {devices}"
    check_fits(started, local * (PROCESS_BYTES + devices * DEVICE_BYTES))
    if not script.is_file():
        raise InputError(f"launch: there is no script {script}.")
    command = [sys.executable, str(script), *arguments]
    if code := launch_processes(command, local, devices, Exit.LOST):
        raise SystemExit(code)
