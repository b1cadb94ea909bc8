import numpy as np
import pytest
from scipy import stats

from gptjax.compare.analysis.statistics import (
    Interval,
    at_look,
    at_next_look,
    holm_levels,
    paired_differences,
    power,
    seeds_needed,
    t_interval,
    trimmed_interval,
)
from gptjax.config import InputError


def test_an_interval_is_scipys():
    values = np.random.default_rng(0).normal(1, 2, size=7)
    mean, low, high = t_interval(values, 0.9)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    np.testing.assert_allclose([mean, low, high], [values.mean(), *expected], rtol=1e-12)


def test_as_many_intervals_miss_as_the_level_says():
    samples = np.random.default_rng(1).normal(size=(4000, 4))
    missed = np.mean([t_interval(sample, 0.9).excludes_zero for sample in samples])
    assert abs(missed - 0.1) < 0.02  # Four standard errors.


def test_what_all_runs_of_a_seed_share_drops_out():
    generator = np.random.default_rng(2)
    shared, own = generator.normal(0, 10, size=5), generator.normal(0, 0.01, size=(2, 5))
    values = {"base": shared + own[0], "better": shared - 1 + own[1]}
    difference = paired_differences(values, "base")["better"]
    assert difference.high < -0.9
    np.testing.assert_allclose(difference, t_interval(own[1] - own[0] - 1), rtol=1e-9)


def holm(chances: np.ndarray, level: float) -> set[int]:
    """Whom Holm's test rejects, as in the paper: from the smallest p on, until one is too large."""
    rejected: set[int] = set()
    for place, index in enumerate(np.argsort(chances)):
        if chances[index] > (1 - level) / (len(chances) - place):
            break
        rejected.add(int(index))
    return rejected


@pytest.mark.parametrize("seed", range(30))
def test_intervals_exclude_zero_where_holms_test_rejects(seed):
    generator = np.random.default_rng(seed)
    effects = generator.choice([0, 0.5, 1, 3], size=6)
    values = {"base": np.zeros(5)}
    values |= {f"{i}": generator.normal(effect, 1, 5) for i, effect in enumerate(effects)}
    found = paired_differences(values, "base")
    chances = np.array([stats.ttest_1samp(values[name], 0)[1] for name in found])
    expected = {list(found)[index] for index in holm(chances, 0.95)}
    assert {name for name, interval in found.items() if interval.excludes_zero} == expected


def test_behind_the_first_that_fails_nothing_is_different():
    # p = 0.04 each: alone enough, and of three not even for the last that is asked.
    values = np.array([-2, -1, 0, 1, 2]) + 3.0 * np.sqrt(2.5 / 5)
    assert 0.03 < np.asarray(stats.ttest_1samp(values, 0))[1] < 0.05
    assert paired_differences({"base": 0 * values, "a": values}, "base")["a"].excludes_zero
    three = {"a": values, "b": values, "c": values}
    found = paired_differences({"base": 0 * values, **three}, "base")
    assert not any(interval.excludes_zero for interval in found.values())


def test_of_many_equal_variants_hardly_one_is_called_different():
    generator = np.random.default_rng(3)
    wrong = 0
    for _ in range(1000):
        # Against a baseline that is known, so that the differences are independent.
        values = {"base": np.zeros(4)} | {f"{i}": generator.normal(size=4) for i in range(5)}
        found = paired_differences(values, "base").values()
        wrong += any(interval.excludes_zero for interval in found)
    assert wrong / 1000 < 0.05 + 3 * 0.0069  # Without Holm it would be 0.23.


def test_a_variant_is_not_different_from_itself():
    found = paired_differences({"base": np.arange(3), "same": np.arange(3)}, "base")
    assert found == {"same": Interval(0.0, 0.0, 0.0)}
    assert not found["same"].excludes_zero


