"""Any measurement over the checkpoints of a run, to see when a behaviour forms."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax.models.build import LanguageModel
from gptjax.runs.loading import checkpoint_steps, load_model


def history(
    directory: str | Path,
    measure: Callable[[LanguageModel], Any],
    steps: Sequence[int] | None = None,
) -> tuple[list[int], list[Any]]:
    """`measure` of the model at each checkpoint of a run.

    A run keeps the last and the best checkpoint, and with `train.keep_every` those between.

    Args:
      directory: of a run or a trial.
      measure: a function of a model.
      steps: of the checkpoints; None is all.

    Returns:
      The steps, in order, and the measurement at each.

    Raises:
      InputError: no run, no checkpoint, or none of one of the steps.
    """
    steps = checkpoint_steps(directory) if steps is None else sorted(steps)
    return list(steps), [measure(load_model(directory, step)[1]) for step in steps]
