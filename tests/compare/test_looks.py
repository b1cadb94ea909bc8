"""Seeds that are added after a look: what is kept of it, and what the next look may spend."""

import dataclasses
import json
import os

import answers
import numpy as np
import pytest

from gptjax.compare.analysis.statistics import at_look, holm_levels, t_interval, trimmed_interval
from gptjax.compare.analysis.verdicts import standings
from gptjax.compare.looks import with_looks
from gptjax.compare.report.files import write_report
from gptjax.compare.results import Entry
from gptjax.config import InputError, read_sealed, sealed

VARIANT = "llama-style"


def entries(seeds: int, *variants: str, first: int = 0, rate: float = 3e-3) -> list[Entry]:
    """The baseline and others, of the seeds from `first` on."""
    return [
        dataclasses.replace(each, finals=each.finals[first:])
        for each in (
            answers.entry(name, answers.EFFECTS[name], seeds, rate=rate)
            for name in (answers.BASELINE, *(variants or (VARIANT,)))
        )
    ]


def looks(found: tuple[Entry, ...]) -> list[tuple[int, ...]]:
    """How many seeds each look of each variant had."""
    return [tuple(len(look.seeds) for look in entry.looks) for entry in found[1:]]


def test_added_seeds_are_another_look_and_the_same_seeds_are_not(tmp_path):
    out = tmp_path / "out"
    assert looks(with_looks(entries(3), out)) == [(3,)]
    kept = (out / "looks.json").read_bytes()
    assert looks(with_looks(entries(3), out)) == [(3,)]
    assert (out / "looks.json").read_bytes() == kept
    assert looks(with_looks(entries(5), out)) == [(3, 5)]
    assert looks(with_looks(entries(8), out)) == [(3, 5, 8)]
    # What an earlier report showed is its look again; other seeds of the same are a new one.
    assert looks(with_looks(entries(5), out)) == [(3, 5)]
    assert looks(with_looks(entries(5, first=2), out)) == [(3, 5, 8, 3)]


def test_only_a_difference_that_was_seen_counts(tmp_path):
    with_looks(entries(3), tmp_path)
    assert looks(with_looks(entries(5, VARIANT, "post-norm"), tmp_path)) == [(3, 5), (5,)]
    # Another rate gives other runs.
    assert looks(with_looks(entries(3, rate=1e-3), tmp_path)) == [(3,)]
    # The other way round it is the same difference.
    baseline, variant = entries(8)
    assert looks(with_looks([variant, baseline], tmp_path)) == [(3, 5, 8)]


def test_without_an_interval_there_is_no_look(tmp_path):
    assert looks(with_looks(entries(1), tmp_path / "one")) == [()]
    baseline, variant = entries(3)
    failed = tuple(dataclasses.replace(run, validation_loss=None) for run in variant.finals[1:])
    variant = dataclasses.replace(variant, finals=(variant.finals[0], *failed))
    assert looks(with_looks([baseline, variant], tmp_path / "failed")) == [()]
    assert with_looks(entries(5)[:1], tmp_path / "alone")[0].looks == ()
    assert list(tmp_path.iterdir()) == []


def test_a_report_from_before_looks_were_kept_is_one(tmp_path):
    write_report(answers.answer(entries(3), seeds=3), tmp_path)
    os.utime(tmp_path / "results.jsonl", (0, 86400 * 365))
    (_, variant) = with_looks(entries(5), tmp_path)
    assert [(look.day, len(look.seeds)) for look in variant.looks[:-1]] == [("1971-01-01", 3)]
    assert looks(with_looks(entries(8), tmp_path)) == [(3, 5, 8)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "looks.json is not JSON"),
        ('{"format": 99}', "of another version of gptjax"),
        ('{"format": 1}', "looks.json is damaged: it has no list of looks"),
        ('{"format": 1, "looks": [{"day": "x"}]}', "look 1 of .* lacks variant, size, seeds"),
        ('{"format": 1, "looks": [5]}', "look 1 of .* lacks variant"),
    ],
)
def test_damaged_looks_are_a_sentence(tmp_path, content, sentence):
    (tmp_path / "looks.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        with_looks(entries(3), tmp_path)


def test_a_look_with_fields_of_another_type_is_a_sentence(tmp_path):
    with_looks(entries(3), tmp_path)
    saved = read_sealed(tmp_path / "looks.json")
    saved["looks"][0]["runs"] = 5
    (tmp_path / "looks.json").write_text(json.dumps(sealed(saved)))
    with pytest.raises(InputError, match=r"look 1 of .* is damaged: Look\.runs is 5"):
        with_looks(entries(3), tmp_path)


def test_each_look_may_spend_less_than_the_one_before(tmp_path):
    spent = sum(1 - at_look(0.95, look) for look in range(1, 1000))
    assert spent == pytest.approx(0.05 * 999 / 1000)
    for look, seeds in enumerate((3, 5, 8), start=1):
        found = with_looks(entries(seeds, VARIANT, "gpt2:position_embedding=alibi"), tmp_path)
        _, better, open_ = standings(answers.answer(list(found), seeds=seeds), "")
        baseline = np.array([run.validation_loss for run in found[0].finals])
        differences = [each.losses - baseline for each in (better, open_)]
        levels = holm_levels(differences, 1 - 0.05 / (look * (look + 1)))
        assert (better.difference, open_.difference) == tuple(map(t_interval, differences, levels))
        assert better.trimmed == trimmed_interval(differences[0], levels[0])


def test_a_report_says_at_which_look_it_is(tmp_path):
    with_looks(entries(3), tmp_path)
    found = with_looks(entries(5), tmp_path)
    write_report(answers.answer(list(found), seeds=5), tmp_path)
    said = (tmp_path / "report.md").read_text()
    assert "this is look 2 at `llama-style` (3 seeds on 20" in said
    assert "which may spend 1/6 of the total error" in said
