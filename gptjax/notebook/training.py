"""Train a model on a text in one call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.runs.defaults import defaults, with_fields
from gptjax.runs.directory import or_temporary
from gptjax.runs.loading import Run, load_run
from gptjax.runs.run import run


def train(
    text: str | Path | Sequence[str | Path],
    preset: str = "quickstart",
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    **fields: Any,
) -> Run:
    """Train a preset on a text, as `gptjax train` does.

        trained = train("file.txt", preset="llama-style", steps=500, learning_rate=1e-3)
        plots.loss_curve(trained.metrics)

    Args:
      text: a file or a glob pattern, or whatever else `data.source` takes; several in a list.
      preset: the name of the model (`PRESETS`).
      out: the directory of the run, which the same call resumes; None keeps none.
      overwrite: whether to delete an existing run and start over.
      **fields: of any section of the config (gptjax/config/README.md): steps, batch_size, seed,
        learning_rate, tokenizer, depth, width …

    Returns:
      The model of the best checkpoint, its tokenizer and the metrics of the run.

    Raises:
      InputError: no such preset, field, value or text.
      Diverged: a loss that is not finite.
      Interrupted: an interrupt, after the state is saved in `out`.
    """
    source = (str(text),) if isinstance(text, (str, Path)) else tuple(map(str, text))
    config = with_fields(defaults(preset), source=source, **fields)
    with or_temporary(out) as directory:
        run(config, directory, overwrite, show=None)
        return load_run(directory)
