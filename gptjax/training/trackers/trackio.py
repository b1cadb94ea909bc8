"""Trackio: its store on this machine, or the Space of `TRACKIO_SPACE_ID`, its own variable.

Steps that a killed run had logged after its last checkpoint are logged twice, with the same values.
"""

import importlib
from pathlib import Path
from typing import Any

from gptjax.training.trackers.protocol import PROJECT, identity, run_config


class TrackioTracker:
    """A run of Trackio; one that is resumed in its directory is resumed there too."""

    def __init__(self, directory: Path):
        # By name, since the package is installed only with the extra `trackio`.
        self._trackio: Any = importlib.import_module("trackio")
        name = f"{directory.name}-{identity(directory, 'trackio')[:8]}"
        self._trackio.init(PROJECT, name=name, resume="allow", config=run_config(directory))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Log the scalars of one step."""
        self._trackio.log(scalars, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._trackio.finish()
