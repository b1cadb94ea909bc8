"""The original Transformer, small, from one language to another.

    python experiments/translation.py --data.source train.en.gz#documents=line \\
        --data.target train.de.gz#documents=line --out runs/en-de

Two files of equal lines, or two columns of one file (`pairs.tsv#column=1`, `#column=2`). The last
tenth validates, and the first lines of it are translated at the end.
"""

import dataclasses
from pathlib import Path

from quickstart import train

from gptjax import beam_search, preset
from gptjax.cli import run_experiment
from gptjax.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from gptjax.data.corpus import Corpus, Sources
from gptjax.runs.directory import Run

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
SHOWN = 20
"""Sentences in translations.txt."""


def translation(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """Train a model that translates."""
    if train(config, out, overwrite, objectives=("sequence_to_sequence",), show=show):
        print(f'Next: python -m gptjax sample {out} --beams 4 --prompt "A text to translate."')


def show(run: Run, sources: Sources, corpus: Corpus, out: Path) -> str:
    """Write translations of validation sentences, by the best checkpoint and a beam of 4."""
    shown = []
    for number in range(min(SHOWN, len(sources.validation[0]))):
        text, reference = sources.validation[0][number], sources.validation_targets[0][number]
        question = run.question(text)
        if question.source is None or len(question.source) > run.config.model.context_length:
            continue
        ((best, *_),) = beam_search(
            run.model,
            question.prompt[None],
            max_new_tokens=run.config.model.context_length - 1,
            beams=4,
            end_token=question.ends,
            length_penalty=0.6,
            source=question.source[None],
        )
        written = run.tokenizer.decode(token for token in best.tokens if token not in question.ends)
        shown.append(f"{text}\n  model      {written}\n  reference  {reference}")
    (out / "translations.txt").write_text("\n".join(shown) + "\n", encoding="utf-8")
    return "translations.txt"


if __name__ == "__main__":
    run_experiment(translation, {"translation": DEFAULTS}, "runs/translation", __doc__)
