"""Trackers: where the scalars of logged steps go, one file each.

| `train.track` | file | what it is |
|---|---|---|
| always | jsonl.py | `metrics.jsonl`, which resumption, figures and reports read |
| always | sessions.py | `sessions.jsonl`: where the wall time went, for `gptjax goodput` |
| always | gptjax/training/console.py | a progress bar, or lines |
| tensorboard | tensorboard.py | event files in the run's directory |
| wandb | wandb.py | Weights & Biases |
| mlflow | mlflow.py | an MLflow server, or its local store |
| trackio | trackio.py | Trackio's local store, or a Space of the Hugging Face hub |
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from gptjax.config import InputError, TrainConfig
from gptjax.config.values import TrackerName, exhaustive
from gptjax.distributed import is_first
from gptjax.training.console import ConsoleTracker, ProgressLine, in_notebook
from gptjax.training.trackers.jsonl import METRICS, JsonlTracker, read_jsonl
from gptjax.training.trackers.mlflow import MlflowTracker
from gptjax.training.trackers.protocol import Tracker
from gptjax.training.trackers.sessions import SESSIONS, SessionTracker
from gptjax.training.trackers.tensorboard import TensorBoardTracker
from gptjax.training.trackers.trackio import TrackioTracker
from gptjax.training.trackers.wandb import WandbTracker

SERVICES: dict[str, Callable[[Path], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}
"""Trackers by another package, of which each has the name: (directory of the run) → tracker."""


class _Service:
    """A tracker whose failure is a line on standard error, and not the end of the run."""

    def __init__(self, name: str, directory: Path):
        self._name = name
        try:
            self._tracker: Tracker | None = SERVICES[name](directory)
        except Exception as error:
            words = " ".join(str(error).split())
            raise InputError(f"TrainConfig.track names {name}, which fails: {words}") from error

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` at `step`, if nothing failed before."""
        if self._tracker is not None:
            self._guarded(lambda tracker: tracker.write(step, scalars), f"after step {step}")

    def close(self) -> None:
        """Flush and close."""
        if self._tracker is not None:
            self._guarded(lambda tracker: tracker.close(), "at the end")

    def _guarded(self, act: Callable[[Tracker], None], when: str) -> None:
        assert self._tracker is not None
        try:
            act(self._tracker)
        except Exception as error:
            self._tracker = None
            print(f"{self._name} failed {when}, and gets no more scalars: {error}", file=sys.stderr)


def _tensorboard(directory: Path) -> Tracker:
    return TensorBoardTracker(directory, read_jsonl(directory / METRICS))


TRACKERS: dict[str, Callable[[Path], Tracker]] = exhaustive(
    TrackerName,
    {
        "tensorboard": _tensorboard,
        **{name: functools.partial(_Service, name) for name in SERVICES},
    },
)


def check_installed(config: TrainConfig) -> None:
    """Check that the packages of `config.track` can be imported.

    Raises:
      InputError: one is not installed.
    """
    for name in config.track:
        if name in SERVICES and importlib.util.find_spec(name) is None:
            raise InputError(
                f"TrainConfig.track names {name}, and the package {name} is not installed: "
                f"pip install -e '.[{name}]'."
            )


@contextlib.contextmanager
def open_trackers(
    directory: Path, config: TrainConfig, resume_step: int
) -> Iterator[list[Tracker]]:
    """The trackers of a run that resumes from `resume_step`; none in processes other than 0.

    Raises:
      InputError: a service that cannot be reached.
    """
    trackers: list[Tracker] = []
    if not is_first():
        yield trackers
        return
    with contextlib.ExitStack() as opened:

        def add(tracker: Tracker) -> None:
            opened.callback(tracker.close)
            trackers.append(tracker)

        add(JsonlTracker(directory / METRICS, resume_step, config))
        add(SessionTracker(directory / SESSIONS, resume_step))
        for name in config.track:
            add(TRACKERS[name](directory))
        add(ProgressLine(config.steps) if in_notebook() else ConsoleTracker(config.steps))
        yield trackers
