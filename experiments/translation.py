"""Train a small original Transformer to translate from one language to another.

    python experiments/translation.py --data.source train.en.gz#documents=line \\
        --data.target train.de.gz#documents=line --out runs/en-de

Source and target are two files of parallel lines, or two columns of one file
(`pairs.tsv#column=1`, `#column=2`). The last tenth validates, and its first lines are translated at
the end.
"""

import dataclasses
from pathlib import Path

from gptjax import preset
from gptjax.cli import run_experiment
from gptjax.commands.outcomes import outcome
from gptjax.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from gptjax.runs.run import run

DEFAULTS = ExperimentConfig(
    model=dataclasses.replace(preset("transformer-tiny"), vocab_size=0, context_length=64),
    data=DataConfig(
        objective="sequence_to_sequence",
        source=("source.txt#documents=line",),
        target=("target.txt#documents=line",),
        tokenizer="bpe:4000",
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=200),
    train=TrainConfig(steps=2000, batch_size=64, label_smoothing=0.1),
)


def translation(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """Train a model that translates."""
    if run(config, out, overwrite, show=outcome):
        print(f'Next: python -m gptjax sample {out} --beams 4 --prompt "A text to translate."')


if __name__ == "__main__":
    run_experiment(
        translation,
        {"translation": DEFAULTS},
        "runs/translation",
        __doc__,
        objectives=("sequence_to_sequence",),
    )
