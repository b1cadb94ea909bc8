"""A training run in one call: a config and batches in, a trained model and its curve out.

For notebooks, and wherever batches are made and not read; `experiments/quickstart.py` spells out
the same wiring for text. It is `fit`, so what is true of a run is true of a trial.
"""

import contextlib
import tempfile
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
from gptjax.runs.directory import CHECKPOINTS, CONFIG, begin, begins, hold, load_config
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.loop import Batches, fit
from gptjax.training.metrics import METRICS, JsonlWriter, Writer, read_jsonl


class Trial(NamedTuple):
    """What a trial came to."""

    model: LanguageModel
    """After the last step."""
    lines: list[dict[str, Any]]
    """Scalars of the logged and the evaluated steps, those of a run's `metrics.jsonl`."""
    validation_loss: float
    """After the last step, nats per token."""
    seconds: float
    """Wall time, compilation included."""
    diverged: int = 0
    """The first step whose loss or gradient was not finite; 0 if none was."""


def train(
    config: ExperimentConfig,
    batches: grain.DatasetIterator,
    validation: Batches,
    *,
    directory: str | Path | None = None,
    writers: Sequence[Writer] = (),
    mup_base: TransformerConfig | None = None,
) -> Trial:
    """Train a model anew.

    Args:
      config: the model, the optimizer, how long; its `data` is not asked.
      batches: from `gptjax.data.pipeline`: `training_batches` of text, `made_batches` of anything.
      validation: a list of batches; each evaluation uses all.
      directory: where checkpoints and `metrics.jsonl` stay, for `load_model` and `probe.history`;
        a trial of the same config that was interrupted there goes on. None keeps nothing.
      writers: where else the scalars go.
      mup_base: the model at the width that the learning rate was chosen for, from which muP carries
        it to the width of `config`; None trains as `config` says.

    Raises:
      InputError: a directory that holds something else or is in use by another process, batches
        that do not fit the devices, or a base that differs in more than sizes or is for Muon.
      DiskError: a disk that is full or fails; what is saved stays.
      Diverged: a loss that is not finite.
      Interrupted: an interrupt, by keyboard or in a notebook.
    """
    with contextlib.ExitStack() as opened:
        if directory is None:
            directory = opened.enter_context(tempfile.TemporaryDirectory())
        opened.enter_context(hold(Path(directory)))
        return _train(config, batches, validation, Path(directory), writers, mup_base)


def _train(
    config: ExperimentConfig,
    batches: grain.DatasetIterator,
    validation: Batches,
    directory: Path,
    writers: Sequence[Writer],
    mup_base: TransformerConfig | None,
) -> Trial:
    mesh = build_mesh(config.mesh, config.train.batch_size // config.train.grad_accumulation)
    assembly = assemble(config, mesh, mup_base=mup_base)
    config = assembly.config
    if begins(directory):
        begin(directory, {"config": to_dict(config)})
    elif not (directory / CONFIG).exists():
        raise InputError(f"{directory} is not empty: a trial begins in a directory of its own.")
    elif load_config(directory) != config:
        raise InputError(f"{directory} holds a trial of another config: choose another one.")
    with (
        Checkpoints(directory / CHECKPOINTS, keep_every=config.train.keep_every) as checkpoints,
        closing(
            JsonlWriter(directory / METRICS, checkpoints.last_step or 0, config.train.log_every)
        ) as writer,
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
            writers=[writer, *writers],
        )
    params = jax.device_put(fitted.params, jax.devices()[0])
    progress = fitted.progress
    return Trial(
        nnx.merge(abstract(config.model)[0], params),
        read_jsonl(directory / METRICS),
        progress.last_loss,
        progress.seconds,
    )
