"""From a question to its report: what is planned, trained once, and said."""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from compared import COSTS, TINY, tiny

from gptjax.compare import study
from gptjax.compare.analysis.verdicts import standings
from gptjax.compare.grid import grid
from gptjax.compare.plan import costs
from gptjax.compare.plan.plan import SEARCH_SEED, make_plan
from gptjax.compare.question import BUDGETS, parse_quantity, quantity
from gptjax.config import InputError, to_dict
from gptjax.costs.model import model_cost

SILU = f"{TINY},activation=silu"
FILES = ("report.html", "report.md", "results.csv", "results.jsonl")


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """Costs have their own tests; they are the only figures here that a clock decides."""
    monkeypatch.setattr(costs, "measure", lambda configs, batch: dict.fromkeys(configs, COSTS))


def planned(tmp_path, *variants, **fields):
    return make_plan(tiny(tmp_path, *variants, **fields), tmp_path / "out")


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def test_all_variants_see_the_same(tmp_path):
    plan = planned(tmp_path, TINY, SILU, rates=(1e-2, 3e-2), search_seeds=2)
    for each in plan.planned:
        search, finals = plan.search(each), plan.finals(each, 3e-2)
        assert [cell.config.train.seed for cell in finals] == [0, 1]
        assert [
            (cell.config.optimizer.learning_rate, cell.config.train.seed) for cell in search
        ] == [(rate, SEARCH_SEED + seed) for rate in (1e-2, 3e-2) for seed in (0, 1)]
        assert {cell.config.optimizer.learning_rate for cell in finals} == {3e-2}
        assert {cell.config.model.context_length for cell in (*search, *finals)} == {16}
        assert {cell.config.model.vocab_size for cell in (*search, *finals)} == {
            plan.data.corpus.vocabulary.size
        }
    first, again = plan.data.batches(0), plan.data.batches(0)
    np.testing.assert_array_equal(next(first).tokens, next(again).tokens)
    assert (next(plan.data.batches(1)).tokens != next(plan.data.batches(0)).tokens).any()


def test_one_rate_and_a_variants_own_need_no_search(tmp_path):
    own = f"{TINY},optimizer.learning_rate=0.1"
    plan = planned(tmp_path, TINY, own, rates=(1e-2, 3e-2))
    assert len(plan.search(plan.planned[0])) == 4
    assert plan.search(plan.planned[1]) == []
    (cell, _) = plan.finals(plan.planned[1], 1e-2)
    assert cell.config.optimizer.learning_rate == 0.1
    plan = planned(tmp_path, TINY, rates=(1e-2,))
    assert plan.search(plan.planned[0]) == []


