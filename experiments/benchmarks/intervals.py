"""Error rates of a comparison's intervals: seeds added after interim looks, and outlying seeds.

    python experiments/benchmarks/intervals.py

The first table simulates studies under the null: all variants equal their baseline. A study without
a verdict adds the seeds that its report suggests, the fewest over all variants and at most `MOST`,
and looks again. The table has the percentage of studies that call a variant better or worse at any
look: with the whole level at each look, and with alpha spending, as in `experiments/compare.py`.
The last columns have one variant and two looks, the second at the number of seeds of `CHOICES`
that, after the first look, is most likely to end wrongly.

The second table has the coverage, in percent, of Student's interval of the mean and of that of the
trimmed mean.
"""

import argparse
from collections.abc import Callable

import numpy as np
from scipy import special

from gptjax.compare.analysis.statistics import (
    at_look,
    at_next_look,
    seeds_needed,
    t_interval,
    trimmed_interval,
)

LEVEL = 0.95
SEEDS, VARIANTS, LOOKS = (3, 5, 8), (1, 4, 8), (2, 5)
MOST = 100
CHOICES = (1, 2, 3, 4, 5, 7, 10, 15, 25, 50, 95)
"""More seeds."""
CONTINUATIONS = 20_000
"""Simulated continuations of a study, over which wrong verdicts are counted."""
DIFFERENCES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda generator, seeds: generator.normal(size=seeds),
    "heavy tails: t, 3 degrees": lambda generator, seeds: generator.standard_t(3, seeds),
    "one in ten lies 100 deviations off, on either side": lambda generator, seeds: (
        generator.normal(size=seeds) + generator.choice([0, 100, -100], seeds, p=[0.9, 0.05, 0.05])
    ),
}
"""Distributions of differences between seeds, symmetric about 0."""


def ends_wrongly(
    generator: np.random.Generator, variants: int, seeds: int, looks: int, spent: bool
) -> bool:
    """Whether a study of equal variants calls one better or worse at any look."""

    def differences(more: int) -> np.ndarray:
        """Returns [variants, seeds] minus a baseline of equal variance."""
        return generator.normal(size=(variants, more)) - generator.normal(size=more)

    seen = differences(seeds)
    for look in range(1, looks + 1):
        # Holm's first step, on the smallest p-value, decides whether there is any verdict.
        surest = seen[np.argmax(abs(seen.mean(1)) / seen.std(1, ddof=1))]
        number = look if spent else 0
        level = at_look(1 - (1 - LEVEL) / variants, number)
        if t_interval(surest, level).excludes_zero:
            return True
        more = seeds_needed(surest, at_next_look(level, number), most=MOST)
        if more is None:
            return False
        seen = np.concatenate([seen, differences(more)], 1)
    return False


def worst_case(generator: np.random.Generator, seeds: int, studies: int, spent: bool) -> float:
    """Returns the error rate of two looks, the second at the worst number of seeds."""
    levels = [at_look(LEVEL, look) if spent else LEVEL for look in (1, 2)]
    normal = generator.normal(size=(CONTINUATIONS, max(CHOICES)))
    sums, squares = normal.cumsum(1), (normal**2).cumsum(1)
    later = 0.0
    for _ in range(studies):
        first = generator.normal(size=seeds)
        if t_interval(first, levels[0]).excludes_zero:
            continue
        wrong = []
        for more in CHOICES:
            every = seeds + more
            mean = (first.sum() + sums[:, more - 1]) / every
            square = ((first**2).sum() + squares[:, more - 1]) / every - mean**2
            error = np.sqrt(square / (every - 1))
            wrong.append(
                np.mean(abs(mean) > special.stdtrit(every - 1, (1 + levels[1]) / 2) * error)
            )
        later += max(wrong)
    return 1 - levels[0] + later / studies


def print_added_seeds(studies: int) -> None:
    """Print the table of error rates."""
    generator = np.random.default_rng(0)
    schemes = [(looks, spent) for spent in (False, True) for looks in LOOKS]
    heads = [f"{looks} looks, {'spent' if spent else 'whole level'}" for looks, spent in schemes]
    print(f"| seeds | variants | {' | '.join(heads)} | at worst, whole level | at worst, spent |")
    print(f"|{'---|' * (4 + len(schemes))}")
    for seeds in SEEDS:
        for variants in VARIANTS:
            cells = []
            for looks, spent in schemes:
                wrong = [
                    ends_wrongly(generator, variants, seeds, looks, spent) for _ in range(studies)
                ]
                cells.append(f"{100 * np.mean(wrong):.1f}")
            for spent in (False, True):
                share = worst_case(generator, seeds, studies // 5, spent) if variants == 1 else None
                cells.append("" if share is None else f"{100 * share:.1f}")
            print(f"| {seeds} | {variants} | {' | '.join(cells)} |", flush=True)


def print_coverage(studies: int) -> None:
    """Print the table of coverage."""
    generator = np.random.default_rng(0)
    print("| differences | seeds | level | Student's | trimmed | width of trimmed, median |")
    print("|---|---|---|---|---|---|")
    for name, draw in DIFFERENCES.items():
        for seeds in (5, 6, 8, 10):
            for level in (LEVEL, at_look(1 - (1 - LEVEL) / 8, 1)):
                samples = [draw(generator, seeds) for _ in range(studies)]
                shares, widths = [], []
                for interval in (t_interval, trimmed_interval):
                    found = [interval(sample, level) for sample in samples]
                    shares.append(100 * np.mean([not each.excludes_zero for each in found]))
                    widths.append([each.high - each.low for each in found])
                ratio = np.median(np.divide(*reversed(widths)))
                print(
                    f"| {name} | {seeds} | {100 * level:.2f} | {shares[0]:.1f} | {shares[1]:.1f} "
                    f"| {ratio:.2f} of Student's |",
                    flush=True,
                )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=10_000, help="of each row")
    studies = parser.parse_args().studies
    print_added_seeds(studies)
    print()
    print_coverage(studies)


if __name__ == "__main__":
    main()
