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
from gptjax.compare.grid.grid import run_cells, work
from gptjax.compare.grid.progress import GridProgress, clock
from gptjax.compare.plan.data import Material, open_material
from gptjax.compare.plan.runs import Cell, finished
from gptjax.config import (
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)
from gptjax.runs.directory import load_run

MODEL = TransformerConfig(context_length=16, depth=1, width=16, heads=2)


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    return open_material(tiny(tmp_path_factory.mktemp("text")), MODEL)


def cell(material: Material, seed: int = 0, rate: float = 1e-2, variant: str = "a") -> Cell:
    vocabulary = material.corpus.vocabulary.size
    config = ExperimentConfig(
        model=dataclasses.replace(MODEL, vocab_size=vocabulary),
        data=material.comparison.data,
        optimizer=OptimizerConfig(warmup_steps=2, learning_rate=rate),
        train=TrainConfig(
            steps=12, batch_size=4, seed=seed, log_every=4, eval_every=4, checkpoint_every=4
        ),
    )
    return Cell(variant, "", "final", config)


def trained(cells, out, material):
    with GridProgress(sum(work(each.config) for each in cells)) as progress:
        outcomes = run_cells(cells, out, material, progress)
    assert progress.done == pytest.approx(sum(work(each.config) for each in cells))
    return outcomes


def refuse(*arguments, **options):
    raise AssertionError("nothing is to be trained")


@pytest.fixture(scope="module")
def kept(material, tmp_path_factory):
    """Three seeds on eight devices, and where they are kept; read only."""
    out = tmp_path_factory.mktemp("grid")
    cells = [cell(material, seed) for seed in range(3)]
    start = time.perf_counter()
    outcomes = trained(cells, out, material)
    return out, cells, outcomes, time.perf_counter() - start


def test_an_outcome_says_what_was_trained(kept, material):
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


def test_a_run_that_is_compared_can_be_looked_into(kept, material):
    out, cells, outcomes, _ = kept
    run = load_run(out / outcomes[0].directory)
    assert run.config == cells[0].config
    total = sum(
        float(-jax.nn.log_softmax(run.model(batch.tokens))[row, place, batch.targets[row, place]])
        for batch in material.validation
        for row, place in zip(*np.nonzero(batch.loss_weights), strict=True)
    )
    held_out = sum(batch.loss_weights.sum() for batch in material.validation)
    assert total / held_out == pytest.approx(outcomes[0].validation_loss, rel=1e-5)


def test_what_is_there_is_not_trained_again(kept, material, monkeypatch):
    out, cells, outcomes, _ = kept
    monkeypatch.setattr(grid, "train_ensemble", refuse)
    assert trained(cells, out, material) == outcomes
    # The same run under another name.
    (renamed,) = trained([cell(material, 1, variant="b")], out, material)
    assert renamed == dataclasses.replace(outcomes[1], variant="b")


def test_what_is_missing_comes_out_the_same(kept, material, tmp_path):
    out, cells, outcomes, _ = kept
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / outcomes[1].directory / "result.json").unlink()
    shutil.rmtree(tmp_path / "copy" / outcomes[2].directory)
    again = trained(cells, tmp_path / "copy", material)
    for new, old in zip(again, outcomes, strict=True):
        assert dataclasses.replace(new, seconds=0.0) == dataclasses.replace(old, seconds=0.0)


def test_one_after_another_gives_the_same(kept, material, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "most_at_once", lambda parameters: 1)
    monkeypatch.setattr(grid, "train_ensemble", refuse)
    _, cells, outcomes, _ = kept
    (alone,) = trained(cells[1:2], tmp_path, material)
    assert alone.curve_steps == outcomes[1].curve_steps
    assert alone.curve_losses == pytest.approx(outcomes[1].curve_losses, rel=1e-5)
    assert load_run(tmp_path / alone.directory).config == cells[1].config


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_run_that_diverges_is_an_outcome_and_stays_one(at_once, material, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "most_at_once", lambda parameters: at_once)
    cells = [cell(material, rate=1e30), cell(material)]
    diverged, other = trained(cells, tmp_path, material)
    assert diverged.validation_loss is None
    assert diverged.error.startswith("Step 3: the loss ")
    assert other.validation_loss
    monkeypatch.setattr(grid, "train_ensemble", refuse)
    monkeypatch.setattr(grid, "train", refuse)
    assert trained(cells, tmp_path, material) == [diverged, other]


def test_a_run_that_breaks_is_tried_again(kept, material, tmp_path, monkeypatch, capsys):
    _, cells, outcomes, _ = kept

    def full(*arguments, **options):
        raise MemoryError("out\nof memory")

    with monkeypatch.context() as patch:
        patch.setattr(grid, "train_ensemble", full)
        failed = trained(cells, tmp_path, material)
    assert [outcome.error for outcome in failed] == ["MemoryError: out of memory"] * 3
    assert "MemoryError: out of memory" in capsys.readouterr().out
    again = trained(cells, tmp_path, material)
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
def test_results_of_another_version_are_refused(kept, material, tmp_path, content, sentence):
    _, cells, outcomes, _ = kept
    path = tmp_path / outcomes[0].directory / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(InputError) as error:
        finished(cells[0], tmp_path, material)
    assert str(error.value).startswith(str(path))
    assert sentence in str(error.value)


def test_all_that_decides_a_runs_numbers_is_in_its_name(material):
    names = {
        each.directory(material)[-12:]
        for each in (
            cell(material),
            cell(material, seed=1),
            cell(material, rate=2e-2),
            dataclasses.replace(cell(material), mup_base=MODEL),
            dataclasses.replace(cell(material), purpose="search"),
        )
    }
    assert len(names) == 5
    text = material.sources.train[0]
    other = material._replace(sources=material.sources._replace(train=[text, text]))
    assert cell(material).directory(other)[-12:] not in names
    odd = cell(material, variant="gpt2:norm=rmsnorm,attention=full,local")
    assert odd.directory(material).startswith(
        "gpt2_norm=rmsnorm_attention=full_local_final-rate0.01-seed0-"
    )
    assert odd.directory(material)[-12:] == cell(material).directory(material)[-12:]


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