@pytest.mark.parametrize(
    ("values", "baseline", "sentence"),
    [
        ({"a": [1, 2]}, "b", "baseline is 'b': it must be one of a"),
        ({"a": [1], "b": [2]}, "a", "There are 1 values"),
        ({"a": [1, 2], "b": [2, 3, 4]}, "a", "'b' has 3 seeds"),
    ],
)
def test_what_cannot_be_compared_is_told(values, baseline, sentence):
    with pytest.raises(InputError, match=sentence):
        paired_differences(values, baseline)


def test_an_interval_knows_the_level_that_it_was_asked_for():
    generator = np.random.default_rng(4)
    values = {
        name: generator.normal(effect, 1, 6)
        for name, effect in zip("abc", (0, 0.7, 9), strict=True)
    }
    differences = [values[name] - values["a"] for name in "bc"]
    levels = holm_levels(differences, 0.9)
    assert levels == pytest.approx([0.9, 0.95])  # The surest is asked first, for more.
    found = paired_differences(values, "a", 0.9)
    assert list(found.values()) == [*map(t_interval, differences, levels)]


def separated(samples: np.ndarray, level: float) -> float:
    """How many of the studies [studies, seeds] find a difference."""
    chances = np.asarray(stats.ttest_1samp(samples, 0, axis=1)[1])
    return float(np.mean(chances < 1 - level))


@pytest.mark.parametrize(
    ("effect", "seeds", "level"), [(1.0, 5, 0.95), (-0.5, 12, 0.99), (3, 2, 0.9)]
)
def test_power_is_how_often_a_difference_is_found(effect, seeds, level):
    samples = np.random.default_rng(5).normal(2 * effect, 2, size=(20_000, seeds))
    assert power(2 * effect, 2, seeds, level) == pytest.approx(
        separated(samples, level),
        abs=0.014,  # Four standard errors.
    )


@pytest.mark.parametrize("effect", [0.0, 0.2, 1.0, 4.0, 1000.0])
@pytest.mark.parametrize("seeds", [2, 5, 30])
def test_power_is_that_of_the_noncentral_t(effect, seeds):
    threshold = stats.t.ppf(0.975, seeds - 1)
    distribution = stats.nct(seeds - 1, effect * np.sqrt(seeds))
    # Below, SciPy's own sum may end in nan where there is nothing.
    expected = distribution.sf(threshold) + np.nan_to_num(distribution.cdf(-threshold))
    assert power(effect, 1, seeds) == pytest.approx(expected, abs=1e-9)


def test_power_is_the_textbooks():
    # Cohen 1988: a medium effect of 0.5 needs 34 pairs for 80% at 5%.
    assert power(0.5, 1, 33, 0.95) < 0.8 < power(0.5, 1, 34, 0.95)


def test_power_grows_with_seeds_and_effect_and_falls_with_level():
    by_seeds = [power(0.7, 1, seeds) for seeds in range(2, 40)]
    by_effect = [power(effect, 1, 5) for effect in np.linspace(0, 30, 40)]
    by_level = [power(0.7, 1, 5, level) for level in np.linspace(0.999, 0.5, 40)]
    for powers in (by_seeds, by_effect, by_level):
        assert np.all(np.diff(powers) >= -1e-12)
        assert powers[0] < powers[-1]
    assert power(0, 1, 5, 0.95) == pytest.approx(0.05)
    assert (power(0, 0, 5), power(1, 0, 5)) == (0, 1)


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize("effect", [0.3, 0.9])
def test_with_the_seeds_that_were_asked_for_most_studies_separate(effect, level):
    noise = np.array([-1.2, 0.3, 1.1, -0.9, 0.7])
    observed = effect + (noise - noise.mean()) / noise.std(ddof=1)
    more = seeds_needed(observed, level)
    assert more is not None
    assert more >= 1
    samples = np.random.default_rng(6).normal(effect, 1, size=(5000, 5 + more))
    assert 0.8 - 0.023 < separated(samples, level) < 0.8 + 0.06  # Seeds are whole.
    assert separated(samples[:, :-1], level) < 0.8 + 0.023


