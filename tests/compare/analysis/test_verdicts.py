import re
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from gptjax.compare.analysis.statistics import paired_differences, t_interval
from gptjax.compare.analysis.verdicts import Standing, edge, standings
from gptjax.compare.question import Comparison
from gptjax.compare.results import Answer, Entry, Outcome
from gptjax.config import OptimizerConfig, TransformerConfig

Losses = Sequence[float | None] | np.ndarray


def outcome(variant: str, seed: int, loss: float | None) -> Outcome:
    return Outcome(
        variant=variant,
        size="",
        purpose="final",
        seed=seed,
        learning_rate=1e-3,
        steps=10,
        tokens=1000,
        validation_loss=loss,
        curve_steps=(10,),
        curve_losses=(loss or 0.0,),
        seconds=1.0,
        error="" if loss is not None else "Loss is nan at step 3.",
        directory="",
    )


def entry(variant: str, losses: Losses, searched: Sequence[float] = ()) -> Entry:
    return Entry(
        variant=variant,
        size="",
        model=TransformerConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        parameters=1000,
        training_flops=6000,
        target=None,
        reached=None,
        steps=10,
        searched=dict.fromkeys(searched, (2.0,)),
        finals=tuple(outcome(variant, seed, loss) for seed, loss in enumerate(losses)),
        costs=None,
    )


def found(losses: Mapping[str, Losses], confidence: float = 0.95) -> dict[str, Standing]:
    entries = tuple(entry(variant, values) for variant, values in losses.items())
    answer = Answer(
        comparison=Comparison(variants=tuple(losses), confidence=confidence),
        command="",
        commit="",
        environment={},
        data="",
        sizes=("",),
        entries=entries,
        outcomes=(),
        notes=(),
        seconds=1.0,
    )
    return {standing.entry.variant: standing for standing in standings(answer, "")}


BASE = [2.0, 2.1, 1.9, 2.05, 1.95]
NOISE = np.array([0.01, -0.01, 0.005, -0.005, 0.0])


def test_what_differs_is_found_and_told_in_the_order_asked_for():
    three = {
        "base": np.array(BASE),
        "bad": np.array(BASE) + 0.1 + NOISE,
        "good": np.array(BASE) - 0.1 + NOISE[::-1],
    }
    standing = found(three)
    verdicts = [each.verdict for each in standing.values()]
    assert verdicts == ["baseline", "worse than base", "better than base"]
    assert [each.tone for each in standing.values()] == ["baseline", "worse", "better"]
    expected = paired_differences(three, "base")
    assert standing["base"].difference is None
    for name in ("bad", "good"):
        assert standing[name].difference == pytest.approx(expected[name])
        assert standing[name].interval == t_interval(standing[name].losses)
        assert standing[name].deviation == pytest.approx(np.std(three[name], ddof=1))


def test_what_is_not_separated_is_told_with_the_seeds_that_would_do():
    values = np.array(BASE) + 0.01 * np.array([3, -1, 1, -2, 2])
    standing = found({"base": BASE, "close": values})["close"]
    assert standing.tone == "open"
    told = re.fullmatch(
        r"not separated from base; about (\d+) more seeds would separate a difference of this size",
        standing.verdict,
    )
    assert told
    assert 5 < int(told[1]) < 100


def test_a_difference_of_nothing_is_given_no_number():
    verdict = found({"base": BASE, "same": BASE})["same"].verdict
    assert verdict == (
        "not separated from base; not even 1000 more seeds would separate a difference of this size"
    )


def test_equal_variants_are_hardly_ever_called_different():
    generator = np.random.default_rng(0)
    wrong, studies = 0, 400
    for _ in range(studies):
        shared = generator.normal(0, 0.1, 4)  # The batches of a seed, the same for all.
        losses = {name: 2 + shared + generator.normal(0, 0.02, 4) for name in ("base", *"abcd")}
        tones = {standing.tone for standing in found(losses, 0.9).values()}
        wrong += tones != {"baseline", "open"}
    # Each for itself they would be wrong in 0.26 of studies.
    assert wrong / studies < 0.1 + 3 * np.sqrt(0.1 * 0.9 / studies)


