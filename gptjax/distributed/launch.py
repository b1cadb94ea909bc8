"""Launch the processes of one run on this machine, to try out a multi-host run."""

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
"""Time for the others to stop by themselves when one has failed."""
POLL_SECONDS = 0.1
SIGNALLED = 128
"""Exit code 128 + N: a signal N was caught; -N, as Popen has it: it was killed by signal N."""


def launch(command: Sequence[str], processes: int, devices: int, other_code: int) -> int:
    """Run `command` in several processes on this machine's CPU, as one run.

    SIGINT and SIGTERM are forwarded to all of them. When one fails, the others stop too: by
    themselves, or killed after `END_SECONDS`. Standard output is process 0's.

    Args:
      command: that each process runs.
      processes: their number.
      devices: CPU devices per process.
      other_code: the exit code of a process that stopped because another one failed.

    Returns:
      The exit code of the process that failed first, by the convention of shells; or 0.
    """
    shared = {ADDRESS: f"localhost:{free_port()}", SECRET: new_secret()}
    running: dict[int, subprocess.Popen] = {}

    def forward(number: int, _: FrameType | None) -> None:
        for process in running.values():
            process.send_signal(number)

    handlers = {
        number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)
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
    identity = dict(zip(SELF, (str(index), str(processes)), strict=True))
    environment = {
        "JAX_PLATFORMS": "cpu",
        **os.environ,
        **identity,
        **shared,
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    # In a session of its own: else Ctrl-C in a terminal would reach it twice, and the second kills.
    return subprocess.Popen(
        command,
        env=environment,
        stdout=None if index == 0 else subprocess.DEVNULL,
        start_new_session=True,
    )


def _watch(running: dict[int, subprocess.Popen], other_code: int) -> int:
    """Wait for all processes; report the first that failed, and return its exit code.

    A process that stopped because of another may end before that one: it is blamed only if none
    ends otherwise in time.
    """
    failed: dict[int, int] = {}
    blamed, deadline = None, float("inf")
    while running:
        time.sleep(POLL_SECONDS)
        ended = {index: process.poll() for index, process in running.items()}
        for index, code in ended.items():
            if code is not None:
                del running[index]
        failed |= {index: code for index, code in ended.items() if code}
        if failed:
            deadline = min(deadline, time.monotonic() + END_SECONDS)
        late = time.monotonic() > deadline
        causes = [index for index, code in failed.items() if code != other_code]
        if blamed is None and (causes or (failed and (late or not running))):
            blamed = (causes or list(failed))[0]
            if _shell_code(failed[blamed]) < SIGNALLED or failed[blamed] < 0:
                # Else it reported the signal itself.
                print(f"Process {blamed} {_ending(failed[blamed])}.", file=sys.stderr)
        if late:
            for index, process in running.items():
                process.kill()
                process.wait()
                print(f"Process {index} did not stop in {END_SECONDS} s: killed.", file=sys.stderr)
            break
    return 0 if blamed is None else _shell_code(failed[blamed])


def _shell_code(code: int) -> int:
    return code if code >= 0 else SIGNALLED - code


def _ending(code: int) -> str:
    return f"ended with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
