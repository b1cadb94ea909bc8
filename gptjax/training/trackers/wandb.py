"""Weights & Biases. Its project is that of `WANDB_PROJECT`, its own variable, or `gptjax`."""

import importlib
import os
from pathlib import Path

from gptjax.training.trackers.protocol import PROJECT, identity, run_config


class WandbTracker:
    """A run of Weights & Biases; one that is resumed in its directory is resumed there too."""

    def __init__(self, directory: Path):
        # By name, since the package is installed only with the extra `wandb`.
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=directory.name,
            id=identity(directory, "wandb"),
            resume="allow",
            dir=directory,
            config=run_config(directory),
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Log the scalars of one step."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
