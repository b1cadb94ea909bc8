"""The runs of a comparison: trained once, kept, read back; one that fails fails alone."""

import dataclasses
import json
import shutil
import time

import jax
import numpy as np
import pytest
from compared import tiny

from gptjax.compare.grid import grid
from gptjax.compare.grid.grid import run_grid, work
from gptjax.compare.grid.progress import GridProgress, clock
from gptjax.compare.plan.data import SharedData, open_shared_data
from gptjax.compare.plan.runs import GridRun, finished
from gptjax.config import (
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)
from gptjax.runs.loading import load_run

MODEL = TransformerConfig(context_length=16, depth=1, width=16, heads=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SharedData:
    return open_shared_data(tiny(tmp_path_factory.mktemp("text")), MODEL)


def grid_run(data: SharedData, seed: int = 0, rate: float = 1e-2, variant: str = "a") -> GridRun:
    vocabulary = data.corpus.vocabulary.size
    config = ExperimentConfig(
        model=dataclasses.replace(MODEL, vocab_size=vocabulary),
        data=data.comparison.data,
        optimizer=OptimizerConfig(warmup_steps=2, learning_rate=rate),
        train=TrainConfig(
            steps=12, batch_size=4, seed=seed, log_every=4, eval_every=4, checkpoint_every=4
        ),
    )
    return GridRun(variant, "", "final", config)


def trained(runs, out, data):
    with GridProgress(sum(work(each.config) for each in runs)) as progress:
        outcomes = run_grid(runs, out, data, progress)
    assert progress.done == pytest.approx(sum(work(each.config) for each in runs))
    return outcomes


def refuse(*arguments, **options):
    raise AssertionError("nothing is to be trained")


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    """Three seeds on eight devices, and where they are kept; read only."""
    out = tmp_path_factory.mktemp("grid")
    runs = [grid_run(data, seed) for seed in range(3)]
    start = time.perf_counter()
    outcomes = trained(runs, out, data)
    return out, runs, outcomes, time.perf_counter() - start


def test_an_outcome_says_what_was_trained(kept, data):
    out, _, outcomes, elapsed = kept
    assert [outcome.seed for outcome in outcomes] == [0, 1, 2]
    for outcome in outcomes:
        assert (outcome.variant, outcome.purpose, outcome.error) == ("a", "final", "")
        assert (outcome.steps, outcome.tokens) == (12, 12 * 4 * 16)
        assert outcome.curve_steps == (4, 8, 12)
        assert outcome.curve_losses[-1] == outcome.validation_loss
        assert outcome.curve_losses[0] > outcome.curve_losses[-1]
        assert outcome.seconds > 0
    assert sum(outcome.seconds for outcome in outcomes) < elapsed
    assert len({outcome.validation_loss for outcome in outcomes}) == 3
    assert {path.name for path in (out / "runs").iterdir()} == {
        outcome.directory.removeprefix("runs/") for outcome in outcomes
    }


@pytest.mark.slow
def test_a_run_that_is_compared_can_be_looked_into(kept, data):
    out, runs, outcomes, _ = kept
    run = load_run(out / outcomes[0].directory)
    assert run.config == runs[0].config
    total = sum(
        float(-jax.nn.log_softmax(run.model(batch.tokens))[row, place, batch.targets[row, place]])
        for batch in data.validation
        for row, place in zip(*np.nonzero(batch.loss_weights), strict=True)
    )
    held_out = sum(batch.loss_weights.sum() for batch in data.validation)
    assert total / held_out == pytest.approx(outcomes[0].validation_loss, rel=1e-5)


def test_what_is_there_is_not_trained_again(kept, data, monkeypatch):
    out, runs, outcomes, _ = kept
    monkeypatch.setattr(grid, "train_ensemble", refuse)
    assert trained(runs, out, data) == outcomes
    # The same run under another name.
    (renamed,) = trained([grid_run(data, 1, variant="b")], out, data)
    assert renamed == dataclasses.replace(outcomes[1], variant="b")


def test_what_is_missing_comes_out_the_same(kept, data, tmp_path):
    out, runs, outcomes, _ = kept
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / outcomes[1].directory / "result.json").unlink()
    shutil.rmtree(tmp_path / "copy" / outcomes[2].directory)
    again = trained(runs, tmp_path / "copy", data)
    for new, old in zip(again, outcomes, strict=True):
        assert dataclasses.replace(new, seconds=0.0) == dataclasses.replace(old, seconds=0.0)


