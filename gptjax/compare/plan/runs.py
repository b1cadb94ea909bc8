"""The runs of a comparison, each a directory named by a hash of all that determines its result.

| file | content |
|---|---|
| config.json | the run's config, and the fingerprints of its data, as in any run's directory |
| metrics.jsonl | the evaluated steps |
| checkpoints/, tokenizer.* | of compared runs only: `python -m gptjax sample` reads them |
| result.json | written last: the outcome |
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Literal

from gptjax.compare.plan.data import SharedData
from gptjax.compare.results import Outcome, read_record
from gptjax.compare.versioned_files import read_versioned, write_versioned
from gptjax.config import ExperimentConfig, TransformerConfig, sealed, to_dict
from gptjax.data.tokenizers import save_tokenizer
from gptjax.runs.directory import CHECKPOINTS, CONFIG, RESULT, save_model, write_json
from gptjax.runs.result import environment
from gptjax.runs.trial import Trial
from gptjax.training.trackers.jsonl import METRICS, line_of

RUNS = "runs"


@dataclasses.dataclass(frozen=True)
class GridRun:
    """A planned run of the grid."""

    variant: str
    size: str
    purpose: Literal["search", "final"]
    config: ExperimentConfig
    """Has the run's seed and learning rate."""
    mup_base: TransformerConfig | None = None
    """The base model of muP, at which the learning rate was chosen; None without muP."""

    def directory(self, data: SharedData) -> str:
        """Returns its name, which ends in a hash of all that determines the run's result."""
        made = environment()
        content = {
            **data.identity,
            "config": to_dict(self.config),
            "mup_base": None if self.mup_base is None else to_dict(self.mup_base),
            "purpose": self.purpose,  # Search runs keep no model.
            "jax": made["versions"]["jax"],
            "device": made["device"],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        words = f"{self.variant} {self.size} {self.purpose}"
        slug = re.sub(r"[^A-Za-z0-9.=-]+", "_", words).strip("_")[:80]
        rate = f"{self.config.optimizer.learning_rate:g}"
        return f"{slug}-rate{rate}-seed{self.config.train.seed}-{digest}"


def finished(run: GridRun, out: Path, data: SharedData) -> Outcome | None:
    """Returns the run's outcome of an earlier call, whatever the variant was called then, or None.

    Raises:
      InputError: a result that another version of gptjax wrote, or that cannot be read.
    """
    name = run.directory(data)
    for directory in sorted((out / RUNS).glob(f"*{name[-13:]}")):
        if (directory / RESULT).exists():
            path = directory / RESULT
            saved = read_record(Outcome, read_versioned(path).get("outcome"), str(path))
            return dataclasses.replace(saved, variant=run.variant, size=run.size)
    return None


def failed(run: GridRun, error: str) -> Outcome:
    """Returns the outcome of a run that failed."""
    return _outcome(run, None, [], 0.0, error, "")


def keep(run: GridRun, trial: Trial, out: Path, data: SharedData) -> Outcome:
    """Write the directory of a finished run, its result last; returns its outcome."""
    name = run.directory(data)
    directory = out / RUNS / name
    if trial.diverged:
        sentence = f"Step {trial.diverged}: the loss or the gradient is not finite."
        return keep_diverged(run, sentence, out, data)
    directory.mkdir(parents=True, exist_ok=True)
    if run.purpose == "final":
        if not (directory / CONFIG).exists():
            shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)  # Left by a killed call.
            save_model(directory, trial.model)
        save_tokenizer(data.tokenizer, directory)
    lines = "".join(map(line_of, trial.lines))
    (directory / METRICS).write_text(lines, encoding="utf-8")
    curve = [
        (line["step"], line["validation_loss"]) for line in trial.lines if "validation_loss" in line
    ]
    outcome = _outcome(run, trial.validation_loss, curve, trial.seconds, "", f"{RUNS}/{name}")
    # With muP, fields of the model's config depend on the width.
    trained = dataclasses.replace(run.config, model=trial.model.config)
    _write(trained, outcome, out, data)
    return outcome


def keep_diverged(run: GridRun, sentence: str, out: Path, data: SharedData) -> Outcome:
    """Write the outcome of a run that diverged, which would diverge again."""
    name = f"{RUNS}/{run.directory(data)}"
    outcome = _outcome(run, None, [], 0.0, sentence, name)
    _write(run.config, outcome, out, data)
    return outcome


def _write(config: ExperimentConfig, outcome: Outcome, out: Path, data: SharedData) -> None:
    directory = out / outcome.directory
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, sealed({"config": to_dict(config), **data.identity}))
    write_versioned(directory / RESULT, {"outcome": to_dict(outcome), **environment()})


def _outcome(
    run: GridRun,
    loss: float | None,
    curve: list[tuple[int, float]],
    seconds: float,
    error: str,
    directory: str,
) -> Outcome:
    train = run.config.train
    finite = [(step, value) for step, value in curve if math.isfinite(value)]
    return Outcome(
        variant=run.variant,
        size=run.size,
        purpose=run.purpose,
        seed=train.seed,
        learning_rate=run.config.optimizer.learning_rate,
        steps=train.steps,
        tokens=train.steps * train.batch_size * run.config.model.context_length,
        validation_loss=loss,
        curve_steps=tuple(step for step, _ in finite),
        curve_losses=tuple(value for _, value in finite),
        seconds=seconds,
        error=error,
        directory=directory,
    )