def test_a_defect_is_found_worse_in_spite_of_all_others():
    generator = np.random.default_rng(1)
    shared = generator.normal(2, 0.2, 5)
    losses = {name: shared + generator.normal(0, 0.02, 5) for name in ("base", *"abcdef")}
    losses["f"] = losses["f"] + 0.3
    standing = found(losses)
    assert standing["f"].verdict == "worse than base"


def test_one_seed_has_no_interval():
    standing = found({"base": [2.0], "other": [1.0]})
    assert standing["other"].verdict == "one seed: no interval"
    assert standing["other"].tone == "open"
    for each in standing.values():
        assert each.interval is None
        assert each.difference is None
        assert each.deviation is None


def test_a_variant_is_not_called_better_for_the_seeds_that_it_survived():
    lower = [loss - 0.3 + noise for loss, noise in zip(BASE, NOISE, strict=True)]
    assert found({"base": BASE, "low": lower})["low"].verdict == "better than base"
    standing = found({"base": BASE, "low": [None, *lower[1:4], None]})["low"]
    assert standing.verdict == (
        "2 of 5 runs failed; not called better than base, since its failed runs may be the bad ones"
    )
    assert standing.tone == "open"
    assert standing.difference is not None
    assert standing.difference.high < 0
    np.testing.assert_allclose(standing.losses, lower[1:4])


def test_a_baseline_is_not_called_better_for_the_seeds_that_it_survived():
    higher = [loss + 0.3 + noise for loss, noise in zip(BASE, NOISE, strict=True)]
    lower = [loss - 0.3 + noise for loss, noise in zip(BASE, NOISE, strict=True)]
    standing = found({"base": [None, *BASE[1:]], "high": higher, "low": lower})
    assert standing["base"].verdict == "1 of 5 runs failed; baseline"
    assert standing["high"].verdict == (
        "not called worse than base, since base's failed runs may be the bad ones"
    )
    assert standing["low"].verdict == "better than base"
    assert [each.tone for each in standing.values()] == ["baseline", "open", "better"]


def test_failed_runs_leave_the_seeds_in_common():
    worse = [loss + 0.3 + noise for loss, noise in zip(BASE, NOISE, strict=True)]
    standing = found(
        {
            "base": BASE,
            "worse": [None, *worse[1:]],
            "one": [None, 2.0, None, None, None],
            "none": [None] * 5,
        }
    )
    assert standing["worse"].verdict == "1 of 5 runs failed; worse than base"
    assert (
        standing["worse"].difference
        == paired_differences({"base": np.array(BASE[1:]), "worse": np.array(worse[1:])}, "base")[
            "worse"
        ]
    )  # What cannot be asked is not counted among the questions.
    assert standing["one"].verdict == (
        "4 of 5 runs failed; one seed in common with base: no interval"
    )
    assert standing["none"].verdict == "5 of 5 runs failed; nothing to compare with base"
    assert [each.tone for each in standing.values()] == ["baseline", "worse", "open", "failed"]
    assert np.isnan(standing["none"].mean)
    assert standing["none"].losses.shape == (0,)


def test_without_a_baseline_there_is_no_verdict():
    standing = found({"base": [None, None], "other": [2.0, 2.1]})
    assert standing["base"].verdict == "2 of 2 runs failed; baseline"
    assert standing["other"].verdict == "no seed in common with base: no interval"
    assert [each.tone for each in standing.values()] == ["baseline", "open"]


def test_a_loss_that_is_no_number_is_a_failed_run():
    standing = found({"base": BASE, "wild": [*BASE[:4], float("nan")]})["wild"]
    assert standing.verdict.startswith("1 of 5 runs failed; not separated from base")
    assert len(standing.losses) == 4


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        ((1e-4, 1e-3, 1e-2), None),
        ((1e-3,), None),
        ((), None),
        ((1e-3, 1e-2), "a did best at 0.001, the smallest learning rate tried: "),
        ((1e-4, 1e-3), "a did best at 0.001, the largest learning rate tried: "),
    ],
)
def test_a_rate_at_the_end_of_its_grid_is_told(rates, sentence):
    told = edge(entry("a", [2.0], searched=rates))
    assert told == sentence or (sentence and told and told.startswith(sentence))