@pytest.mark.slow
def test_one_after_another_gives_the_same(kept, data, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "most_at_once", lambda parameters: 1)
    monkeypatch.setattr(grid, "train_ensemble", refuse)
    _, runs, outcomes, _ = kept
    (alone,) = trained(runs[1:2], tmp_path, data)
    assert alone.curve_steps == outcomes[1].curve_steps
    assert alone.curve_losses == pytest.approx(outcomes[1].curve_losses, rel=1e-5)
    assert load_run(tmp_path / alone.directory).config == runs[1].config


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_run_that_diverges_is_an_outcome_and_stays_one(at_once, data, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "most_at_once", lambda parameters: at_once)
    runs = [grid_run(data, rate=1e30), grid_run(data)]
    diverged, other = trained(runs, tmp_path, data)
    assert diverged.validation_loss is None
    assert diverged.error.startswith("Step 3: the loss ")
    assert other.validation_loss
    monkeypatch.setattr(grid, "train_ensemble", refuse)
    monkeypatch.setattr(grid, "train", refuse)
    assert trained(runs, tmp_path, data) == [diverged, other]


def test_a_run_that_breaks_is_tried_again(kept, data, tmp_path, monkeypatch, capsys):
    _, runs, outcomes, _ = kept

    def full(*arguments, **options):
        raise MemoryError("out\nof memory")

    with monkeypatch.context() as patch:
        patch.setattr(grid, "train_ensemble", full)
        failed = trained(runs, tmp_path, data)
    assert [outcome.error for outcome in failed] == ["MemoryError: out of memory"] * 3
    assert "MemoryError: out of memory" in capsys.readouterr().out
    again = trained(runs, tmp_path, data)
    assert [each.validation_loss for each in again] == [each.validation_loss for each in outcomes]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"format": 0}', "is of another version of gptjax (format 0, where 1 is read): choose"),
        ("[]", "holds list, not a JSON object."),
        ("{}", "is of another version of gptjax (format None, where 1 is read)"),
        ("{", "is not JSON: Expecting property name"),
    ],
)
def test_results_of_another_version_are_refused(kept, data, tmp_path, content, sentence):
    _, runs, outcomes, _ = kept
    path = tmp_path / outcomes[0].directory / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(InputError) as error:
        finished(runs[0], tmp_path, data)
    assert str(error.value).startswith(str(path))
    assert sentence in str(error.value)


def test_all_that_decides_a_runs_numbers_is_in_its_name(data):
    names = {
        each.directory(data)[-12:]
        for each in (
            grid_run(data),
            grid_run(data, seed=1),
            grid_run(data, rate=2e-2),
            dataclasses.replace(grid_run(data), mup_base=MODEL),
            dataclasses.replace(grid_run(data), purpose="search"),
        )
    }
    assert len(names) == 5
    text = data.sources.train[0]
    other = data._replace(sources=data.sources._replace(train=[text, text]))
    assert grid_run(data).directory(other)[-12:] not in names
    odd = grid_run(data, variant="gpt2:norm=rmsnorm,attention=full,local")
    assert odd.directory(data).startswith(
        "gpt2_norm=rmsnorm_attention=full_local_final-rate0.01-seed0-"
    )
    assert odd.directory(data)[-12:] == grid_run(data).directory(data)[-12:]


def test_the_config_that_was_trained_is_kept(kept):
    out, _, outcomes, _ = kept
    saved = json.loads((out / outcomes[0].directory / "config.json").read_text())
    assert saved["config"]["train"]["steps"] == 12
    assert {"data_sha256", "tokenizer_sha256"} <= saved.keys()


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_a_duration_reads_as_a_clock(seconds, expected):
    assert clock(seconds) == expected
