"""Any measurement over all the checkpoints of a run: when did it form?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax.runs.directory import checkpoint_steps, load_model


def history(
    directory: str | Path,
    measure: Callable[[Any], Any],
    steps: Sequence[int] | None = None,
) -> tuple[list[int], list[Any]]:
    """What `measure` says of the model at each checkpoint that was kept.

    A run keeps the last and the best, and with `train.keep_every` those between.

    Args:
      directory: of a run or a trial.
      measure: of a model.
      steps: of the checkpoints; None is all.

    Returns:
      The steps, in order, and what was measured at each.

    Raises:
      InputError: no run, no checkpoint, or none of a step.
    """
    steps = checkpoint_steps(directory) if steps is None else sorted(steps)
    return list(steps), [measure(load_model(directory, step)[1]) for step in steps]
