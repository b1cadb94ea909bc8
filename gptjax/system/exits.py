"""Exit codes of all commands, which tell a script whether to retry.

| code | meaning | retry? |
|---|---|---|
| 0 | done | no |
| 1 | a failed check (`certify`, `preflight`), or a bug in gptjax | no |
| 2 | a user error: a flag, a file, a directory in use | no, fix it |
| 65 | the loss or the gradient is not finite | no, it would recur |
| 74 | the disk is full or fails; the last good checkpoint is kept | no, fix it |
| 75 | another process of the run was lost | yes, it resumes from the last checkpoint |
| 128 + N | signal N ended it; 130 is Ctrl-C, 143 SIGTERM: both save first | yes, except 130 |

65, 74 and 75 are EX_DATAERR, EX_IOERR and EX_TEMPFAIL of sysexits.h.
"""

import contextlib
import enum
import os
import signal
import types

SHOW_CURSOR = b"\x1b[?25h"
"""The terminal sequence that shows the cursor, which a progress bar hides."""


class Exit(enum.IntEnum):
    """Named exit codes, explained in the module's table."""

    MISTAKE = 2
    DIVERGED = 65
    DISK = 74
    LOST = 75
    INTERRUPTED = 128 + signal.SIGINT


class Diverged(RuntimeError):
    """The loss or its gradient is not finite; the message is one sentence for the user."""


class Interrupted(RuntimeError):
    """A signal stopped the run after its state was saved."""

    def __init__(self, step: int, number: int, *, kept: bool = True):
        name = signal.Signals(number).name
        saved = f"; step {step} is saved, the same command resumes."
        lost = f" at step {step}; without a directory nothing of the run is kept."
        super().__init__(f"Stopped by {name}{saved if kept else lost}")
        self.step, self.number, self.exit_code = step, number, 128 + number


class Interrupts:
    """A command's handler of Ctrl-C: the first raises KeyboardInterrupt, the second exits at once.

    A second exception would not exit: threads that write a checkpoint are waited for, and an
    exception raised while a library calls back into Python is lost.
    """

    def __init__(self):
        self.noted = False
        """Whether the first one arrived, here or at a handler that replaces this one."""

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        """Handle the signal."""
        if not self.noted:
            self.noted = True
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            os.write(2, b"Stopped at once; what was saved before stays.\n")
        os._exit(Exit.INTERRUPTED)
