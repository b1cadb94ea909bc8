"""Progress of the grid: a bar with the time left in a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class GridProgress:
    """Progress of all runs together, in units of work such as FLOPs.

    Use it as a context manager: the bar is removed when the context ends.
    """

    def __init__(self, total: float):
        """`total` is the work of all runs."""
        self.done = 0.0
        """Work done so far, including earlier calls."""
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
        """Show the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()

    def begin(self, what: str) -> None:
        """Show what is being done; plain lines are printed when it ends."""
        if self._bar:
            self._bar.update(self._task, description=what)

    def skip(self, work: float) -> None:
        """Count work done by an earlier call."""
        self._before += work
        self.add(work)

    def add(self, work: float) -> None:
        """Count work done now."""
        self.done += work
        if self._bar:
            self._bar.update(self._task, completed=self.done)

    def say(self, line: str) -> None:
        """Print a line that stays; without a bar, with the progress of all runs."""
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
    """Returns a duration as 1:02:03 or 2:03."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
