"""How far a grid of runs is: a bar with the time left in a terminal, plain lines anywhere else."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class GridProgress:
    """Of all runs together, in units of work, such as FLOPs.

    Use it as a context manager: the bar goes when the context ends.
    """

    def __init__(self, total: float):
        """So much there is to do."""
        self.done = 0.0
        """So far, by earlier calls too."""
        self._total, self._before = total, 0.0
        self._start = time.perf_counter()
        self._bar = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeRemainingColumn(compact=True),
                console=Console(),
            )
            self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> "GridProgress":
        """Show it."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar down."""
        if self._bar:
            self._bar.stop()

    def begin(self, what: str) -> None:
        """Say what is worked on; in plain lines it is said when it ends."""
        if self._bar:
            self._bar.update(self._task, description=what)

    def skip(self, work: float) -> None:
        """So much was done by an earlier call."""
        self._before += work
        self.add(work)

    def add(self, work: float) -> None:
        """So much more is done."""
        self.done += work
        if self._bar:
            self._bar.update(self._task, completed=self.done)

    def say(self, line: str) -> None:
        """A line that stays, with how far all is where there is no bar."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(f"{line}  ({self.done / self._total:.0%}{self._time_left()})", flush=True)

    def _time_left(self) -> str:
        seconds, worked = time.perf_counter() - self._start, self.done - self._before
        if not worked:
            return ""
        return f", {clock((self._total - self.done) * seconds / worked)} left"


def clock(seconds: float) -> str:
    """As 1:02:03 or 2:03."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
