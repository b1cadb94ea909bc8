"""Local processes of one run, for trying out on a machine what is meant for many."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from gptjax.distributed.cluster import ADDRESS, SELF, free_port
from gptjax.distributed.handshake import SECRET, new_secret

END_SECONDS = 10
"""Which the others have to stop by themselves when one has ended with a mistake."""
LOOK_SECONDS = 0.1
CAUGHT = 128
"""Exit codes above it tell of a signal, by which a negative one says that it was killed."""


def launch(command: Sequence[str], processes: int, devices: int, other_code: int) -> int:
    """Run `command` so many times on this machine's CPU, as the processes of one run.

    SIGINT and SIGTERM go on to all of them. When one ends with a mistake, so do the others: by
    themselves, or after `END_SECONDS` by force. Standard output is process 0's.

    Args:
      command: what each runs.
      processes: how many.
      devices: CPU devices of each.
      other_code: what a process exits with because another did, which is then the one to blame.

    Returns:
      The exit code of the process that failed first, as a shell has it; or 0.
    """
    shared = {ADDRESS: f"localhost:{free_port()}", SECRET: new_secret()}
    running: dict[int, subprocess.Popen] = {}

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in running.values():
            process.send_signal(number)

    handlers = {
        number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for index in range(processes):
            running[index] = _start(command, index, processes, devices, shared)
        return _watch(running, other_code)
    finally:
        for process in running.values():
            process.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start(
    command: Sequence[str], index: int, processes: int, devices: int, shared: Mapping[str, str]
) -> subprocess.Popen:
    place = dict(zip(SELF, (str(index), str(processes)), strict=True))
    environment = {
        "JAX_PLATFORMS": "cpu",
        **os.environ,
        **place,
        **shared,
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    # In a group of its own: a terminal's Ctrl-C would reach it twice, and a second one kills.
    return subprocess.Popen(
        command,
        env=environment,
        stdout=None if index == 0 else subprocess.DEVNULL,
        start_new_session=True,
    )


def _watch(running: dict[int, subprocess.Popen], other_code: int) -> int:
    """Wait for all; the code of the first that failed, after a sentence about it."""
    first, deadline = 0, float("inf")
    while running:
        time.sleep(LOOK_SECONDS)
        ended = {index: process.poll() for index, process in running.items()}
        failed = {index: code for index, code in ended.items() if code}
        if failed and not first:
            index = min(failed, key=lambda index: failed[index] == other_code)
            first, deadline = _shell_code(failed[index]), time.monotonic() + END_SECONDS
            if first < CAUGHT or failed[index] < 0:  # Else it said itself which signal it got.
                print(f"Process {index} {_said(failed[index])}.", file=sys.stderr)
        for index, code in ended.items():
            if code is not None:
                del running[index]
        if time.monotonic() > deadline:
            for index, process in running.items():
                process.kill()
                print(f"Process {index} did not stop in {END_SECONDS} s: killed.", file=sys.stderr)
            deadline = float("inf")
    return first


def _shell_code(code: int) -> int:
    return code if code >= 0 else CAUGHT - code


def _said(code: int) -> str:
    return f"ended with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
