"""A trial: a training run in one call, from a config and batches to a model and its curve.

For notebooks, and for batches that are generated rather than read; `experiments/quickstart.py`
spells out the same wiring for text. A trial uses `fit`, and so behaves as a run does.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
from flax import nnx

from gptjax.config import ExperimentConfig, InputError, TransformerConfig, to_dict
from gptjax.models.build import LanguageModel, abstract
from gptjax.parallel.sharding import build_mesh
from gptjax.runs.assembly import assemble
from gptjax.runs.directory import (
    CHECKPOINTS,
    CONFIG,
    begin,
    begins,
    hold,
    load_config,
    or_temporary,
)
from gptjax.system.programs import keep_programs
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.loop import Batches, fit
from gptjax.training.profile.steps import StepProfile
from gptjax.training.trackers.jsonl import METRICS, JsonlTracker, read_jsonl
from gptjax.training.trackers.protocol import Tracker


class Trial(NamedTuple):
    """The result of a trial."""

    model: LanguageModel
    """After the last step."""
    lines: list[dict[str, Any]]
    """Scalars of the logged and evaluated steps, as in a run's `metrics.jsonl`."""
    validation_loss: float
    """After the last step, nats per token."""
    seconds: float
    """Wall time, compilation included."""
    diverged: int = 0
    """The first step whose loss or gradient was not finite; 0 if all were."""


def train(
    config: ExperimentConfig,
    batches: grain.DatasetIterator,
    validation: Batches,
    *,
    directory: str | Path | None = None,
    trackers: Sequence[Tracker] = (),
    mup_base: TransformerConfig | None = None,
) -> Trial:
    """Train a model from scratch, or resume an interrupted trial of the same directory.

    Args:
      config: the model, the optimizer, the number of steps; its `data` and `train.track` are
        ignored.
      batches: from `gptjax.data.pipeline`: `training_batches` of text, `made_batches` of anything.
      validation: a list of batches; each evaluation uses all.
      directory: where checkpoints and `metrics.jsonl` are kept, for `load_model` and
        `probe.history`, and from which the same config resumes. None keeps nothing.
      trackers: further trackers of the scalars.
      mup_base: the model of the width at which the learning rate was tuned, from which muP
        transfers it to the width of `config`; None is without muP.

    Raises:
      InputError: a directory that holds something else or is in use by another process, batches
        that do not fit the devices, or a base that differs in more than sizes or is for Muon.
      DiskError: a disk that is full or fails; what is saved stays.
      Diverged: a loss that is not finite.
      Interrupted: an interrupt, by keyboard or in a notebook.
    """
    with or_temporary(directory) as named, hold(named) as own:
        return _train(config, batches, validation, own, trackers, mup_base)


def _train(
    config: ExperimentConfig,
    batches: grain.DatasetIterator,
    validation: Batches,
    directory: Path,
    trackers: Sequence[Tracker],
    mup_base: TransformerConfig | None,
) -> Trial:
    mesh = build_mesh(config.mesh, config.train.batch_size // config.train.grad_accumulation)
    keep_programs()
    assembly = assemble(config, mesh, mup_base=mup_base)
    config = assembly.config
    if begins(directory):
        begin(directory, {"config": to_dict(config)})
    elif not (directory / CONFIG).exists():
        raise InputError(f"{directory} is not empty: a trial needs a directory of its own.")
    elif load_config(directory) != config:
        raise InputError(f"{directory} holds a trial of another config: choose another one.")
    with (
        Checkpoints(directory / CHECKPOINTS, keep_every=config.train.keep_every) as checkpoints,
        closing(
            JsonlTracker(directory / METRICS, checkpoints.last_step or 0, config.train)
        ) as tracker,
    ):
        fitted = fit(
            config.train,
            assembly.init,
            mesh=mesh,
            loss=assembly.loss,
            optimizer=assembly.optimizer(),
            batches=batches,
            validation=validation,
            checkpoints=checkpoints,
            trackers=[tracker, *trackers],
            activations=assembly.activations,
            profile=StepProfile(config, directory),
        )
    params = jax.device_put(fitted.params, jax.devices()[0])
    progress = fitted.progress
    return Trial(
        nnx.merge(abstract(config.model)[0], params),
        read_jsonl(directory / METRICS),
        progress.last_loss,
        progress.seconds,
    )
