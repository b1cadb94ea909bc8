"""A trial: a model trained in one call on batches that a function makes."""

import dataclasses
import math
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import (
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)
from gptjax.data.batch import Batch
from gptjax.data.pipeline import made_batches
from gptjax.models.build import LanguageModel
from gptjax.runs import trial
from gptjax.runs.directory import CHECKPOINTS, load_config
from gptjax.runs.loading import load_model
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.trackers.jsonl import read_jsonl

VOCABULARY, CONTEXT = 5, 8
CONFIG = ExperimentConfig(
    model=TransformerConfig(
        vocab_size=VOCABULARY, context_length=CONTEXT, depth=1, width=16, heads=2
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule="constant"),
    train=TrainConfig(
        steps=40, batch_size=8, log_every=1, eval_every=20, checkpoint_every=5, keep_every=10
    ),
)


def count_on(generator: np.random.Generator) -> Batch:
    """Rows that count from a number at random, and from the largest on to the smallest."""
    first = generator.integers(VOCABULARY, size=(8, 1))
    return Batch.causal((first + np.arange(CONTEXT + 1)) % VOCABULARY)


VALIDATION = [count_on(np.random.default_rng(1))]


def run(config: ExperimentConfig = CONFIG, directory: Path | None = None) -> trial.Trial:
    batches = made_batches(count_on, seed=config.train.seed)
    return trial.train(config, batches, VALIDATION, directory=directory)


def shorter(steps: int, seed: int = 0) -> ExperimentConfig:
    return dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, seed=seed, steps=steps)
    )


def answers(model: LanguageModel) -> np.ndarray:
    """Logits [B, T, V] of the validation batch."""
    return np.asarray(model(jnp.asarray(VALIDATION[0].tokens)))


def losses(trained: trial.Trial) -> list[float]:
    return [line["loss"] for line in trained.lines]


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[trial.Trial, Path]:
    directory = tmp_path_factory.mktemp("trial") / "new"
    return run(directory=directory), directory


def test_a_trial_learns(kept):
    trained, _ = kept
    assert [line["step"] for line in trained.lines] == list(range(1, 41))
    assert trained.lines[0]["loss"] > math.log(VOCABULARY) - 0.2
    assert trained.validation_loss < 0.2
    assert trained.validation_loss == trained.lines[-1]["validation_loss"]
    assert trained.seconds > 0
    np.testing.assert_array_equal(answers(trained.model).argmax(axis=-1), VALIDATION[0].targets)


def test_its_directory_keeps_the_config_the_curve_and_every_checkpoint_asked_for(kept):
    trained, directory = kept
    assert load_config(directory) == CONFIG
    assert read_jsonl(directory / trial.METRICS) == trained.lines
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        assert checkpoints.steps == [10, 20, 30, 40]
    logits = []
    for step in (10, 20, 30, 40):
        config, model, loaded = load_model(directory, step)
        assert (config, loaded) == (CONFIG, step)
        logits.append(answers(model))
    np.testing.assert_array_equal(logits[-1], answers(trained.model))
    assert all(np.abs(early - logits[-1]).max() > 0.1 for early in logits[:-1])


@pytest.mark.slow
def test_the_seed_alone_decides(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trained, _ = kept
    for seed, same in ((0, True), (1, False)):
        again = run(shorter(3, seed))
        assert (losses(again) == losses(trained)[:3]) is same
    assert not list(tmp_path.iterdir()), "without a directory of its own a trial leaves nothing"


def test_a_directory_with_anything_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError) as error:
        run(directory=tmp_path)
    assert str(error.value) == (f"{tmp_path} is not empty: a trial needs a directory of its own.")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_trials_directory_is_refused(kept):
    _, directory = kept
    with pytest.raises(InputError, match="holds a trial of another config"):
        run(shorter(7), directory=directory)


@pytest.mark.slow
def test_a_trial_that_was_interrupted_goes_on(kept, tmp_path):
    class Interrupting:
        def write(self, step, scalars):
            if step == 20:
                raise KeyboardInterrupt

        def close(self):
            pass

    trained, _ = kept
    batches = made_batches(count_on, seed=CONFIG.train.seed)
    with pytest.raises(KeyboardInterrupt):
        trial.train(CONFIG, batches, VALIDATION, directory=tmp_path, trackers=[Interrupting()])
    resumed = run(directory=tmp_path)
    assert losses(resumed) == losses(trained)
    assert resumed.validation_loss == trained.validation_loss
