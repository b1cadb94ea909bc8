"""Train a small GPT on the text that every Python installation carries, and see what it learned.

    python experiments/quickstart.py

needs no network and leaves all it made in runs/quickstart. Any UTF-8 text will do instead:

    python experiments/quickstart.py --data.source FILE --out runs/mine

A run has three steps, which gptjax/runs/run.py has in sight: the data; the model, its optimizer and
the devices; `fit`. `gptjax train` does the same for every preset and objective.
"""

import dataclasses
from pathlib import Path

from gptjax import preset
from gptjax.cli import run_experiment
from gptjax.commands.outcomes import outcome
from gptjax.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from gptjax.runs.run import run

DEFAULTS = ExperimentConfig(
    model=dataclasses.replace(preset("quickstart"), vocab_size=0),
    data=DataConfig(),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    train=TrainConfig(steps=1000, batch_size=16),
)


def quickstart(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """Train a model that predicts the next token, and let it write."""
    if run(config, out, overwrite, objectives=("causal",), show=outcome):
        print(f'Next: python -m gptjax sample {out} --prompt "The "')


if __name__ == "__main__":
    run_experiment(quickstart, {"quickstart": DEFAULTS}, "runs/quickstart", __doc__)
