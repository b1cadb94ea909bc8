"""The grid of runs: what is missing is trained, side by side where that is faster, and kept."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptjax.compare.grid.progress import GridProgress
from gptjax.compare.plan.data import Material
from gptjax.compare.plan.runs import RUNS, Cell, failed, finished, keep, keep_diverged
from gptjax.compare.results import Outcome
from gptjax.config import ExperimentConfig, TransformerConfig
from gptjax.costs.model import model_cost
from gptjax.runs.ensembles import most_at_once, train_ensemble
from gptjax.runs.trial import Trial, train
from gptjax.system.disk import is_failure
from gptjax.system.exits import Diverged, Interrupted
from gptjax.system.locks import InUse


def work(config: ExperimentConfig) -> float:
    """FLOPs of a run's training."""
    tokens = config.train.steps * config.train.batch_size * config.model.context_length
    return float(tokens * model_cost(config.model).training_flops)


def run_cells(
    cells: Sequence[Cell], out: Path, material: Material, progress: GridProgress
) -> list[Outcome]:
    """What each cell came to, in their order; those that an earlier call finished are read.

    Cells that follow each other and differ in seed and learning rate alone share a program. One
    that fails is an outcome with its error, and is tried again by the next call unless its numbers
    themselves failed.

    Raises:
      InputError: results of another version in `out`.
    """
    outcomes: list[Outcome] = []
    for round_ in _rounds(cells, material):
        found = [finished(cell, out, material) for cell in round_]
        missing = [cell for cell, outcome in zip(round_, found, strict=True) if outcome is None]
        progress.skip(sum(work(cell.config) for cell in round_ if cell not in missing))
        goal = progress.done + sum(work(cell.config) for cell in missing)
        trained = iter(_train(missing, out, material, progress))
        progress.add(goal - progress.done)  # What a run that failed has not done.
        outcomes += [outcome or next(trained) for outcome in found]
    return outcomes


def _rounds(cells: Iterable[Cell], material: Material) -> list[list[Cell]]:
    """Cells that are trained side by side."""

    def alike(cell: Cell) -> tuple[str, str, str, TransformerConfig | None]:
        return cell.variant, cell.size, cell.purpose, cell.mup_base

    rounds = []
    for _, group in itertools.groupby(cells, alike):
        together = list(group)
        parameters = model_cost(together[0].config.model).parameters
        size = most_at_once(parameters) if material.one_shape else 1
        rounds += [together[first : first + size] for first in range(0, len(together), size)]
    return rounds


def _train(
    cells: Sequence[Cell], out: Path, material: Material, progress: GridProgress
) -> list[Outcome]:
    if not cells:
        return []
    first = cells[0]
    seeds = ", ".join(str(cell.config.train.seed) for cell in cells)
    what = f"{first.variant} {first.size} {first.purpose} seed {seeds}".replace("  ", " ")
    progress.begin(what)
    try:
        trials = _trials(cells, out, material, progress)
        outcomes = [
            keep(cell, trial, out, material) for cell, trial in zip(cells, trials, strict=True)
        ]
    except (Interrupted, InUse):
        raise
    except Diverged as error:
        outcomes = [keep_diverged(cell, str(error), out, material) for cell in cells]
    except Exception as error:
        if is_failure(error):
            raise
        # Of one variant, whatever it is, the others need not know.
        sentence = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        outcomes = [failed(cell, sentence) for cell in cells]
    told = [
        outcome.error or f"{outcome.validation_loss:.4f} at rate {outcome.learning_rate:g}"
        for outcome in outcomes
    ]
    progress.say(f"{what}: {'; '.join(told)}")
    return outcomes


def _trials(
    cells: Sequence[Cell], out: Path, material: Material, progress: GridProgress
) -> list[Trial]:
    each = work(cells[0].config) / cells[0].config.train.steps
    if most_at_once(model_cost(cells[0].config.model).parameters) > 1 and material.one_shape:
        trials = train_ensemble(
            [cell.config for cell in cells],
            [material.batches(cell.config.train.seed) for cell in cells],
            [material.validation] * len(cells),
            mup_base=cells[0].mup_base,
            progress=lambda runs: progress.add(runs * each),
        )
        return [trial._replace(seconds=trial.seconds / len(cells)) for trial in trials]
    return [
        train(
            cell.config,
            material.batches(cell.config.train.seed),
            material.validation,
            mup_base=cell.mup_base,
            directory=out / RUNS / cell.directory(material),
            writers=[_Counted(progress, each)],
        )
        for cell in cells
    ]


class _Counted:
    """A writer that tells the grid's progress of the steps that a run has made."""

    def __init__(self, progress: GridProgress, each: float):
        self._progress, self._each = progress, each
        self._last = 0

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Count the steps since the last line."""
        self._progress.add((step - self._last) * self._each)
        self._last = step

    def close(self) -> None:
        """Nothing is open."""
