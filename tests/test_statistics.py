import numpy as np
import pytest
from scipy import stats

from gptjax.config import InputError
from gptjax.statistics import Interval, paired_differences, t_interval


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
