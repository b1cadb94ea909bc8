"""The runs of a comparison, each a directory that is named by what decides its numbers.

| file | content |
|---|---|
| config.json | the run's config, and the fingerprints of its data, as in any run's directory |
| metrics.jsonl | the evaluated steps |
| checkpoints/, tokenizer.* | of a run that is compared: `python -m gptjax sample` reads it |
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

from gptjax.compare.plan.data import Material
from gptjax.compare.results import Outcome, read_record
from gptjax.compare.versioned_files import read_saved, write_saved
from gptjax.config import ExperimentConfig, TransformerConfig, sealed, to_dict
from gptjax.data.tokenizers import save_tokenizer
from gptjax.runs.directory import CHECKPOINTS, CONFIG, RESULT, environment, save_model, write_json
from gptjax.runs.trial import Trial
from gptjax.training.metrics import METRICS, line_of

RUNS = "runs"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of the grid, before it is run."""

    variant: str
    size: str
    purpose: Literal["search", "final"]
    config: ExperimentConfig
    """Its seed and learning rate are the cell's."""
    mup_base: TransformerConfig | None = None
    """The model at which the learning rate was chosen, where muP carries it from there."""

    def directory(self, material: Material) -> str:
        """Its name, which ends in a hash of all that decides the run's numbers."""
        made = environment()
        content = {
            **material.identity,
            "config": to_dict(self.config),
            "mup_base": None if self.mup_base is None else to_dict(self.mup_base),
            "purpose": self.purpose,  # A search keeps no model.
            "jax": made["versions"]["jax"],
            "device": made["device"],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        words = f"{self.variant} {self.size} {self.purpose}"
        slug = re.sub(r"[^A-Za-z0-9.=-]+", "_", words).strip("_")[:80]
        rate = f"{self.config.optimizer.learning_rate:g}"
        return f"{slug}-rate{rate}-seed{self.config.train.seed}-{digest}"


def finished(cell: Cell, out: Path, material: Material) -> Outcome | None:
    """What the cell came to in an earlier call, under whatever name the variant had then.

    Raises:
      InputError: a result that another version of gptjax wrote, or that cannot be read.
    """
    name = cell.directory(material)
    for directory in sorted((out / RUNS).glob(f"*{name[-13:]}")):
        if (directory / RESULT).exists():
            path = directory / RESULT
            saved = read_record(Outcome, read_saved(path).get("outcome"), str(path))
            return dataclasses.replace(saved, variant=cell.variant, size=cell.size)
    return None


def failed(cell: Cell, error: str) -> Outcome:
    """The outcome of a cell that came to nothing."""
    return _outcome(cell, None, [], 0.0, error, "")


def keep(cell: Cell, trial: Trial, out: Path, material: Material) -> Outcome:
    """Write the directory of a finished cell, its result last."""
    name = cell.directory(material)
    directory = out / RUNS / name
    if trial.diverged:
        sentence = f"Step {trial.diverged}: the loss or the gradient is not finite."
        return keep_diverged(cell, sentence, out, material)
    directory.mkdir(parents=True, exist_ok=True)
    if cell.purpose == "final":
        if not (directory / CONFIG).exists():
            shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)  # Of a call that was killed.
            save_model(directory, trial.model)
        save_tokenizer(material.tokenizer, directory)
    lines = "".join(map(line_of, trial.lines))
    (directory / METRICS).write_text(lines, encoding="utf-8")
    curve = [
        (line["step"], line["validation_loss"]) for line in trial.lines if "validation_loss" in line
    ]
    outcome = _outcome(cell, trial.validation_loss, curve, trial.seconds, "", f"{RUNS}/{name}")
    # With muP the model's config has what the width has changed.
    trained = dataclasses.replace(cell.config, model=trial.model.config)
    _write(trained, outcome, out, material)
    return outcome


def keep_diverged(cell: Cell, sentence: str, out: Path, material: Material) -> Outcome:
    """Write what would come out again: numbers that are no longer finite."""
    name = f"{RUNS}/{cell.directory(material)}"
    outcome = _outcome(cell, None, [], 0.0, sentence, name)
    _write(cell.config, outcome, out, material)
    return outcome


def _write(config: ExperimentConfig, outcome: Outcome, out: Path, material: Material) -> None:
    directory = out / outcome.directory
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, sealed({"config": to_dict(config), **material.identity}))
    write_saved(directory / RESULT, {"outcome": to_dict(outcome), **environment()})


def _outcome(
    cell: Cell,
    loss: float | None,
    curve: list[tuple[int, float]],
    seconds: float,
    error: str,
    directory: str,
) -> Outcome:
    train = cell.config.train
    finite = [(step, value) for step, value in curve if math.isfinite(value)]
    return Outcome(
        variant=cell.variant,
        size=cell.size,
        purpose=cell.purpose,
        seed=train.seed,
        learning_rate=cell.config.optimizer.learning_rate,
        steps=train.steps,
        tokens=train.steps * train.batch_size * cell.config.model.context_length,
        validation_loss=loss,
        curve_steps=tuple(step for step, _ in finite),
        curve_losses=tuple(value for _, value in finite),
        seconds=seconds,
        error=error,
        directory=directory,
    )
