"""When to save by the clock, at a step on which all processes agree."""

import time

from gptjax import distributed


class CheckpointClock:
    """Says at which steps the minutes between checkpoints are over.

    Clocks of processes differ, and all must save after the same step. So each time half of what is
    left is over, by the time that a step has taken so far, the processes exchange their clocks and
    take the one that is furthest: a few messages per checkpoint, none per step. The first steps are
    only dispatched when they are asked about, and seem to take no time, so that at most as many
    steps as were made so far pass until the next exchange.
    """

    def __init__(self, minutes: float, step: int):
        """Count from now, after `step`; 0 minutes are never over."""
        self._seconds = 60 * minutes
        self.saved(step)

    def saved(self, step: int) -> None:
        """Count from now, after the checkpoint of `step`."""
        self._since, self._first, self._next = time.perf_counter(), step, step + 1

    def over(self, step: int) -> bool:
        """Whether to save after `step`; every process asks after the same steps."""
        if not self._seconds or step < self._next:
            return False
        own = time.perf_counter() - self._since
        elapsed = max(distributed.meet("the time since the last checkpoint", own))
        per_step, left = elapsed / (step - self._first), self._seconds - elapsed
        self._next = step + max(1, min(int(left / per_step / 2), step - self._first))
        return left < per_step
