"""What a few runs let one say: intervals, and differences that are told apart from chance.

Seeds are few, so a mean is worth little without its interval; variants are several, so the least
of many differences is worth less than one alone (Holm 1979).
"""

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from gptjax.config import InputError


class Interval(NamedTuple):
    """A mean, and where the true one lies with the confidence that was asked for."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the true mean is known."""
        return self.low > 0 or self.high < 0


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Student's interval for the mean of normal values: mean ± t s / √n.

    Args:
      values: [n], of independent runs.
      level: the share of such intervals that hold the true mean.

    Raises:
      InputError: a single value, of which nobody knows how much it scatters.
    """
    mean, error = _mean_and_error(values)
    reach = float(special.stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return Interval(mean, mean - reach, mean + reach)


def paired_differences(
    values: Mapping[str, np.ndarray], baseline: str, level: float = 0.95
) -> dict[str, Interval]:
    """How far each variant is from the baseline, seed by seed: value minus baseline's value.

    What a seed does to all alike (its batches, say) drops out of a difference. Over all variants
    together, the chance that an interval wrongly excludes zero is at most 1 - `level`: each has
    the level of `holm_levels`, so that it excludes zero exactly where Holm's test rejects it.

    Args:
      values: [seeds] by variant, the same seeds in the same order.
      baseline: the variant that the others are compared with.
      level: of all statements together.

    Returns:
      By variant, without the baseline.

    Raises:
      InputError: a baseline that is not there, a single seed, or not as many seeds of each.
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


def holm_levels(differences: Sequence[np.ndarray], level: float = 0.95) -> list[float]:
    """The level that each difference is asked for, so that `level` is that of all together.

    Holm's test asks the k-th surest of m differences for the level 1 - (1 - level) / (m - k + 1),
    and stops at the first that fails it; those behind the stop are asked for the level of the stop,
    which they fail too.

    Args:
      differences: [seeds] each, and each may have seeds of its own.
      level: of all statements together.

    Raises:
      InputError: a difference of a single seed.
    """
    chances = [_chance(difference) for difference in differences]
    levels, stopped = [level] * len(differences), 0
    for place, index in enumerate(np.argsort(chances, kind="stable")):
        remaining = stopped or len(differences) - place
        levels[index] = 1 - (1 - level) / remaining
        if not t_interval(differences[index], levels[index]).excludes_zero:
            stopped = remaining
    return levels


def power(effect: float, deviation: float, seeds: int, level: float = 0.95) -> float:
    """How often the interval of a difference excludes zero, if the true one is `effect`.

    Of the two-sided t-test: (√n · mean / s)² has a noncentral F distribution with 1 and n - 1
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
    """About how many more seeds would separate a difference of this size and spread from zero.

    As if the observed mean and deviation were the true ones, which after a few seeds is a guess:
    it says what kind of effort is needed, and promises nothing.

    Args:
      differences: [seeds], paired.
      level: that the difference was asked for, which Holm's test may make stricter.
      wanted: how often a study with that many seeds in all should separate it.
      most: how many more seeds anyone would run.

    Returns:
      0 of a difference that is separated already, else at least 1; None where `most` more would
      not do, so that a mean near zero is given no number that means nothing.

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


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean, and the standard error of it."""
    if len(values) < 2:
        raise InputError(f"There are {len(values)} values: an interval needs at least 2.")
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _chance(values: np.ndarray) -> float:
    """p of the two-sided t-test of a mean of zero."""
    mean, error = _mean_and_error(values)
    if error == 0:
        return float(mean == 0)
    return float(2 * special.stdtr(len(values) - 1, -abs(mean) / error))
