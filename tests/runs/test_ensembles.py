import dataclasses
import re

import jax
import numpy as np
import pytest

from gptjax import ExperimentConfig, InputError, OptimizerConfig, TrainConfig, TransformerConfig
from gptjax.data.batch import Batch
from gptjax.data.pipeline import made_batches
from gptjax.runs.ensembles import train_ensemble
from gptjax.runs.trial import train
from gptjax.system.exits import Diverged

CONFIG = ExperimentConfig(
    model=TransformerConfig(vocab_size=11, context_length=8, depth=1, width=16, heads=2),
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=3e-3),
    train=TrainConfig(steps=6, batch_size=4, log_every=2, eval_every=3),
)


def made(rng: np.random.Generator) -> Batch:
    return Batch.causal(rng.integers(9, size=(4, 1)) + np.arange(9) % 3)


def held_out(seed: int) -> list[Batch]:
    return [made(np.random.default_rng(100 + seed + number)) for number in range(2)]


def changed(seed: int, learning_rate: float = 3e-3) -> ExperimentConfig:
    return dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, seed=seed),
        optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=learning_rate),
    )


def with_steps_per_dispatch(config: ExperimentConfig, steps: int) -> ExperimentConfig:
    train = dataclasses.replace(config.train, steps_per_dispatch=steps)
    return dataclasses.replace(config, train=train)


def trained(configs, seeds, **how):
    batches = [made_batches(made, seed=seed) for seed in seeds]
    return train_ensemble(configs, batches, [held_out(seed) for seed in seeds], **how)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at_once", "grouped"), [(0, 1), (3, 2), pytest.param(16, 2, marks=pytest.mark.large)]
)
def test_runs_together_are_those_that_run_alone(at_once, grouped, monkeypatch):
    """On four devices, in rounds of three, and by vmap, two on each of two devices."""
    # Two seeds, and two rates of one of them.
    configs = [changed(0), changed(1), changed(1, 1e-2), changed(1, 1e-4)]
    groups = [with_steps_per_dispatch(config, grouped) for config in configs]
    steps = []
    if at_once == 16:
        monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:2])
    together = trained(groups, [5, 6, 7, 7], at_once=at_once, progress=steps.append)
    assert sum(steps) == 4 * CONFIG.train.steps
    for run in (1, 3):
        seed = [5, 6, 7, 7][run]
        alone = train(configs[run], made_batches(made, seed=seed), held_out(seed))
        np.testing.assert_allclose(together[run].validation_loss, alone.validation_loss, rtol=1e-5)
        for ours, theirs in zip(together[run].lines, alone.lines, strict=True):
            assert ours.keys() <= theirs.keys()
            np.testing.assert_allclose(
                list(ours.values()), [theirs[name] for name in ours], rtol=1e-4
            )
        tokens = held_out(0)[0].tokens
        np.testing.assert_allclose(together[run].model(tokens), alone.model(tokens), atol=1e-5)
    losses = [trial.validation_loss for trial in together]
    assert len({round(loss, 4) for loss in losses}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_runs_draw_and_drop_the_same_whatever_jaxs_generator(generator, monkeypatch):
    """Of these, under vmap all numbers come from the first key (jax.random's documentation)."""
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    model = dataclasses.replace(CONFIG.model, dropout=0.3)
    configs = [dataclasses.replace(changed(seed), model=model) for seed in (0, 1)]
    alone = train(configs[1], made_batches(made, seed=6), held_out(6))
    with jax.default_prng_impl(generator):
        together = trained(configs, [5, 6], at_once=16)[1]
    np.testing.assert_allclose(together.validation_loss, alone.validation_loss, rtol=1e-5)
    np.testing.assert_allclose(
        [line["loss"] for line in together.lines], [line["loss"] for line in alone.lines], rtol=1e-5
    )


@pytest.mark.slow
def test_a_run_that_diverges_stops_alone():
    configs = [with_steps_per_dispatch(each, 2) for each in (changed(0, 1e30), changed(0))]
    diverged, alone = trained(configs, [5, 5])
    with pytest.raises(Diverged, match=f"Step {diverged.diverged}:"):
        train(changed(0, 1e30), made_batches(made, seed=5), held_out(5))
    assert not np.isfinite(diverged.lines[-1]["loss"])
    assert alone.diverged == 0
    assert alone.validation_loss == trained([changed(0), changed(1)], [5, 6])[0].validation_loss


def test_the_same_shapes_compile_once(caplog):
    trained([changed(0), changed(1)], [5, 6])
    with jax.log_compiles():
        trained([changed(2), changed(3, 1e-2)], [7, 8])
    assert "Compiling" not in caplog.text
    with jax.log_compiles():
        trained([changed(2)], [7])
    assert "Compiling" in caplog.text


def test_five_seeds_in_rounds_of_two_compile_once(caplog):
    train = dataclasses.replace(CONFIG.train, steps=7)  # Of no other test here.
    configs = [
        dataclasses.replace(CONFIG, train=dataclasses.replace(train, seed=seed))
        for seed in range(5)
    ]
    with jax.log_compiles():
        assert len(trained(configs, range(5), at_once=2)) == 5
    # The step and the evaluation.
    assert len(re.findall("^.*Compiling .*over_runs", caplog.text, flags=re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("configs", "seeds", "sentence"),
    [
        ([], [], "There are 0 configs"),
        ([changed(0)], [1, 2], "There are 1 configs, 2 iterators"),
        (
            [changed(0), dataclasses.replace(CONFIG, model=TransformerConfig(vocab_size=11))],
            [1, 2],
            "these 2 differ in more",
        ),
    ],
)
def test_what_cannot_be_one_program_is_told(configs, seeds, sentence):
    with pytest.raises(InputError, match=sentence):
        trained(configs, seeds)
