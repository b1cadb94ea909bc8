"""Train a small BERT to find the tokens that were hidden, and see what it finds.

    python experiments/masked_lm.py

reads the text that every Python installation carries. Any text will do, and with documents
`next_sentence` can be asked too, as BERT was (Devlin et al. 2018):

    python experiments/masked_lm.py --data.source 'FILE#documents=block' --out runs/mine \\
        --data.objective next_sentence --model.token_types 2 --model.encoder-heads pretraining
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from quickstart import train

from gptjax import preset
from gptjax.cli import run_experiment
from gptjax.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from gptjax.data.corpus import Corpus, Sources
from gptjax.data.pipeline import EvaluationBatches
from gptjax.data.report import labels
from gptjax.runs.directory import Run

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
SHOWN = 20
"""Rows of the validation part in predictions.txt."""


def masked_lm(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """Train a model that finds what was hidden."""
    objectives = ("masked_lm", "next_sentence")
    train(config, out, overwrite, objectives=objectives, show=show)


def show(run: Run, sources: Sources, corpus: Corpus, out: Path) -> str:
    """Write rows of the validation part with the model's guesses, by its best checkpoint."""
    lines, found, hidden = [], 0, 0
    for batch in EvaluationBatches(corpus.validation, SHOWN):
        inputs = {name: jnp.asarray(array) for name, array in batch.inputs().items()}
        logits = run.model(jnp.asarray(batch.tokens), **inputs)
        guesses = np.asarray(logits.argmax(axis=-1))
        asked = batch.loss_weights > 0
        found += int((guesses == batch.targets)[asked].sum())
        hidden += int(asked.sum())
        if not lines:
            for row in np.flatnonzero(asked.any(axis=1)):
                filled = batch.padding_mask if batch.segment_ids is None else batch.segment_ids
                read = np.asarray(filled)[row] > 0
                texts = labels(batch.targets[row][read], run.tokenizer, corpus.vocabulary)
                guessed = labels(guesses[row][read], run.tokenizer, corpus.vocabulary)
                marked = [
                    f"[{text if text == guess else f'{text}: {guess}'}]" if hid else text
                    for text, guess, hid in zip(texts, guessed, asked[row][read], strict=True)
                ]
                lines.append("".join(marked))
    head = f"{found:,} of {hidden:,} hidden tokens found ({found / hidden:.1%})."
    print(head)
    explained = "What was hidden stands in brackets, and behind it a guess that is wrong."
    text = "\n\n".join([head, explained, *lines])
    (out / "predictions.txt").write_text(text + "\n", encoding="utf-8")
    return "predictions.txt"


if __name__ == "__main__":
    run_experiment(masked_lm, {"masked_lm": DEFAULTS}, "runs/masked_lm", __doc__)
