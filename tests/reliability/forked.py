"""Programs in forked processes of this one, so that a thousand of them share one import of JAX.

A forked process is a process like any other: it is killed by a signal, holds its own locks, and
ends as an interpreter does, with its exit functions. JAX's devices must not be initialised in the
parent, whose threads a fork would not bring along.
"""

import atexit
import contextlib
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MEMORY_BYTES = 12 << 30
"""The data that a program may hold before its allocations fail."""


class Ended(NamedTuple):
    """How a program ended."""

    code: int
    """Its exit code, negative for the signal that ended it."""
    said: str
    """What it wrote to standard output and standard error."""
    hung: bool = False
    """Whether it was killed because its time was over."""


def start(program: Callable[[], object], log: Path | None = None) -> int:
    """Run `program` in a process of its own, which writes into `log` if given; the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        # A terminal's Ctrl-C ends the trial; a signal to the program is meant for it alone.
        os.setsid()
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
        program()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # What Python does at an interpreter's end; the parent's own stack is not unwound.
        with contextlib.suppress(BaseException):
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> tuple[int, bool]:
    """The exit code of a process started here, and whether it had to be killed after `seconds`."""
    deadline, hung = time.monotonic() + seconds, False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), hung
        if time.monotonic() > deadline and not hung:
            os.kill(pid, signal.SIGKILL)
            hung = True
        time.sleep(0.005)


def run(program: Callable[[], object], log: Path, seconds: float = 120) -> Ended:
    """Run `program` in a process of its own to its end."""
    code, hung = wait(start(program, log), seconds)
    return Ended(code, log.read_text(errors="replace"), hung)
