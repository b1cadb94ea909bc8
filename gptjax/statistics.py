"""What a few runs let one say: intervals, and differences that are told apart from chance.

Seeds are few, so a mean is worth little without its interval; variants are several, so the least
of many differences is worth less than one alone (Holm 1979).
"""

from collections.abc import Mapping
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
    together, the chance that an interval wrongly excludes zero is at most 1 - `level`: Holm's test
    asks the k-th surest of m differences for the level 1 - (1 - level) / (m - k + 1), and stops at
    the first that fails it. Each interval has the level that its difference was asked for, those
    behind the stop that of the stop, so that an interval excludes zero exactly where the test
    rejects it.

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
    chances = {name: _chance(difference) for name, difference in differences.items()}
    intervals, stopped = {}, 0
    for place, name in enumerate(sorted(chances, key=lambda name: chances[name])):
        remaining = stopped or len(differences) - place
        intervals[name] = t_interval(differences[name], 1 - (1 - level) / remaining)
        if not intervals[name].excludes_zero:
            stopped = remaining
    return {name: intervals[name] for name in differences}


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
