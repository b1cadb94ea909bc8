"""For real: a model with a known defect is found worse, and one that is the same is not."""

from pathlib import Path

import numpy as np
import pytest
from compared import COSTS, tiny

from gptjax.compare import study
from gptjax.compare.analysis.statistics import paired_differences
from gptjax.compare.analysis.verdicts import standings
from gptjax.compare.grid.grid import run_grid
from gptjax.compare.grid.progress import GridProgress
from gptjax.compare.plan import costs
from gptjax.compare.plan.plan import make_plan
from gptjax.compare.question import Comparison
from gptjax.config import DataConfig

SOUND = "quickstart:depth=1,width=32,heads=2"
DEFECTS = {
    "no positions": f"{SOUND},position_embedding=none",
    "a mask that hides all but the token itself": f"{SOUND},attention=local,window=1",
    "a learning rate ten times too high": f"{SOUND},optimizer.learning_rate=0.1",
}


def riddles(directory: Path, *variants: str, **fields) -> Comparison:
    """Four letters again and again, and then four others: the next one is that of four before."""
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (900, 4))
    path = directory / "riddles.txt"
    path.write_text("".join("".join(four) * 4 for four in letters))
    data = DataConfig(source=(str(path),), tokenizer="characters")
    return tiny(directory, *variants, data=data, budget="tokens=20480", rates=(1e-2,), **fields)


@pytest.mark.large
def test_known_defects_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "measure", lambda configs, batch: dict.fromkeys(configs, COSTS))
    comparison = riddles(tmp_path, SOUND, *DEFECTS.values(), seeds=4)
    answer = study.compare(comparison, tmp_path / "out", "it")
    sound, *others = standings(answer, "")
    assert sound.mean < 1.6  # Guessing one of eight letters is 2.08.
    for name, standing in zip(DEFECTS, others, strict=True):
        assert standing.verdict == f"worse than {SOUND}", (name, standing)
        assert standing.mean > sound.mean + 0.1


@pytest.mark.large
def test_eight_seeds_against_eight_others_are_not_told_apart(tmp_path):
    plan = make_plan(riddles(tmp_path, SOUND, seeds=16), tmp_path / "out")
    (each,) = plan.planned
    with GridProgress(1.0) as progress:
        outcomes = run_grid(plan.finals(each, 1e-2), tmp_path / "out", plan.data, progress)
    losses = np.array([outcome.validation_loss for outcome in outcomes], float)
    assert len(set(losses)) == 16
    groups = {"first": losses[:8], "second": losses[8:]}
    assert not paired_differences(groups, "first")["second"].excludes_zero
    # It could have been: what eight seeds tell apart is within reach of a defect.
    shifted = groups | {"second": losses[8:] + 0.3}
    assert paired_differences(shifted, "first")["second"].excludes_zero
