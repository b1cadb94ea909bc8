"""What a few runs let one say: intervals, and differences that are told apart from chance.

Seeds are few, so a mean is worth little without its interval; variants are several, so the least
of many differences is worth less than one alone (Holm 1979).

Seeds are added after a look at the first ones, and a study that goes on until it finds something
finds it too often. So the error that is allowed, α = 1 - level, is spent over the looks as Slud
and Wei (1982) and Lan and DeMets (1983) spend it: the k-th look at a difference may spend
α / (k (k + 1)), a half, a sixth, a twelfth …, whose sum is α however many looks there will be. By
the union bound p k (k + 1) of the k-th look is a p-value of a difference that is looked at again
and again, and Holm's test takes it like any other. Boundaries that count on how the looks depend on
each other would be narrower, and hold only where what was seen does not decide how many seeds come
next, which here it does; the slack of the bound pays for that
(`experiments/benchmarks/intervals.py`).
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


def trimmed_interval(values: np.ndarray, level: float = 0.95, share: float = 0.2) -> Interval:
    """Student's interval for the trimmed mean, which single outlying values leave where it is.

    A share of the values is left out at either end; the error is that of the sample in which they
    are moved to the ends of what remains (Tukey and McLaughlin 1963; of one sample what Yuen 1974
    is of two). Of normal values it misses the mean a little more often than it should, 6.3% instead
    of 5% for five of them. With fewer than five nothing is left out: it is `t_interval`.

    Args:
      values: [n], of independent runs.
      level: the share of such intervals that hold the true trimmed mean, approximately.
      share: of the values that is left out at either end, rounded down.

    Raises:
      InputError: a single value, of which nobody knows how much it scatters.
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


def holm_levels(
    differences: Sequence[np.ndarray], level: float = 0.95, looks: Sequence[int] = ()
) -> list[float]:
    """The level that each difference is asked for, so that `level` is that of all together.

    Holm's test asks the k-th surest of m differences for the level 1 - (1 - level) / (m - k + 1),
    and stops at the first that fails it; those behind the stop are asked for the level of the stop,
    which they fail too. A difference at its second or a later look is that much less sure.

    Args:
      differences: [seeds] each, and each may have seeds of its own.
      level: of all statements together, at all their looks.
      looks: [differences], which look each is at, from 1; 0, or none at all, where the number of
        seeds was fixed before any was seen and there is no other look.

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
    """The level of the `look`-th look, for `level` to be that of all looks at a difference.

    The first look is 1; 0 is the only one that there will be, and has the whole level.
    """
    return 1 - (1 - level) * _share(look)


def at_next_look(level: float, look: int) -> float:
    """The level of the next look, if the `look`-th was asked for `level`; behind 0 the same."""
    return 1 - (1 - level) * _share(look + 1) / _share(look) if look else level


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


def _share(look: int) -> float:
    """Of the error, that a look may spend."""
    return 1 / (look * (look + 1)) if look else 1.0


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
