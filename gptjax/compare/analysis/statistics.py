"""Statistics of a few runs: confidence intervals, and tests of paired differences.

Seeds are few, so means come with intervals; variants are several, so tests are corrected for
multiple comparisons (Holm 1979).

Seeds are added after a look at the first ones (an interim analysis), and a study that continues
until it finds something finds it too often. So the error α = 1 - level is spent over the looks by
an alpha-spending function (Slud and Wei 1982, Lan and DeMets 1983): the k-th look at a difference
may spend α / (k (k + 1)), a half, a sixth, a twelfth …, whose sum is α for any number of looks. By
the union bound p k (k + 1) at the k-th look is a p-value of the difference over all looks, and
Holm's test takes it like any other. Boundaries that use the correlation between looks would be
narrower, but are valid only where the results do not decide how many seeds come next; here they
do, and the slack of the bound pays for that (`experiments/benchmarks/intervals.py`).
"""

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from gptjax.config import InputError


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean differs significantly from zero."""
        return self.low > 0 or self.high < 0


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Returns Student's interval for the mean of normal values: mean ± t s / √n.

    Args:
      values: [n], of independent runs.
      level: confidence level, the share of such intervals that contain the true mean.

    Raises:
      InputError: a single value, whose variance is unknown.
    """
    mean, error = _mean_and_error(values)
    reach = float(special.stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return Interval(mean, mean - reach, mean + reach)


def trimmed_interval(values: np.ndarray, level: float = 0.95, share: float = 0.2) -> Interval:
    """Returns Student's interval for the trimmed mean, which is robust to single outliers.

    A share of the values is dropped at either end; the standard error is that of the winsorised
    sample (Tukey and McLaughlin 1963; the one-sample case of Yuen 1974). For normal values it
    misses the mean slightly more often than its level says: 6.3% instead of 5% for five values.
    With fewer than five nothing is dropped: it is `t_interval`.

    Args:
      values: [n], of independent runs.
      level: confidence level, approximately.
      share: of the values dropped at either end, rounded down.

    Raises:
      InputError: a single value, whose variance is unknown.
    """
    ordered = np.sort(np.asarray(values, float))
    out = int(share * len(ordered))
    kept = ordered[out : len(ordered) - out]
    if not out:
        return t_interval(ordered, level)
    mean, freedom = float(np.mean(kept)), len(kept) - 1
    squares = len(ordered) * np.var(np.clip(ordered, kept[0], kept[-1]))
    error = float(np.sqrt(squares / (len(kept) * freedom)))
    reach = float(special.stdtrit(freedom, (1 + level) / 2)) * error
    return Interval(mean, mean - reach, mean + reach)


def paired_differences(
    values: Mapping[str, np.ndarray], baseline: str, level: float = 0.95
) -> dict[str, Interval]:
    """Returns each variant's paired difference from the baseline: value minus baseline, by seed.

    Effects of a seed on all variants (its batches, say) cancel in a difference. The family-wise
    error rate, that any interval wrongly excludes zero, is at most 1 - `level`: each has the
    level of `holm_levels`, so that it excludes zero exactly where Holm's test rejects.

    Args:
      values: [seeds] by variant, the same seeds in the same order.
      baseline: the variant that the others are compared with.
      level: family-wise confidence level.

    Returns:
      By variant, without the baseline.

    Raises:
      InputError: an unknown baseline, a single seed, or unequal numbers of seeds.
    """
    if baseline not in values:
        raise InputError(f"baseline is {baseline!r}: it must be one of {', '.join(values)}.")
    reference = np.asarray(values[baseline], float)
    differences = {}
    for name, of_variant in values.items():
        if len(of_variant) != len(reference):
            raise InputError(
                f"{name!r} has {len(of_variant)} seeds: as many as {baseline!r}, "
                f"{len(reference)}, can be paired with them."
            )
        if name != baseline:
            differences[name] = np.asarray(of_variant, float) - reference
    levels = holm_levels(list(differences.values()), level)
    return {
        name: t_interval(difference, of_difference)
        for (name, difference), of_difference in zip(differences.items(), levels, strict=True)
    }


def holm_levels(
    differences: Sequence[np.ndarray], level: float = 0.95, looks: Sequence[int] = ()
) -> list[float]:
    """Returns the level at which each difference is tested, for a family-wise `level`.

    Holm's test takes the k-th smallest of m p-values at level 1 - (1 - level) / (m - k + 1) and
    stops at the first that fails; the remaining ones get the level of the stop, which they fail
    too. A difference at its second or a later look has its p-value multiplied accordingly.

    Args:
      differences: [seeds] each; the numbers of seeds may differ.
      level: family-wise confidence level over all looks.
      looks: [differences], the number of each one's look, from 1; 0, or None, where the number
      of seeds was fixed in advance and there is a single look.

    Raises:
      InputError: a difference of a single seed.
    """
    looks = looks or [0] * len(differences)
    chances = [_chance(each) / _share(look) for each, look in zip(differences, looks, strict=True)]
    levels, stopped = [level] * len(differences), 0
    for place, index in enumerate(np.argsort(chances, kind="stable")):
        remaining = stopped or len(differences) - place
        levels[index] = at_look(1 - (1 - level) / remaining, looks[index])
        if not t_interval(differences[index], levels[index]).excludes_zero:
            stopped = remaining
    return levels


def at_look(level: float, look: int) -> float:
    """Returns the level of the `look`-th look, for `level` over all looks at a difference.

    Looks count from 1; 0 is a single look fixed in advance, which has the whole level.
    """
    return 1 - (1 - level) * _share(look)


def at_next_look(level: float, look: int) -> float:
    """Returns the level of the next look, given that of the `look`-th; unchanged if `look` is 0."""
    return 1 - (1 - level) * _share(look + 1) / _share(look) if look else level


def power(effect: float, deviation: float, seeds: int, level: float = 0.95) -> float:
    """Returns the power: how often the interval excludes zero if the true difference is `effect`.

    Two-sided t-test: (√n · mean / s)² has a noncentral F distribution with 1 and n - 1
    degrees of freedom and noncentrality n (effect / deviation)².

    Args:
      effect: the true mean of the paired differences.
      deviation: their true standard deviation.
      seeds: how many there are, n.
      level: of the interval.

    Raises:
      InputError: fewer than two seeds.
    """
    if seeds < 2:
        raise InputError(f"seeds is {seeds}: an interval needs at least 2.")
    if deviation == 0:
        return float(effect != 0)
    threshold = special.stdtrit(seeds - 1, (1 + level) / 2)
    missed = special.ncfdtr(1, seeds - 1, seeds * (effect / deviation) ** 2, threshold**2)
    return float(1 - np.nan_to_num(missed))  # SciPy's sum ends in nan only where it is next to 0.


def seeds_needed(
    differences: np.ndarray, level: float = 0.95, wanted: float = 0.8, most: int = 1000
) -> int | None:
    """Returns about how many more seeds would separate such a difference from zero.

    It takes the observed mean and deviation for the true ones, which after a few seeds is a
    guess: an order of magnitude, not a promise.

    Args:
      differences: [seeds], paired.
      level: at which the difference was tested, after Holm's correction.
      wanted: the power that the study should have with that many seeds in all.
      most: the largest number of further seeds considered.

    Returns:
      0 for a difference that is separated already, else at least 1; None where `most` more would
      not suffice, so that a mean near zero gets no meaningless number.

    Raises:
      InputError: a single seed.
    """
    if t_interval(differences, level).excludes_zero:
        return 0
    effect, there = float(np.mean(differences)), len(differences)
    deviation = float(np.std(differences, ddof=1))

    def enough(more: int) -> bool:
        return power(effect, deviation, there + more, level) >= wanted

    if not enough(most):
        return None
    return 1 + bisect.bisect_left(range(1, most), True, key=enough)


def _share(look: int) -> float:
    """Returns the share of the error that a look may spend."""
    return 1 / (look * (look + 1)) if look else 1.0


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error."""
    if len(values) < 2:
        raise InputError(f"There are {len(values)} values: an interval needs at least 2.")
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _chance(values: np.ndarray) -> float:
    """Returns the two-sided p-value of the t-test that the mean is zero."""
    mean, error = _mean_and_error(values)
    if error == 0:
        return float(mean == 0)
    return float(2 * special.stdtr(len(values) - 1, -abs(mean) / error))
