"""The run as a person sees it: a progress bar in a terminal, plain lines anywhere else."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ConsoleWriter:
    """A writer of scalars for a person; standard output decides its form."""

    def __init__(self, steps: int):
        self._steps = steps
        self._first: tuple[int, float] | None = None
        self._validation = ""
        self._bar = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                console=Console(),
            )
            self._task = self._bar.add_task("compiling", total=steps)
            self._bar.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Show the newest scalars."""
        if "validation_loss" in scalars:
            self._validation = f"  validation {scalars['validation_loss']:.4f}"
        text = (
            f"loss {scalars['loss']:.4f}{self._validation}  "
            f"{scalars['tokens_per_second']:,.0f} tokens/s  MFU {scalars['mfu']:.1%}"
        )
        if self._bar:  # Which is one line, so that it keeps the last validation loss.
            self._bar.update(self._task, completed=step, description=text)
        else:
            line = f"step {step}/{self._steps}  {text}  {self._time_left(step)}"
            print(line.rstrip(), flush=True)
            self._validation = ""

    def _time_left(self, step: int) -> str:
        """From the steps seen so far; rich does the same for the bar."""
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
            return ""
        steps, seconds = step - self._first[0], now - self._first[1]
        left = round((self._steps - step) * seconds / steps)
        return f"{left // 60}:{left % 60:02d} left"

    def close(self) -> None:
        """Take the bar down."""
        if self._bar:
            self._bar.stop()
