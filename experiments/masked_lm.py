"""Train a small BERT by masked language modelling, and show its predictions.

    python experiments/masked_lm.py

reads the text that every Python installation includes. Any text will do, and one that is divided
into documents allows next-sentence prediction too, as in BERT (Devlin et al. 2018):

    python experiments/masked_lm.py --data.source 'FILE#documents=block' --out runs/mine \\
        --data.objective next_sentence --model.token_types 2 --model.encoder-heads pretraining
"""

import dataclasses
from pathlib import Path

from gptjax import preset
from gptjax.cli import run_experiment
from gptjax.commands.outcomes import outcome
from gptjax.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from gptjax.runs.run import run

DEFAULTS = ExperimentConfig(
    model=dataclasses.replace(
        preset("bert-tiny"),
        vocab_size=0,
        context_length=64,
        token_types=0,
        encoder_heads="masked_lm",
    ),
    data=DataConfig(objective="masked_lm", tokenizer="bpe:1000", whole_words=True),
    optimizer=OptimizerConfig(learning_rate=2e-3),
    train=TrainConfig(steps=1000, batch_size=32),
)


def masked_lm(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """Train a masked language model."""
    run(config, out, overwrite, show=outcome)


if __name__ == "__main__":
    run_experiment(
        masked_lm,
        {"masked_lm": DEFAULTS},
        "runs/masked_lm",
        __doc__,
        objectives=("masked_lm", "next_sentence"),
    )