def test_seeds_are_asked_for_only_where_they_help():
    spread = np.array([-1.0, 1.0, -0.5, 0.5])
    assert seeds_needed(10 + spread) == 0
    assert seeds_needed(spread) is None
    assert seeds_needed(0.05 + spread) is None
    assert (seeds_needed(0.05 + spread, most=10_000) or 0) > 1000
    # Not separated, though a study of this size would be more often than not.
    barely = spread + 0.99 * (0 - t_interval(spread).low)
    assert seeds_needed(barely) in range(1, 4)
    with pytest.raises(InputError, match="There are 1 values"):
        seeds_needed(np.array([1.0]))
    with pytest.raises(InputError, match="seeds is 1: an interval needs at least 2"):
        power(1, 1, 1)


@pytest.mark.parametrize("seeds", [5, 6, 10, 13])
def test_a_trimmed_interval_ends_at_zero_at_the_level_of_yuens_test(seeds):
    values = np.random.default_rng(seeds).standard_t(2, size=seeds)
    # Of two samples, the second of which does not scatter.
    options: dict = {"trim": 0.2, "equal_var": False}  # SciPy's annotation wants whole numbers.
    chance = np.asarray(stats.ttest_ind(values, np.zeros(seeds), **options)[1])
    mean, low, high = trimmed_interval(values, 1 - float(chance))
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-9)
    assert mean == pytest.approx(stats.trim_mean(values, 0.2))
    assert trimmed_interval(values[:4], 0.9) == t_interval(np.sort(values[:4]), 0.9)


def test_one_outlying_seed_widens_the_trimmed_interval_hardly():
    """As of post-norm in the log: four seeds that end alike, and one that never learns."""
    values = np.array([0.105, 0.108, 1.706, 0.111, 0.103])
    assert not t_interval(values).excludes_zero
    _, low, high = trimmed_interval(values)
    assert 0.09 < low < high < 0.13


@pytest.mark.parametrize("seeds", [5, 8])
def test_as_many_trimmed_intervals_hold_the_centre_as_they_should(seeds):
    generator = np.random.default_rng(7)
    outlying = generator.choice([0, 100, -100], size=(2000, seeds), p=[0.9, 0.05, 0.05])
    for samples in (outlying * 0, outlying):
        samples = samples + generator.normal(size=samples.shape)
        missed = np.mean([trimmed_interval(sample).excludes_zero for sample in samples])
        assert 0.03 < missed < 0.08  # 0.05 and a little more, as its docstring says.


def test_a_later_look_is_asked_for_more():
    generator = np.random.default_rng(8)
    differences = [generator.normal(effect, 1, 6) for effect in (9, 0.2)]
    levels = holm_levels(differences, 0.9, [3, 1])
    assert levels == pytest.approx([1 - 0.1 / 12 / 2, 1 - 0.1 / 2])
    assert holm_levels(differences, 0.9, [0, 0]) == holm_levels(differences, 0.9)
    assert [1 - at_look(0.9, look) for look in range(4)] == pytest.approx(
        [0.1, 0.1 / 2, 0.1 / 6, 0.1 / 12]
    )
    for look in (1, 2, 7):
        then = at_next_look(at_look(0.9, look), look)
        assert then == pytest.approx(at_look(0.9, look + 1))
    assert at_next_look(0.9, 0) == 0.9
    # The surest is the one whose p k (k + 1) is the least.
    sure, surer = np.array([9.0, 9.1, 8.9]), np.array([9.0, 9.01, 8.99])
    assert holm_levels([sure, surer], 0.9, [0, 0]) == pytest.approx([0.9, 0.95])
    assert holm_levels([sure, surer], 0.9, [0, 12]) == pytest.approx([0.95, 1 - 0.1 / 156])
