"""Hosts of a run: `doctor` looks at them, `launch` makes some of this machine."""

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
"""Of a process that has imported JAX and gptjax, at least."""
DEVICE_BYTES = 1 << 20
"""Of a CPU device's threads and streams."""


def doctor() -> None:
    """Versions, code and devices of this machine; started on several, whether they are the same.

    A host that is missing or differs is named. A page for a bug report.
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
    """Run a script as several processes of this machine, on its CPU, to try out many hosts.

    Args:
      script: An experiment, as experiments/quickstart.py.
      arguments: Its own, behind it.
      local: Processes to start.
      devices: CPU devices of each.
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
