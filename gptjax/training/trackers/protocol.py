"""What a tracker is, and what those of services share."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gptjax.config import read_sealed
from gptjax.system.disk import replacing

PROJECT = "gptjax"
"""The project or experiment in a service, where its own variable names none."""


class Tracker(Protocol):
    """A destination of scalars."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` at `step`."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


@runtime_checkable
class DurableTracker(Tracker, Protocol):
    """A tracker whose lines must be on disk before the checkpoint of the last of their steps."""

    def write_through(self) -> None:
        """Return when everything so far is on disk."""
        ...


@runtime_checkable
class TimeTracker(Tracker, Protocol):
    """A tracker of where the wall time goes."""

    def ready(self, compile_seconds: float) -> None:
        """The first step begins."""
        ...

    def spent(self, step: int, seconds: dict[str, float]) -> None:
        """The seconds of each kind since `ready`, after `step`."""
        ...


def identity(
    directory: Path, service: str, create: Callable[[], str] = lambda: uuid.uuid4().hex
) -> str:
    """The run's identity in a service, made once and kept in the run's directory."""
    path = directory / service / "run_id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            file.write(create().encode())
    return path.read_text()


def run_config(directory: Path) -> dict[str, Any]:
    """The config of the run in `directory`, nested as in its config.json.

    Raises:
      InputError: no config.json, or one that is damaged.
    """
    return read_sealed(directory / "config.json")["config"]