def test_a_budget_of_tokens_or_flops_gives_the_steps(tmp_path):
    wide = TINY.replace("width=16", "width=32")
    plan = planned(tmp_path, TINY, wide, budget="tokens=2600")
    assert [each.steps for each in plan.planned] == [2600 // 64] * 2
    plan = planned(tmp_path, TINY, wide, budget="flops=100M")
    costs_ = [64 * model_cost(each.model).training_flops for each in plan.planned]
    assert [each.steps for each in plan.planned] == [int(1e8 / cost) for cost in costs_]
    assert plan.planned[0].steps > 2 * plan.planned[1].steps


def test_a_budget_of_seconds_is_measured_once(tmp_path, monkeypatch):
    measured = []

    def measure(configs, batch):
        measured.append(len(configs))
        return [0.01, 0.02]

    monkeypatch.setattr(costs, "seconds_per_step", measure)
    for _ in range(2):
        plan = planned(tmp_path, TINY, SILU, budget="seconds=1")
        assert [each.steps for each in plan.planned] == [100, 50]
    assert measured == [2]


def test_parameters_are_matched_to_the_baselines_or_to_a_number(tmp_path):
    wide = "quickstart:depth=1,width=32,heads=2,activation=swiglu"
    plan = planned(tmp_path, "quickstart:depth=1,width=24,heads=2", wide, match="params")
    first, second = (model_cost(each.model).parameters for each in plan.planned)
    assert second == pytest.approx(first, rel=0.01)
    assert plan.planned[1].reached == second
    plan = planned(tmp_path, "quickstart:depth=1", "llama-style:depth=1", scale="params=30k,60k")
    assert plan.sizes == ("params=30k", "params=60k")
    assert [each.size for each in plan.planned] == ["params=30k"] * 2 + ["params=60k"] * 2
    for each, target in zip(plan.planned, (3e4, 3e4, 6e4, 6e4), strict=True):
        assert model_cost(each.model).parameters == pytest.approx(target, rel=0.01)


def test_seconds_are_matched_by_the_clock(tmp_path, monkeypatch):
    def measure(configs, batch):
        flops = [float(model_cost(config.model).training_flops) for config in configs]
        return [flops[0], *(1.5 * each for each in flops[1:])]  # All but the first are slower.

    monkeypatch.setattr(costs, "seconds_per_step", measure)
    variants = "quickstart:depth=2", "quickstart:depth=2,norm=rmsnorm"
    for _ in range(2):
        plan = planned(tmp_path, *variants, match="seconds", tolerance=0.02)
        first, second = (model_cost(each.model).training_flops for each in plan.planned)
        assert 1.5 * second == pytest.approx(first, rel=0.021)
        assert plan.planned[1].reached == pytest.approx(1.5 * second / first)
        monkeypatch.setattr(costs, "seconds_per_step", None)  # The second call measures nothing.


def test_with_mup_the_rate_is_chosen_at_another_width(tmp_path):
    plan = planned(tmp_path, "quickstart:depth=1,width=32", rates=(1e-2, 3e-2), mup_width=16)
    (each,) = plan.planned
    assert {cell.config.model.width for cell in plan.search(each)} == {16}
    assert {cell.mup_base for cell in plan.search(each)} == {None}
    for cell in plan.finals(each, 1e-2):
        assert cell.config.model.width == 32
        assert cell.mup_base == plan.search(each)[0].config.model
    # A single rate is one of that width too.
    plan = planned(tmp_path, "quickstart:depth=1,width=32", rates=(1e-2,), mup_width=16)
    (each,) = plan.planned
    assert plan.search(each) == []
    assert {cell.mup_base and cell.mup_base.width for cell in plan.finals(each, 1e-2)} == {16}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"budget": "tokens=200"}, "--budget is 'tokens=200': for quickstart"),
        ({"budget": "tokens=200"}, "that is 3 steps of 64 tokens, too small for 4 evaluations"),
        ({"budget": "tokens=1M,2M"}, "it must be one amount, as tokens=1M"),
        ({"budget": "tokens"}, "it must be one amount, as tokens=1M"),
        ({"match": "seconds=3"}, "--match is 'seconds=3': seconds takes no amount"),
        ({"match": "params=1M,2M"}, "params takes one amount; --scale takes several"),
        ({"scale": "params"}, "--scale is 'params': it must give sizes"),
        ({"scale": "seconds=3"}, "--scale has an unknown measure 'seconds'"),
        ({"match": "size"}, "--match has an unknown measure 'size'"),
        ({"match": "params=10"}, "cannot be matched: "),
        (
            {"mup_width": 8, "variants": (f"{TINY},optimizer.name=muon",)},
            "--mup-width is 8: with quickstart:depth=1,width=16,heads=2,optimizer.name=muon it",
        ),
    ],
)
def test_what_cannot_be_planned_is_told(tmp_path, fields, sentence):
    with pytest.raises(InputError) as error:
        planned(tmp_path, **fields)
    assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A comparison with a search of two rates, and where it is; read only."""
    directory = tmp_path_factory.mktemp("study")
    comparison = tiny(directory, TINY, SILU, rates=(1e-3, 1e-2), search_seeds=1, seeds=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "measure", lambda configs, batch: dict.fromkeys(configs, COSTS))
        return comparison, directory / "out", study.compare(comparison, directory / "out", "it")


def test_a_study_answers(answered):
    _, out, answer = answered
    assert [entry.variant for entry in answer.entries] == [TINY, SILU]
    for entry in answer.entries:
        assert list(entry.searched) == [1e-3, 1e-2]
        slow, fast = (losses[0] for losses in entry.searched.values())
        assert fast < slow
        assert entry.optimizer.learning_rate == 1e-2
        assert [outcome.seed for outcome in entry.finals] == [0, 1, 2]
        assert entry.costs == COSTS
    assert len(answer.outcomes) == 2 * (2 + 3)
    assert {path.name for path in out.iterdir()} >= {*FILES, "runs", "comparison.json"}
    assert len(list((out / "runs").iterdir())) == 10
    (look,) = answer.entries[1].looks
    assert look.seeds == (0, 1, 2)
    assert json.loads((out / "looks.json").read_text())["looks"] == [to_dict(look)]
    baseline, other = standings(answer, "")
    assert baseline.verdict == "baseline"
    assert other.difference is not None


def test_the_second_call_trains_nothing_and_says_the_same(answered, monkeypatch):
    comparison, out, _ = answered
    before = contents(out)

    def refuse(*arguments, **options):
        raise AssertionError("nothing is to be trained")

    monkeypatch.setattr(grid, "train_ensemble", refuse)
    monkeypatch.setattr(costs, "measure", refuse)
    study.compare(comparison, out, "it")
    assert contents(out) == before


@pytest.mark.slow
def test_a_larger_question_trains_what_is_missing(answered, monkeypatch, tmp_path):
    comparison, out, answer = answered
    trained = []
    real = grid.train_ensemble
    monkeypatch.setattr(
        grid,
        "train_ensemble",
        lambda configs, *more, **how: trained.extend(configs) or real(configs, *more, **how),
    )
    larger = study.compare(dataclasses.replace(comparison, variants=(TINY,), seeds=4), out, "it")
    assert [config.train.seed for config in trained] == [3]
    old = [outcome.validation_loss for outcome in answer.entries[0].finals]
    assert [outcome.validation_loss for outcome in larger.entries[0].finals][:3] == old


@pytest.mark.slow
def test_one_seed_has_no_interval_and_says_so(tmp_path):
    out = tmp_path / "out"
    answer = study.compare(tiny(tmp_path, TINY, SILU, seeds=1), out, "it")
    assert all(each.interval is None for each in standings(answer, ""))
    assert "one seed" in study.summary(answer)
    assert "one seed" in (out / "report.md").read_text()


def test_the_plan_is_described_without_training(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "estimated_seconds", lambda configs, batch: [0.5] * len(configs))
    comparison = tiny(tmp_path, TINY, SILU, rates=(1e-3, 1e-2))
    told = study.describe(comparison, tmp_path / "out")
    # Two variants, each with 4 runs of the search and 2 that are compared, of 40 steps.
    assert "12 runs, of which" in told
    assert "takes about 4:00" in told
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for act in (study.describe, functools.partial(study.compare, command="it")):
        with pytest.raises(InputError, match=r"holds files but no comparison\.json"):
            act(tiny(tmp_path), out)
    (out / "comparison.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match=r"of another version of gptjax \(format 99, where 1 is"):
        study.compare(tiny(tmp_path), out, "it")
    assert {path.name for path in out.iterdir()} == {"thesis.tex", "comparison.json"}


@pytest.mark.parametrize(
    ("below", "sentence"),
    [
        ("text.txt", "text.txt is a file: choose another --out"),
        ("text.txt/a/b", "text.txt is a file: choose another --out"),
        ("link", "link is a link that leads nowhere: choose another --out"),
        ("link/a", "link is a link that leads nowhere: choose another --out"),
        ("n" * 300, "--out: cannot use .*: File name too long"),
        ("pipe", "pipe is a file: choose another --out"),
        ("locked/out", "locked may not be written: choose another"),
        ("half/out", "half/out holds files but no comparison.json"),
    ],
)
def test_what_cannot_be_a_directory_is_told(tmp_path, monkeypatch, below, sentence):
    comparison = tiny(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "locked").mkdir()
    (tmp_path / "half" / "out" / "comparison.json.d").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    before = sorted(tmp_path.rglob("*"))
    for act in (study.describe, functools.partial(study.compare, command="it")):
        with pytest.raises(InputError, match=sentence):
            act(comparison, tmp_path / below)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["comparison.json", "runs", "measured.json", "report.html"])
def test_what_stands_in_the_way_of_a_file_is_told(tmp_path, name):
    out = tmp_path / "out"
    study._begin(tiny(tmp_path), out)
    if name == "runs":
        (out / name).rmdir()
        (out / name).write_text("precious")
    else:
        (out / name).unlink(missing_ok=True)
        (out / name).mkdir()
    with pytest.raises(InputError, match=re.escape(name)):
        study.compare(tiny(tmp_path), out, "it")


def test_a_start_that_was_killed_is_begun_anew(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "comparison.tmp").write_text("{")
    study._open(out)
    study._begin(tiny(tmp_path), out)
    assert (out / "comparison.json").exists()


def test_costs_that_cannot_be_measured_are_a_note(tmp_path, monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")

    monkeypatch.setattr(costs, "measure", fail)
    answer = study.compare(tiny(tmp_path, TINY, seeds=2), tmp_path / "out", "it")
    assert [entry.costs for entry in answer.entries] == [None]
    assert "RESOURCE_EXHAUSTED" in answer.notes[0]


@pytest.mark.parametrize(
    ("number", "text"), [(1e6, "1M"), (3e5, "300k"), (1.5e9, "1.5B"), (2e15, "2P"), (42, "42")]
)
def test_a_number_is_written_as_it_is_read(number, text):
    assert quantity(number) == text
    assert parse_quantity("budget", f"tokens={text}", BUDGETS) == ("tokens", (number,))
