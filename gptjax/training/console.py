"""Training progress on standard output: a progress bar in a terminal, plain lines elsewhere.

A notebook is no terminal, but its output obeys a carriage return: there one line is updated.
"""

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


class ConsoleTracker:
    """A tracker of scalars that shows them as a progress bar, or as lines where there is no tty."""

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
        if self._bar:  # The bar is one line, and goes on showing the last validation loss.
            self._bar.update(self._task, completed=step, description=text)
        else:
            line = f"step {step}/{self._steps}  {text}  {self._time_left(step)}"
            print(line.rstrip(), flush=True)
            self._validation = ""

    def _time_left(self, step: int) -> str:
        """The time left, estimated from the steps so far; rich does the same for the bar."""
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
            return ""
        steps, seconds = step - self._first[0], now - self._first[1]
        left = round((self._steps - step) * seconds / steps)
        return f"{left // 60}:{left % 60:02d} left"

    def close(self) -> None:
        """Stop the progress bar."""
        if self._bar:
            self._bar.stop()


class ProgressLine:
    """One line of training progress in a notebook, overwritten as steps are made.

    A tracker of scalars for `trial.train`, and the `progress` callback of `train_ensemble`; several
    runs may share one, which then counts the steps of all.
    """

    def __init__(self, steps: int, *, every: float = 0.2):
        """Count up to `steps` in all, with at least `every` seconds between updates."""
        self._steps, self._every = steps, every
        self._done, self._longest, self._shown = 0, 40, float("-inf")
        self._losses = {"loss": "", "validation": ""}
        self._lock = threading.Lock()  # Runs in several threads may share it.
        self._start = time.perf_counter()
        print(f"step 0 of {steps:,}  compiling", end="", flush=True)

    def __call__(self, steps: int) -> None:
        """Add `steps` to those made."""
        with self._lock:
            self._show(self._done + steps)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Show the newest scalars."""
        for name, key in (("loss", "loss"), ("validation", "validation_loss")):
            if key in scalars:
                self._losses[name] = f"  {name} {scalars[key]:.3f}"
        self._show(step)

    def close(self) -> None:
        """Do nothing: the line holds no resource."""

    def _show(self, done: int) -> None:
        self._done = done
        now = time.perf_counter()
        if done < self._steps and now - self._shown < self._every:
            return
        self._shown = now
        losses = "".join(self._losses.values())
        text = f"step {done:,} of {self._steps:,}{losses}  {now - self._start:.0f} s"
        self._longest = max(self._longest, len(text))
        end = "\n" if done >= self._steps else ""
        print(f"\r{text:{self._longest}}", end=end, flush=True)
