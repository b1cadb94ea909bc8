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

import enum
import signal


class Exit(enum.IntEnum):
    """The codes with a name; the module's table says what they mean."""

    MISTAKE = 2
    DIVERGED = 65
    DISK = 74
    LOST = 75
    INTERRUPTED = 128 + signal.SIGINT


class StoppedAtOnce(KeyboardInterrupt):
    """A second interrupt, which does not wait until the state is saved."""

    def __init__(self):
        super().__init__("Stopped at once; the same command goes on from the last checkpoint.")
