"""The grid of runs: missing runs are trained, as one ensemble where that is faster, and kept."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptjax.compare.grid.progress import GridProgress
from gptjax.compare.plan.data import SharedData
from gptjax.compare.plan.runs import RUNS, GridRun, failed, finished, keep, keep_diverged
from gptjax.compare.results import Outcome
from gptjax.config import ExperimentConfig, TransformerConfig
from gptjax.costs.model import model_cost
from gptjax.runs.bucket import push
from gptjax.runs.ensembles import most_at_once, train_ensemble
from gptjax.runs.trial import Trial, train
from gptjax.system.disk import is_failure
from gptjax.system.exits import Diverged, Interrupted
from gptjax.system.locks import InUse


def work(config: ExperimentConfig) -> float:
    """Returns the training FLOPs of a run."""
    tokens = config.train.steps * config.train.batch_size * config.model.context_length
    return float(tokens * model_cost(config.model).training_flops)


def run_grid(
    runs: Sequence[GridRun], out: Path, data: SharedData, progress: GridProgress
) -> list[Outcome]:
    """Returns the outcome of each run in order; runs finished by an earlier call are read.

    Consecutive runs that differ only in seed and learning rate share a program. A run that fails is
    an outcome with its error, and is tried again by the next call unless it diverged.

    Raises:
      InputError: results of another version in `out`.
    """
    outcomes: list[Outcome] = []
    for round_ in _rounds(runs, data):
        found = [finished(run, out, data) for run in round_]
        missing = [run for run, outcome in zip(round_, found, strict=True) if outcome is None]
        progress.skip(sum(work(run.config) for run in round_ if run not in missing))
        goal = progress.done + sum(work(run.config) for run in missing)
        trained = iter(_train(missing, out, data, progress))
        progress.add(goal - progress.done)  # The rest of failed runs.
        push(out)
        outcomes += [outcome or next(trained) for outcome in found]
    return outcomes


def _rounds(runs: Iterable[GridRun], data: SharedData) -> list[list[GridRun]]:
    """Returns groups of runs that are trained together."""

    def alike(run: GridRun) -> tuple[str, str, str, TransformerConfig | None]:
        return run.variant, run.size, run.purpose, run.mup_base

    rounds = []
    for _, group in itertools.groupby(runs, alike):
        together = list(group)
        parameters = model_cost(together[0].config.model).parameters
        size = most_at_once(parameters) if data.one_shape else 1
        rounds += [together[first : first + size] for first in range(0, len(together), size)]
    return rounds


def _train(
    runs: Sequence[GridRun], out: Path, data: SharedData, progress: GridProgress
) -> list[Outcome]:
    if not runs:
        return []
    first = runs[0]
    seeds = ", ".join(str(run.config.train.seed) for run in runs)
    what = f"{first.variant} {first.size} {first.purpose} seed {seeds}".replace("  ", " ")
    progress.begin(what)
    try:
        trials = _trials(runs, out, data, progress)
        outcomes = [keep(run, trial, out, data) for run, trial in zip(runs, trials, strict=True)]
    except (Interrupted, InUse):
        raise
    except Diverged as error:
        outcomes = [keep_diverged(run, str(error), out, data) for run in runs]
    except Exception as error:
        if is_failure(error):
            raise
        # A failure of one variant must not stop the others.
        sentence = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        outcomes = [failed(run, sentence) for run in runs]
    results = [
        outcome.error or f"{outcome.validation_loss:.4f} at rate {outcome.learning_rate:g}"
        for outcome in outcomes
    ]
    progress.say(f"{what}: {'; '.join(results)}")
    return outcomes


def _trials(
    runs: Sequence[GridRun], out: Path, data: SharedData, progress: GridProgress
) -> list[Trial]:
    each = work(runs[0].config) / runs[0].config.train.steps
    if most_at_once(model_cost(runs[0].config.model).parameters) > 1 and data.one_shape:
        trials = train_ensemble(
            [run.config for run in runs],
            [data.batches(run.config.train.seed) for run in runs],
            [data.validation] * len(runs),
            mup_base=runs[0].mup_base,
            progress=lambda steps: progress.add(steps * each),
        )
        return [trial._replace(seconds=trial.seconds / len(runs)) for trial in trials]
    return [
        train(
            run.config,
            data.batches(run.config.train.seed),
            data.validation,
            mup_base=run.mup_base,
            directory=out / RUNS / run.directory(data),
            trackers=[_Counted(progress, each)],
        )
        for run in runs
    ]


class _Counted:
    """A metrics tracker that reports a run's steps to the grid's progress."""

    def __init__(self, progress: GridProgress, each: float):
        self._progress, self._each = progress, each
        self._last = 0

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Count the steps since the last line."""
        self._progress.add((step - self._last) * self._each)
        self._last = step

    def close(self) -> None:
        """Nothing to close."""
