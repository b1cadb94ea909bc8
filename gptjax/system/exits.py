"""What every command's exit code says, so that whoever started it knows whether to try again.

| code | what happened | again? |
|---|---|---|
| 0 | done | no |
| 1 | a check found what it looks for (`certify`, `preflight`), or a fault of gptjax's own | no |
| 2 | a mistake in what was given: a flag, a file, a directory in use | no, mend it |
| 65 | the loss or the gradient is not finite | no, it would come again |
| 74 | the disk is full or fails; the last good checkpoint is kept | no, mend it |
| 75 | another process of the run was lost | yes, it goes on from the last checkpoint |
| 128 + N | signal N ended it; 130 is Ctrl-C, 143 SIGTERM: both save first | yes, but for 130 |

65, 74 and 75 are EX_DATAERR, EX_IOERR and EX_TEMPFAIL of sysexits.h.
"""

import contextlib
import enum
import os
import signal
import types

SHOW_CURSOR = b"\x1b[?25h"
"""Which a progress bar has hidden."""


class Exit(enum.IntEnum):
    """The codes with a name; the module's table says what they mean."""

    MISTAKE = 2
    DIVERGED = 65
    DISK = 74
    LOST = 75
    INTERRUPTED = 128 + signal.SIGINT


class Diverged(RuntimeError):
    """The loss or its gradient is not finite; the message is one sentence for the user."""


class Interrupted(RuntimeError):
    """A signal stopped the run after its state was saved."""

    def __init__(self, step: int, number: int):
        name = signal.Signals(number).name
        super().__init__(f"Stopped by {name}; step {step} is saved, the same command goes on.")
        self.exit_code = 128 + number


class Interrupts:
    """A command's handler of Ctrl-C: the first is a KeyboardInterrupt, the second ends it at once.

    An exception would not do that: threads that write a checkpoint are waited for, and one that
    arises where a library calls back into Python is lost.
    """

    def __init__(self):
        self.noted = False
        """Whether the first one came, here or to who handles it instead."""

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        """Be told of a signal."""
        if not self.noted:
            self.noted = True
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            os.write(2, b"Stopped at once; what was saved before stays.\n")
        os._exit(Exit.INTERRUPTED)
