"""Measurements over the checkpoints of a run."""

import numpy as np
import pytest

from gptjax import (
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
    probe,
)
from gptjax.data.batch import Batch
from gptjax.data.pipeline import made_batches
from gptjax.runs import trial
from gptjax.runs.loading import load_model


def make(generator: np.random.Generator) -> Batch:
    return Batch.causal(np.tile(generator.integers(5, size=(8, 4)), (1, 3))[:, :9])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("history") / "trial"
    config = ExperimentConfig(
        model=TransformerConfig(vocab_size=5, context_length=8, depth=1, width=16, heads=2),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(steps=6, batch_size=8, checkpoint_every=2, keep_every=2, eval_every=3),
    )
    validation = [make(np.random.default_rng(1))]
    trial.train(config, made_batches(make, seed=0), validation, directory=directory)
    return directory


def test_each_checkpoint_is_measured(directory):
    tokens = make(np.random.default_rng(2)).tokens

    def measure(model):
        return float(probe.token_loss(model, tokens).mean())

    steps, losses = probe.history(directory, measure)
    assert steps == [2, 4, 6]
    assert losses == [measure(load_model(directory, step)[1]) for step in steps]
    assert losses[0] > losses[1] > losses[2]
    assert probe.history(directory, measure, steps=[6, 2]) == ([2, 6], [losses[0], losses[2]])


def test_what_is_no_run_is_refused(directory, tmp_path):
    with pytest.raises(InputError, match=r"holds no run: it has no config\.json\.$"):
        probe.history(tmp_path, lambda model: 0)
    with pytest.raises(InputError, match=r"no checkpoint of step 5: it has 2, 4, 6\.$"):
        probe.history(directory, lambda model: 0, steps=[5])
