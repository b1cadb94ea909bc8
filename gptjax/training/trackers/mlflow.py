"""MLflow: the server of `MLFLOW_TRACKING_URI`, or its local store.

The experiment is that of `MLFLOW_EXPERIMENT_NAME`, MLflow's own variable, or `gptjax`.
"""

import importlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptjax.training.trackers.protocol import PROJECT, identity, run_config

LARGEST_BATCH = 100
"""Parameters of one request; MLflow's own limit."""


class MlflowTracker:
    """A run of MLflow; one that is resumed in its directory is resumed there too."""

    def __init__(self, directory: Path):
        # By name, since the package is installed only with the extra `mlflow`.
        self._mlflow: Any = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        self._run = identity(directory, "mlflow", lambda: self._created(directory))
        self._client.update_run(self._run, "RUNNING")
        history = self._client.get_metric_history(self._run, "loss")
        self._known = max((metric.step for metric in history), default=0)

    def _created(self, directory: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        created = self._client.create_run(experiment, run_name=directory.name).info.run_id
        entities = self._mlflow.entities
        params = [entities.Param(name, str(value)) for name, value in _flat(run_config(directory))]
        for start in range(0, len(params), LARGEST_BATCH):
            self._client.log_batch(created, params=params[start : start + LARGEST_BATCH])
        return created

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Log the scalars of one step, unless it did before the run was resumed."""
        if step > self._known:
            entities, now = self._mlflow.entities, int(1000 * time.time())
            metrics = [entities.Metric(name, value, now, step) for name, value in scalars.items()]
            self._client.log_batch(self._run, metrics=metrics, synchronous=False)

    def close(self) -> None:
        """Wait for the scalars under way, and end the run."""
        self._mlflow.flush_async_logging()
        self._client.set_terminated(self._run)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with its dotted name, such as `model.depth`."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
